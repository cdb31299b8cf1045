"""Which keys to offer, in which order, and how to sign with each: files, agent, and a key at hand.

OpenSSH's rules (sshconnect2.c, pubkey_prepare), with one difference: keys that the caller names come
before the agent's others, so that a full agent does not use up the server's patience.
"""

from __future__ import annotations

import binascii
import contextlib
import functools
import logging
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Protocol

import paramiko
from paramiko.agent import AgentKey as ParamikoAgentKey
from paramiko.message import Message

from bokeh_ssh._core.errors import UsageError
from bokeh_ssh._core.events import Question
from bokeh_ssh._core.host import Host
from bokeh_ssh._core.settings import setting
from bokeh_ssh._core.text import clean
from bokeh_ssh._core.this_machine.home import expand
from bokeh_ssh._core.this_machine.scarcity import is_scarce
from bokeh_ssh._ssh.auth import public_keys
from bokeh_ssh._ssh.auth.agent import Agent, AgentError, AgentKey
from bokeh_ssh._ssh.auth.private_keys import (
    PrivateKey,
    UnusableKeyError,
    WrongPassphraseError,
    check_supported,
    inspect_key,
    load,
    other_format,
    signature,
)
from bokeh_ssh._ssh.config.lookup import HostConfig
from bokeh_ssh._ssh.crypto.security_key import DeviceError, SecurityKey
from bokeh_ssh._ssh.messages import CERTIFICATE

log = logging.getLogger("bokeh_ssh.auth")

#: In the order of ssh(1); the last is OpenSSH 10.6's.
DEFAULT_KEYS = ("id_rsa", "id_ecdsa", "id_ecdsa_sk", "id_ed25519", "id_ed25519_sk", "id_mldsa44_ed25519")
_MOST_BYTES = 1 << 20
#: NumberOfPasswordPrompts of ssh_config(5), for passwords, passphrases and rounds of questions alike.
PROMPTS = 3


class Identity(Protocol):
    """A key that can be offered to a server.

    :ivar label: its name in messages
    :ivar explicit: whether the caller named it
    :ivar known: the public key or certificate, as far as it is known without asking anybody
    """

    label: str
    explicit: bool
    known: bytes | None

    @property
    def ready(self) -> bool:
        """Whether a signature costs nothing: no person and no agent is asked."""

    def public(self) -> bytes:
        """Return the public key or certificate, as sent (RFC 4253, section 6.6)."""

    def sign(self, data: bytes, algorithm: str) -> bytes:
        """Sign; both methods raise UnusableKeyError."""


class ReadyKey:
    """A ``paramiko.PKey`` that the caller has at hand."""

    explicit = True
    ready = True

    def __init__(self, key: paramiko.PKey) -> None:
        self._key = key
        self.label = "pkey"
        self._blob: bytes = key.public_blob.key_blob if key.public_blob else key.asbytes()
        self.known: bytes | None = self._blob

    def public(self) -> bytes:
        return self._blob

    def sign(self, data: bytes, algorithm: str) -> bytes:
        try:
            return signature(self._key, data, algorithm)
        except (paramiko.SSHException, OSError, ValueError, AttributeError, KeyError) as exc:
            # AttributeError: paramiko's, from an agent that was closed; KeyError: with what it cannot sign
            msg = "it cannot sign"
            raise UnusableKeyError(msg) from exc


class HeldKey:
    """A key that the agent holds."""

    explicit = False
    ready = False

    def __init__(
        self, agent: Agent, key: AgentKey, label: str | None, touch: Callable[[str], object]
    ) -> None:
        self._agent = agent
        self._touch = touch
        self._key = key
        self.known: bytes | None = key.blob
        comment = PurePath(clean(key.comment, 60)).name
        self.label = label or f"{comment or key_type(key.blob)} (agent)"

    def public(self) -> bytes:
        return self._key.blob

    def sign(self, data: bytes, algorithm: str) -> bytes:
        if _is_in_device(self._key.blob):
            self._touch(self.label)
        try:
            return self._agent.sign(self._key.blob, data, algorithm)
        except AgentError as exc:
            raise UnusableKeyError(str(exc), unsigned=True) from exc


