"""The supervisor's control socket, from inside and from outside: one request, with descriptors, one answer.

A request and an answer are one line of JSON each. The directory's permissions say who may knock (see
``_remote.run_dir``).
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import signal
import socket
import struct
import sys
import time

from bokeh_ssh._remote import process_tree
from bokeh_ssh._remote.process_group import let_go
from bokeh_ssh._remote.run_dir import CONTROL, HOLDER, KEEP, RunDir, identity, list_run_dirs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

MOST_CLIENTS = 32  # that may stand in the door at once
PATIENCE = 10.0  # seconds until one that does not say what it wants is shown out
LONGEST = 1 << 16  # bytes of a request
MENDED = 4.0  # seconds in which a supervisor makes its directory again that was removed: it looks every 2
_GRACE = 5.0  # seconds between TERM and KILL for what nobody holds any more


def peer(sock: socket.socket) -> int | None:
    """Return the user who is on the other end; None where the system does not say."""
    try:
        if hasattr(socket, "SO_PEERCRED"):
            raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            return int(struct.unpack("3i", raw)[1])
        if sys.platform == "darwin" or "bsd" in sys.platform:
            raw = sock.getsockopt(0, 1, 76)  # SOL_LOCAL, LOCAL_PEERCRED, struct xucred
            return int(struct.unpack("2I", raw[:8])[1])
    except (OSError, struct.error):
        pass
    return None


class ControlClient:
    """One who knocked.

    :ivar request: what it wants, once it has said it
    :ivar fds: the descriptors that it has handed in; whoever takes them empties the list
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.since = time.monotonic()
        self.request: dict[str, Any] | None = None
        self.fds: list[int] = []
        self._data = b""

    def fileno(self) -> int:
        return self.sock.fileno()

    def receive(self) -> bool:
        """Read some more of the request; False where none will come."""
        try:
            data, more, _, _ = self.sock.recvmsg(LONGEST, socket.CMSG_SPACE(16))
        except BlockingIOError:
            return True
        except OSError:
            return False
        for level, kind, raw in more:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(raw[: len(raw) - len(raw) % numbers.itemsize])
                self.fds.extend(numbers)
        self._data += data
        if not data or len(self._data) > LONGEST or len(self.fds) > 2:
            return False
        if b"\n" in self._data:
            try:
                request = json.loads(self._data.partition(b"\n")[0])
            except (ValueError, RecursionError):
                return False
            if not isinstance(request, dict):
                return False
            self.request = request
        return True

    def answer(self, **message: Any) -> None:
        """Send it a message; one that does not listen is not waited for."""
        self.sock.settimeout(1.0)
        with contextlib.suppress(OSError):
            self.sock.sendall(json.dumps(message).encode("ascii") + b"\n")

    def close(self) -> None:
        """Show it out."""
        self.sock.close()
        while self.fds:
            os.close(self.fds.pop())


class ControlSocket:
    """The inside.

    :param path: of the socket
    """

    def __init__(self, path: str) -> None:
        self.sock = self._bind(path)
        self.clients: dict[int, ControlClient] = {}

    def _bind(self, path: str) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.bind(path)
            os.chmod(path, 0o600)
            sock.listen(MOST_CLIENTS)
            self._file = os.lstat(path)
        except OSError:
            sock.close()
            raise
        sock.setblocking(False)
        return sock

    def is_at(self, path: str) -> bool:
        """Return whether who knocks there comes to us."""
        try:
            return os.path.samestat(os.lstat(path), self._file)
        except OSError:
            return False

    def rebind(self, path: str) -> None:
        """Listen there again; who stands in the door is not sent away.

        :raises OSError: if that is not possible
        """
        new = path + ".new"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)
        sock = self._bind(new)
        os.rename(new, path)
        self.sock.close()
        self.sock = sock

    def fds(self) -> list[int]:
        """List what to wait for."""
        return [self.sock.fileno(), *self.clients]

    def handle_readable(self, fd: int) -> ControlClient | None:
        """Deal with what came; return a guest that has said what it wants, which is the caller's then."""
        if fd == self.sock.fileno():
            with contextlib.suppress(OSError):
                sock, _ = self.sock.accept()
                sock.setblocking(False)
                client = ControlClient(sock)
                if peer(sock) in (None, 0, os.geteuid()) and len(self.clients) < MOST_CLIENTS:
                    self.clients[client.fileno()] = client
                else:
                    client.close()
            return None
        client = self.clients[fd]
        if not client.receive():
            del self.clients[fd]
            client.close()
        elif client.request is not None:
            del self.clients[fd]
            return client
        return None

    def drop_idle(self) -> None:
        """Show out who has stood there for too long."""
        late = [fd for fd, client in self.clients.items() if time.monotonic() - client.since > PATIENCE]
        for fd in late:
            self.clients.pop(fd).close()


