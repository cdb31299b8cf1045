"""Unix sockets on this machine: listening on one that only this account may use, and taking it away again."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import sys

from bokeh_ssh._core.endpoint import LONGEST_PATH, check_path
from bokeh_ssh._core.errors import ForwardError, SocketInUseError, UsageError
from bokeh_ssh._core.settings import setting
from bokeh_ssh._core.this_machine.home import expand_home

#: ``sun_path`` without its NUL: 108 bytes on Linux, 104 on the BSDs and macOS.
_LONGEST = LONGEST_PATH if sys.platform.startswith("linux") else 103
_BACKLOG = 4096
_TRIES = 3  # others may be faster; who loses three races has somebody else to talk to


def check_here(path: str | os.PathLike[str], name: str) -> str:
    """Return the absolute path of a socket on this machine.

    A leading ``~/`` is this account's home; a relative path is taken from the current directory.

    :param name: the keyword that it came with
    :raises UsageError: if no socket here can have it, or this system has no Unix sockets
    """
    if not hasattr(socket, "AF_UNIX"):
        msg = f"{name} needs Unix sockets, which this system does not have for Python"
        raise UsageError(msg, hint="use a port")
    text = os.fspath(path)
    if isinstance(text, str) and text and "\0" not in text:
        trail = "/" if text.endswith("/") else ""
        text = os.path.abspath(expand_home(text)) + trail  # noqa: PTH100  # PathLike gives str
    check_path(text, name, longest=_LONGEST)
    return text


class LocalSocket:
    """A listening Unix socket of mode 0600; made by :func:`bind`.

    :ivar sock: the socket
    :ivar path: where it is
    """

    def __init__(self, sock: socket.socket, path: str) -> None:
        self.sock = sock
        self.path = path
        self._pid = os.getpid()
        self._file = _stat(path)

    def __repr__(self) -> str:
        return f"<LocalSocket {self.path}>"

    def close(self) -> None:
        """Stop listening and remove the file, unless another has taken its place; idempotent."""
        ours, self._file = self._file, None
        # A forked child has a copy of the socket; the file is its parent's.
        if ours and os.getpid() == self._pid:
            file = _stat(self.path)
            if file and _same(file, ours):
                _remove(self.path)
        self.sock.close()


def bind(path: str) -> LocalSocket:
    """Listen on a socket that only this account may connect to.

    What is left of a program that has ended is removed first, but only where nobody listens.

    :param path: as :func:`check_here` gives it
    :raises SocketInUseError: somebody listens there, or it is something else than a socket of ours
    :raises ForwardError: it cannot be made, or not be kept from others
    """
    for _ in range(_TRIES):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.bind(path)
            _make_private(path)
            sock.listen(_BACKLOG)  # before this nobody can connect, so nobody came in by its first mode
        except OSError as exc:
            sock.close()
            if exc.errno != errno.EADDRINUSE:
                msg = f"the socket {path} cannot be made ({exc.strerror})"
                hint = "check that its folder is there, and that you may write to it"
                raise ForwardError(msg, hint=hint) from exc
            _clear(path)
        except ForwardError:
            _remove(path)
            sock.close()
            raise
        else:
            return LocalSocket(sock, path)
    raise _taken(path, "others take it again and again")


def _make_private(path: str) -> None:
    os.chmod(path, stat.S_IRUSR | stat.S_IWUSR)  # noqa: PTH101  # a path as the system has it, not a Path
    file = _stat(path)
    if not file or not stat.S_ISSOCK(file.st_mode) or file.st_uid != os.geteuid() or file.st_mode & 0o077:
        msg = f"others may connect to the socket {path}: its file system keeps no permissions"
        raise ForwardError(msg, hint="choose a folder in your home, or in XDG_RUNTIME_DIR")
    folder = os.stat(os.path.dirname(path))  # noqa: PTH116, PTH120
    if folder.st_mode & stat.S_IWOTH and not folder.st_mode & stat.S_ISVTX:
        msg = f"others may put a socket of theirs in the place of {path}: everybody may write to its folder"
        raise ForwardError(msg, hint="choose a folder that only you may write to")


def _clear(path: str) -> None:
    """Remove what a program that has ended left behind.

    :raises SocketInUseError: if it is something else, or in use
    """
    file = _stat(path)
    if file is None:
        return  # gone meanwhile
    if not stat.S_ISSOCK(file.st_mode):
        raise _taken(path, "it is a file, and not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        code = probe.connect_ex(path)
    if code == errno.ENOENT:
        return
    if code != errno.ECONNREFUSED:
        raise _taken(path, "it belongs to another user" if code == errno.EACCES else "somebody listens there")
    again = _stat(path)
    if again and _same(file, again):
        try:
            os.unlink(path)  # noqa: PTH108
        except OSError as exc:
            raise _taken(path, f"it cannot be removed: {exc.strerror}") from exc


def _stat(path: str) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except OSError:
        return None


def _same(one: os.stat_result, other: os.stat_result) -> bool:
    """Return whether it is the same file: a number alone may have been given to a new one."""
    return os.path.samestat(one, other) and one.st_mtime_ns == other.st_mtime_ns


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)  # noqa: PTH108


def _taken(path: str, why: str) -> SocketInUseError:
    msg = f"the socket {path} cannot be used ({why})"
    hint = f"choose another {setting('local_socket')}, or end what listens there"
    return SocketInUseError(msg, hint=hint, path=path, side="local")
