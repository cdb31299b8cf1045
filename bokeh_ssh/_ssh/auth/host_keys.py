"""Is it the right machine? Host keys checked against known_hosts files, and new ones remembered."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bokeh_ssh._core.errors import (
    ChangedHostKeyError,
    HostKeyError,
    RevokedHostKeyError,
    UnknownHostKeyError,
)
from bokeh_ssh._core.events import HostKeyAdded, Question
from bokeh_ssh._core.patterns import lower
from bokeh_ssh._ssh.auth import known_hosts, public_keys
from bokeh_ssh._ssh.auth.known_hosts import Entry, Verdict
from bokeh_ssh._ssh.auth.public_keys import PublicKey

log = logging.getLogger("bokeh_ssh.hostkeys")

#: ssh writes no name with one of these into a known_hosts file. We add "!", which would turn its sense
#: around, and what would end it.
_NOT_A_NAME = re.compile(r"[@?*#\[\]|'\"\\!,\s\x00-\x1f\x7f]")
_LOCK_SECONDS = 5.0
_LOCK_PAUSE = 0.05
#: Where Windows locks: it keeps others from reading what is locked, so a place behind every real end.
_LOCK_OFFSET = 0x7FFFFFF0
_MOST_ANSWERS = 3
_MOST_OTHER_NAMES = 8


def fingerprint(key: bytes) -> str:
    """Return the fingerprint of a public key, as ``ssh-keygen -l`` prints it: ``"SHA256:…"``.

    Of a certificate, that of the key in it.
    """
    return _read_anyhow(key).fingerprint


def kind(key: bytes) -> str:
    """Return the type of a public key, such as ``"ssh-ed25519"``; of a certificate, that of the key in it."""
    return _read_anyhow(key).kind


def known_algorithms(name: str, port: int | None, files: Sequence[str]) -> tuple[str, ...]:
    """List the host key algorithms that can be verified, best first, so that the server is asked for them.

    With a ``@cert-authority`` for the host these begin with ``…-cert-v01@openssh.com``.

    :param name: the HostKeyAlias, or the host name
    :param port: None if ``name`` is a HostKeyAlias
    """
    return known_hosts.algorithms(_find(files, known_hosts.name_of(name, port)))


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
) -> HostKeyAdded | None:
    """Make sure that a host is the one that its key says (``ssh -o StrictHostKeyChecking``).

    :param host: the machine as the user named it, for messages
    :param key: the public key or certificate that the server presented and proved to have
    :param name: the HostKeyAlias, or the host name
    :param address: what was dialled, for the question; None behind a jump host. It is not looked up
        (``CheckHostIP no``, the default since OpenSSH 8.5)
    :param port: None if ``name`` is a HostKeyAlias: that stands in the files without a port
    :param files: known_hosts files; missing ones are as good as empty
    :param writable: the file that gets new keys; None if there is none
    :param policy: what becomes of an unknown key: refused, asked about, or taken
    :param ask: gets a ``Question`` of kind ``"host_key"``; ``"yes"`` or the fingerprint accepts
    :returns: what was added, if it was
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
    case = _Case(host, presented, name, address, port, tuple(files))
    verdict = case.judge()
    if verdict.status == "known":
        log.debug("%s: host key %s is known from %s", host, presented.fingerprint, verdict.entry)
        return None
    if verdict.status != "unknown" or policy == "strict":
        raise case.refusal(verdict)
    if writable is None:
        raise case.unknown("and there is no file to remember it in", "give known_hosts= a file")
    if _NOT_A_NAME.search(name):
        raise case.unknown("and its name cannot stand in a known_hosts file", "give it a HostKeyAlias")
    if policy == "ask":
        _confirm(case, verdict, ask)
    return _remember(case, writable)


@dataclass(frozen=True)
class _Case:
    """A host and its key, to be judged."""

    host: str
    key: PublicKey
    name: str
    address: str | None
    port: int | None
    files: tuple[str, ...]

    @property
    def listed(self) -> str:
        """The host as known_hosts has it."""
        return known_hosts.name_of(self.name, self.port)

    def judge(self) -> Verdict:
        """Read the files and decide."""
        bare = lower(self.name)
        entries = _find(self.files, self.listed)
        others = [] if bare == self.listed else _find(self.files, bare)
        return known_hosts.judge(entries, others, self.key, bare, time.time())

    def refusal(self, verdict: Verdict) -> HostKeyError:
        """Make the error for a verdict other than "known"."""
        entry = verdict.entry
        if verdict.status == "unknown" or entry is None:
            more = f"(its certificate is {verdict.problem})" if verdict.problem else ""
            hint = "compare the fingerprint with one from a trusted source, then connect once with "
            return self.unknown(more, hint + 'host_keys="ask" or host_keys="accept-new"')
        if verdict.status == "revoked":
            who = "host key" if entry.key.blob == self.key.blob else "certificate's CA"
            msg = f"its {who} {entry.key.fingerprint} is marked @revoked in {entry}"
            hint = "the key may be stolen: do not log in, ask the administrator"
            return RevokedHostKeyError(msg, host=self.host, hint=hint, **self._facts)
        msg = (
            f"its host key has changed: it shows {self.key.kind} {self.key.fingerprint}, "
            f"but {entry} has {entry.key.kind} {entry.key.fingerprint}"
        )
        remove = f"ssh-keygen -f {shlex.quote(entry.path)} -R {shlex.quote(self.listed)}"
        hint = f"somebody may be in between; only if the change is confirmed, remove the old key: {remove}"
        return ChangedHostKeyError(msg, host=self.host, hint=hint, **self._facts)

    def unknown(self, more: str, hint: str) -> UnknownHostKeyError:
        """Make the error for a key that no file has."""
        msg = f"no known_hosts file has its host key, {self.key.kind} {self.key.fingerprint} {more}".rstrip()
        return UnknownHostKeyError(msg, host=self.host, hint=hint, **self._facts)

    @property
    def _facts(self) -> dict[str, str]:
        return {"key_type": self.key.kind, "fingerprint": self.key.fingerprint}


def _confirm(case: _Case, verdict: Verdict, ask: Callable[[Question], str | None] | None) -> None:
    """Ask a person to compare the fingerprint.

    :raises UnknownHostKeyError: if nobody can be asked, or the answer is no
    """
    if ask is None:
        hint = 'give prompt=, or host_keys="accept-new" after comparing the fingerprint'
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
    shown = [f"    {e}: {_shown(e)}" for e in found[:_MOST_OTHER_NAMES]]
    return ["This host key is known by the following other names/addresses:", *shown]


def _shown(entry: Entry) -> str:
    return "[hashed name]" if entry.names.startswith("|") else entry.names


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
            _append(file, f"{case.listed} {key}\n".encode())
    except (OSError, RuntimeError) as exc:  # RuntimeError: there is no home for "~"
        more = f"and it cannot be remembered in {path} ({getattr(exc, 'strerror', None) or exc})"
        raise case.unknown(more, "make the file writable, or give known_hosts= another one") from exc
    return HostKeyAdded(
        host=case.host, key_type=case.key.kind, fingerprint=case.key.fingerprint, path=str(path)
    )


def _find(files: Sequence[str], name: str) -> list[Entry]:
    return [entry for path in files for entry in known_hosts.find(_read_file(path), path, name)]


def _read_file(path: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except (OSError, RuntimeError) as exc:  # as ssh: a file that is not there, or not for us, knows nobody
        log.debug("%s is not read: %s", path, exc)
        return b""


def _read_anyhow(key: bytes) -> PublicKey:
    try:
        return public_keys.read(key)
    except ValueError:
        return PublicKey("", key)


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
