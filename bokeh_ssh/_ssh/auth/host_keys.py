"""Is it the right machine? Host keys checked against known_hosts files, and new ones remembered."""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import logging
import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bokeh_ssh._core.errors import (
    ChangedHostKeyError,
    ConfigError,
    HostKeyError,
    RevokedHostKeyError,
    UnknownHostKeyError,
)
from bokeh_ssh._core.events import HostKeyAdded, HostKeyVerified, Question
from bokeh_ssh._core.patterns import lower
from bokeh_ssh._core.settings import setting
from bokeh_ssh._core.text import clean
from bokeh_ssh._core.this_machine.scarcity import is_scarce
from bokeh_ssh._ssh.auth import known_hosts, public_keys, revocation_list
from bokeh_ssh._ssh.auth.known_hosts import Entry, Verdict
from bokeh_ssh._ssh.auth.public_keys import PublicKey
from bokeh_ssh._ssh.config.lookup import HostKeysCommand

log = logging.getLogger("bokeh_ssh.hostkeys")

#: ssh writes no name with one of these into a known_hosts file. We add "!", which would turn its sense
#: around, and what would end it.
_NOT_A_NAME = re.compile(r"[@?*#\[\]|'\"\\!,\s\x00-\x1f\x7f]")
_LOCK_SECONDS = 5.0
_LOCK_PAUSE = 0.05
#: Where Windows locks: it keeps others from reading what is locked, so a place behind every real end.
_LOCK_OFFSET = 0x7FFFFFF0
_MOST_ANSWERS = 3
#: What stands for a file's name where a KnownHostsCommand has said it, and seconds that one may take.
_COMMAND = "KnownHostsCommand"
_NAMES_SHOWN = 80  # characters
_COMMAND_SECONDS = 15.0
_MOST_OTHER_NAMES = 8


def fingerprint(key: bytes) -> str:
    """Return the fingerprint of a public key, as ``ssh-keygen -l`` prints it: ``"SHA256:…"``.

    Of a certificate, that of the key in it.
    """
    try:
        return public_keys.read(key).fingerprint
    except ValueError:
        return PublicKey("", key).fingerprint


@dataclass(frozen=True)
class Rules:
    """What the ssh config says about host keys, besides the names of files.

    :ivar command: says more known_hosts lines (``KnownHostsCommand``)
    :ivar revoked: files of keys that are never taken (``RevokedHostKeys``)
    :ivar hash_names: whether new names are written as hashes (``HashKnownHosts``)
    :ivar check_address: whether no other key may be known for the address (``CheckHostIP``)
    :ivar least_rsa_bits: of an RSA key (``RequiredRSASize``)
    :ivar ca_algorithms: what a CA may sign with (``CASignatureAlgorithms``); None for all that there is
    :ivar note: a line that is not followed, for the error of a key that is not known
    """

    command: HostKeysCommand | None = None
    revoked: tuple[str, ...] = ()
    hash_names: bool = False
    check_address: bool = False
    least_rsa_bits: int = 0
    ca_algorithms: tuple[str, ...] | None = None
    note: str = ""


_NO_RULES = Rules()


def known_algorithms(
    name: str, port: int | None, files: Sequence[str], command: HostKeysCommand | None = None
) -> tuple[str, ...]:
    """List the host key algorithms that can be verified, best first, so that the server is asked for them.

    With a ``@cert-authority`` for the host these begin with ``…-cert-v01@openssh.com``.

    :param name: the HostKeyAlias, or the host name
    :param port: None if ``name`` is a HostKeyAlias
    :param command: says more known_hosts lines
    :raises ConfigError: if the command fails
    """
    said = _ask_command(command, name, port, "ORDER", None)
    return known_hosts.algorithms(_read_files(files), name, port, said)


