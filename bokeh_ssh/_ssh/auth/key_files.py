"""Key files: OpenSSH's format, PEM and PKCS#8, encrypted or not, and the ``.pub`` files beside them."""

from __future__ import annotations

import binascii
import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import paramiko
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from paramiko.message import Message
from paramiko.pkey import OPENSSH_AUTH_MAGIC

from bokeh_ssh._core.text import clean, expand
from bokeh_ssh._ssh.auth.agent import Agent, AgentError, AgentKey

#: What ends the type of a certificate.
CERTIFICATE = "-cert-v01@openssh.com"
_MOST_BYTES = 1 << 20


class UnusableKeyError(Exception):
    """A key cannot be used; the text says why. Never leaves the package.

    :ivar locked: it only lacks its passphrase
    """

    def __init__(self, message: str, *, locked: bool = False) -> None:
        super().__init__(message)
        self.locked = locked


class WrongPassphraseError(Exception):
    """The passphrase does not open the key. Never leaves the package."""


class KeyFile:
    """A private key file, or the ``.pub`` file of a key that only the agent has.

    It is decrypted when it must sign, or when there is no other way to learn its public half; not at all if
    the agent holds the key too.

    :param passphrases: yields what may open it; asks a person where there is one
    """

    def __init__(
        self, path: str, *, explicit: bool, agent: Agent | None, passphrases: Callable[[Path], Iterator[str]]
    ) -> None:
        self.path = private_path(path)
        self.label = clean(self.path.name, 100)
        self.explicit = explicit
        self._agent = agent
        self._passphrases = passphrases
        self._text = read(self.path)
        self._key: paramiko.PKey | None = None
        self._shut: UnusableKeyError | None = None
        head, self._locked = inspect_key(self._text)
        if head and key_type(head).startswith("sk-"):
            self._text = None  # a handle for a security key, which only the agent can use
        self._public = head or read_public(beside(self.path, ".pub"))
        if self._public is None and self._text and not self._locked:
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
        return self._key is not None or bool(self._text and not self._locked)

    def certificate(self) -> Certified | None:
        """Return the certificate in ``<path>-cert.pub``, which the same key signs for."""
        blob = read_public(beside(self.path, "-cert.pub"))
        return Certified(self, blob, f"{self.label}-cert") if blob and is_certificate(blob) else None

    def public(self) -> bytes:
        if self._public is None:
            self._public = self._open().asbytes()
        if not self._text and self._in_agent() is None:
            msg = "its private half is neither there nor in the SSH agent"
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
        return signature(self._open(), data, algorithm)

    def _in_agent(self) -> AgentKey | None:
        held = self._agent.list_keys() if self._agent else ()
        return next((key for key in held if key.blob == self._public), None)

    def _open(self) -> paramiko.PKey:
        if self._key is None:
            if not self._text:
                msg = "its private half is not there"
                raise UnusableKeyError(msg)
            self._key = self._unlock(self._text) if self._locked else load(self._text, None)
        return self._key

    def _unlock(self, text: bytes) -> paramiko.PKey:
        if self._shut:  # its certificate comes next, and nobody is to be asked twice
            raise self._shut
        tried = False
        for passphrase in self._passphrases(self.path):
            tried = True
            try:
                return load(text, passphrase)
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


def inspect_key(text: bytes | None) -> tuple[bytes | None, bool]:
    """Return a private key file's public half, where it is readable, and whether the file is encrypted."""
    if not text:
        return None, False
    _, begin, rest = text.partition(b"-----BEGIN OPENSSH PRIVATE KEY-----")
    if not begin:
        return None, b"ENCRYPTED" in text
    try:
        body = binascii.a2b_base64(rest.partition(b"-----END")[0])
    except binascii.Error:
        return None, False
    if not body.startswith(OPENSSH_AUTH_MAGIC):
        return None, False
    message = Message(body[len(OPENSSH_AUTH_MAGIC) :])  # openssh-portable/PROTOCOL.key
    cipher = message.get_binary()
    message.get_binary()
    message.get_binary()
    count = message.get_int()
    return (message.get_binary() if count == 1 else None), cipher != b"none"


def load(text: bytes, passphrase: str | None) -> paramiko.PKey:
    """Read a private key of any format that OpenSSH reads, as a paramiko key.

    paramiko's own readers know no PKCS#8 and, for encrypted files, run the slow key derivation twice.
    """
    # An unencodable character must not raise: the error object would hold the passphrase.
    secret = None if passphrase is None else passphrase.encode("utf-8", "surrogatepass")
    openssh = b"BEGIN OPENSSH PRIVATE KEY" in text
    reader = serialization.load_ssh_private_key if openssh else serialization.load_pem_private_key
    try:
        loaded = reader(text, secret)
    except UnsupportedAlgorithm as exc:
        msg = "it is of a kind that is not supported"
        raise UnusableKeyError(msg) from exc
    except (ValueError, TypeError) as exc:
        if secret is not None:
            raise WrongPassphraseError from exc
        msg = "it is not a private key that can be read"
        raise UnusableKeyError(msg) from exc
    return _as_paramiko(loaded)


def _as_paramiko(key: object) -> paramiko.PKey:
    cls: type[paramiko.PKey]
    if isinstance(key, ed25519.Ed25519PrivateKey):
        cls = paramiko.Ed25519Key
    elif isinstance(key, ec.EllipticCurvePrivateKey):
        cls = paramiko.ECDSAKey
    elif isinstance(key, rsa.RSAPrivateKey):
        cls = paramiko.RSAKey
    else:
        msg = f"it is of a kind that is not supported ({type(key).__name__})"
        raise UnusableKeyError(msg)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    try:
        return cls.from_private_key(io.StringIO(key.private_bytes(*form).decode()))
    except (ValueError, paramiko.SSHException) as exc:
        msg = "it is of a kind that is not supported"  # a curve that SSH has no name for
        raise UnusableKeyError(msg) from exc


def signature(key: paramiko.PKey, data: bytes, algorithm: str) -> bytes:
    """Sign with a paramiko key, whichever way it gives its signature."""
    signature = key.sign_ssh_data(data, algorithm)
    return signature if isinstance(signature, bytes) else signature.asbytes()
