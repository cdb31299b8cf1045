"""Files that servers have sent, on this machine's disk.

Each has the hash of its content as its name. What was kept for its address has the hash of that
(:class:`Address`), the head of the answer in front, and the hash of all at its end. Every process of the
account shares one folder. A file comes into it complete, by a rename, and nobody writes into one that is
there. Whatever reads one checks it: what does not match its hash is removed, and counts as not there. So
nothing has to be locked, or written through to the disk.

A folder that is not the account's own, or that others could write into, is not used at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from bokeh_ssh._core.this_machine.private_folder import FolderError, check_folder, make_folder
from bokeh_ssh._forwarding.static_requests import MOST_BYTES, Address, Lasting, StaticFile

log = logging.getLogger("bokeh_ssh.forward")

Read = TypeVar("Read")

#: Bytes of all files together: those of some thirty versions of Bokeh.
MOST_TOGETHER = 128 * 1024 * 1024
#: Seconds after which a file that was begun is taken for left behind.
_LEFT_BEHIND = 3600.0
#: Seconds between two notes of a file's last use.
_NOTED = 3600.0
_READ_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)  # else a pipe of that name would be waited for
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)
_WRITE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_BY_CONTENT = re.compile(r"[0-9a-f]{128}-[A-Za-z0-9._-]{1,64}")
_NAME = re.compile(rf"{_BY_CONTENT.pattern}|[0-9a-f]{{64}}\.answer")
_BEGUN = re.compile(r"begun-[0-9a-f]{32}")
#: Bytes of a file that are not its content: the head, as JSON in a line, and the hash.
_MOST_BESIDE = 64 * 1024
_DIGEST = hashlib.sha512().digest_size
#: How many files of one name are looked at: versions of it.
_MOST_VERSIONS = 8


class Usage(NamedTuple):
    """How much is kept.

    :ivar size: of all files together, in bytes
    """

    files: int
    size: int


class StaticStore:
    """The folder, and what is in it. Safe for several threads and processes.

    :param folder: made when the first file is kept
    :param most: bytes of all files together; those that were used longest ago are removed
    """

    def __init__(self, folder: Path, most: int = MOST_TOGETHER) -> None:
        self.folder = folder
        self._most = most

    def load(self, file: StaticFile) -> bytes | None:
        """Return the content of a file, checked; None where it is not there as it should be."""
        return self._read(
            self._path(file),
            lambda content: content if hashlib.sha512(content).hexdigest() == file.sha512 else None,
        )

    def load_answer(self, address: Address) -> tuple[Lasting, bytes] | None:
        """Return the answer that was kept for an address and its content, checked; None without one."""
        found = self._read(self._path(address), lambda data: _unpack(data, address))
        if found is None or found[0].is_fresh(time.time()):
            return found
        with contextlib.suppress(OSError):
            self._path(address).unlink()
        return None

    def _read(self, path: Path, check: Callable[[bytes], Read | None]) -> Read | None:
        """Return what ``check`` makes of a file; one that it makes nothing of is removed."""
        try:
            check_folder(self.folder)
            number = os.open(path, _READ_FLAGS)
        except (OSError, FolderError):
            return None
        try:
            status = os.fstat(number)
            usable = _is_own(status) and status.st_size <= MOST_BYTES + _MOST_BESIDE
            read = check(_read_whole(number, status.st_size)) if usable else None
            if read is not None:
                self._note_use(path, status.st_mtime)
                return read
        except OSError as exc:
            log.debug("%s cannot be read: %s", path, exc)
            return None
        finally:
            os.close(number)
        log.info("%s is not what it was, and is removed", path)
        with contextlib.suppress(OSError):
            path.unlink()
        return None

    def _note_use(self, path: Path, noted: float) -> None:
        if abs(time.time() - noted) > _NOTED:
            with contextlib.suppress(OSError):
                os.utime(path, follow_symlinks=os.utime not in os.supports_follow_symlinks)

    def begin(self, file: StaticFile | Address, answer: Lasting | None = None) -> StaticWriter:
        """Begin to keep a file.

        :param answer: to whose address it is
        :raises OSError: if nothing can be written
        :raises FolderError: if the folder is not used
        """
        make_folder(self.folder)
        begun = self.folder / f"begun-{secrets.token_hex(16)}"
        opened = io.FileIO(os.open(begun, _WRITE_FLAGS, 0o600), "wb")
        sha512 = file.sha512 if isinstance(file, StaticFile) else ""
        writer = StaticWriter(self, begun, opened, self._path(file), sha512)
        if isinstance(file, Address) and answer:
            try:
                writer.write(_pack(answer, file))
            except OSError:
                writer.discard()
                raise
        return writer

    def keep(self, begun: Path, path: Path) -> None:
        """Rename a file that is complete to its name, and make room for it.

        :raises OSError: if that does not work
        """
        begun.replace(path)
        with contextlib.suppress(FolderError):  # others were let in meanwhile: nobody reads it
            self._make_room(path)

    def _make_room(self, newest: Path) -> None:
        now = time.time()

        def used(each: tuple[Path, os.stat_result]) -> float:
            at = each[1].st_mtime
            return at if at <= now + _NOTED else 0.0  # nobody knows: the clock was set back since

        every = sorted(self._scan(), key=used)
        together = sum(status.st_size for path, status in every if _NAME.fullmatch(path.name))
        for path, status in every:
            if _BEGUN.fullmatch(path.name):
                unwanted, size = abs(now - status.st_mtime) > _LEFT_BEHIND, 0
            else:
                unwanted, size = together > self._most and path != newest, status.st_size
            if unwanted:
                with contextlib.suppress(OSError):  # another process was faster, or reads it
                    path.unlink()
                    together -= size

    def hashes(self) -> set[str]:
        """Return the hashes of the files that are there; none where the folder is not used."""
        with contextlib.suppress(OSError, FolderError):
            return {path.name[:128] for path, _ in self._scan() if _BY_CONTENT.fullmatch(path.name)}
        return set()

    def find(self, name: str) -> list[str]:
        """Return the hashes of the files of that name, those that were used last first.

        :param name: the last part of a file's path
        """
        every: list[tuple[Path, os.stat_result]] = []
        with contextlib.suppress(OSError, FolderError):
            every += [each for each in self._scan() if each[0].name[128:] == f"-{name}"]
        every.sort(key=lambda each: each[1].st_mtime, reverse=True)
        return [path.name[:128] for path, _ in every[:_MOST_VERSIONS]]

    def usage(self) -> Usage:
        """Return how much is kept.

        :raises OSError: if the folder cannot be looked at
        :raises FolderError: if it is not the account's own
        """
        return self._count(lambda path: None)

    def clear(self) -> Usage:
        """Remove all files, also those that are being received; return what was removed.

        :raises OSError: if one cannot be removed
        :raises FolderError: if the folder is not the account's own
        """
        return self._count(Path.unlink)

    def _count(self, do: Callable[[Path], None]) -> Usage:
        sizes = []
        if os.path.lexists(self.folder):
            for path, status in self._scan():
                with contextlib.suppress(FileNotFoundError):
                    do(path)
                    sizes += [status.st_size] if _NAME.fullmatch(path.name) else []
        return Usage(len(sizes), sum(sizes))

    def _path(self, file: StaticFile | Address) -> Path:
        if isinstance(file, Address):
            return self.folder / f"{file.key}.answer"
        return self.folder / f"{file.sha512}-{file.name}"

    def _scan(self) -> Iterator[tuple[Path, os.stat_result]]:
        """Find what is there of ours.

        :raises OSError: if the folder cannot be looked at
        :raises FolderError: if it is not the account's own
        """
        check_folder(self.folder)
        for entry in list(os.scandir(self.folder)):
            if _NAME.fullmatch(entry.name) or _BEGUN.fullmatch(entry.name):
                with contextlib.suppress(OSError):
                    yield Path(entry.path), entry.stat(follow_symlinks=False)


class StaticWriter:
    """One file that is being received. Made by :meth:`StaticStore.begin`; for one thread.

    :param path: what it becomes
    :param sha512: of its content; where that is not known, the hash of what came is put behind it
    """

    def __init__(self, store: StaticStore, begun: Path, opened: io.FileIO, path: Path, sha512: str) -> None:
        self._store = store
        self._begun = begun
        self._opened = opened
        self._path = path
        self._sha512 = sha512
        self._hash = hashlib.sha512()

    def write(self, data: bytes) -> None:
        """Add the next bytes.

        :raises OSError: if they do not fit
        """
        self._hash.update(data)
        left = memoryview(data)
        while left:
            left = left[self._opened.write(left) :]

    def finish(self) -> bool:
        """Keep the file; False where its content is not what it should be.

        :raises OSError: if it cannot be kept
        """
        try:
            if not self._sha512:
                self.write(self._hash.digest())
            self._opened.close()
            if self._sha512 and self._hash.hexdigest() != self._sha512:
                return False
            self._store.keep(self._begun, self._path)
        finally:
            self.discard()
        return True

    def discard(self) -> None:
        """Keep nothing of it; idempotent, and of no effect after :meth:`finish`."""
        with contextlib.suppress(OSError):
            self._opened.close()
        with contextlib.suppress(OSError):
            self._begun.unlink()


def _is_own(status: os.stat_result) -> bool:
    """Return whether nobody else has written a file; its folder may have been open to others for a while."""
    mine = not hasattr(os, "geteuid") or (status.st_uid == os.geteuid() and not status.st_mode & 0o022)
    return stat.S_ISREG(status.st_mode) and mine


def _read_whole(number: int, size: int) -> bytes:
    """Read a file, and notice where it has another size by now."""
    parts = []
    while size >= 0:
        part = os.read(number, size + 1)
        if not part:
            break
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _pack(answer: Lasting, address: Address) -> bytes:
    """Write what stands before the content of an answer that is kept."""
    return json.dumps({"key": address.key, **answer._asdict()}).encode("ascii") + b"\n"


def _unpack(data: bytes, address: Address) -> tuple[Lasting, bytes] | None:
    """Read an answer that was kept; None where it is none, or another one's."""
    content, digest = data[:-_DIGEST], data[-_DIGEST:]
    if hashlib.sha512(content).digest() != digest:
        return None
    head, _, content = content.partition(b"\n")
    try:
        said = json.loads(head)
        lines, varies = tuple(map(str, said["lines"])), tuple((str(a), str(b)) for a, b in said["varies"])
        answer = Lasting(lines, varies, float(said["since"]), int(said["lasts"]))
    except (ValueError, KeyError, TypeError, OverflowError):
        return None
    return (answer, content) if said["key"] == address.key else None