class KeyFile:
    """A private key file, or the ``.pub`` file of a key that only the agent has.

    It is decrypted when it must sign, or when there is no other way to learn its public half; not at all if
    the agent holds the key too.

    :param passphrases: yields what may open it; asks a person where there is one
    :param used: called with the path and the key once, before the file's key signs
    :param pins: yields what may be the PIN of the security key that the key is in
    :param touch: called with the label when that waits for a touch
    :param ended: whether nobody waits for its touch any more
    """

    def __init__(
        self,
        path: str,
        *,
        explicit: bool,
        agent: Agent | None,
        passphrases: Callable[[Path], Iterator[str]],
        used: Callable[[Path, PrivateKey], object],
        pins: Callable[[Path], Iterator[str]] = lambda _: iter(()),
        touch: Callable[[str], object] = lambda _: None,
        ended: Callable[[], bool] = lambda: False,
    ) -> None:
        self.path = private_path(path)
        self.label = clean(self.path.name, 100)
        self.explicit = explicit
        self._agent = agent
        self._passphrases = passphrases
        self._pins = pins
        self._touch = touch
        self._ended = ended
        self._used: Callable[[Path, PrivateKey], object] | None = used
        self._text, self._exposed = _read(self.path)
        self._private: PrivateKey | None = None
        self._shut: UnusableKeyError | None = None
        head, self._locked, self._for_agent = inspect_key(self._text)
        if self._for_agent:
            self._text = None
        self.known = head or read_public(beside(self.path, ".pub"))
        self._touched = bool(self.known and _is_in_device(self.known))
        if self.known is None and self._text and not self._locked and not self._exposed:
            # An old PEM file without a .pub beside it.
            with contextlib.suppress(UnusableKeyError):
                self.known = self._open().for_paramiko.asbytes()
        self.ready = bool(self._text and not (self._locked or self._exposed or self._touched))

    @property
    def exists(self) -> bool:
        """Whether there is anything to use."""
        return self._text is not None or self.known is not None

    def certificate(self) -> Certified | None:
        """Return the certificate in ``<path>-cert.pub``, which the same key signs for."""
        blob = read_public(beside(self.path, "-cert.pub"))
        return Certified(self, blob, f"{self.label}-cert") if blob and is_certificate(blob) else None

    def public(self) -> bytes:
        if self.known is None:
            self.known = self._open().for_paramiko.asbytes()
        if (self._exposed or not self._text) and self._in_agent() is None:
            self._check_exposed()
            msg = "its private half is neither there nor in the SSH agent"
            if self._for_agent:
                name = shlex.quote(str(self.path))
                msg = f"only the SSH agent can use one of its kind ({key_type(self.known)}): `ssh-add {name}`"
                msg += ", or `pip install fido2`" if self._touched else ""
            raise UnusableKeyError(msg)
        return self.known

    def sign(self, data: bytes, algorithm: str) -> bytes:
        if not self.ready and self._agent and (held := self._in_agent()):
            try:
                return HeldKey(self._agent, held, self.label, self._touch).sign(data, algorithm)
            except UnusableKeyError:
                if not self._text:
                    raise
        key = self._open()
        used, self._used = self._used, None
        if used:
            used(self.path, key)
        if isinstance(key.key, SecurityKey):
            try:
                return key.key.sign(
                    data, lambda: self._pins(self.path), lambda: self._touch(self.label), self._ended
                )
            except DeviceError as exc:
                raise UnusableKeyError(str(exc), locked=exc.locked, absent=exc.absent) from exc
        return key.sign(data, algorithm)

    def _check_exposed(self) -> None:
        if self._exposed:
            msg = f"others can read it (mode {self._exposed:04o}): `chmod 600 {shlex.quote(str(self.path))}`"
            raise UnusableKeyError(msg)

    def _in_agent(self) -> AgentKey | None:
        held = self._agent.list_keys() if self._agent else ()
        return next((key for key in held if key.blob == self.known), None)

    def _open(self) -> PrivateKey:
        if self._private is None:
            self._check_exposed()
            if not self._text:
                msg = "its private half is not there"
                raise UnusableKeyError(msg)
            name = shlex.quote(str(self.path))
            self._private = self._unlock(self._text, name) if self._locked else load(self._text, None, name)
            self.ready = not self._touched
        return self._private

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


class Certified:
    """A key with a certificate for it.

    :param label: its name in messages
    """

    def __init__(self, key: Identity, certificate: bytes, label: str) -> None:
        self._key = key
        self._certificate = certificate
        self.known: bytes | None = certificate
        self.label = label
        self.explicit = key.explicit

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


def _is_in_device(blob: bytes) -> bool:
    """Return whether the private half is in a security key, which wants to be touched."""
    return key_type(blob).startswith("sk-")


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


