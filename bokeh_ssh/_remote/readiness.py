"""What says that a server listens, and where: its log lines, its socket, or its own word."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import select
import socket
import stat
import struct
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any

#: Numbers a descriptor that a command of the caller's own writes a line of JSON to once it is ready.
READY_FD = "BOKEH_SSH_READY_FD"

_STARTING = re.compile(r"Starting Bokeh server version (\S+) \(running on Tornado ([^\s)]+)\)")
_RUNNING = re.compile(r"Bokeh app running at: http(s?)://\S*?:(\d+)(/.*)?$")
_PROCESS = re.compile(r"Starting Bokeh server with process id: (\d+)")
#: Characters of a line that are read: Bokeh's own are short, and an app may write any.
_LONGEST = 2000
_MOST_ROUTES = 1000
#: An address in what a server of another kind writes: where, the path, the query. Not one in quotes: logs of
#: requests have those of the pages that led there.
_ADDRESS = re.compile(
    r"(?:^|[\s(<=])https?(?:\+unix)?://([^\s/?#\"'<>]+)(/[^\s?#\"'<>]*)?(?:\?([^\s#\"'<>]*))?"
)
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_SHORTEST_SECRET = 8  # characters of a value in a query that is taken for one
_SECRETS = 16
_CLAIMS = 16  # ports that are looked at together, where log lines say that it listens there


class Facts:
    """What Bokeh's log lines say about where it listens. The host in them is never used.

    An app may write such lines too: whether a process of the server listens there has to be seen.

    :param asked: the port that Bokeh is to listen on, the only one that is read of; 0 for any
    """

    def __init__(self, asked: int = 0) -> None:
        self.asked = asked
        self.versions = ""
        self.port = 0
        self.tls = False
        self.routes: dict[str, None] = {}  # in order

    def read(self, line: str) -> dict[str, Any] | None:
        """Take one line; give a ``ready`` message when it was the last of those that matter."""
        line = line[:_LONGEST].rstrip()
        found = _STARTING.search(line)
        if found:  # also when --dev restarts the server
            self.versions, self.port, self.routes = "Bokeh {}, Tornado {}".format(*found.groups()), 0, {}
            return None
        found = _RUNNING.search(line)
        if found:
            port = int(found.group(2)[:6])
            if self.asked and port != self.asked:
                return None
            if port != self.port:  # one of the two is not Bokeh's
                self.port, self.routes = port, {}
            self.tls = bool(found.group(1))
            route = found.group(3) or "/"
            if len(self.routes) < _MOST_ROUTES:
                self.routes[route] = None  # each process of --num-procs says the same
            return None
        found = _PROCESS.search(line)
        if not found or not self.port:
            return None
        return {
            "event": "ready",
            "port": self.port,
            "pid": int(found.group(1)[:9]),
            "routes": list(self.routes) or ["/"],
            "versions": self.versions,
            "tls": self.tls,
        }


class OwnAddress:
    """What a server of another kind than Bokeh's writes of its own address: Jupyter's has a token in it.

    :ivar path: the path with its query; empty where it has written none
    """

    def __init__(self) -> None:
        self.path = ""
        self._secrets: list[str] = []

    def read(self, lines: Iterable[str], port: int, socket: str) -> list[str]:
        """Read it from its log; return the lines without what is secret in it.

        The first address counts, and the last with a secret: a server that restarts itself makes another.

        :param port: the one that it is to listen on, or 0
        :param socket: the path of the socket that it is to listen on, or nothing
        """
        lines = list(lines)
        for line in lines:
            for where, path, query in _ADDRESS.findall(_COLOURS.sub("", line[:_LONGEST])):
                place = where.replace("%2F", "/").replace("%2f", "/") if socket else where.rpartition(":")[2]
                if place != (socket or str(port)):
                    continue
                words = [word.rstrip(".,;)") for word in query.split("&") if word and word[-4:] != "=..."]
                if words or not self.path:
                    self.path = (path.rstrip(".,;)") or "/") + ("?" if words else "") + "&".join(words)
                values = [word.partition("=")[2] for word in words]
                self._secrets += [value for value in values if len(value) >= _SHORTEST_SECRET]
        del self._secrets[:-_SECRETS]
        return [self._mask(line) for line in lines]

    def _mask(self, line: str) -> str:
        for secret in self._secrets:
            line = line.replace(secret, "***")
        return line


def asked_port(words: Sequence[str]) -> int:
    """Return the port that Bokeh is to listen on by its command line; 0 for any."""
    own = list(words[: words.index("--args")] if "--args" in words else words)  # the rest is the app's own
    asked = [own[at + 1] for at, word in enumerate(own[:-1]) if word == "--port"]
    return int(asked[-1]) if asked and asked[-1].isdigit() else 0


def listeners(port: int = 0) -> dict[str, int] | None:
    """Return the TCP sockets that listen, or those on a port, and their users; None if they are hidden."""
    found: dict[str, int] = {}
    try:
        for table in ("tcp", "tcp6"):
            with contextlib.suppress(FileNotFoundError), open("/proc/self/net/" + table) as rows:
                for row in rows:
                    words = row.split()
                    if (
                        len(words) > 9
                        and words[3] == "0A"
                        and (not port or words[1].endswith(":%04X" % port))
                    ):
                        found["socket:[" + words[9] + "]"] = int(words[7])
        if not os.path.exists("/proc/self/net/tcp"):
            return None
    except OSError:
        return None
    return found


def holds(pids: Iterable[int], port: int) -> bool | None:
    """Check whether one of these processes listens on a TCP port; None where the system does not say."""
    sockets = listeners(port)
    if sockets is None:
        return None
    for pid in pids if sockets else ():
        with contextlib.suppress(OSError):
            place = "/proc/%d/fd" % pid
            for name in os.listdir(place):
                with contextlib.suppress(OSError):
                    if os.readlink(place + "/" + name) in sockets:
                        return True
    return False


def users(pids: Iterable[int]) -> set[int]:
    """List the users that these processes run as, and this one does."""
    found = {os.geteuid()}
    for pid in pids:
        with contextlib.suppress(OSError):
            found.add(os.stat("/proc/%d" % pid).st_uid)
    return found


def parse_notice(line: str) -> dict[str, Any] | None:
    """Read what a command says of itself: ``port`` or ``socket``, and maybe ``routes`` and ``versions``."""
    try:
        word = json.loads(line)
        port, path = int(word.get("port", 0)), str(word.get("socket", ""))
        if not port and not path:
            return None
        return {
            "event": "ready",
            "port": port,
            "socket": path,
            "routes": [str(route) for route in word.get("routes", ["/"])],
            "versions": str(word.get("versions", "")),
        }
    # JSON has Infinity, and any depth.
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None


def listener(path: str) -> int | None:
    """Return the process that listens on a socket, 0 if the system does not say; None if none does."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.setblocking(False)
        sock.connect(path)
        if hasattr(socket, "SO_PEERCRED"):
            return int(struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])
    except BlockingIOError:  # it listens, and is busy
        return 0
    except OSError:
        return None
    finally:
        sock.close()
    return 0