def verify(
    host: str,
    key: bytes,
    *,
    name: str,
    address: str | None,
    port: int | None,
    files: Sequence[str],
    writable: str | None,
    policy: Literal["strict", "ask", "accept-new"],
    ask: Callable[[Question], str | None] | None,
    rules: Rules = _NO_RULES,
) -> list[HostKeyAdded | HostKeyVerified]:
    """Make sure that a host is the one that its key says (``ssh -o StrictHostKeyChecking``).

    :param host: the machine as the user named it, for messages
    :param key: the public key or certificate that the server presented and proved to have
    :param name: the HostKeyAlias, or the host name
    :param address: what was dialled, for the question; None behind a jump host. It is looked up only where
        the rules say so (``CheckHostIP``, off since OpenSSH 8.5)
    :param port: None if ``name`` is a HostKeyAlias: that stands in the files without a port
    :param files: known_hosts files; missing ones are as good as empty
    :param writable: the file that gets new keys; None if there is none, so that a person is asked each time
    :param policy: what becomes of an unknown key: refused, asked about, or taken
    :param ask: gets a ``Question`` of kind ``"host_key"``; ``"yes"`` or the fingerprint accepts
    :param rules: what else the ssh config says
    :returns: what is to be reported
    :raises UnknownHostKeyError: if no file has it, and it was not accepted or could not be written down
    :raises ChangedHostKeyError: if the files have another key for the host
    :raises RevokedHostKeyError: if it is marked ``@revoked``, or the CA that signed it is
    """
    try:
        presented = public_keys.read(key)
    except ValueError as exc:
        msg = f"its host key cannot be trusted: {exc}"
        hint = "check that this is the right machine and port"
        raise UnknownHostKeyError(msg, host=host, hint=hint, fingerprint=fingerprint(key)) from exc
    if rules.least_rsa_bits and (presented.rsa_bits or rules.least_rsa_bits) < rules.least_rsa_bits:
        msg = (
            f"its host key has {presented.rsa_bits} bits, and RequiredRSASize asks for {rules.least_rsa_bits}"
        )
        hint = "have the server use another key, or change that line of your ssh config"
        facts = {"key_type": presented.kind, "fingerprint": presented.fingerprint}
        raise HostKeyError(msg, host=host, hint=hint, **facts)
    _check_revoked(host, presented, rules.revoked)
    case = _Case(host, presented, name, address, port, tuple(files), rules, writable is not None)
    verdict = case.judge()
    verified = HostKeyVerified(host=host, key_type=presented.kind, fingerprint=presented.fingerprint)
    if verdict.status == "known":
        case.check_address()
        log.debug("%s: host key %s is known from %s", host, presented.fingerprint, verdict.entry)
        return [verified]
    if verdict.status != "unknown" or policy == "strict":
        raise case.refusal(verdict)
    if writable is None and policy != "ask":  # then anybody's key would be taken, each time
        raise case.unknown("and there is no file to remember it in", f"give {setting('known_hosts=')} a file")
    if writable is not None and _NOT_A_NAME.search(name):
        raise case.unknown("and its name cannot stand in a known_hosts file", "give it a HostKeyAlias")
    if policy == "ask":
        _confirm(case, verdict, ask)
    added = None if writable is None else _remember(case, writable)
    return [added, verified] if added else [verified]