def send_request(
    path: str, request: dict[str, Any], fds: Sequence[int] = (), timeout: float = 5.0
) -> tuple[socket.socket, dict[str, Any]]:
    """Ask a supervisor for something.

    :returns: the connection, still open, and the answer
    :raises ConnectionRefusedError: if there is none any more; FileNotFoundError likewise
    :raises OSError: if it does not answer
    """
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(timeout)
        sock.connect(path)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())] if fds else []
        sock.sendmsg([json.dumps(request).encode("ascii") + b"\n"], rights)
        data = b""
        while b"\n" not in data:
            part = sock.recv(LONGEST)
            if not part:
                raise ConnectionResetError
            data += part
        return sock, json.loads(data.partition(b"\n")[0])
    except ValueError:
        sock.close()
        raise ConnectionAbortedError from None
    except BaseException:
        sock.close()
        raise


def is_stale(run_dir: RunDir) -> bool:
    """Return whether the supervisor of a place is no more; one whose socket was removed makes it again.

    Where its record was removed too, its server's environment says which process it is; else it has the time
    for that.
    """
    record = run_dir.read()
    # On Linux a refusal is the truth; macOS refuses also where many knock at once.
    for pause in [0] if sys.platform == "linux" else [0, 0.02, 0.02]:
        time.sleep(pause)
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(1.0)
            sock.connect(run_dir.at(CONTROL))
        except FileNotFoundError:
            if not record and run_dir.age() < MENDED:
                return False
            break
        except ConnectionRefusedError:
            continue
        except OSError:
            pass
        finally:
            sock.close()
        return False
    known = {os.fsencode(str(record.get("identity", "")))}
    if not record:
        known = process_tree.values(HOLDER.encode(), process_tree.marked(run_dir.mark, process_tree.table()))
    return not any(map(_lives, known))


def _lives(who: bytes) -> bool:
    """Return whether a process still runs that :func:`identity` has named."""
    pid = who.partition(b":")[0]
    return pid.isdigit() and identity(int(pid)).encode() == who


def remove_run_dir(run_dir: RunDir, patience: float) -> None:
    """Remove the place of a supervisor that is no more, and first end what is left of its server.

    Something is left only where all were killed at once that would have ended it.

    :param patience: seconds between TERM and KILL
    """
    process_tree.end(lambda rows: process_tree.marked(run_dir.mark, rows), patience)
    run_dir.remove()


def remove_stale() -> set[int]:
    """Remove the places of supervisors that were killed, and records that nobody came for.

    :returns: children of ours that end what is left of such a server; nobody waits for them
    """
    children = set()
    for run_dir in list_run_dirs():
        if ("ended" in run_dir.read() and run_dir.age() <= KEEP) or not is_stale(run_dir):
            continue
        if "ended" in run_dir.read() or not process_tree.marked(run_dir.mark, process_tree.table()):
            run_dir.remove()
        else:
            pid = os.fork()
            if not pid:
                try:
                    os.setpgid(0, 0)
                    signal.set_wakeup_fd(-1)
                    let_go()
                    remove_run_dir(run_dir, _GRACE)
                finally:
                    os._exit(0)
            children.add(pid)
    return children
