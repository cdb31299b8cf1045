"""The server that is held: how it is started, seen to listen, and what is reported of it."""

from __future__ import annotations

import collections
import contextlib
import errno
import json
import os
import re
import signal
import socket
import sys
import time

from bokeh_ssh._remote import process_tree
from bokeh_ssh._remote.control_group import MemoryGroup
from bokeh_ssh._remote.control_socket import remove_stale
from bokeh_ssh._remote.packing.packer import start_packer
from bokeh_ssh._remote.process_group import PATIENCE, changes
from bokeh_ssh._remote.readiness import READY_FD, ReadinessProbe, Watch, mask, parse_notice, routes_of
from bokeh_ssh._remote.run_dir import APPS, HOLDER, PACKED, SERVER, WITHIN, RunDir, identity, node
from bokeh_ssh._remote.server_process import ServerProcess, Sidecar, Stage
from bokeh_ssh._remote.upload_dir import UploadDir

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from bokeh_ssh._remote.client_stream import Client

PROTOCOL = 1
CHUNK = 1 << 16  # bytes read at once, and the longest line before it is cut
LINES = 1000  # lines kept of the log
TAIL = 1 << 18  # characters kept of the log, which is what one who comes later gets; 1 MiB at most
LAST = 100  # lines of the log in the record of a server that ended while nobody was there
#: Errors of a machine, or an account, that has no more of something.
SCARCE = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
#: What argparse, click and others say of an option that they do not know.
NO_SUCH_OPTION = re.compile(r"(?i)(unrecognized|unknown|no such) (argument|option)s?\b.{0,40}--unix-socket")
#: What Bokeh says where its environment or a config file names a certificate.
NO_TLS = "args are not supported with a unix socket"
#: Runs a module as ``python -m`` does, without the current directory on its path, where that puts it: an
#: app's random.py is not for Bokeh, which has the app's directory on its path while it runs the app. So it is
#: with the ``bokeh`` command. A server that restarts itself (``--dev``) has to do that in the same way.
STUB = "import sys; exec(sys.argv[1])"
RUN = (
    "sys.path[:1] = filter(None, sys.path[:1]); import runpy; "
    "from tornado.autoreload import add_reload_hook; "
    "run, name = sys.argv[1:3]; sys.argv = sys.argv[2:]; "
    "add_reload_hook(lambda: (setattr(sys.modules['__main__'], '__spec__', None), "
    f"sys.argv.__setitem__(slice(1), ['-c', {STUB!r}, run, name]))); "
    "runpy.run_module(name, run_name='__main__', alter_sys=True)"
)


class ServerOutput:
    """The streams that a server, and what runs beside it, write to; and its log.

    :param on_lines: is called with the name of a stream and the lines that have come
    :ivar streams: by descriptor: name and unfinished line
    :ivar log: the last lines, as many as one who comes later gets
    """

    def __init__(self, on_lines: Callable[[str, list[str]], object]) -> None:
        self.streams: dict[int, tuple[str, bytes]] = {}
        self.log: collections.deque[str] = collections.deque()
        self._kept = 0  # characters of it, with line ends
        self._on_lines = on_lines

    def add(self, **streams: int) -> None:
        """Read these too: descriptors by name."""
        self.streams.update((fd, (name, b"")) for name, fd in streams.items())

    def drain(self, fd: int) -> bool:
        """Read what a stream has; return whether there may be more."""
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
            self._on_lines(name, [line.rstrip(b"\r").decode("utf-8", "replace") for line in lines])
        return bool(data)

    def drain_all(self) -> None:
        """Read what the server wrote before it ended; a grandchild that writes on does not hold us."""
        for fd in list(self.streams):
            for _ in range(64):
                if not self.drain(fd):
                    break

    def keep(self, lines: list[str]) -> None:
        """Keep the last lines, and no more than is ever sent of them."""
        last = lines[-LINES:]
        self.log.extend(last)
        self._kept += sum(len(line) + 1 for line in last)
        while len(self.log) > LINES or self._kept > TAIL:
            self._kept -= len(self.log.popleft()) + 1