@dataclass(frozen=True)
class _Case:
    """A host and its key, to be judged."""

    host: str
    key: PublicKey
    name: str
    address: str | None
    port: int | None
    files: tuple[str, ...]
    rules: Rules
    remembers: bool  # whether there is a file that gets new keys

    @property
    def listed(self) -> str:
        """The host as known_hosts has it."""
        return known_hosts.name_of(self.name, self.port)

    def judge(self) -> Verdict:
        """Read the files and decide."""
        said = _ask_command(self.rules.command, self.name, self.port, "HOSTNAME", self.key)
        key, allowed = self.key, self.rules.ca_algorithms
        if key.certificate and allowed is not None and key.certificate.algorithm not in allowed:
            certificate = dataclasses.replace(key.certificate, left_out=True)
            key = dataclasses.replace(key, certificate=certificate)
        return known_hosts.judge(_read_files(self.files), self.name, self.port, key, time.time(), said)

    def check_address(self) -> None:
        """Refuse a host whose address has another key in the files, where that is asked for.

        :raises HostKeyError: if it has
        """
        if not self.rules.check_address or self.key.certificate or self.address in (None, self.name):
            return
        if ipaddress.ip_address(str(self.address).partition("%")[0]).is_loopback:
            return
        alone = dataclasses.replace(self.rules, command=None)
        by_address = dataclasses.replace(self, name=str(self.address), rules=alone)
        verdict = by_address.judge()
        if verdict.status in ("changed", "revoked"):
            raise by_address.refusal(verdict)

    def refusal(self, verdict: Verdict) -> HostKeyError:
        """Make the error for a verdict other than "known"."""
        entry = verdict.entry
        if verdict.status == "unknown" or entry is None:
            more = f"(its certificate is {verdict.problem})" if verdict.problem else ""
            then = f"connect once with {setting('host_keys=ask')} or {setting('host_keys=accept-new')}"
            if not self.remembers:
                then = f"give {setting('known_hosts=')} a file for it: there is none that keeps keys"
            return self.unknown(more, f"compare the fingerprint with one from a trusted source, then {then}")
        if verdict.status == "revoked":
            who = "host key" if entry.key.blob == self.key.blob else "certificate's CA"
            msg = f"its {who} {entry.key.fingerprint} is marked @revoked in {entry}"
            hint = "the key may be stolen: do not log in, ask the administrator"
            return RevokedHostKeyError(msg, host=self.host, hint=hint, **self._facts)
        if not public_keys.is_supported(entry.key.kind):
            more = f"but {entry} has one of a kind that is not supported here, {entry.key.kind}"
            hint = "compare the fingerprint with one from a trusted source, and add this key to that file"
            return self.unknown(more, hint)
        msg = (
            f"its host key has changed: it shows {self.key.kind} {self.key.fingerprint}, "
            f"but {entry} has {entry.key.kind} {entry.key.fingerprint}"
        )
        remove = f"remove the old key: ssh-keygen -f {shlex.quote(entry.path)} -R {shlex.quote(self.listed)}"
        if self._is_shared(entry):
            # ssh-keygen -R takes each line that matches as a whole, also one for all nodes of a cluster.
            whose = f"a line for other hosts too ({clean(entry.names, _NAMES_SHOWN)})"
            remove = f"add ,!{self.listed} to the names of {entry}, {whose}, which ssh-keygen -R would remove"
        if entry.path == _COMMAND:
            remove = "correct what the command says"
        hint = f"somebody may be in between; only if the change is confirmed, {remove}"
        msg += f"; {self.rules.note}" * bool(self.rules.note)
        return ChangedHostKeyError(msg, host=self.host, hint=hint, **self._facts)

    def _is_shared(self, entry: Entry) -> bool:
        """Check if a line has names or patterns besides the host and the address that it was reached at."""
        mine = {self.listed}
        if self.address is not None:  # ssh has written both on one line for many years
            mine.add(dataclasses.replace(self, name=str(self.address)).listed)
        return not entry.names.startswith("|") and not mine.issuperset(lower(entry.names).split(","))

    def unknown(self, more: str, hint: str) -> UnknownHostKeyError:
        """Make the error for a key that no file has."""
        name = f"(looked up as {self.listed})" if self.listed != self.host else ""
        facts = (self.key.kind, self.key.fingerprint, name, more)
        msg = f"no known_hosts file has its host key, {' '.join(filter(None, facts))}"
        for path in self.files:
            if why := _unreadable(path):
                msg += f"; {path} cannot be read ({why})"
        msg += f"; {self.rules.note}" * bool(self.rules.note)
        return UnknownHostKeyError(msg, host=self.host, hint=hint, **self._facts)

    @property
    def _facts(self) -> dict[str, str]:
        return {"key_type": self.key.kind, "fingerprint": self.key.fingerprint}


