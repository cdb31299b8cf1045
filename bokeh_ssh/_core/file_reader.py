"""A file of this machine as it was looked at: read without being led elsewhere, and no further than that.

Between the look and the reading it may have become a FIFO, a device or a link; it may grow without end, or be
cut short.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

#: Bytes that are read of a file which says that it has none: some that a kernel makes up do.
_UNSIZED = 1 << 20
#: What opening says of something that is no file any more: a link, a socket, a device without a driver, a
#: path that leads through a file.
_NO_FILE = {errno.ELOOP, errno.ENXIO, errno.ENOTDIR, errno.EISDIR, errno.ENODEV, getattr(errno, "EMLINK", -1)}
#: A FIFO that nobody writes to must not be waited for, and a terminal not become ours.
FLAGS = sum(getattr(os, name, 0) for name in ("O_RDONLY", "O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"))
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_DIRECTORY = getattr(os, "O_DIRECTORY", 0)


class NotAFileError(Exception):
    """It is no file any more."""


class Reading:
    """An open file; closed by :meth:`close`.

    :param path: where it is
    :param top: the folder that was named, which may be a link itself; nothing below it may be one. The file's
        own path where that was named
    :param size: bytes that it had; it is read no further
    :param changed: when it was last written, in nanoseconds
    :ivar name: its path
    :ivar settled: whether it was, when all had been read, as it was looked at
    :raises NotAFileError: if it is no file
    :raises OSError: if it cannot be opened
    """

    def __init__(self, path: Path, top: Path, size: int, changed: int) -> None:
        self.name = str(path)
        self._looked = (size, changed)
        self._most = size or _UNSIZED
        self.settled = False
        try:
            self._file = _open(path, top)
        except OSError as exc:
            exc.filename = exc.filename or self.name
            if exc.errno in _NO_FILE:
                raise NotAFileError(self.name) from exc
            raise
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            self.close()
            raise NotAFileError(self.name)

    def pieces(self, most: int) -> Iterator[tuple[int, bytes]]:
        """Read it: where each piece begins, and what it is; what lies between them is zeros.

        :param most: bytes of a piece
        :raises OSError: if it cannot be read
        """
        reported = at = 0
        try:
            while at < self._most:
                at = self._after_hole(at)
                data = self._read(at, min(most, self._most - at))
                if not data:
                    break
                if data != bytes(len(data)):
                    yield at, data
                    reported = at + len(data)
                at += len(data)
        except OSError as exc:
            exc.filename = exc.filename or self.name
            raise
        facts = os.fstat(self._file)
        same = (facts.st_size, facts.st_mtime_ns) == self._looked
        self.settled = same and (at == facts.st_size or (not facts.st_size and at < _UNSIZED))
        if reported < at:
            yield at - 1, b"\0"

    def _read(self, at: int, count: int) -> bytes:
        if not count:
            return b""
        os.lseek(self._file, at, os.SEEK_SET)
        return os.read(self._file, count)

    def _after_hole(self, at: int) -> int:
        """Return where the next data begins, as far as the system knows; the end where there is none."""
        if not hasattr(os, "SEEK_DATA"):
            return at
        try:
            return min(os.lseek(self._file, at, os.SEEK_DATA), self._most)
        except OSError as exc:
            if exc.errno != errno.ENXIO:  # this file system does not know
                return at
            return max(at, min(os.fstat(self._file).st_size, self._most))

    def close(self) -> None:
        """Close it; idempotent."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)


def _open(path: Path, top: Path) -> int:
    if path == top or os.open not in os.supports_dir_fd:
        return os.open(path, FLAGS | (0 if path == top else _NOFOLLOW))
    folder = os.open(top, FLAGS | _DIRECTORY)
    try:
        *between, name = path.relative_to(top).parts
        for part in between:
            inner = os.open(part, FLAGS | _DIRECTORY | _NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
        return os.open(name, FLAGS | _NOFOLLOW, dir_fd=folder)
    finally:
        with contextlib.suppress(OSError):
            os.close(folder)
