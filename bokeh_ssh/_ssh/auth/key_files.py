"""Key files, and the ``.pub`` files beside them; what is in them is read by ``private_keys``."""

from __future__ import annotations

import binascii
import contextlib
import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import paramiko
from paramiko.message import Message

from bokeh_ssh._core.text import clean, expand
from bokeh_ssh._ssh.auth.agent import Agent, AgentError, AgentKey
from bokeh_ssh._ssh.auth.private_keys import (
    PrivateKey,
    UnusableKeyError,
    WrongPassphraseError,
    check_supported,
    inspect_key,
    is_readable,
    load,
    signature,
)

#: What ends the type of a certificate.
CERTIFICATE = "-cert-v01@openssh.com"
_MOST_BYTES = 1 << 20


class KeyFile:
    """A private key file, or the ``.pub`` file of a key that only the agent has.

    It is decrypted when it must sign, or when there is no other way to learn its public half; not at all if
    the agent holds the key too.

    :param passphrases: yields what may open it; asks a person where there is one
    :param used: called with the path and the key once, before the file's key signs
    """

    def __init__(
        self,
        path: str,
        *,
        explicit: bool,
        agent: Agent | None,
        passphrases: Callable[[Path], Iterator[str]],
        used: Callable[[Path, PrivateKey], object],
    ) -> None:
        self.path = private_path(path)
        self.label = clean(self.path.name, 100)
        self.explicit = explicit
        self._agent = agent
        self._passphrases = passphrases
        self._used: Callable[[Path, PrivateKey], object] | None = used
        self._text, self._exposed = _read_private(self.path)
        self._private: PrivateKey | None = None
        self._key: paramiko.PKey | None = None
        self._shut: UnusableKeyError | None = None
        head, self._locked = inspect_key(self._text)
        self._for_agent = bool(head) and not is_readable(key_type(head or b""))
        if self._for_agent:
            self._text = None
        self._public = head or read_public(beside(self.path, ".pub"))
        if self._public is None and self._text and not self._locked and not self._exposed:
            # An old PEM file without a .pub beside it.
            with contextlib.suppress(UnusableKeyError):
                self._public = self._open().asbytes()

    @property
    def exists(self) -> bool:
        """Whether there is anything to use."""
        return self._text is not None or self._public is not None

    @property
    def known(self) -> bytes | None:
        return self._public

    @property
    def ready(self) -> bool:
        return self._key is not None or bool(self._text and not self._locked and not self._exposed)

    def certificate(self) -> Certified | None:
        """Return the certificate in ``<path>-cert.pub``, which the same key signs for."""
        blob = read_public(beside(self.path, "-cert.pub"))
        return Certified(self, blob, f"{self.label}-cert") if blob and is_certificate(blob) else None

    def public(self) -> bytes:
        if self._public is None:
            self._public = self._open().asbytes()
        if (self._exposed or not self._text) and self._in_agent() is None:
            self._check_exposed()
            msg = "its private half is neither there nor in the SSH agent"
            if self._for_agent:
                name = shlex.quote(str(self.path))
                msg = (
                    f"only the SSH agent can use one of its kind ({key_type(self._public)}): `ssh-add {name}`"
                )
            raise UnusableKeyError(msg)
        return self._public

    def sign(self, data: bytes, algorithm: str) -> bytes:
        if not self.ready:
            held = self._in_agent()
            if held and self._agent:
                try:
                    return self._agent.sign(held.blob, data, algorithm)
                except AgentError as exc:
                    if not self._text:
                        raise UnusableKeyError(str(exc)) from exc
        key = self._open()
        used, self._used = self._used, None
        if used and self._private:
            used(self.path, self._private)
        if self._private and algorithm == "ssh-rsa":
            return self._private.sign_with_sha1(data)
        return signature(key, data, algorithm)

    def _check_exposed(self) -> None:
        if self._exposed:
            msg = f"others can read it (mode {self._exposed:04o}): `chmod 600 {shlex.quote(str(self.path))}`"
            raise UnusableKeyError(msg)

    def _in_agent(self) -> AgentKey | None:
        held = self._agent.list_keys() if self._agent else ()
        return next((key for key in held if key.blob == self._public), None)

    def _open(self) -> paramiko.PKey:
        if self._key is None:
            self._check_exposed()
            if not self._text:
                msg = "its private half is not there"
                raise UnusableKeyError(msg)
            name = shlex.quote(str(self.path))
            self._private = self._unlock(self._text, name) if self._locked else load(self._text, None, name)
            self._key = self._private.for_paramiko()
        return self._key

    def _unlock(self, text: bytes, name: str) -> PrivateKey:
        if self._shut:  # its certificate comes next, and nobody is to be asked twice
            raise self._shut
        check_supported(text, name)
        tried = False
        for passphrase in self._passphrases(self.path):
            tried = True
            try:
                return load(text, passphrase, name)
            except WrongPassphraseError:
                continue
        msg = "the passphrase does not open it" if tried else "it is encrypted, and there is no passphrase"
        self._shut = UnusableKeyError(msg, locked=True)
        raise self._shut


class Signer(Protocol):
    """What signs: see ``_ssh.auth.identities.Identity``."""

    explicit: bool

    @property
    def ready(self) -> bool: ...
    def public(self) -> bytes: ...
    def sign(self, data: bytes, algorithm: str) -> bytes: ...


class Certified:
    """A key with a certificate for it.

    :param label: its name in messages
    """

    def __init__(self, key: Signer, certificate: bytes, label: str) -> None:
        self._key = key
        self._certificate = certificate
        self.label = label
        self.explicit = key.explicit

    @property
    def known(self) -> bytes:
        return self._certificate

    @property
    def ready(self) -> bool:
        return self._key.ready

    def public(self) -> bytes:
        self._key.public()
        return self._certificate

    def sign(self, data: bytes, algorithm: str) -> bytes:
        return self._key.sign(data, algorithm.replace(CERTIFICATE, ""))


def is_certificate(blob: bytes) -> bool:
    """Return whether what was read as a public key is a certificate."""
    return key_type(blob).endswith(CERTIFICATE)


def private_path(path: str) -> Path:
    """Return the private key's path, also where a ``.pub`` or ``-cert.pub`` file was named."""
    for suffix in ("-cert.pub", ".pub"):
        if path.endswith(suffix):
            return expand(path[: -len(suffix)])
    return expand(path)


def beside(path: Path, suffix: str) -> Path:
    """Return the path with ``suffix`` added to its name."""
    return Path(f"{path}{suffix}")


def key_type(blob: bytes) -> str:
    """Read the type at the head of a public key, such as ``ssh-ed25519``."""
    return clean(Message(blob).get_binary(), 100)


def _read_private(path: Path) -> tuple[bytes | None, int]:
    """Read a private key file; and its mode if others than its owner can read it, else 0.

    As ``ssh``: somebody else's file is taken as it is.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            text = file.read(_MOST_BYTES)
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return None, 0
    mine = hasattr(os, "getuid") and status.st_uid == os.getuid()
    return text, status.st_mode & 0o777 if mine and status.st_mode & 0o077 else 0


def read(path: Path) -> bytes | None:
    """Read a file; None if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(_MOST_BYTES)
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return None


def read_public(path: Path) -> bytes | None:
    """Read a ``.pub`` file: type, base64, comment."""
    fields = (read(path) or b"").split(None, 2)
    if len(fields) < 2:
        return None
    try:
        blob = binascii.a2b_base64(fields[1])
    except binascii.Error:
        return None
    return blob if key_type(blob).encode() == fields[0] else None