def _confirm(case: _Case, verdict: Verdict, ask: Callable[[Question], str | None] | None) -> None:
    """Ask a person to compare the fingerprint.

    :raises UnknownHostKeyError: if nobody can be asked, or the answer is no
    """
    if ask is None:
        hint = f"give prompt=, or {setting('host_keys=accept-new')} after comparing the fingerprint"
        raise case.unknown("and nobody can be asked about it", hint)
    print_of = case.key.fingerprint
    where = f"{case.listed} ({case.address})" if case.address else case.listed
    lines = [
        f"The authenticity of host {where} can't be established.",
        f"Its {case.key.kind} key fingerprint is {print_of}",
        *([f"Its certificate is {verdict.problem}."] if verdict.problem else []),
        *_other_names(case),
        "Are you sure you want to continue connecting (yes/no/[fingerprint])? ",
    ]
    text = "\n".join(lines)
    for attempt in range(_MOST_ANSWERS):
        # The first text has the fingerprint in it: its answer is for this key alone.
        question = Question(kind="host_key", host=case.host, text=text, echo=True, reusable=not attempt)
        answer = (ask(question) or "").strip()
        if answer.lower() == "yes" or answer == print_of:
            return
        if answer.lower() in ("", "no"):
            break
        text = "Please type 'yes', 'no' or the fingerprint: "
    raise case.unknown("and it was not accepted", "compare the fingerprint with one from a trusted source")


def _other_names(case: _Case) -> list[str]:
    found = [e for path in case.files for e in known_hosts.find_key(_read_file(path), path, case.key)]
    if not found:
        return ["This key is not known by any other names."]
    named = ((e, "[hashed name]" if e.names.startswith("|") else e.names) for e in found[:_MOST_OTHER_NAMES])
    shown = (f"    {entry}: {names}" for entry, names in named)
    return ["This host key is known by the following other names/addresses:", *shown]


def _remember(case: _Case, writable: str) -> HostKeyAdded | None:
    """Add the key to a file, unless somebody else has done so since.

    :raises UnknownHostKeyError: if it cannot be written: a key that is not remembered is taken again and
        again, whoever shows it
    :raises HostKeyError: if the files now speak against it
    """
    path = Path(writable)
    try:
        path = path.expanduser()
        with _locked(path) as file:
            verdict = case.judge()
            if verdict.status == "known":
                return None
            if verdict.status != "unknown":
                raise case.refusal(verdict)
            key = public_keys.to_text(case.key)
            name = known_hosts.hash_name(case.listed) if case.rules.hash_names else case.listed
            _append(file, f"{name} {key}\n".encode())
    except (OSError, RuntimeError) as exc:  # RuntimeError: there is no home for "~"
        more = f"and it cannot be remembered in {path} ({getattr(exc, 'strerror', None) or exc})"
        raise case.unknown(
            more, (f"make the file writable, or give {setting('known_hosts=')} another one")
        ) from exc
    return HostKeyAdded(
        host=case.host, key_type=case.key.kind, fingerprint=case.key.fingerprint, path=str(path)
    )


def _check_revoked(host: str, key: PublicKey, files: Sequence[str]) -> None:
    """Refuse a key that one of the files has, or that a key in them has signed (``RevokedHostKeys``).

    :raises RevokedHostKeyError: if one has it
    :raises HostKeyError: if one cannot be read: it may have it
    """
    bad = {key.blob, key.certificate.ca} if key.certificate else {key.blob}
    facts = {"key_type": key.kind, "fingerprint": key.fingerprint}
    for path in files:
        try:
            text = Path(path).read_bytes()
        except OSError as exc:
            msg = f"the revoked keys in {path} cannot be read ({exc.strerror})"
            hint = "correct the RevokedHostKeys line of your ssh config"
            raise HostKeyError(msg, host=host, hint=hint, **facts) from exc
        try:
            if text.startswith(revocation_list.MAGIC):
                found = revocation_list.revokes(text, key)
            else:
                found = any(blob in bad for blob in known_hosts.find_blobs(text))
        except ValueError as exc:
            msg = f"the revocation list {path} cannot be read ({exc})"
            hint = "correct it (ssh-keygen -k writes one), or exempt this host with RevokedHostKeys none"
            raise HostKeyError(msg, host=host, hint=hint, **facts) from exc
        if found:
            msg = f"its host key {key.fingerprint} is revoked in {path}"
            hint = "the key may be stolen: do not log in, ask the administrator"
            raise RevokedHostKeyError(msg, host=host, hint=hint, **facts)


