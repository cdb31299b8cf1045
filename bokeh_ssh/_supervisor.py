"""Hold a server on the remote machine: start it, drain it, report on it, end it.

The package never imports this file: it sends the text to the remote Python, which runs it. So it needs the
standard library only (with ``_place`` and others, which are sent along), Python 3.8 or newer, and any POSIX
system.

What comes in, on standard input, is one JSON object a line with a ``do`` (see the ``do_`` methods; the first
is ``start``). What goes out, on standard output, is the mark of this launch and one JSON object a line, with
an ``event``: ``depot``, ``stored``, ``started``, ``log``, ``dropped``, ``ready``, ``stopped``, ``continued``,
``beat``, ``busy``, ``answers``, ``detached``, ``taken``, ``exit``, ``gone``, ``failed``, ``crashed``. A
``do`` that is not known is skipped, so a newer client can talk to this.

A client that comes back, or another one, knocks at the control socket (the ``ask_`` methods). One that
adopts the server hands in its own standard input and output, which replace those that there were: from then
on all is as it was with the first.

There are three processes. This one holds everything. The *server* does the work. The *keeper* leads the
server's process group, which pins the group's number, and waits on a pipe whose end tells it that this
process was killed; then it ends the group in our place.
"""

from __future__ import annotations

import binascii
import collections
import contextlib
import json
import os
import select
import signal
import socket
import sys
import time

from bokeh_ssh._depot import Depot
from bokeh_ssh._door import Door, Guest, sweep
from bokeh_ssh._group import PATIENCE, look, members, send, start_keeper
from bokeh_ssh._place import APPS, CONTROL, SERVER, Place, make, node
from bokeh_ssh._readiness import READY_FD, Facts, Watch, close_to_others, listener, mask, routes_of, told
from bokeh_ssh._wire import Wire

TYPE_CHECKING = False  # typing costs milliseconds of a launch and is not needed to run
if TYPE_CHECKING:
    from typing import Any, NoReturn

PROTOCOL = 1
CHUNK = 1 << 16  # bytes read at once, and the longest line before it is cut
TAIL = 1 << 18  # characters of the log that one who comes later is told
WITHIN = "BOKEH_SSH_WITHIN"  # tells a supervisor started by a server which one that was
LAST = 100  # lines of the log in the record of a server that ended while nobody was there


