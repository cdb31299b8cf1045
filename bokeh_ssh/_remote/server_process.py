"""The server that is held, and its processes: how it is started, read, seen to listen, and ended.

Runs on the remote machine, as the lower half of the supervisor: standard library only, Python 3.8 or newer,
any POSIX system. It knows no client; what happens is told by ``say``.
"""

from __future__ import annotations

import collections
import contextlib
import os
import re
import socket
import sys
import time

from bokeh_ssh._remote import process_tree
from bokeh_ssh._remote.control_socket import remove_stale
from bokeh_ssh._remote.guardian import Guardian
from bokeh_ssh._remote.process_group import PATIENCE, changes, piped, start
from bokeh_ssh._remote.readiness import (
    READY_FD,
    Facts,
    Watch,
    asked_port,
    close_to_others,
    holds,
    listener,
    listeners,
    parse_notice,
    routes_of,
    users,
)
from bokeh_ssh._remote.run_dir import APPS, HOLDER, SERVER, RunDir, identity, node
from bokeh_ssh._remote.sidecar import Sidecar
from bokeh_ssh._remote.upload_dir import UploadDir

TYPE_CHECKING = False  # typing costs milliseconds of a launch and is not needed to run
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

PROTOCOL = 1
CHUNK = 1 << 16  # bytes read at once, and the longest line before it is cut
CLAIMS = 16  # ports that are looked at together, where log lines say that it listens there
LINES = 1000  # lines kept of the log
TAIL = 1 << 18  # characters kept of the log, which is what one who comes later is told; 1 MiB at most
#: What argparse, click and others say of an option that they do not know.
NO_SUCH_OPTION = re.compile(r"(?i)(unrecognized|unknown|no such) (argument|option)s?\b.{0,40}--unix-socket")
#: Runs a module as ``python -m`` does, without the current directory on its path, where that puts it: an
#: app's random.py is not for Bokeh, which has the app's directory on its path while it runs the app. So it is
#: with the ``bokeh`` command. A server that starts itself anew (``--dev``) has to do that in the same way.
STUB = "import sys; exec(sys.argv[1])"
RUN = (
    "sys.path[:1] = filter(None, sys.path[:1]); import runpy; "
    "from tornado.autoreload import add_reload_hook; "
    "run, name = sys.argv[1:3]; sys.argv = sys.argv[2:]; "
    "add_reload_hook(lambda: (setattr(sys.modules['__main__'], '__spec__', None), "
    f"sys.argv.__setitem__(slice(1), ['-c', {STUB!r}, run, name]))); "
    "runpy.run_module(name, run_name='__main__', alter_sys=True)"
)