def _ask_command(
    command: HostKeysCommand | None, name: str, port: int | None, reason: str, key: PublicKey | None
) -> list[Entry]:
    """Run a KnownHostsCommand, and list the entries for a host that it says.

    :param reason: what ``%I`` stands for
    :raises ConfigError: if it fails, or takes too long: what it knows could speak against the key
    """
    if command is None:
        return []
    listed = known_hosts.name_of(name, port)
    kind = text = print_of = "NONE"
    if key:
        kind, text = public_keys.to_text(key).split()[:2]
        print_of = key.fingerprint
    words = command.expand(H=listed, I=reason, t=kind, f=print_of, K=text)
    null = subprocess.DEVNULL
    try:
        if not Path(words[0]).is_absolute():
            msg = f"{words[0]} is not an absolute path"
            raise ValueError(msg)
        done = subprocess.run(words, stdin=null, capture_output=True, timeout=_COMMAND_SECONDS, check=False)
        problem = f"status {done.returncode}" if done.returncode else ""
    except subprocess.TimeoutExpired:
        problem = f"it did not end within {_COMMAND_SECONDS:g} s"
    except (OSError, ValueError) as exc:
        problem = str(getattr(exc, "strerror", None) or exc)
    if problem:
        msg = f"{command.where}: KnownHostsCommand failed ({problem})"
        raise ConfigError(msg, host=listed, hint="run it in a shell, or correct the line")
    return known_hosts.find([(_COMMAND, done.stdout)], listed)


def _read_files(files: Sequence[str]) -> list[tuple[str, bytes]]:
    return [(path, _read_file(path)) for path in files]


def _read_file(path: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except (OSError, RuntimeError) as exc:  # as ssh: a file that is not there, or not for us, knows nobody
        if is_scarce(exc):  # a host that is known would be taken for a new one
            raise
        log.debug("%s is not read: %s", path, exc)
        return b""


def _unreadable(path: str) -> str:
    """Return why a file that is there cannot be read; empty where it can, or is not there."""
    try:
        with Path(path).expanduser().open("rb"):
            return ""
    except (FileNotFoundError, RuntimeError):
        return ""
    except OSError as exc:
        return exc.strerror or str(exc)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Open a file for appending, made if need be, and keep others of us out."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
    file = os.open(path, flags, 0o600)
    try:
        deadline = time.monotonic() + _LOCK_SECONDS
        while not _try_lock(file) and time.monotonic() < deadline:
            time.sleep(_LOCK_PAUSE)  # neither flock nor msvcrt.locking has a deadline of its own
        yield file
    finally:
        os.close(file)  # which unlocks it


def _try_lock(file: int) -> bool:
    """Lock a file; True if it is locked now, or cannot be locked where it is."""
    try:
        import fcntl
    except ImportError:
        return _try_lock_windows(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as exc:  # some network file systems have no locks; one write() is whole there, too
        log.debug("known_hosts is not locked: %s", exc)
    return True


def _try_lock_windows(file: int) -> bool:
    import msvcrt

    try:
        os.lseek(file, _LOCK_OFFSET, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]  # Windows only
    except OSError:
        return False
    return True


def _append(file: int, line: bytes) -> None:
    """Add a line, in one write; a last line without its end gets it first."""
    if os.fstat(file).st_size:
        os.lseek(file, -1, os.SEEK_END)
        if os.read(file, 1) != b"\n":
            line = b"\n" + line
    while line:
        line = line[os.write(file, line) :]