def _read(path: Path) -> tuple[bytes | None, int]:
    """Read a file, None where it cannot be read; and its mode if others than its owner can read it, else 0.

    As ``ssh``: somebody else's file is taken as it is.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            text = file.read(_MOST_BYTES)
    except FileNotFoundError:
        return None, 0
    except (OSError, ValueError) as exc:  # ValueError: a NUL in the path
        if is_scarce(exc):
            raise
        return None, 0
    mine = hasattr(os, "getuid") and status.st_uid == os.getuid()
    return text, status.st_mode & 0o777 if mine and status.st_mode & 0o077 else 0


def read_public(path: Path) -> bytes | None:
    """Read a ``.pub`` file: type, base64, comment."""
    fields = (_read(path)[0] or b"").split(None, 2)
    if len(fields) < 2:
        return None
    try:
        blob = binascii.a2b_base64(fields[1])
    except binascii.Error:
        return None
    return blob if key_type(blob).encode() == fields[0] else None


def check_keys(host: Host) -> None:
    """Refuse keys named by the caller that cannot work, before anything is started.

    :raises UsageError: if ``pkey`` cannot sign, or a ``key_filename`` is not there or is not a private key
    """
    name = host.target.host
    key = host.pkey
    if key is not None and not isinstance(key, paramiko.PKey):
        msg = f"pkey is a {type(key).__name__}, not a paramiko.PKey"
        raise UsageError(
            msg, host=name, hint=(f"load one with paramiko.PKey.from_path, or give {setting('key_filename')}")
        )
    if key is not None and not isinstance(key, ParamikoAgentKey) and not key.can_sign():
        msg = "pkey is a public key: it cannot sign"
        raise UsageError(msg, host=name, hint="give the private key")
    for path in map(private_path, host.key_files):
        _check_file(path, name)


def _check_file(path: Path, name: str) -> None:
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES)
    except (OSError, ValueError) as exc:  # ValueError: a NUL in the path
        if isinstance(exc, FileNotFoundError) and beside(path, ".pub").exists():
            return  # the agent may hold its private half
        msg = f"key file {clean(str(path), 300)} cannot be read ({getattr(exc, 'strerror', exc)})"
        raise UsageError(msg, host=name, hint=f"check {setting('key_filename')}") from exc
    if b"PRIVATE KEY-----" not in text:
        if foreign := other_format(text, shlex.quote(str(path))):
            msg = f"key file {path} cannot be used: {foreign}"
            raise UsageError(msg, host=name, hint="name the new file")
        msg = f"key file {path} is not a private key in OpenSSH or PEM format"
        raise UsageError(msg, host=name, hint="convert it with ssh-keygen, or name another file")


def find_identities(
    host: Host,
    config: HostConfig,
    agent: Agent,
    touch: Callable[[str], object] = lambda _: None,
    ended: Callable[[], bool] = lambda: False,
    note: Callable[[str], object] = log.debug,
) -> Iterator[Identity]:
    """Yield the keys to offer, best first; each file and the agent is looked at when its turn comes.

    :param touch: gets the key that waits for a touch of its security key
    :param ended: whether the login that they are for is over: nobody waits for a touch then
    :param note: gets which files that the config names are of no use, and why
    """
    tries = PROMPTS if config.password_prompts is None else config.password_prompts
    asker = _asker(host, "Enter passphrase", host.passphrase, tries)
    pins = _asker(host, "Enter PIN", None, tries)
    usable = agent if host.allow_agent else None
    used = _adder(host, config, agent)

    def files(paths: Sequence[str], *, explicit: bool) -> list[KeyFile]:
        make = functools.partial(
            KeyFile,
            explicit=explicit,
            agent=usable,
            passphrases=asker,
            used=used,
            pins=pins,
            touch=touch,
            ended=ended,
        )
        return [file for file in map(make, paths) if file.exists]

    explicit: list[Identity] = [] if host.pkey is None else [ReadyKey(host.pkey)]
    named = files(host.key_files, explicit=True)
    explicit += _with_certificates(named)
    yield from explicit
    paths = config.identity_files
    named_any = bool(paths or explicit)
    if not named_any and host.look_for_keys:
        # As with ssh: a key named in any way replaces the default ones.
        paths = tuple(f"~/.ssh/{name}" for name in DEFAULT_KEYS)
    listed = files(paths, explicit=False)
    found = {file.path for file in listed}
    for path in config.identity_files:
        if path != "none" and private_path(path) not in found:
            note(f"IdentityFile {clean(path, 300)} is not there, or cannot be read")
    yield from _certified(config.certificate_files, [*named, *listed], usable, touch, note)
    # As with ssh: a CertificateFile stands in place of what lies beside the files.
    configured = list(listed) if config.certificate_files else _with_certificates(listed)
    if not named_any:
        configured.sort(key=_effort)
    if usable is not None:
        yield from _agent_identities(
            usable, [*explicit, *configured], config.identities_only, touch, in_order=named_any
        )
    yield from configured


def _with_certificates(files: Sequence[KeyFile]) -> list[Identity]:
    both: list[Identity] = []
    for file in files:
        certificate = file.certificate()
        both += [file, certificate] if certificate else [file]
    return both


def _certified(
    paths: Sequence[str],
    files: Sequence[KeyFile],
    agent: Agent | None,
    touch: Callable[[str], object],
    note: Callable[[str], object],
) -> Iterator[Identity]:
    """Yield the certificates that the config names, each with the key that it is for, wherever that is."""
    for path in map(expand, paths):
        label = f"CertificateFile {clean(str(path), 300)}"
        certificate = read_public(path)
        if certificate is None or not is_certificate(certificate):
            note(f"{label} is not there, or is no certificate")
            continue
        try:
            key = public_keys.read(certificate).blob
        except ValueError as exc:
            note(f"{label} is no certificate ({exc})")
            continue
        signer: Identity | None = next((file for file in files if file.known == key), None)
        if signer is None and agent is not None:
            signer = next(
                (HeldKey(agent, held, None, touch) for held in agent.list_keys() if held.blob == key), None
            )
        if signer is None:
            note(f"{label} was not used: its key is in no file that is named, and not in the SSH agent")
        else:
            yield Certified(signer, certificate, clean(path.name, 100))


def _agent_identities(
    agent: Agent,
    configured: Sequence[Identity],
    identities_only: bool,
    touch: Callable[[str], object],
    *,
    in_order: bool,
) -> Iterator[Identity]:
    """Yield the agent's keys: those of the configured files first, and only those with IdentitiesOnly.

    :param in_order: those of the files keep their order, since somebody has named them
    """
    held = agent.list_keys()
    labels: dict[bytes | None, str] = {}
    for identity in configured:
        labels.setdefault(identity.known, identity.label)
    keys = [
        HeldKey(agent, key, labels.get(key.blob), touch)
        for key in held
        if key.blob in labels or not identities_only
    ]

    def place(key: HeldKey) -> tuple[bool, int, bool]:
        is_listed = key.known in labels
        return (False, 0, False) if is_listed and in_order else (True, _effort(key), not is_listed)

    yield from sorted(keys, key=place)


def _effort(identity: Identity) -> int:
    """Return the place of a key that nobody has named, as ssh 10.6 does: those with a certificate first."""
    blob = identity.known or b""
    if not blob or not is_certificate(blob):
        return 3
    if _is_in_device(blob) and b"verify-required" in blob:
        return 2
    return 0 if _is_in_device(blob) and b"no-touch-required" in blob else 1


def _adder(host: Host, config: HostConfig, agent: Agent) -> Callable[[Path, PrivateKey], None]:
    """Make what adds a key file's key to the agent, as AddKeysToAgent says."""
    how, lifetime = config.add_keys_to_agent or ("no", 0.0)

    def add(path: Path, key: PrivateKey) -> None:
        if how == "no" or not (host.allow_agent and agent.present):
            return
        if how == "ask":
            name = clean(str(path), 300)
            text = f"Add key {name} ({key.comment or name}) to agent? "
            question = Question(kind="add_key", host=host.target.host, text=text, echo=True, reusable=True)
            answer = host.prompt(question) if host.prompt else None
            if answer is None or answer.strip().lower() not in ("", "yes"):
                return
        try:
            agent.add(key.for_agent(), key.comment or str(path), lifetime=lifetime, confirm=how == "confirm")
        except AgentError as exc:  # as with ssh, the login goes on
            log.debug("%s was not added to the agent: %s", path, exc)

    return add


def _asker(host: Host, what: str, given: str | None, tries: int) -> Callable[[Path], Iterator[str]]:
    """Make what yields secrets for a key file: the one given, then a person's answers."""

    def secrets(path: Path) -> Iterator[str]:
        if given is not None:
            yield given
        for _ in range(tries if host.prompt else 0):
            text = f"{what} for key '{clean(str(path), 300)}': "
            answer = host.prompt and host.prompt(
                Question(kind="passphrase", host=host.target.host, text=text, reusable=True)
            )
            if not answer:  # as with ssh, an empty answer goes on to the next key
                return
            yield answer

    return secrets
