"""Hold a server on the remote machine: start it, drain it, report on it, end it.

The package never imports this file: it sends the text to the remote Python, which runs it. So it needs the
standard library only, Python 3.8 or newer, and any POSIX system.

What comes in, on standard input, is one JSON object a line with a ``do`` (see the ``do_`` methods; the first
is ``start``). What goes out, on standard output, is the mark of this launch and one JSON object a line, with
an ``event``: ``started``, ``log``, ``dropped``, ``ready``, ``stopped``, ``continued``, ``beat``, ``exit``,
``gone``, ``failed``, ``crashed``. A ``do`` that is not known is skipped, so a newer client can talk to this.

There are three processes. This one holds everything. The *server* does the work. The *keeper* leads the
server's process group, which pins the group's number, and waits on a pipe whose end tells it that this
process was killed; then it ends the group in our place.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import re
import select
import signal
import sys
import time

TYPE_CHECKING = False  # typing costs milliseconds of a launch and is not needed to run
if TYPE_CHECKING:
    from typing import Any, NoReturn

PROTOCOL = 1
CHUNK = 1 << 16  # bytes read at once, and the longest line before it is cut
OUTBOX = 1 << 20  # bytes that may wait for a slow client; log lines past that are dropped and counted
PATIENCE = 5.0  # seconds between TERM and KILL where nobody says otherwise

_STARTING = re.compile(r"Starting Bokeh server version (\S+) \(running on Tornado ([^\s)]+)\)")
_RUNNING = re.compile(r"Bokeh app running at: https?://\S*?:(\d+)(/.*?)?\s*$")
_PROCESS = re.compile(r"Starting Bokeh server with process id: (\d+)")


class Facts:
    """What Bokeh's log lines say about where it listens. The host in them is never used."""

    def __init__(self) -> None:
        self.versions = ""
        self.port = 0
        self.routes: list[str] = []

    def read(self, line: str) -> dict[str, Any] | None:
        """Take one line; give a ``ready`` message when it was the last of those that matter."""
        found = _STARTING.search(line)
        if found:  # also when --dev starts the server anew
            self.versions, self.port, self.routes = "Bokeh {}, Tornado {}".format(*found.groups()), 0, []
            return None
        found = _RUNNING.search(line)
        if found:
            self.port = int(found.group(1))
            route = found.group(2) or "/"
            if route not in self.routes:  # each process of --num-procs says the same
                self.routes.append(route)
            return None
        found = _PROCESS.search(line)
        if not found or not self.port:
            return None
        return {
            "event": "ready",
            "port": self.port,
            "pid": int(found.group(1)),
            "routes": self.routes or ["/"],
            "versions": self.versions,
        }


def look(pid: int) -> tuple[int, str]:
    """Give the group of a process and the letter of its state; ``(0, "")`` where /proc does not say."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            text = stat.read()
        state, _, group = text.rpartition(b")")[2].split()[:3]  # the name before may hold anything
    except (OSError, ValueError):
        return 0, ""
    return int(group), state.decode()


def members(group: int) -> set[int]:
    """List the processes of a group that still run; a zombie does not."""
    if os.path.exists("/proc/self/stat"):
        table = [(int(name), *look(int(name))) for name in os.listdir("/proc") if name.isdigit()]
    else:
        with os.popen("ps -A -o pid=,pgid=,stat=") as ps:  # noqa: S605, S607 - where ps is, PATH knows
            table = [(int(pid), int(its), state) for pid, its, state in (row.split()[:3] for row in ps)]
    return {pid for pid, its, state in table if its == group and state[:1] not in ("Z", "X")}


def send(group: int, *signals: int) -> None:
    """Send signals to a process group; one that is gone needs none."""
    for number in signals:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: EPERM for a group of zombies
            os.killpg(group, number)


def start_keeper() -> tuple[int, int]:
    """Fork the keeper; give its process id, which is the group's too, and the pipe that it waits on."""
    waits, lifeline = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            keep(waits)
        finally:
            os._exit(0)
    os.setpgid(pid, pid)  # here too, so that the group exists before the server joins it
    os.close(waits)
    return pid, lifeline