class ServerProcess:
    """A server, its guardian, and what goes along with it.

    :param spec: the ``start`` message; see ``Launch.spec`` on the client's side for its fields
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        self.run_dir: RunDir | None = None
        self.nowhere = ""  # why there is no place
        self.upload_dir: UploadDir | None = None  # where the app is that the client brings
        self.sidecar = Sidecar()
        self.facts = Facts()
        self.claims: dict[int, dict[str, Any]] = {}  # what log lines say, by port, and nobody has looked at
        self.claims_at = 0.0  # when to look
        self.port = 0  # the one that it is to listen on, where it is not Bokeh's and cannot tell
        self.before: set[str] = set()  # sockets that others listened on before it was started
        self.socket = ""  # the path that the server is to listen on; empty for a port
        self.socket_fd = -1  # holds on to its socket, should the path be removed
        self.no_socket = ""  # why it is a port though a socket was wanted
        self.watch = Watch(float(spec.get("watch", 0)))
        self.ready: dict[str, Any] | None = None
        self.log: collections.deque[str] = collections.deque()
        self.kept = 0  # characters of it, with line ends
        self.streams: dict[int, tuple[str, bytes]] = {}  # descriptor: name and unfinished line
        self.server = 0
        self.group = 0  # the one that it leads
        self.adopts = False  # what leaves the group, and its parents, becomes a child of ours
        self.guardian: Guardian | None = None  # the server's parent
        self.untold = False  # the guardian was killed where nobody adopts: nothing tells how the server ends
        self.others: set[int] = set()  # children that were there before
        self.asked: set[tuple[int, int]] = set()  # who was sent TERM
        self.status: int | None = None
        self.halted = False
        self.started: dict[str, Any] = {}
        self.stop_requested = False  # somebody wants the server to end, or its time is up
        self.kill_deadline: float | None = None  # set once the server is being ended
        self.killed: float | None = None

    def send(self, event: str, **more: Any) -> None:
        """Send a message to whoever is there, without ever waiting for it."""
        raise NotImplementedError

    def record_of(self) -> dict[str, Any]:
        """Return all that those may know who come later."""
        raise NotImplementedError

    # --- start

    def leave(self) -> None:
        """Remove the place where we are found, and what the client has brought."""
        if self.upload_dir:
            self.upload_dir.remove()
        if self.run_dir:
            self.run_dir.remove()

    def prepare(self) -> None:
        """Choose where it is to listen, and make room for what is brought."""
        if self.spec.get("brings"):
            self.open_upload_dir()
        if self.spec.get("socket"):
            self.no_socket = self.spec.get("no_socket") or self.nowhere
            self.socket = self.run_dir.at(SERVER) if self.run_dir and not self.no_socket else ""
        if self.spec.get("plain"):
            self.find_room()

    def find_room(self) -> None:
        """Find a port for a server that is told where to listen; one that wants a socket has it, or fails."""
        if not self.spec.get("socket"):
            self.port = int(self.spec.get("port", 0)) or int(free_port())
        elif not self.socket:
            self.status = 1
            self.kill_deadline = time.monotonic()
            self.send("failed", at="socket", status=1, text=self.no_socket)

    def open_upload_dir(self) -> None:
        """Make room for what the client brings, and say so; the server is started when all is there."""
        try:
            self.upload_dir = UploadDir(self.run_dir.at(APPS) if self.run_dir else None)
            self.send("depot", path=self.upload_dir.path)
        except OSError as exc:
            self.status = 1
            self.kill_deadline = time.monotonic()
            self.send("failed", at="depot", status=1, text=os.strerror(exc.errno or 0))

    def spawn(self) -> None:
        """Start the server in a group of its own, with both its streams on pipes of ours."""
        if self.upload_dir and self.spec.get("inside"):
            os.chdir(self.upload_dir.path)
        argv = [word for item in self.spec["argv"] for word in self.words(item)]
        env = self.environment(self.spec["signing"] if self.signs() else {})
        env.setdefault(b"PYTHONUNBUFFERED", b"1")  # so that what the app prints arrives when it prints it
        ends = []
        if self.spec.get("notify"):
            ours, theirs = os.pipe()
            os.set_blocking(ours, False)
            os.set_inheritable(theirs, True)
            self.streams[ours] = ("ready", b"")
            env[encode(READY_FD)] = b"%d" % theirs
            ends.append(theirs)
        if not self.is_bokeh():
            self.before = set(listeners() or ())
        shown = [os.fsdecode(word) for word in argv]
        self.facts = Facts(asked_port(shown))
        try:
            out, err = self.start_server(self.without_cwd(argv), env)
            self.streams.update({out: ("out", b""), err: ("err", b"")})
            self.started.update(protocol=PROTOCOL, pid=self.server, supervisor=os.getpid(), argv=shown)
            self.started.update(python=sys.executable, node=node(), nowhere=self.nowhere)
            self.started.update(identity=identity(os.getpid()))
            self.started.update(libraries=os.environ.get("LD_LIBRARY_PATH", ""))
            self.started.update(depot=self.upload_dir.path if self.upload_dir else "")
            if self.run_dir:
                self.started.update(id=self.run_dir.id, place=self.run_dir.path)
                self.run_dir.write(self.record_of())
            self.send("started", **self.started)
        except OSError as exc:
            self.status = 127
            self.kill_deadline = time.monotonic()
            self.send("failed", at="spawn", status=127, text=os.strerror(exc.errno or 0), argv=shown)
        for fd in ends:
            os.close(fd)

    def without_cwd(self, argv: list[bytes]) -> list[bytes]:
        """Return the command that runs a module (``-m``) without what is in the current directory."""
        if self.spec["argv"][0][0] != "python" or argv[1] != b"-m":
            return argv
        return [argv[0], b"-c", encode(STUB), encode(RUN), *argv[2:]]

    def start_server(self, argv: list[bytes], env: dict[bytes, bytes]) -> list[int]:
        """Start the server; return our ends of its streams."""
        if self.group:  # an attempt before: its number is pinned only as long as its guardian lives
            process_tree.end(lambda rows: process_tree.members(self.group, rows), 1.0, self.group)
        streams = piped(lambda outputs: self.guard(lambda: start(argv, env, 0, outputs)))
        self.server = self.group
        return streams

    def guard(self, begin: Callable[[], int]) -> None:
        """Start the server's guardian, by another than before if there was one.

        :param begin: starts it, or gives the one that runs; 0 as long as there is none
        """
        former, mark = self.guardian, self.run_dir.mark if self.run_dir else b""
        self.guardian = Guardian(begin, self.leave, mark, self.adopts)
        self.group = self.guardian.child
        if former:
            former.dismiss()

    def unguarded(self) -> None:
        """Do without a guardian that was killed: the server is our child now, or nobody's."""
        if self.server and not self.adopts:
            self.untold = True
            self.request_stop(PATIENCE)
        else:
            with contextlib.suppress(OSError):
                self.guard(lambda: self.group)

    def environment(self, more: dict[str, str]) -> dict[bytes, bytes]:
        """Return the environment of what is started here."""
        env = dict(os.environb)
        for name in self.spec["unset"]:
            env.pop(encode(name), None)
        env.update((encode(name), encode(value)) for name, value in dict(self.spec["env"], **more).items())
        if self.run_dir:
            name, _, value = self.run_dir.mark.partition(b"=")
            env[name] = value
            env[HOLDER.encode()] = identity(os.getpid()).encode()
        return env

    def signs(self) -> bool:
        """Return whether sessions have to be signed, which may depend on where it listens."""
        signed = self.spec.get("signed", False)
        return not self.socket if signed == "port" else bool(signed)

    def words(self, item: Any) -> list[bytes]:
        """Return the words of the command line that an item stands for; what is a list is found out here."""
        if isinstance(item, str):
            return [encode(item)]
        kind, *texts = item
        if kind == "home":
            return [os.path.expanduser(encode(texts[0]))]
        if kind == "fill":
            text = texts[0].replace("{port}", str(self.port))
            return [encode(text.replace("{socket}", os.fsdecode(self.socket)))]
        if kind == "brought" and self.upload_dir:
            return [encode(self.upload_dir.at(texts[0]))]
        if kind == "listen":
            if self.socket:
                return [b"--unix-socket", os.fsencode(self.socket)]
            return [free_port() if text == "free" else encode(text) for text in texts]
        return [os.fsencode(sys.executable or texts[0])]

    # --- whether it runs and listens

    def reap(self) -> None:
        """Notice that the server was stopped, goes on, or has ended."""
        for pid, event, status in changes(self.server):
            if pid == self.server:
                self.on_server_change(event, status)
            if event != "exit":
                continue
            self.others.discard(pid)
            if self.guardian and pid == self.guardian.pid:
                self.guardian.pid = 0  # which may be another's soon
            elif pid == self.sidecar.pid:
                self.drain_all()
                self.sidecar.note_ended()
                if (
                    self.kill_deadline is None
                ):  # else it is the server's end that counts, which is told by itself
                    self.send("along", word={})

    def on_server_change(self, event: str, status: int) -> None:
        """Take note of what the system says of the server; of its end, once."""
        if event != "exit":
            self.note_halted(event == "stopped")
        if event != "exit" or self.status is not None:
            return
        self.status = status
        self.drain_all()
        if not self.retry():
            self.send("exit", status=self.status)
            self.end(PATIENCE)

    def retry(self) -> bool:
        """Start the server anew with a port, if it is one that does not know of sockets."""
        if (
            not self.socket
            or self.spec.get("plain")
            or self.ready
            or self.kill_deadline is not None
            or self.status == 0
        ):
            return False
        # Only what a parser of options says before it knows more: an app may write what it likes.
        why = [line for line in self.log if NO_SUCH_OPTION.search(line[:1000])]
        if not why or self.status != 2 or self.facts.versions:
            return False
        self.socket, self.no_socket, self.status = "", why[-1].strip()[:300], None
        self.spawn()
        return True

    def look_for_socket(self) -> None:
        """Take note that the server listens on its socket, once it does."""
        if not os.path.lexists(self.socket):
            return
        closed = close_to_others(self.socket)
        pid = listener(self.socket)
        if pid is None:
            return
        if not closed:
            self.record("err", ["its socket is open to others, and cannot be closed to them"])
            self.request_stop(PATIENCE)
            return
        routes = ["/"] if self.spec.get("plain") else self.known_routes()
        message = {"event": "ready", "port": 0, "socket": self.socket, "pid": pid or self.server}
        self.note_listening(dict(message, routes=routes, versions=self.facts.versions))

    def known_routes(self) -> list[str]:
        """Return the routes that the apps are served at, as Bokeh names them."""
        apps = [os.path.expanduser(app) for app in self.spec.get("apps", [])]
        if self.upload_dir:
            apps = [self.upload_dir.at(app) for app in apps]
        return routes_of(apps, self.spec.get("prefix", ""), self.spec.get("glob", False))

    def look_at_claims(self, now: float) -> None:
        """Look whether what log lines say is so; in a tenth of the time at most, whatever an app writes."""
        if not self.claims or now < self.claims_at:
            return
        claims, self.claims = self.claims, {}
        mine = self.processes()  # once for all of them: the list of all processes is the dear part
        for ready in claims.values():
            self.take_word(ready, mine)
        took = time.monotonic() - now
        self.claims_at = now + min(1.0, 10 * took)

    def take_word(self, ready: dict[str, Any], mine: set[int]) -> None:
        """Take what log lines say of a port, if one of these processes listens there: apps write too.

        Not once it is ready: a server that starts itself anew (``--dev``) does so in the same place. Where
        a socket was asked for, only a command of the caller's own may listen on a port after all.
        """
        if self.ready is not None:
            return
        bokeh = self.is_bokeh()
        held = self.holds_port(ready["port"], mine)
        if held is False or (self.socket and (held is None or bokeh)):
            return
        if ready["pid"] not in mine:
            ready["pid"] = self.server
        known = self.known_routes()
        others = known if bokeh else ready["routes"]  # what a command of one's own serves, only it knows
        ready["routes"] = [route for route in ready["routes"] if route in known] or others
        self.note_listening(ready)

    def is_bokeh(self) -> bool:
        """Check whether it is Bokeh's own server, and no command of the caller's own."""
        return bool(self.spec["argv"][0][0] == "python")

    def processes(self) -> set[int]:
        """List the server's processes that still run, as far as they can be found."""
        return self.remaining(process_tree.table()) | {self.server}

    def holds_port(self, port: int, mine: set[int]) -> bool | None:
        """Check whether the server listens on a port; None where the system does not tell.

        A command of the caller's own may have somebody else start what listens (``srun``), or start it as
        another user (``sudo -u``), where it cannot be looked into. Then it has to be new, and of such a user.

        :param mine: the server's processes
        """
        held = holds(mine, port)
        if held is not False or self.is_bokeh():
            return held
        new = {user for name, user in (listeners(port) or {}).items() if name not in self.before}
        return bool(new & users(mine))

    def look_for_port(self) -> None:
        """Take note that the server listens on the port that it was told, once it does."""
        probe = socket.socket()
        try:
            probe.settimeout(0.1)
            probe.connect(("127.0.0.1", self.port))
            if probe.getsockname() == probe.getpeername():
                return  # it got that very port for itself, and has met itself (simultaneous open)
        except OSError:
            return
        finally:
            probe.close()
        taken = self.before & set(listeners(self.port) or ())
        if taken and not holds(self.processes(), self.port):
            return  # it is another server's, which was there before
        message = {"event": "ready", "port": self.port, "pid": self.server, "routes": ["/"], "versions": ""}
        self.note_listening(message)

    def note_listening(self, ready: dict[str, Any]) -> None:
        """Take note that the server listens, and say so."""
        if self.ready is not None:
            return
        if ready.get("port") and self.spec.get("socket"):
            ready["no_socket"] = self.no_socket or "the command does not listen on it"
            self.socket = ""
        self.ready = ready
        if self.socket:
            with contextlib.suppress(OSError):
                self.hold_socket()
        self.send(**ready)
        if self.run_dir:
            self.run_dir.write(self.record_of())
            with contextlib.suppress(OSError):  # what others have left ends nothing of ours
                self.others |= remove_stale()

    def hold_socket(self) -> bool:
        """Put the server's socket back at its path, which was removed; False if that cannot be done.

        A socket lives on without its path. On Linux a descriptor of it is another path to it, which a link in
        the old place leads to: as the server's owner, and nobody else, may follow.
        """
        flags = getattr(os, "O_PATH", None)
        if not os.path.lexists(self.socket):
            if self.socket_fd < 0:
                return False
            os.symlink(f"/proc/{os.getpid()}/fd/{self.socket_fd}", self.socket)
            return os.path.exists(self.socket)
        if flags is None or os.path.islink(self.socket):
            return True
        if self.socket_fd < 0 or not os.path.samestat(os.lstat(self.socket), os.fstat(self.socket_fd)):
            # The first look; or a server that has started itself anew (--dev) listens on a new one.
            before, self.socket_fd = self.socket_fd, os.open(self.socket, flags | os.O_NOFOLLOW)
            if before >= 0:
                os.close(before)
        return True

    def note_halted(self, halted: bool) -> None:
        if halted != self.halted:
            self.halted = halted
            self.send("stopped" if halted else "continued")

    # --- its streams

    def drain(self, fd: int) -> bool:
        """Read what a stream has; say whether there may be more."""
        try:
            data = os.read(fd, CHUNK)
        except BlockingIOError:
            return False
        name, rest = self.streams[fd]
        *lines, rest = (rest + data).split(b"\n")
        if rest and (not data or len(rest) > CHUNK):
            lines.append(rest)
            rest = b""
        self.streams[fd] = (name, rest)
        if not data:
            del self.streams[fd]
            os.close(fd)
        if lines:
            self.record(name, [line.rstrip(b"\r").decode("utf-8", "replace") for line in lines])
        return bool(data)

    def drain_all(self) -> None:
        """Read what the server wrote before it ended; a grandchild that writes on does not hold us."""
        for fd in list(self.streams):
            for _ in range(64):
                if not self.drain(fd):
                    break

    def record(self, name: str, lines: list[str]) -> None:
        if name == "ready":
            for word in filter(None, map(parse_notice, lines)):
                self.note_listening(dict(word, pid=self.server))
            return
        if name == "along":
            if self.sidecar.read_status(lines):
                self.send("along", word=self.sidecar.status)
            return
        self.keep_of_log(lines)
        self.send("log", stream=name, lines=lines)
        # One of another kind is looked for where it was told to listen, whatever it writes.
        for line in [] if self.spec.get("notify") or self.spec.get("plain") or self.ready else lines:
            ready = self.facts.read(line)
            if ready:  # what an app writes while it is imported comes first, and Bokeh's own last
                self.claims.pop(ready["port"], None)
                self.claims[ready["port"]] = ready
                if len(self.claims) > CLAIMS:
                    del self.claims[next(iter(self.claims))]
        self.look_at_claims(time.monotonic())

    def keep_of_log(self, lines: list[str]) -> None:
        """Keep the last lines, and no more than is ever told of them."""
        last = lines[-LINES:]
        self.log.extend(last)
        self.kept += sum(len(line) + 1 for line in last)
        while len(self.log) > LINES or self.kept > TAIL:
            self.kept -= len(self.log.popleft()) + 1

    def tail(self, most: int) -> list[str]:
        """Return the last lines of the log, with no more than ``most`` characters."""
        lines: list[str] = []
        for line in reversed(self.log):
            most -= len(line) + 1
            if most < 0:
                break
            lines.append(line)
        return lines[::-1]

    # --- the end

    def request_stop(self, patience: float) -> None:
        """End the server because somebody wants it, or because its time is up."""
        if self.kill_deadline is None:
            self.stop_requested = True
        self.end(patience)

    def end(self, patience: float) -> None:
        """Ask the whole group to end, and see to it after ``patience`` seconds."""
        kill_deadline = time.monotonic() + patience
        if self.kill_deadline is None:
            self.kill_deadline = kill_deadline
            self.press_remaining()
        self.kill_deadline = min(self.kill_deadline, kill_deadline)

    def is_over(self) -> bool:
        """Whether nothing of the group is left, or what is left cannot be ended by anyone."""
        if self.kill_deadline is None:
            return False
        if self.killed is not None and time.monotonic() > self.killed + PATIENCE:
            return True
        if not self.server:
            return True
        return (self.untold or self.status is not None) and not self.remaining(process_tree.table())

    def remaining(self, rows: process_tree.Table) -> set[int]:
        """List what still runs of the server's group and, where it can be known, of all that was started."""
        found = process_tree.members(self.group, rows)
        if self.adopts:
            found |= process_tree.below(os.getpid(), rows, self.others)
        return found - {self.guardian.pid if self.guardian else 0}

    def press_remaining(self) -> None:
        """End what remains: TERM once, and KILL when it is time for that."""
        rows = process_tree.table()
        process_tree.press(self.remaining(rows), rows, self.asked, self.group, self.killed is not None)


def encode(text: str) -> bytes:
    """Return the bytes that the caller meant, whatever this machine's locale is."""
    return text.encode("utf-8", "surrogateescape")


def free_port() -> bytes:
    """Return the number of a port that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return b"%d" % probe.getsockname()[1]