def close_to_others(path: str) -> bool:
    """See to it that we may connect to a socket, and nobody else; False if that is not possible."""
    with contextlib.suppress(OSError):
        if stat.S_IMODE(os.lstat(path).st_mode) != 0o600:
            os.chmod(path, 0o600)
        found = os.lstat(path)
        return stat.S_ISSOCK(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
    return False


def routes_of(apps: Sequence[str], prefix: str, globs: bool) -> list[str]:
    """Return the routes that Bokeh serves apps at: on a socket it does not say them.

    :param apps: paths, as on the command line
    :param prefix: the value of ``--prefix``
    :param globs: whether the paths are patterns (``--glob``)
    """
    paths = [path for app in apps for path in (sorted(glob.glob(app)) if globs else [app])]
    front = "/" + prefix.strip("/") if prefix.strip("/") else ""
    routes = []
    for path in paths:
        name = os.path.basename(os.path.abspath(path))
        routes.append(front + "/" + (name if os.path.isdir(path) else os.path.splitext(name)[0]))
    return sorted(dict.fromkeys(routes)) or [front + "/"]


class ReadinessProbe:
    """Looks for where a server listens, until it does; and holds on to its socket.

    :param spec: the ``start`` message
    :param running: lists its processes
    :param routes: lists those that its apps are served at
    :ivar port: the one that it is to listen on, where it is not Bokeh's and cannot say it
    :ivar socket: the path that it is to listen on; empty for a port
    :ivar no_socket: why it is a port though a socket was wanted
    :ivar before: sockets that others listened on before it was started
    :ivar address: what it writes of its address, where it is not Bokeh's
    :ivar ready: the message that says where it listens, once that is known
    """

    def __init__(
        self, spec: dict[str, Any], running: Callable[[], set[int]], routes: Callable[[], list[str]]
    ) -> None:
        self.port = 0
        self.socket = ""
        self.no_socket = ""
        self.before: set[str] = set()
        self.facts = Facts()
        self.address = OwnAddress()
        self.ready: dict[str, Any] | None = None
        self._spec = spec
        self._running = running
        self._routes = routes
        self._claims: dict[int, dict[str, Any]] = {}  # what log lines say, by port, and nobody has looked at
        self._claims_at = 0.0  # when to look
        self._socket_fd = -1  # holds on to its socket, should the path be removed

    def is_bokeh(self) -> bool:
        """Check whether it is Bokeh's own server, and no command of the caller's own."""
        return bool(self._spec["argv"][0][0] == "python")

    def prepare(self, argv: Sequence[str]) -> None:
        """Begin to look for one that is about to be started with this command line."""
        self.facts = Facts(asked_port(argv))
        if not self.is_bokeh():
            self.before = set(listeners() or ())

    def note_ready(self, ready: dict[str, Any]) -> None:
        """Take note where it listens."""
        if ready.get("port") and self._spec.get("socket"):
            ready["no_socket"] = self.no_socket or "the command does not listen on it"
            self.socket = ""
        self.ready = ready
        if self.socket:
            with contextlib.suppress(OSError):
                self.hold_socket()

    def pause(self) -> float:
        """Return how long there is nothing to look at, in seconds."""
        if self.socket:
            return 0.02  # its socket is not announced, but looked for
        if self._claims:
            return max(0.0, self._claims_at - time.monotonic())
        return 0.1 if self.port else float("inf")  # each look takes a port

    def check(self) -> dict[str, Any] | None:
        """Return a ``ready`` message if it listens.

        :raises PermissionError: if its socket is open to others, and cannot be closed to them
        """
        found = self._check_socket() if self.socket else None
        found = found or self.check_claims()
        return found or (self._check_port() if self.port else None)

    def read(self, lines: Iterable[str]) -> None:
        """Read its log, unless it is known where it is to listen: what it writes counts for nothing then."""
        for line in [] if self._spec.get("notify") or self._spec.get("plain") else lines:
            ready = self.facts.read(line)
            if ready:  # what an app writes while it is imported comes first, and Bokeh's own last
                self._claims.pop(ready["port"], None)
                self._claims[ready["port"]] = ready
                if len(self._claims) > _CLAIMS:
                    del self._claims[next(iter(self._claims))]

    def check_claims(self) -> dict[str, Any] | None:
        """Look whether what log lines say is so; in a tenth of the time at most, whatever an app writes."""
        began = time.monotonic()
        if not self._claims or began < self._claims_at:
            return None
        claims, self._claims = self._claims, {}
        mine = self._running()  # once for all of them: the list of all processes is the dear part
        found = next((ready for ready in claims.values() if self._is_true(ready, mine)), None)
        self._claims_at = began + min(1.0, 10 * (time.monotonic() - began))
        return found

    def _is_true(self, ready: dict[str, Any], mine: set[int]) -> bool:
        """Check whether one of these processes listens where log lines say: apps write too.

        Where a socket was asked for, only a command of the caller's own may listen on a port after all.
        """
        bokeh = self.is_bokeh()
        held = self._holds(ready["port"], mine)
        if held is False or (self.socket and (held is None or bokeh)):
            return False
        if ready["pid"] not in mine:
            del ready["pid"]
        known = self._routes()
        others = known if bokeh else ready["routes"]  # what a command of one's own serves, only it knows
        ready["routes"] = [route for route in ready["routes"] if route in known] or others
        return True

    def _holds(self, port: int, mine: set[int]) -> bool | None:
        """Check whether the server listens on a port; None where the system does not say.

        A command of the caller's own may have somebody else start what listens (``srun``), or start it as
        another user (``sudo -u``), where it cannot be looked into. Then it has to be new, and of such a user.

        :param mine: the server's processes
        """
        held = holds(mine, port)
        if held is not False or self.is_bokeh():
            return held
        new = {user for name, user in (listeners(port) or {}).items() if name not in self.before}
        return bool(new & users(mine))

    def _check_socket(self) -> dict[str, Any] | None:
        """Look whether it listens on its socket."""
        if not os.path.lexists(self.socket):
            return None
        closed = close_to_others(self.socket)
        pid = listener(self.socket)
        if pid is None:
            return None
        if not closed:
            raise PermissionError("its socket is open to others, and cannot be closed to them")
        routes = ["/"] if self._spec.get("plain") else self._routes()
        ready = {"event": "ready", "port": 0, "socket": self.socket, "routes": routes}
        return dict(ready, versions=self.facts.versions, **({"pid": pid} if pid else {}))

    def _check_port(self) -> dict[str, Any] | None:
        """Look whether it listens on the port that it was given."""
        sock = socket.socket()
        try:
            sock.settimeout(0.1)
            sock.connect(("127.0.0.1", self.port))
            if sock.getsockname() == sock.getpeername():
                return None  # it got that very port for itself, and has met itself (simultaneous open)
        except OSError:
            return None
        finally:
            sock.close()
        taken = self.before & set(listeners(self.port) or ())
        if taken and not holds(self._running(), self.port):
            return None  # it is another server's, which was there before
        return {"event": "ready", "port": self.port, "routes": ["/"], "versions": ""}

    def hold_socket(self) -> bool:
        """Put the server's socket back at its path, which was removed; False if that cannot be done.

        A socket lives on without its path. On Linux a descriptor of it is another path to it, which a link in
        the old place leads to: as the server's owner, and nobody else, may follow.
        """
        flags = getattr(os, "O_PATH", None)
        if not os.path.lexists(self.socket):
            if self._socket_fd < 0:
                return False
            os.symlink(f"/proc/{os.getpid()}/fd/{self._socket_fd}", self.socket)
            return os.path.exists(self.socket)
        if flags is None or os.path.islink(self.socket):
            return True
        if self._socket_fd < 0 or not os.path.samestat(os.lstat(self.socket), os.fstat(self._socket_fd)):
            # The first look; or a server that has restarted itself (--dev) listens on a new one.
            before, self._socket_fd = self._socket_fd, os.open(self.socket, flags | os.O_NOFOLLOW)
            if before >= 0:
                os.close(before)
        return True


class Watch:
    """Looks now and then whether a server still answers: its event loop, without a request or a log line.

    A connection whose sending side is closed at once is closed by any server that gets to look at it. One
    that computes for long, or hangs, does not get to it.

    :ivar busy: whether the last look had no answer in time
    """

    def __init__(self, pause: float) -> None:
        self.pause = pause  # seconds between two looks, and until one counts as not answered
        self.busy = False
        self.sock: socket.socket | None = None
        self.due = 0.0
        self.full = False  # the server's queue is; there is no connection to wait for

    def fds(self) -> list[int]:
        """List what to wait for."""
        return [self.sock.fileno()] if self.sock and not self.full else []

    def check(self, now: float, port: int, path: str) -> None:
        """Look, if it is time to."""
        if now < self.due:
            return
        # We may be late ourselves, and not have seen an answer that is there.
        self.busy = self.sock is not None and not (self.fds() and select.select(self.fds(), [], [], 0)[0])
        self.drop()
        self.due = now + self.pause
        self.full = False
        self.sock = socket.socket(socket.AF_UNIX if path else socket.AF_INET)
        try:
            self.sock.settimeout(0.1)  # it takes longer only where the queue of a server is full
            self.sock.connect(path or ("127.0.0.1", port))
            self.sock.shutdown(socket.SHUT_WR)
        except (socket.timeout, BlockingIOError):
            self.full = True
        except OSError:  # nobody listens there: then there is nothing to look at
            self.drop()

    def answered(self) -> None:
        """Take note that something came."""
        self.busy = False
        self.drop()

    def drop(self) -> None:
        """Close the connection."""
        sock, self.sock = self.sock, None
        if sock:
            sock.close()


def mask(before: str, word: str) -> str:
    """Hide a word of a command line that its option, or its name, says is a secret."""
    name, equals, _ = word.partition("=")
    if equals and _names_secret(name):
        return name + "=***"
    return "***" if _names_secret(before) else word


def _names_secret(option: str) -> bool:
    """Check whether the value of an option is a secret, as its name goes."""
    name = option.lower()
    at = len(name)
    while at and (name[at - 1].isalnum() or name[at - 1] in "_-"):
        at -= 1
    found = any(word in name[at:] for word in ("secret", "passw", "credential"))
    return name[:1] == "-" and (found or name.endswith(("token", "key")))