class Server:
    """A server with its processes, its log, its files, and what runs beside it.

    :param spec: the ``start`` message; see ``Launch.spec`` on the client's side for its fields
    :param client: what is sent the messages
    """

    def __init__(self, spec: dict[str, Any], client: Client) -> None:
        self.spec = spec
        self.client = client
        self.run_dir: RunDir | None = None
        self.nowhere = ""  # why there is none
        self.upload_dir: UploadDir | None = None  # where the app is that the client brings
        self.process = ServerProcess(self.leave)
        self.probe = ReadinessProbe(spec, self.process.running, self.known_routes)
        self.output = ServerOutput(self.take_lines)
        self.sidecar = Sidecar()
        self.watch = Watch(float(spec.get("watch", 0)))
        self.was_busy = False
        self.memory = MemoryGroup()
        self.memory_kills = 0  # in that group, before the server was started
        self.memory_limit: int | None = None  # what it was killed for: bytes, 0 where no limit is known
        self.born = client.since
        self.started: dict[str, Any] = {}

    # --- start

    def leave(self) -> None:
        """Remove the directory where we are found, and what the client has brought."""
        if self.upload_dir:
            self.upload_dir.remove()
        if self.run_dir:
            self.run_dir.remove()

    def fail(self, at: str, status: int, text: str, **more: Any) -> None:
        """Say why it cannot be started."""
        self.process.status = status
        self.process.end(0)
        self.client.send("failed", at=at, status=status, text=text, **more)

    def prepare(self) -> None:
        """Choose where it is to listen; start it, or make room for what the client brings first."""
        if self.run_dir:
            self.process.mark = self.run_dir.mark
        if self.spec.get("brings"):
            self.open_upload_dir()
        if self.spec.get("socket"):
            self.probe.no_socket = self.spec.get("no_socket") or self.nowhere
            self.probe.socket = self.run_dir.at(SERVER) if self.run_dir and not self.probe.no_socket else ""
        if self.spec.get("plain") and not self.probe.socket:
            if self.spec.get("socket"):
                self.fail("socket", 1, self.probe.no_socket)
            self.probe.port = int(self.spec.get("port", 0)) or int(free_port())
        if self.spec.get("brings"):
            self.process.guard(lambda: 0)  # what is brought has to be removed too
        else:
            self.spawn()

    def open_upload_dir(self) -> None:
        """Make room for what the client brings, and say so; the server is started when all is there."""
        try:
            self.upload_dir = UploadDir(self.run_dir.at(APPS) if self.run_dir else None)
            self.client.send("depot", path=self.upload_dir.path)
        except OSError as exc:
            self.fail("depot", 1, os.strerror(exc.errno or 0))

    def spawn(self) -> None:
        """Start the server, with its streams on pipes of ours."""
        if not self.process.advance(Stage.STARTING):
            return
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
            self.output.add(ready=ours)
            env[encode(READY_FD)] = b"%d" % theirs
            ends.append(theirs)
        shown = [os.fsdecode(word) for word in argv]
        self.probe.prepare(shown)
        self.memory_kills = self.memory.kills()
        try:
            out, err = self.process.start(self.reloading(argv) or self.without_cwd(argv), env)
            self.output.add(out=out, err=err)
            self.started.update(
                protocol=PROTOCOL,
                pid=self.process.pid,
                supervisor=os.getpid(),
                identity=identity(os.getpid()),
                argv=shown,
                python=sys.executable,
                node=node(),
                nowhere=self.nowhere,
                libraries=os.environ.get("LD_LIBRARY_PATH", ""),
                depot=self.upload_dir.path if self.upload_dir else "",
            )
            if self.run_dir:
                self.started.update(id=self.run_dir.id, place=self.run_dir.path)
            self.write_record()
            self.client.send("started", **self.started)
        except OSError as exc:
            why = os.strerror(exc.errno or 0)
            if exc.errno == errno.ENOENT and "/" in shown[0] and os.path.exists(shown[0]):
                why = "its first line names a program that is not there, or ends in a carriage return"
            self.fail("spawn", 127, why, argv=shown, scarce=exc.errno in SCARCE)
        for fd in ends:
            os.close(fd)

    def without_cwd(self, argv: list[bytes]) -> list[bytes]:
        """Return the command that runs a module (``-m``) without what is in the current directory."""
        if not self.probe.is_bokeh() or argv[1] != b"-m":
            return argv
        return [argv[0], b"-c", encode(STUB), encode(RUN), *argv[2:]]

    def reloading(self, argv: list[bytes]) -> list[bytes]:
        """Return the command that runs it again whenever its files change (``dev``); empty if none is to."""
        if not self.spec.get("reload"):
            return []
        apps = [os.path.abspath(os.path.expanduser(app)) for app in self.spec["apps"]]
        what = {
            "watched": [self.upload_dir.path] if self.upload_dir else apps,
            "bokeh": self.probe.is_bokeh(),
        }
        stub = b"import sys; sys.path[:1] = filter(None, sys.path[:1]); exec(sys.argv[1])"
        python = os.fsencode(sys.executable or "python3")
        return [python, b"-c", stub, encode(self.spec["reload"]), encode(json.dumps(what)), *argv]

    def environment(self, more: dict[str, str]) -> dict[bytes, bytes]:
        """Return the environment of what is started here."""
        env = dict(os.environb)
        for name in self.spec["unset"]:
            env.pop(encode(name), None)
        given = {name: self.fill(value) for name, value in self.spec["env"].items()}
        env.update((encode(name), encode(value)) for name, value in dict(given, **more).items())
        if self.run_dir:
            name, _, value = self.run_dir.mark.partition(b"=")
            env[name] = value
            env[HOLDER.encode()] = identity(os.getpid()).encode()
        return env

    def signs(self) -> bool:
        """Return whether sessions have to be signed, which may depend on where it listens."""
        signed = self.spec.get("signed", False)
        return not self.probe.socket if signed == "port" else bool(signed)

    def fill(self, text: str) -> str:
        """Return a text with where it is to listen in its places, if it is no server of Bokeh's."""
        if not self.spec.get("plain"):
            return text
        return text.replace("{port}", str(self.probe.port)).replace("{socket}", self.probe.socket)

    def words(self, item: Any) -> list[bytes]:
        """Return the words of the command line that an item stands for; what is a list is found out here."""
        if isinstance(item, str):
            return [encode(item)]
        kind, *texts = item
        if kind == "home":
            return [os.path.expanduser(encode(texts[0]))]
        if kind == "fill":
            return [encode(self.fill(texts[0]))]
        if kind == "brought" and self.upload_dir:
            return [encode(self.upload_dir.at(texts[0]))]
        if kind == "listen":
            if self.probe.socket:
                return [b"--unix-socket", os.fsencode(self.probe.socket)]
            return [free_port() if text == "free" else encode(text) for text in texts]
        return [os.fsencode(sys.executable or texts[0])]

    def known_routes(self) -> list[str]:
        """Return the routes that the apps are served at, as Bokeh names them."""
        apps = [os.path.expanduser(app) for app in self.spec.get("apps", [])]
        if self.upload_dir:
            apps = [self.upload_dir.at(app) for app in apps]
        return routes_of(apps, self.spec.get("prefix", ""), self.spec.get("glob", False))

    # --- what becomes of it

    def take_lines(self, name: str, lines: list[str]) -> None:
        """Take lines of the server's log, its own word that it is ready, or its sidecar's."""
        if name == "ready":
            for ready in filter(None, map(parse_notice, lines)):
                self.note_ready(ready)
        elif name == "along":
            if self.sidecar.read_status(lines):
                self.client.send("along", word=self.sidecar.status)
        else:
            if self.spec.get("plain"):
                before = self.probe.address.path
                lines = self.probe.address.read(lines, self.probe.port, self.probe.socket)
                if self.probe.address.path != before:
                    self.client.send("address", path=self.probe.address.path)
            self.output.keep(lines)
            self.client.send("log", stream=name, lines=lines)
            if self.process.stage is Stage.STARTING:
                self.probe.read(lines)
                self.note_ready(self.probe.check_claims())

    def note_ready(self, ready: dict[str, Any] | None) -> None:
        """Take note that the server listens, and say so; once.

        One that is restarted as its files change is so in the same place.
        """
        if not ready or not self.process.advance(Stage.READY):
            return
        ready.setdefault("pid", self.process.pid)
        if self.spec.get("reload"):
            ready["pid"] = self.process.pid  # the one that stays
        if self.spec.get("packs") and ready.get("socket") and self.run_dir:
            path = self.run_dir.at(PACKED)
            if start_packer(path, ready["socket"], self.process.group):
                ready["packed"] = path
        self.probe.note_ready(ready)
        if ready.get("tls"):
            self.watch.pause = 0  # it would log each look
        self.client.send(**ready)
        self.write_record()
        if self.run_dir:
            with contextlib.suppress(OSError):  # what others have left ends nothing of ours
                self.process.others |= remove_stale()

    def reap(self) -> None:
        """Notice that the server was stopped, goes on, or has ended."""
        for pid, event, status in changes(self.process.pid):
            if pid == self.process.pid:
                self.note_change(event, status)
            if event != "exit":
                continue
            self.process.others.discard(pid)
            if self.process.guardian and pid == self.process.guardian.pid:
                self.process.guardian.pid = 0  # which may be another's soon
            elif pid == self.sidecar.pid:
                self.output.drain_all()
                self.sidecar.note_ended()
                if not self.process.ending:  # else the server's end counts, which is reported by itself
                    self.client.send("along", word={})

    def read_guardian(self) -> None:
        """Take note of what becomes of the server, and of its guardian."""
        assert self.process.guardian
        for event, status in self.process.guardian.read_changes():
            self.note_change(event, status)
        if self.process.guardian.fileno() < 0:
            self.process.replace_guardian()

    def note_change(self, event: str, status: int) -> None:
        """Take note of what the system says of the server; of its end, once."""
        if event != "exit":
            self.note_halted(event == "stopped")
        elif self.process.status is None:
            self.process.status = status
            self.output.drain_all()
            # A shell that has started it, and waits for it, says 128 + 9.
            if status in (-signal.SIGKILL, 128 + signal.SIGKILL) and self.memory.kills() > self.memory_kills:
                self.memory_limit = self.memory.limit()
            if not self.retry():
                self.client.send("exit", status=status, memory=self.memory_limit)
                self.process.end(PATIENCE)

    def note_halted(self, halted: bool) -> None:
        """Take note that the server is stopped, or goes on."""
        if halted != self.process.halted:
            self.process.halted = halted
            self.client.send("stopped" if halted else "continued")

    def retry(self) -> bool:
        """Start the server again with a port, if it is one that does not know of sockets, or has TLS."""
        starting = self.process.stage is Stage.STARTING and self.process.status in (1, 2)
        if not starting or not self.probe.socket or self.spec.get("plain") or self.probe.facts.versions:
            return False
        # Only what a parser of options says before it knows more: an app may write what it likes.
        lines = [line[:1000] for line in self.output.log]
        why = [line for line in lines if NO_SUCH_OPTION.search(line)]
        if self.process.status == 1:
            why = ["Bokeh takes no TLS on a socket"] if any(NO_TLS in line for line in lines) else []
        if not why:
            return False
        self.probe.socket, self.probe.no_socket = "", why[-1].strip()[:300]
        self.process.status = None
        self.spawn()
        return True

    def pause(self) -> float:
        """Return how long there is nothing to look at, in seconds."""
        if self.process.ending:
            return 0.05
        if self.process.stage is Stage.STARTING:
            return self.probe.pause()
        if not self.probe.ready:
            return float("inf")
        pause = 1.0 if self.probe.ready["pid"] != self.process.pid else float("inf")
        if self.watch.pause and self.client.lease.is_held():
            pause = min(pause, max(0.0, self.watch.due - time.monotonic()))
        return pause

    def check(self, now: float) -> None:
        """Look whether it listens, answers and runs, and go on ending it."""
        if self.process.stage is Stage.STARTING:
            try:
                self.note_ready(self.probe.check())
            except PermissionError as exc:
                self.take_lines("err", [str(exc)])
                self.process.end(PATIENCE, requested=True)
        if self.process.stage is Stage.READY and self.watch.pause:
            self.check_answers(now)
        self.process.check(now)
        ready = self.probe.ready
        if ready and ready["pid"] != self.process.pid:  # a wrapper's child: no signal reports it
            row = process_tree.read_process(ready["pid"])
            if row and row[1] == self.process.group:
                self.note_halted(row[2] in ("T", "t"))

    def check_answers(self, now: float) -> None:
        """See whether the server answers; nobody has to know while nobody is there."""
        ready = self.probe.ready
        if not ready or self.process.halted or not self.client.lease.is_held():
            self.watch.drop()
            return
        self.watch.check(now, ready["port"], ready.get("socket", ""))
        if self.was_busy != self.watch.busy:
            self.was_busy = self.watch.busy
            self.client.send("busy" if self.was_busy else "answers")

    # --- what is reported of it

    def is_findable(self) -> bool:
        """Return whether one who comes later can find it."""
        return bool(self.probe.ready and self.run_dir and not self.run_dir.fault)

    def replay_state(self) -> None:
        """Send one who came later what was sent to the first."""
        client = self.client
        key = self.spec["signing"].get("BOKEH_SECRET_KEY", "") if self.signs() else ""
        client.send("started", token=client.token, detached=client.lease.keep, key=key, **self.started)
        client.send("log", stream="", lines=list(self.output.log), again=True)
        if self.sidecar.status:
            client.send("along", word=self.sidecar.status)
        if self.probe.address.path:
            client.send("address", path=self.probe.address.path)
        if self.probe.ready:
            client.send(**self.probe.ready)
        if self.process.halted:
            client.send("stopped")
        if self.was_busy:
            client.send("busy")

    def record(self) -> dict[str, Any]:
        """Return all that those may know who come later; the token is not among it."""
        argv = self.started.get("argv", [])
        record = dict(
            self.started,
            argv=[mask(*pair) for pair in zip(["", *argv], argv)],  # noqa: B905 - Python 3.10
            apps=self.spec.get("apps", []),
            within=os.environ.get(WITHIN, ""),
            elsewhere=bool(self.spec.get("notify")),
            born=self.born,
            attached=self.client.lease.is_held(),
            since=self.client.since,
            detached=self.client.lease.keep,
            halted=self.process.halted,
            along=self.sidecar.status,
            ready=self.probe.ready,
        )
        if self.process.status is not None:
            record.update(
                status=self.process.status,
                memory=self.memory_limit,
                ended=time.time(),
                log=list(self.output.log)[-LAST:],
            )
        return record

    def write_record(self) -> None:
        """Write that where it is looked for."""
        if self.run_dir:
            self.run_dir.write(self.record())


def encode(text: str) -> bytes:
    """Return the bytes that the caller meant, whatever this machine's locale is."""
    return text.encode("utf-8", "surrogateescape")


def free_port() -> bytes:
    """Return the number of a port that nobody has now, and that the system gives to no outgoing connection.

    The server takes it a second later, when it has imported all it needs.
    """
    low, count = 10000, 22768  # the ephemeral ports begin where these end, or higher
    wanted = [low + int.from_bytes(os.urandom(4), "big") % count for _ in range(50)]
    for port in [*wanted, 0]:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return b"%d" % probe.getsockname()[1]
    raise OSError(errno.EADDRINUSE, "no port is free")