class Supervisor:
    """The server, its keeper, and the line to the client.

    :param spec: the ``start`` message; see ``Launch.spec`` on the client's side for its fields
    :param inbox: what was read past that message
    """

    def __init__(self, spec: dict[str, Any], inbox: bytes = b"") -> None:
        self.spec = spec
        self.wire = Wire(spec["mark"], inbox)
        self.grace = float(spec["grace"])
        self.lease = float(spec["lease"])
        self.token = str(spec.get("token", ""))
        self.keep = False  # nobody has to be there
        self.heard = time.monotonic()
        self.left: float | None = None  # when the client was seen to have gone
        self.place: Place | None = None
        self.door: Door | None = None
        self.nowhere = ""  # why there is no place
        self.depot: Depot | None = None  # where the app is that the client brings
        self.client: Guest | None = None  # what holds the session of one that came later
        self.waiters: list[Guest] = []  # they want to know when all is over
        self.born = time.time()
        self.since = time.time()  # when the client came or went
        self.facts = Facts()
        self.port = 0  # the one that it is to listen on, where it is not Bokeh's and cannot tell
        self.socket = ""  # the path that the server is to listen on; empty for a port
        self.no_socket = ""  # why it is a port though a socket was wanted
        self.watch = Watch(float(spec.get("watch", 0)))
        self.ready: dict[str, Any] | None = None
        self.log: collections.deque[str] = collections.deque(maxlen=1000)
        self.streams: dict[int, tuple[str, bytes]] = {}  # descriptor: name and unfinished line
        self.server = 0
        self.keeper = 0
        self.group = 0
        self.status: int | None = None
        self.halted = False
        self.was_busy = False
        self.started: dict[str, Any] = {}
        self.ordered = False  # somebody wants the server to end, or its time is up
        self.seen = False  # the client knows that the server has ended
        self.termed = False  # somebody sent us TERM
        self.kill_at: float | None = None  # set once the server is being ended
        self.killed: float | None = None

    # --- start

    def run(self) -> None:
        """Start the server, once what it needs is here, and hold it until its whole group is gone."""
        self.arm()
        self.place, self.door, self.nowhere = make(lambda path: Door(os.path.join(path, CONTROL)))
        if self.spec.get("brings"):
            self.open_depot()
        self.keeper, self.lifeline = start_keeper(self.leave)
        self.group = self.keeper
        if self.spec.get("socket"):
            self.no_socket = self.spec.get("no_socket") or self.nowhere
            self.socket = self.place.at(SERVER) if self.place and not self.no_socket else ""
        if self.spec.get("plain"):
            self.find_room()
        try:
            if self.kill_at is None and not self.spec.get("brings"):
                self.spawn()
            self.obey()
            while not self.over():
                self.turn()
        finally:
            send(self.group, signal.SIGKILL)
        self.finish()

    def find_room(self) -> None:
        """Find a port for a server that is told where to listen; one that wants a socket has it, or fails."""
        if not self.spec.get("socket"):
            self.port = int(self.spec.get("port", 0)) or int(free_port())
        elif not self.socket:
            self.status = 1
            self.kill_at = time.monotonic()
            self.say("failed", at="socket", status=1, text=self.no_socket)

    def open_depot(self) -> None:
        """Make room for what the client brings, and say so; the server is started when all is there."""
        try:
            self.depot = Depot(self.place.at(APPS) if self.place else None)
            self.say("depot", path=self.depot.path)
        except OSError as exc:
            self.status = 1
            self.kill_at = time.monotonic()
            self.say("failed", at="depot", status=1, text=os.strerror(exc.errno or 0))

    def leave(self) -> None:
        """Remove the place where we are found, and what the client has brought."""
        if self.depot:
            self.depot.remove()
        if self.place:
            self.place.remove()

    def arm(self) -> None:
        """Make sure that neither a signal nor a client that has gone or stalled can stop us."""
        self.wake, wakes = os.pipe()
        for fd in (self.wake, wakes, 1):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self.on_term)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 2)
        os.close(null)

    def on_term(self, *_: object) -> None:
        self.termed = True

    def spawn(self) -> None:
        """Start the server in the keeper's group, with both its streams on pipes of ours."""
        if self.depot and self.spec.get("inside"):
            os.chdir(self.depot.path)
        argv = [word for item in self.spec["argv"] for word in self.words(item)]
        env = dict(os.environb)
        for name in self.spec["unset"]:
            env.pop(encode(name), None)
        more = dict(self.spec["env"], **(self.spec["signing"] if self.signs() else {}))
        env.update((encode(name), encode(value)) for name, value in more.items())
        env.setdefault(b"PYTHONUNBUFFERED", b"1")  # so that what the app prints arrives when it prints it
        if self.place:
            env[encode(WITHIN)] = encode(self.place.id)
        actions: list[tuple[Any, ...]] = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
        ends = []
        for number, name in ((1, "out"), (2, "err")):
            ours, theirs = os.pipe()
            os.set_blocking(ours, False)
            self.streams[ours] = (name, b"")
            actions.append((os.POSIX_SPAWN_DUP2, theirs, number))
            ends.append(theirs)
        if self.spec.get("notify"):
            ours, theirs = os.pipe()
            os.set_blocking(ours, False)
            os.set_inheritable(theirs, True)
            self.streams[ours] = ("ready", b"")
            env[encode(READY_FD)] = b"%d" % theirs
            ends.append(theirs)
        ignored = [signal.SIGHUP, signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ]  # exec would pass that on
        shown = [os.fsdecode(word) for word in argv]
        try:
            self.server = os.posix_spawnp(
                argv[0], argv, env, file_actions=actions, setpgroup=self.group, setsigdef=ignored
            )
            self.started.update(protocol=PROTOCOL, pid=self.server, supervisor=os.getpid(), argv=shown)
            self.started.update(python=sys.executable, node=node(), nowhere=self.nowhere)
            self.started.update(libraries=os.environ.get("LD_LIBRARY_PATH", ""))
            if self.place:
                self.started.update(id=self.place.id, place=self.place.path)
                self.place.write(self.record_of())
            self.say("started", **self.started)
        except OSError as exc:
            self.status = 127
            self.kill_at = time.monotonic()
            self.say("failed", at="spawn", status=127, text=os.strerror(exc.errno or 0), argv=shown)
        for fd in ends:
            os.close(fd)

    def signs(self) -> bool:
        """Tell whether sessions have to be signed, which may depend on where it listens."""
        signed = self.spec.get("signed", False)
        return not self.socket if signed == "port" else bool(signed)

    def words(self, item: Any) -> list[bytes]:
        """Give the words of the command line that an item stands for; what is a list is found out here."""
        if isinstance(item, str):
            return [encode(item)]
        kind, *texts = item
        if kind == "home":
            return [os.path.expanduser(encode(texts[0]))]
        if kind == "fill":
            text = texts[0].replace("{port}", str(self.port))
            return [encode(text.replace("{socket}", os.fsdecode(self.socket)))]
        if kind == "brought" and self.depot:
            return [encode(self.depot.at(texts[0]))]
        if kind == "listen":
            if self.socket:
                return [b"--unix-socket", os.fsencode(self.socket)]
            return [free_port() if text == "free" else encode(text) for text in texts]
        return [os.fsencode(sys.executable or texts[0])]

    # --- one turn of the loop

    def turn(self) -> None:
        """Wait for whatever comes first, and deal with it; what arrived counts before what ran out."""
        sources = [self.wake, *self.streams, *self.wire.sources()]
        knocks = self.door.fds() if self.door else []
        held = self.client.fileno() if self.client else -1
        looks = self.watch.fds()
        sources += knocks + looks + [held] * (held >= 0)
        try:
            readable, writable, _ = select.select(sources, self.wire.sinks(), [], self.pause())
        except InterruptedError:
            return
        for fd in readable:
            if fd == self.wake:
                os.read(fd, CHUNK)
            elif fd == 0:
                self.listen()
            elif fd in self.streams:
                self.drain(fd)
            elif fd in looks:
                self.watch.answered()
            elif fd == held:  # whoever held the client's session has ended
                self.gone()
        for fd in readable:
            if self.door and fd in knocks:
                self.welcome(self.door.open(fd))
                break  # all descriptors may be others now
        if writable:
            self.flush()
        self.reap()
        self.check(time.monotonic())

    def pause(self) -> float:
        """How long nothing has to be done, in seconds."""
        if self.kill_at is not None:
            return 0.05
        if self.socket and not self.ready:
            return 0.02  # its socket is not told of, but looked for
        if self.port and not self.ready:
            return 0.1  # likewise; each look takes a port
        longest = 1.0 if self.ready and self.ready["pid"] != self.server else 60.0
        if self.ready and self.watch.pause and self.attached():
            longest = min(longest, max(0.0, self.watch.due - time.monotonic()))
        return max(0.0, min(longest, self.limit() - time.monotonic()))

    def limit(self) -> float:
        """When the server must end, unless the client is heard from before."""
        if self.keep and not self.attached():
            return float("inf")
        since = self.heard + self.lease if self.left is None else self.left
        return since + (self.grace if self.ready else 0.0)

    def check(self, now: float) -> None:
        """Do what is due."""
        if self.termed or now >= self.limit():
            self.order(PATIENCE)
        if self.door:
            self.door.tidy()
        if self.place:
            self.place.touch()
        if self.socket and not self.ready:
            self.look_for_socket()
        if self.port and self.server and not self.ready and self.status is None:
            self.look_for_port()
        if self.ready and self.watch.pause and self.kill_at is None:
            self.look_at_server(now)
        if self.kill_at is not None and now >= self.kill_at and self.killed is None:
            self.killed = now
            send(self.group, signal.SIGKILL)
        if self.ready and self.ready["pid"] != self.server:  # a wrapper's child: no signal tells us of it
            group, state = look(self.ready["pid"])
            if group == self.group:
                self.halt(state in ("T", "t"))

    def reap(self) -> None:
        """Notice that the server was stopped, goes on, or has ended."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            except ChildProcessError:
                return
            if not pid:
                return
            if os.WIFSTOPPED(status) or os.WIFCONTINUED(status):
                if pid == self.server:
                    self.halt(os.WIFSTOPPED(status))
            elif pid == self.keeper:
                self.keeper = 0
            elif pid == self.server:
                self.status = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
                self.drain_all()
                if self.retry():
                    continue
                self.say("exit", status=self.status)
                self.end(PATIENCE)

    def retry(self) -> bool:
        """Start the server anew with a port, if it is one that does not know of sockets."""
        if (
            not self.socket
            or self.spec.get("plain")
            or self.ready
            or self.kill_at is not None
            or self.status == 0
        ):
            return False
        why = [line for line in self.log if "unix" in line.lower() and "socket" in line.lower()]
        if not why:
            return False
        self.socket, self.no_socket, self.status = "", why[-1].strip()[:300], None
        self.spawn()
        return True

    def look_for_socket(self) -> None:
        """Take note that the server listens on its socket, once it does."""
        pid = listener(self.socket)
        if pid is None:
            return
        if not close_to_others(self.socket):
            self.record("err", ["its socket is open to others, and cannot be closed to them"])
            self.order(PATIENCE)
            return
        globs, prefix = self.spec.get("glob", False), self.spec.get("prefix", "")
        apps = [os.path.expanduser(app) for app in self.spec.get("apps", [])]
        if self.depot:
            apps = [self.depot.at(app) for app in apps]
        routes = ["/"] if self.spec.get("plain") else routes_of(apps, prefix, globs)
        message = {"event": "ready", "port": 0, "socket": self.socket, "pid": pid or self.server}
        self.listens(dict(message, routes=routes, versions=self.facts.versions))

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
        message = {"event": "ready", "port": self.port, "pid": self.server, "routes": ["/"], "versions": ""}
        self.listens(message)

    def look_at_server(self, now: float) -> None:
        """See whether the server answers; nobody has to know while nobody is there."""
        if not self.ready or self.halted or not self.attached():
            self.watch.drop()
            return
        self.watch.look(now, self.ready["port"], self.ready.get("socket", ""))
        if self.was_busy != self.watch.busy:
            self.was_busy = self.watch.busy
            self.say("busy" if self.was_busy else "answers")

    def listens(self, ready: dict[str, Any]) -> None:
        """Take note that the server listens, and say so."""
        if self.ready is not None and all(ready.get(k) == self.ready.get(k) for k in ("port", "socket")):
            return
        if ready.get("port") and self.spec.get("socket"):
            ready["no_socket"] = self.no_socket or "the command does not listen on it"
            self.socket = ""
        self.ready = ready
        self.say(**ready)
        if self.place:
            self.place.write(self.record_of())
            sweep()

    def halt(self, halted: bool) -> None:
        if halted != self.halted:
            self.halted = halted
            self.say("stopped" if halted else "continued")

    # --- the server's streams

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
            for word in filter(None, map(told, lines)):
                self.listens(dict(word, pid=self.server))
            return
        self.log.extend(lines)
        self.say("log", stream=name, lines=lines)
        for line in [] if self.spec.get("notify") else lines:
            ready = self.facts.read(line)
            if ready:
                self.listens(ready)

    # --- the client

    def say(self, event: str, **more: Any) -> None:
        """Tell the client, without ever waiting for it."""
        self.wire.say(event, **more)
        if self.wire.mute:
            self.gone()

    def flush(self) -> None:
        """Write as much as the client takes now."""
        self.wire.flush()
        if self.wire.mute:
            self.gone()

    def gone(self) -> None:
        """Take note that the client is no longer there."""
        if self.left is None:
            self.left = time.monotonic()
            self.since = time.time()
        self.dismiss()

    def dismiss(self) -> None:
        """Let what holds a session end."""
        client, self.client = self.client, None
        if client:
            client.answer(bye=True)
            client.close()

    def attached(self) -> bool:
        """Whether a client is there, as far as can be known."""
        return self.left is None and time.monotonic() < self.heard + self.lease

    def listen(self) -> None:
        """Read what the client says, and obey."""
        if self.wire.read():
            self.heard = time.monotonic()
            self.obey()
        elif self.wire.deaf:
            self.gone()

    def obey(self) -> None:
        """Do what the client has said."""
        for message in self.wire.orders():
            method = getattr(self, "do_" + message["do"], None)
            if method:
                with contextlib.suppress(
                    ValueError, TypeError, KeyError
                ):  # from another version of the client
                    method(message)

    def do_lease(self, message: dict[str, Any]) -> None:
        """Go on; ``grace`` and ``lease``, in seconds, where they are to change from now on."""
        self.grace = float(message.get("grace", self.grace))
        self.lease = float(message.get("lease", self.lease))
        self.say("beat")

    def do_stop(self, message: dict[str, Any]) -> None:
        """End the server now, with ``patience`` seconds between TERM and KILL."""
        self.order(float(message.get("patience", PATIENCE)))

    def do_detach(self, message: dict[str, Any]) -> None:
        """Hold the server until somebody wants it to end, whoever comes and goes; or no longer."""
        if message.get("keep") is False:
            self.keep = False
        elif self.place and self.ready and self.kill_at is None:
            self.keep = True
            self.say("detached")

    def do_put(self, message: dict[str, Any]) -> None:
        """Store a part of a file; ``last`` makes it whole, and ``runs`` executable."""
        if self.depot and not self.depot.fault:
            data = binascii.a2b_base64(message["data"])
            self.depot.try_to(self.depot.put, message["name"], data, message["last"], message["runs"])

    def do_link(self, message: dict[str, Any]) -> None:
        """Store a symbolic link to another name."""
        if self.depot and not self.depot.fault:
            self.depot.try_to(self.depot.link, message["name"], message["to"])

    def do_drop(self, message: dict[str, Any]) -> None:
        """Remove what was stored."""
        if self.depot and not self.depot.fault:
            self.depot.try_to(self.depot.drop, message["name"])

    def do_sync(self, message: dict[str, Any]) -> None:
        """Say how far we are; what could not be stored is told once, and the next try is a new one."""
        if self.depot:
            fault, self.depot.fault = self.depot.fault, ""
            self.say("stored", number=int(message["number"]), size=self.depot.size, fault=fault)

    def do_go(self, _: dict[str, Any]) -> None:
        """Start the server: all is here."""
        if self.depot and not self.server and self.kill_at is None:
            self.spawn()

    def do_seen(self, _: dict[str, Any]) -> None:
        """Take note that the client knows of the end."""
        self.seen = True

    # --- who comes later

    def welcome(self, guest: Guest | None) -> None:
        """Do what one who knocked asks for, or say why not."""
        if guest is None or guest.request is None:
            return
        try:
            method = getattr(self, "ask_" + str(guest.request.get("do")), None)
            refusal = method(guest, guest.request) if method else "unknown"
        except (ValueError, TypeError, KeyError):
            refusal = "unknown"
        if refusal:
            guest.answer(error=refusal, **self.record_of())
            guest.close()

    def ask_status(self, guest: Guest, _: dict[str, Any]) -> str:
        """Tell what there is to know."""
        guest.answer(**self.record_of())
        guest.close()
        return ""

    def ask_stop(self, guest: Guest, request: dict[str, Any]) -> str:
        """End the server; the guest is told when all is over."""
        self.order(float(request.get("patience", PATIENCE)))
        self.waiters.append(guest)
        guest.answer(stopping=True)
        return ""

    def ask_adopt(self, guest: Guest, request: dict[str, Any]) -> str:
        """Change to another client, whose standard input and output come along.

        With the right token it is the same client again, which also ends a session that only seems to be
        there. Without it, it is another one; then the token changes, so that the first does not take the
        server back unasked.
        """
        if self.kill_at is not None and self.status is not None and not self.ordered:
            self.waiters.append(guest)
            guest.answer(over=False)
            return ""
        if self.kill_at is not None:
            return "gone"
        if self.ready is None:
            return "starting"
        mark, known = str(request["mark"]), request.get("token") == self.token
        lease, grace = float(request.get("lease", self.lease)), float(request.get("grace", self.grace))
        if self.attached() and not known:
            return "attached"
        if len(guest.fds) != 2:
            return "unknown"
        if not known:
            self.token = os.urandom(16).hex()
        self.wire.part()
        self.dismiss()
        fds, guest.fds = guest.fds, []
        self.wire.change(fds, mark)
        guest.answer(adopted=True)
        self.client = guest
        self.lease, self.grace = lease, grace
        self.heard, self.left, self.since = time.monotonic(), None, time.time()
        self.introduce()
        return ""

    def introduce(self) -> None:
        """Tell one who came later what the first was told."""
        key = self.spec["signing"].get("BOKEH_SECRET_KEY", "") if self.signs() else ""
        self.say("started", token=self.token, detached=self.keep, key=key, **self.started)
        self.say("log", stream="", lines=self.tail(TAIL), again=True)
        if self.ready:
            self.say(**self.ready)
        if self.halted:
            self.say("stopped")
        if self.was_busy:
            self.say("busy")

    def tail(self, most: int) -> list[str]:
        """Give the last lines of the log, with no more than ``most`` characters."""
        lines: list[str] = []
        for line in reversed(self.log):
            most -= len(line) + 1
            if most < 0:
                break
            lines.append(line)
        return lines[::-1]

    def record_of(self) -> dict[str, Any]:
        """Give all that those may know who come later; the token is not among it."""
        argv = self.started.get("argv", [])
        record = dict(
            self.started,
            argv=[mask(*pair) for pair in zip(["", *argv], argv)],  # noqa: B905 - Python 3.10
            apps=self.spec.get("apps", []),
            within=os.environ.get(WITHIN, ""),
            elsewhere=bool(self.spec.get("notify")),
            born=self.born,
            attached=self.attached(),
            since=self.since,
            detached=self.keep,
            halted=self.halted,
            ready=self.ready,
        )
        if self.status is not None:
            record.update(status=self.status, ended=time.time(), log=self.tail(TAIL)[-LAST:])
        return record

    # --- the end

    def order(self, patience: float) -> None:
        """End the server because somebody wants it, or because its time is up."""
        if self.kill_at is None:
            self.ordered = True
        self.end(patience)

    def end(self, patience: float) -> None:
        """Ask the whole group to end, and see to it after ``patience`` seconds."""
        kill_at = time.monotonic() + patience
        if self.kill_at is None:
            self.kill_at = kill_at
            send(self.group, signal.SIGTERM, signal.SIGCONT)  # one that is stopped takes TERM only then
        self.kill_at = min(self.kill_at, kill_at)

    def over(self) -> bool:
        """Whether nothing of the group is left, or what is left cannot be ended by anyone."""
        if self.kill_at is None:
            return False
        if self.killed is not None and time.monotonic() > self.killed + PATIENCE:
            return True
        if not self.server:
            return True
        return self.status is not None and not members(self.group) - {self.keeper}

    def finish(self) -> None:
        """Reap what is left, say so, and give the client a moment to take it."""
        self.drain_all()
        if self.keeper:
            os.waitpid(self.keeper, 0)
        if self.depot:
            self.depot.remove()
        told = self.ordered or not self.ready
        if told:
            self.leave()
        self.say("gone", status=self.status)
        deadline = time.monotonic() + 2
        while self.wire.sinks() or not (told or self.seen or self.left):
            if time.monotonic() > deadline:
                break
            readable, _, _ = select.select(self.wire.sources(), self.wire.sinks(), [], 0.2)
            if readable:
                self.listen()
            self.flush()
        if self.place and not (told or self.seen):
            self.place.write(self.record_of())  # the client may come back for it
            self.place.clear()
        elif not told:
            self.leave()
        for guest in self.waiters:
            guest.answer(over=True, status=self.status)
        self.dismiss()


def encode(text: str) -> bytes:
    """Give the bytes that the caller meant, whatever this machine's locale is."""
    return text.encode("utf-8", "surrogateescape")


def free_port() -> bytes:
    """Give the number of a port that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return b"%d" % probe.getsockname()[1]


def main() -> NoReturn:
    """Read the ``start`` message and do it."""
    text = b""
    while b"\n" not in text:
        data = os.read(0, CHUNK)
        if not data:
            os._exit(3)
        text += data
    first, _, rest = text.partition(b"\n")
    supervisor = Supervisor(json.loads(first), rest)
    try:
        supervisor.run()
    except BaseException:  # noqa: BLE001 - the client must be told whatever it is
        import traceback

        supervisor.say("crashed", text=traceback.format_exc())
        supervisor.leave()
        os._exit(4)
    os._exit(0)
