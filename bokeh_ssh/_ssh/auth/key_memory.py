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

from bokeh_ssh._core.this_machine.private_folder import FolderError, check_folder, find_folder, make_folder

log = logging.getLogger("bokeh_ssh.auth")

_FOLDER = "logins"
#: Logins that are remembered; those that were longest ago are forgotten.
_MOST = 500
_TEXT = re.compile(
    r"(?P<key>[0-9a-f]{64}|-) (?P<algorithm>[a-z0-9@._-]{1,64})(?P<more>| alone| waits)\n", re.IGNORECASE
)
_MINDS = "- none\n"
_WAITS = " waits\n"
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
    :ivar more: " alone" where nothing else was needed; " waits" where the server hung up when channels were
        asked for with it
    """

    key: str
    algorithm: str
    more: str = ""


class KeyMemory:
    """What is remembered of one account on one server. None of its methods raises.

    :param host_key: as the server sent it, verified
    :param care: whatever could be written down: 1 asks for nothing together with the login, 2 for the methods
        first
    :ivar unanswered: whether a login has begun with the key, and the server has not answered
    :ivar ahead: whether channels were asked for with it
    :ivar refused: whether it was not enough this time
    :ivar objected: whether the server hung up at the key, or at what came with it
    """

    def __init__(self, host_key: bytes, user: str, *, care: int = 0) -> None:
        self.unanswered = False
        self.ahead = self.refused = self.objected = False
        self._care = care
        self._name = hashlib.sha256(b"%b\0%b" % (host_key, user.encode("utf-8", "replace"))).hexdigest()
        self._known: KnownKey | None = None

    def recall(self) -> KnownKey | None:
        """Return the key that fitted; None where there is none, or the server minds."""
        found = _TEXT.fullmatch(self._read()[0])
        if self._care > 1 or found is None or found["key"] == "-":
            return None
        self._known = KnownKey(found["key"], found["algorithm"], found["more"])
        return self._known

    @property
    def may_ask_ahead(self) -> bool:
        """Whether channels may be asked for with the key."""
        return self._care == 0 and self._known is not None and self._known.more == " alone"

    def keep(self, blob: bytes, algorithm: str, *, alone: bool) -> None:
        """Remember a key that has fitted, unless the server minds.

        :param blob: the public key or certificate
        :param alone: whether nothing else was needed
        """
        text, age = self._read()
        lately = abs(age) <= _MINDING
        waits = self._care == 1 or (text.endswith(_WAITS) and lately)
        known = KnownKey(fingerprint(blob), algorithm, " waits" if waits else " alone" if alone else "")
        minds = self._care > 1 or (text == _MINDS and lately)
        if known != self._known and not minds:
            self._write(f"{known.key} {known.algorithm}{known.more}\n")

    def forget(self) -> None:
        """Forget the key that fitted: another way was needed."""
        if self._known:
            with contextlib.suppress(OSError, FolderError):
                self._path().unlink()

    def note_end(self) -> None:
        """Take it that the connection has ended during the login."""
        self.objected = self.unanswered or (self.ahead and self.refused)

    def note_objection(self) -> int:
        """Remember that the server minds a login that begins with the key, or what came with it.

        :returns: with how much care the next is to be made
        """
        if self.refused:  # it only minds what comes with a key that does not fit
            self.forget()
        elif self.ahead and self._known:
            self._write(f"{self._known.key} {self._known.algorithm}{_WAITS}")
            return 1
        else:
            self._write(_MINDS)
        return 2

    def _read(self) -> tuple[str, float]:
        """Return what stands there, and for how many seconds; empty where that is not to be used."""
        try:
            path = self._path()
            check_folder(path.parent)
            opened = os.open(path, _READ_FLAGS)
            try:
                text = os.read(opened, 200).decode("ascii")
                return text, time.time() - os.fstat(opened).st_mtime
            finally:
                os.close(opened)
        except (OSError, ValueError, FolderError):
            return "", 0.0

    def _path(self) -> Path:
        return find_folder(_FOLDER) / self._name

    def _write(self, text: str) -> None:
        try:
            path = self._path()
            make_folder(path.parent)
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


def fingerprint(blob: bytes) -> str:
    """Return what a key is remembered by."""
    return hashlib.sha256(blob).hexdigest()


def clear_keys() -> None:
    """Forget all of them.

    :raises OSError: if one cannot be removed
    :raises FolderError: if the folder is not the account's own
    """
    folder = find_folder(_FOLDER)
    if os.path.lexists(folder):
        check_folder(folder)
        for path in folder.iterdir():
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
