"""Which key has fitted last time, for each host key and account: it saves a round trip, and is no secret.

A login that knows it begins with that key, and does not ask first which methods there are. Only a key that
would be offered anyway is, and none is offered twice, so that a server counts no more of them than before.
Where nothing but the key was needed, the channels that are wanted are asked for with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import secrets
import time
from pathlib import Path
from typing import NamedTuple

from bokeh_ssh._core.this_machine.private_folder import FolderError, open_folder

log = logging.getLogger("bokeh_ssh.auth")

_FOLDER = "logins"
#: Logins that are remembered; those that were longest ago are forgotten.
_MOST = 500
_TEXT = re.compile(
    r"(?P<key>[0-9a-f]{64}|-) (?P<algorithm>[a-z0-9@._-]{1,64})(?P<more>| alone| waits)(?P<doubt>|\?|!)\n",
    re.IGNORECASE,
)
_MINDS = "- none\n"
#: A pipe of that name is not waited for.
_READ_FLAGS = (
    os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
)
#: Seconds that a server which hung up at such a login is treated with more care.
_MINDING = 7 * 86400.0


class KnownKey(NamedTuple):
    """A key that has fitted.

    :ivar key: SHA-256 of the public key or certificate, in hexadecimal digits
    :ivar algorithm: by which it has signed
    :ivar more: " alone" where nothing else was needed; " waits" where the server minds channels that are
        asked for with it
    :ivar doubt: how the last login that began with it ended without a reason, which may have been the line:
        "?" for hung up, "!" for silence; empty where it did not
    """

    key: str
    algorithm: str
    more: str = ""
    doubt: str = ""


class KeyMemory:
    """What is remembered of one account on one server. None of its methods raises.

    :param host_key: as the server sent it, verified
    :param care: whatever could be written down: 1 asks for nothing together with the login, 2 for the methods
        first
    :ivar may_ask_ahead: whether channels may be asked for with the key
    :ivar unanswered: whether a login has begun with the key, and the server has not answered
    :ivar ahead: whether channels were asked for with it
    :ivar refused: whether it was not enough this time
    :ivar objected: whether the server hung up at the key, or at what came with it
    :ivar certain: whether it said so, so that it was not the line
    """

    def __init__(self, host_key: bytes, user: str, *, care: int = 0) -> None:
        self.unanswered = self.may_ask_ahead = False
        self.ahead = self.refused = self.objected = self.certain = False
        self._care = care
        self._name = hashlib.sha256(b"%b\0%b" % (host_key, user.encode("utf-8", "replace"))).hexdigest()
        self._known: KnownKey | None = None

    def recall(self) -> KnownKey | None:
        """Return the key that fitted; None where there is none, or the server minds."""
        self._known = None if self._care > 1 else _parse(self._read()[0])
        if self._known and self._known.doubt == "!" and self._known.more != " alone":
            self._known = None  # once
        known = self._known
        self.may_ask_ahead = (
            self._care == 0 and known is not None and known.more == " alone" and known.doubt != "!"
        )
        return known

    def keep(self, blob: bytes, algorithm: str, *, alone: bool) -> None:
        """Remember a key that has fitted, unless the server minds.

        :param blob: the public key or certificate
        :param alone: whether nothing else was needed
        """
        text, age = self._read()
        before, lately = _parse(text), abs(age) <= _MINDING
        if self._care or (text == _MINDS and lately):
            return  # what is known of the server is written down
        waits = before is not None and before.more == " waits" and lately
        more = " waits" if waits else " alone" if alone else ""
        tried = before is not None and before.doubt == "?" and (self.ahead or more != " alone")
        doubt = "?" if before is not None and before.doubt and not tried else ""
        known = KnownKey(fingerprint(blob), algorithm, more, doubt)
        if known != self._known:
            self._write(known)

    def forget(self) -> None:
        """Forget the key that fitted: another way was needed."""
        if self._known:
            with contextlib.suppress(OSError, FolderError):
                (open_folder(_FOLDER) / self._name).unlink()

    def note_end(self, *, certain: bool) -> None:
        """Take it that the connection has ended during the login.

        :param certain: whether the server has said that it ends it
        """
        self.objected = self.unanswered or (self.ahead and self.refused)
        self.certain = certain

    def note_objection(self, *, silent: bool = False) -> int:
        """Remember that the server minds a login that begins with the key, or what came with it.

        Where it may have been the line, that counts only if the next one ends in the same way.

        :param silent: whether it has not answered, and has not hung up
        :returns: with how much care the next is to be made
        """
        known = self._known
        if self.refused:  # it only minds what comes with a key that does not fit
            self.forget()
        elif self._care and not self.certain:
            pass  # the one before is written down, and there is another
        elif known and not self.certain and not known.doubt:
            self._write(known._replace(doubt="!" if silent else "?"))
        elif known and self.ahead:
            self._write(known._replace(more=" waits", doubt=""))
        else:
            self._write(None)
        return 1 if self.ahead and not self.refused else 2

    def _read(self) -> tuple[str, float]:
        """Return what stands there, and for how many seconds; empty where that is not to be used."""
        try:
            opened = os.open(open_folder(_FOLDER) / self._name, _READ_FLAGS)
            try:
                text = os.read(opened, 200).decode("ascii")
                return text, time.time() - os.fstat(opened).st_mtime
            finally:
                os.close(opened)
        except (OSError, ValueError, FolderError):
            return "", 0.0

    def _write(self, known: KnownKey | None) -> None:
        text = f"{known.key} {known.algorithm}{known.more}{known.doubt}\n" if known else _MINDS
        try:
            path = open_folder(_FOLDER, make=True) / self._name
            begun = path.with_name(f"begun-{secrets.token_hex(8)}")
            begun.touch(0o600, exist_ok=False)
            try:
                begun.write_bytes(text.encode("ascii"))
                begun.replace(path)
            finally:
                begun.unlink(missing_ok=True)
            _make_room(path.parent)
        except (OSError, FolderError) as exc:
            log.debug("the key that fitted is not remembered: %s", exc)


def _parse(text: str) -> KnownKey | None:
    """Read what is written down; None where there is no key in it."""
    found = _TEXT.fullmatch(text)
    return KnownKey(**found.groupdict()) if found and found["key"] != "-" else None


def fingerprint(blob: bytes) -> str:
    """Return what a key is remembered by."""
    return hashlib.sha256(blob).hexdigest()


def clear_keys() -> None:
    """Forget all of them.

    :raises OSError: if one cannot be removed
    :raises FolderError: if the folder is not the account's own
    """
    with contextlib.suppress(FileNotFoundError):
        for path in open_folder(_FOLDER).iterdir():
            path.unlink(missing_ok=True)


def _make_room(folder: Path) -> None:
    names = os.listdir(folder)  # noqa: PTH208 - names are enough
    if len(names) > _MOST:
        times = {}
        for name in names:
            with contextlib.suppress(OSError):
                times[name] = (folder / name).lstat().st_mtime
        for name in sorted(times, key=times.__getitem__)[: len(names) - _MOST]:
            (folder / name).unlink(missing_ok=True)