def keep(lifeline: int) -> None:
    """Wait until the pipe ends, which means that the supervisor was killed; then end this group."""
    os.setpgid(0, 0)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is sent to the whole group, and we are in it
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):  # the session must not be held open by us
        os.dup2(null, number)
    if lifeline != 3:
        os.dup2(lifeline, 3)
    os.closerange(4, 256)
    while os.read(3, 1):
        pass
    me = os.getpid()
    send(me, signal.SIGTERM, signal.SIGCONT)
    deadline = time.monotonic() + PATIENCE
    while members(me) - {me} and time.monotonic() < deadline:
        time.sleep(0.05)
    send(me, signal.SIGKILL)


class Supervisor:
    """The server, its keeper, and the line to the client.

    :param spec: the ``start`` message; see ``Launch.spec`` on the client's side for its fields
    :param inbox: what was read past that message
    """

    def __init__(self, spec: dict[str, Any], inbox: bytes = b"") -> None:
        self.spec = spec
        self.mark: bytes = spec["mark"].encode()
        self.grace = float(spec["grace"])
        self.lease = float(spec["lease"])
        self.inbox = inbox
        self.outbox: collections.deque[bytes] = collections.deque()
        self.waiting = 0  # bytes in the outbox
        self.dropped = 0  # log lines
        self.deaf = False  # the client's end of standard input is closed
        self.mute = False  # the client's end of standard output is closed
        self.heard = time.monotonic()
        self.left: float | None = None  # when the client was seen to have gone
        self.facts = Facts()
        self.ready: dict[str, Any] | None = None
        self.log: collections.deque[list[str]] = collections.deque(maxlen=1000)
        self.streams: dict[int, tuple[str, bytes]] = {}  # descriptor: name and unfinished line
        self.server = 0
        self.keeper = 0
        self.group = 0
        self.status: int | None = None
        self.halted = False
        self.termed = False  # somebody sent us TERM
        self.kill_at: float | None = None  # set once the server is being ended
        self.killed: float | None = None

    # --- start

    def run(self) -> None:
        """Start the server and hold it until its whole group is gone."""
        self.arm()
        self.keeper, self.lifeline = start_keeper()
        self.group = self.keeper
        try:
            self.spawn()
            self.obey()
            while not self.over():
                self.turn()
        finally:
            send(self.group, signal.SIGKILL)
        self.finish()

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
        argv = [self.word(item) for item in self.spec["argv"]]
        env = dict(os.environb)
        for name in self.spec["unset"]:
            env.pop(encode(name), None)
        env.update((encode(name), encode(value)) for name, value in self.spec["env"].items())
        env.setdefault(b"PYTHONUNBUFFERED", b"1")  # so that what the app prints arrives when it prints it
        actions: list[tuple[Any, ...]] = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
        ends = []
        for number, name in ((1, "out"), (2, "err")):
            ours, theirs = os.pipe()
            os.set_blocking(ours, False)
            self.streams[ours] = (name, b"")
            actions.append((os.POSIX_SPAWN_DUP2, theirs, number))
            ends.append(theirs)
        ignored = [signal.SIGHUP, signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ]  # exec would pass that on
        shown = [os.fsdecode(word) for word in argv]
        try:
            self.server = os.posix_spawnp(
                argv[0], argv, env, file_actions=actions, setpgroup=self.group, setsigdef=ignored
            )
            self.say("started", protocol=PROTOCOL, pid=self.server, supervisor=os.getpid(), argv=shown)
        except OSError as exc:
            self.status = 127
            self.kill_at = time.monotonic()
            self.say("failed", at="spawn", status=127, text=os.strerror(exc.errno or 0), argv=shown)
        for fd in ends:
            os.close(fd)

    def word(self, item: Any) -> bytes:
        """Give one word of the command line; one that is a list is to be found out here."""
        if isinstance(item, str):
            return encode(item)
        kind, text = item
        if kind == "home":
            return os.path.expanduser(encode(text))
        return os.fsencode(sys.executable or text)

    # --- one turn of the loop

    def turn(self) -> None:
        """Wait for whatever comes first, and deal with it; what arrived counts before what ran out."""
        sources = [self.wake, *self.streams] + ([] if self.deaf else [0])
        try:
            readable, writable, _ = select.select(sources, [1] if self.outbox else [], [], self.pause())
        except InterruptedError:
            return
        for fd in readable:
            if fd == self.wake:
                os.read(fd, CHUNK)
            elif fd == 0:
                self.listen()
            else:
                self.drain(fd)
        if writable:
            self.flush()
        self.reap()
        self.check(time.monotonic())

    def pause(self) -> float:
        """How long nothing has to be done, in seconds."""
        if self.kill_at is not None:
            return 0.05
        longest = 1.0 if self.ready and self.ready["pid"] != self.server else 60.0
        return max(0.0, min(longest, self.limit() - time.monotonic()))

    def limit(self) -> float:
        """When the server must end, unless the client is heard from before."""
        since = self.heard + self.lease if self.left is None else self.left
        return since + (self.grace if self.ready else 0.0)

    def check(self, now: float) -> None:
        """Do what is due."""
        if self.termed or now >= self.limit():
            self.end(PATIENCE)
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
                self.say("exit", status=self.status)
                self.end(PATIENCE)

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
        self.log.extend([name, line] for line in lines)
        self.say("log", stream=name, lines=lines)
        for line in lines:
            ready = self.facts.read(line)
            if ready and (self.ready is None or ready["port"] != self.ready["port"]):
                self.ready = ready
                self.say(**ready)

    # --- the client

    def say(self, event: str, **more: Any) -> None:
        """Tell the client, without ever waiting for it."""
        if self.mute:
            return
        if event == "log" and self.waiting > OUTBOX:
            self.dropped += len(more["lines"])
            return
        data = self.mark + json.dumps(dict(more, event=event)).encode("ascii") + b"\n"
        self.outbox.append(data)
        self.waiting += len(data)
        self.flush()

    def flush(self) -> None:
        """Write as much as the client takes now."""
        try:
            while self.outbox:
                sent = os.write(1, self.outbox[0])
                self.waiting -= sent
                if sent < len(self.outbox[0]):
                    self.outbox[0] = self.outbox[0][sent:]
                else:
                    self.outbox.popleft()
        except BlockingIOError:
            return
        except OSError:  # nobody reads any more
            self.mute = True
            self.outbox.clear()
            self.gone()
            return
        if self.dropped:
            dropped, self.dropped = self.dropped, 0
            self.say("dropped", lines=dropped)

    def gone(self) -> None:
        if self.left is None:
            self.left = time.monotonic()

    def listen(self) -> None:
        """Read what the client says, and obey."""
        try:
            data = os.read(0, CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.deaf = True
            self.gone()
            return
        self.heard = time.monotonic()
        self.inbox += data
        self.obey()

    def obey(self) -> None:
        """Do what the lines say that have come in whole."""
        *lines, self.inbox = self.inbox.split(b"\n")
        for line in lines:
            try:
                message = json.loads(line)
                method = getattr(self, "do_" + message["do"], None)
                if method:
                    method(message)
            except (ValueError, TypeError, KeyError):  # from another version of the client
                continue

    def do_lease(self, message: dict[str, Any]) -> None:
        """Go on; ``grace`` and ``lease``, in seconds, where they are to change from now on."""
        self.grace = float(message.get("grace", self.grace))
        self.lease = float(message.get("lease", self.lease))
        self.say("beat")

    def do_stop(self, message: dict[str, Any]) -> None:
        """End the server now, with ``patience`` seconds between TERM and KILL."""
        self.end(float(message.get("patience", PATIENCE)))

    # --- the end

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
        return self.status is not None and not members(self.group) - {self.keeper}

    def finish(self) -> None:
        """Reap what is left, say so, and give the client a moment to take it."""
        self.drain_all()
        if self.keeper:
            os.waitpid(self.keeper, 0)
        self.say("gone", status=self.status)
        deadline = time.monotonic() + 2
        while self.outbox and time.monotonic() < deadline:
            select.select([], [1], [], 0.2)
            self.flush()


def encode(text: str) -> bytes:
    """Give the bytes that the caller meant, whatever this machine's locale is."""
    return text.encode("utf-8", "surrogateescape")


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
        os._exit(4)
    os._exit(0)


if __name__ == "__main__":
    main()
