"""Hold a server on the remote machine: start it, drain it, report on it, end it.

The package never imports this file: it sends the text to the remote Python, which runs it. So it needs the
standard library only (with ``_remote.server_process`` and others, which are sent along), Python 3.8 or newer,
and any POSIX system.

What comes in, on standard input, is one JSON object a line with a ``do`` (see the ``do_`` methods; the first
is ``start``). What goes out, on standard output, is the mark of this launch and one JSON object a line, with
an ``event``: ``depot``, ``stored``, ``started``, ``log``, ``dropped``, ``ready``, ``stopped``, ``continued``,
``beat``, ``busy``, ``answers``, ``along``, ``astray``, ``detached``, ``taken``, ``exit``, ``gone``,
``failed``, ``crashed``. A ``do`` that is not known is skipped, so a newer client can talk to this.

A client that comes back, or another one, knocks at the control socket (the ``ask_`` methods). One that
adopts the server hands in its own standard input and output, which replace those that there were: from then
on all is as it was with the first.

There are four processes. This one holds everything. The *server* does the work. The *guardian* is its parent,
and ends it should this process be killed (see ``_remote.guardian``). The *anchor* is what the SSH server has
executed: whatever that does to it when the channel ends, the others are out of its reach (see
``_remote.daemonize``).
"""

from __future__ import annotations

import binascii
import contextlib
import json
import os
import select
import signal
import time

from bokeh_ssh._remote import process_tree
from bokeh_ssh._remote.client_stream import LONGEST, ClientStream
from bokeh_ssh._remote.control_socket import MOST_CLIENTS, ControlClient, ControlSocket
from bokeh_ssh._remote.daemonize import Anchor, detach_session
from bokeh_ssh._remote.process_group import PATIENCE, changes
from bokeh_ssh._remote.readiness import mask
from bokeh_ssh._remote.run_dir import CONTROL, WITHIN, make_run_dir, repair_run_dir, usable
from bokeh_ssh._remote.server_process import CHUNK, TAIL, ServerProcess, encode
from bokeh_ssh._remote.systemd_scope import doom

TYPE_CHECKING = False  # typing costs milliseconds of a launch and is not needed to run
if TYPE_CHECKING:
    from typing import Any, NoReturn

LOOK = 2.0  # seconds between two looks whether we can still be found: see also _remote.control_client
LAST = 100  # lines of the log in the record of a server that ended while nobody was there


class Supervisor(ServerProcess):
    """The server, and the line to its client.

    :param spec: the ``start`` message
    :param inbox: what was read past that message
    :param anchor: the line to the process that the SSH server has executed
    """

    def __init__(self, spec: dict[str, Any], inbox: bytes = b"", anchor: Anchor | None = None) -> None:
        super().__init__(spec)
        self.anchor = anchor or Anchor()
        self.client_stream = ClientStream(spec["mark"], inbox)
        self.grace = float(spec["grace"])
        self.lease = float(spec["lease"])
        self.token = str(spec.get("token", ""))
        self.keep = False  # nobody has to be there
        self.last_client_message = time.monotonic()
        self.client_gone_since: float | None = None  # when the client was seen to have gone
        self.control_socket: ControlSocket | None = None
        self.client: ControlClient | None = None  # what holds the session of one that came later
        self.waiters: list[ControlClient] = []  # they want to know when all is over
        self.born = time.time()
        self.since = time.time()  # when the client came or went
        self.was_busy = False
        self.seen = False  # the client knows that the server has ended
        self.termed = False  # somebody sent us TERM
        self.look_at = 0.0  # when to see again whether we can be found
        self.astray = ""  # why we cannot
        self.bare = False  # what was brought has been removed

    def run(self) -> None:
        """Start the server, once what it needs is here, and hold it until its whole group is gone."""
        self.arm()
        self.run_dir, self.control_socket, self.nowhere = make_run_dir(
            lambda path: ControlSocket(os.path.join(path, CONTROL))
        )
        if self.run_dir:
            self.anchor.watch(self.run_dir)
        self.started["doomed"] = doom()
        self.prepare()
        self.others = process_tree.below(os.getpid(), process_tree.table())  # what "setup" has left running
        self.adopts = process_tree.adopt()
        try:
            if self.spec.get("brings"):
                self.guard(lambda: 0)  # what is brought has to be removed too
            elif self.kill_deadline is None:
                self.spawn()
            self.run_orders()
            while not self.is_over():
                self.turn()
        finally:
            self.killed = time.monotonic()
            self.press_remaining()
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

    # --- one turn of the loop

    def turn(self) -> None:
        """Wait for whatever comes first, and deal with it; what arrived counts before what ran out."""
        sources = [self.wake, *self.streams, *self.client_stream.sources()]
        knocks = self.control_socket.fds() if self.control_socket else []
        held = self.client.fileno() if self.client else -1
        looks = self.watch.fds()
        guard = self.guardian.fileno() if self.guardian else -1
        sources += knocks + looks + [fd for fd in (held, guard, self.anchor.fd) if fd >= 0]
        try:
            readable, writable, _ = select.select(sources, self.client_stream.sinks(), [], self.pause())
        except InterruptedError:
            return
        for fd in readable:
            if fd == self.wake:
                os.read(fd, CHUNK)
            elif fd == 0:
                self.read_client()
            elif fd in self.streams:
                self.drain(fd)
            elif fd in looks:
                self.watch.answered()
            elif self.guardian and fd == guard:
                for event, status in self.guardian.read_changes():
                    self.on_server_change(event, status)
                if self.guardian.fileno() < 0:
                    self.unguarded()
            elif fd == held:  # whoever held the client's session has ended
                self.note_client_gone()
            elif fd == self.anchor.fd:
                self.note_session_ended()
        for fd in readable:
            if self.control_socket and fd in knocks:
                self.serve_request(self.control_socket.handle_readable(fd))
                break  # all descriptors may be others now
        if writable:
            self.flush()
        self.reap()
        self.check(time.monotonic())

    def pause(self) -> float:
        """How long nothing has to be done, in seconds."""
        if self.kill_deadline is not None:
            return 0.05
        if self.socket and not self.ready:
            return 0.02  # its socket is not told of, but looked for
        if self.claims and not self.ready:
            return max(0.0, self.claims_at - time.monotonic())
        if self.port and not self.ready:
            return 0.1  # likewise; each look takes a port
        longest = 1.0 if self.ready and self.ready["pid"] != self.server else 60.0
        if self.run_dir:
            longest = min(longest, LOOK)
        if self.ready and self.watch.pause and self.attached():
            longest = min(longest, max(0.0, self.watch.due - time.monotonic()))
        return max(0.0, min(longest, self.limit() - time.monotonic()))

    def limit(self) -> float:
        """When the server must end, unless the client is heard from before."""
        if self.keep and not self.attached():
            return float("inf")
        since = (
            self.last_client_message + self.lease
            if self.client_gone_since is None
            else self.client_gone_since
        )
        found = self.ready and self.run_dir and not self.astray  # else nobody can come back
        return since + (self.grace if found else 0.0)

    def check(self, now: float) -> None:
        """Do what is due."""
        if self.termed or now >= self.limit():
            self.request_stop(PATIENCE)
        if self.guardian:
            self.guardian.resume()
        if self.control_socket:
            self.control_socket.drop_idle()
        if self.run_dir:
            self.run_dir.touch()
            if now >= self.look_at and self.kill_deadline is None:
                self.look_at = now + LOOK
                self.check_run_dir()
        if self.socket and not self.ready:
            self.look_for_socket()
        self.look_at_claims(now)
        if self.port and self.server and not self.ready and self.status is None:
            self.look_for_port()
        if self.ready and self.watch.pause and self.kill_deadline is None:
            self.look_at_server(now)
        if self.kill_deadline is not None and now >= self.kill_deadline and self.killed is None:
            self.killed = now
        if self.kill_deadline is not None:
            self.press_remaining()
        if self.ready and self.ready["pid"] != self.server:  # a wrapper's child: no signal tells us of it
            row = process_tree.read_process(self.ready["pid"])
            if row and row[1] == self.group:
                self.note_halted(row[2] in ("T", "t"))

    def check_run_dir(self) -> None:
        """See whether the place is as it was, since a person, or what cleans /tmp, may have removed it."""
        assert self.run_dir
        assert self.control_socket
        before = self.astray
        try:
            self.astray = self.repair()
        except OSError as exc:
            self.astray = exc.strerror or "it cannot be made again"
        bare = bool(self.upload_dir and not os.path.isdir(self.upload_dir.path))
        if self.astray != before or bare != self.bare:
            self.bare = bare
            self.send("astray", why=self.astray, bare=bare)

    def repair(self) -> str:
        """Make good what was removed; says why it cannot be."""
        assert self.run_dir
        assert self.control_socket
        control = self.run_dir.at(CONTROL)
        if usable(os.path.dirname(self.run_dir.path)) or not self.control_socket.is_at(control):
            fault = repair_run_dir(self.run_dir)
            if fault:
                return fault
            if not self.control_socket.is_at(control):
                self.control_socket.rebind(control)
            self.run_dir.write(self.record_of())
        if self.socket and self.ready and not self.hold_socket():
            return "the server's socket is gone"
        return ""

    def look_at_server(self, now: float) -> None:
        """See whether the server answers; nobody has to know while nobody is there."""
        if not self.ready or self.halted or not self.attached():
            self.watch.drop()
            return
        self.watch.check(now, self.ready["port"], self.ready.get("socket", ""))
        if self.was_busy != self.watch.busy:
            self.was_busy = self.watch.busy
            self.send("busy" if self.was_busy else "answers")

    # --- the client

    def send(self, event: str, **more: Any) -> None:
        """Send a message to the client, without ever waiting for it."""
        self.client_stream.send(event, **more)
        if self.client_stream.output_closed:
            self.note_client_gone()

    def flush(self) -> None:
        """Write as much as the client takes now."""
        self.client_stream.flush()
        if self.client_stream.output_closed:
            self.note_client_gone()

    def note_client_gone(self) -> None:
        """Take note that the client is no longer there."""
        if self.client_gone_since is None:
            self.client_gone_since = time.monotonic()
            self.since = time.time()
            self.look_at = 0.0  # whoever comes back is to find us
        self.release_client()

    def note_session_ended(self) -> None:
        """Take note that the first client's session was ended around us."""
        self.anchor.let_go()
        if self.client is None:
            self.client_stream.hang_up()
            self.note_client_gone()

    def release_client(self) -> None:
        """Let what holds a session end."""
        client, self.client = self.client, None
        if client:
            client.answer(bye=True)
            client.close()

    def attached(self) -> bool:
        """Whether a client is there, as far as can be known."""
        return self.client_gone_since is None and time.monotonic() < self.last_client_message + self.lease

    def read_client(self) -> None:
        """Read what the client says, and obey."""
        if self.client_stream.read():
            self.last_client_message = time.monotonic()
            self.run_orders()
        elif self.client_stream.input_closed:
            self.note_client_gone()

    def run_orders(self) -> None:
        """Do what the client has said."""
        for message in self.client_stream.take_messages():
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
        self.send("beat")

    def do_stop(self, message: dict[str, Any]) -> None:
        """End the server now, with ``patience`` seconds between TERM and KILL."""
        self.request_stop(float(message.get("patience", PATIENCE)))

    def do_detach(self, message: dict[str, Any]) -> None:
        """Hold the server until somebody wants it to end, whoever comes and goes; or no longer."""
        if message.get("keep") is False:
            self.keep = False
        elif self.run_dir and not self.astray and self.ready and self.kill_deadline is None:
            self.keep = True
            self.send("detached")

    def do_accompany(self, message: dict[str, Any]) -> None:
        """Run a program beside the server, unless one runs; ``along`` tells what it says of itself."""
        if self.sidecar.pid:
            if self.sidecar.status:  # else it is to come
                self.send("along", word=self.sidecar.status)
            return
        if not self.ready or self.kill_deadline is not None:
            self.send("along", word={})
            return
        try:
            argv = [encode(word) for word in message["argv"]]
            out, err = self.sidecar.start(argv, self.environment(message["env"]), self.group)
            self.streams.update({out: ("along", b""), err: ("err", b"")})
        except OSError:
            self.send("along", word={})

    def do_put(self, message: dict[str, Any]) -> None:
        """Store a part of a file; ``last`` makes it whole, and ``runs`` executable."""
        if self.upload_dir and not self.upload_dir.fault:
            data = binascii.a2b_base64(message["data"])
            skip = int(message.get("skip", 0))
            self.upload_dir.attempt(
                self.upload_dir.put, message["name"], data, message["last"], message["runs"], skip
            )

    def do_place(self, message: dict[str, Any]) -> None:
        """Rename a file that the client has written by itself, as ``part``."""
        if self.upload_dir and not self.upload_dir.fault:
            self.upload_dir.attempt(
                self.upload_dir.finish_file, message["name"], message["part"], message["runs"]
            )

    def do_link(self, message: dict[str, Any]) -> None:
        """Store a symbolic link to another name."""
        if self.upload_dir and not self.upload_dir.fault:
            self.upload_dir.attempt(self.upload_dir.link, message["name"], message["to"])

    def do_drop(self, message: dict[str, Any]) -> None:
        """Remove what was stored."""
        if self.upload_dir and not self.upload_dir.fault:
            self.upload_dir.attempt(self.upload_dir.drop, message["name"])

    def do_sync(self, message: dict[str, Any]) -> None:
        """Say how far we are; what could not be stored is told once, and the next try is a new one."""
        if self.upload_dir:
            fault, self.upload_dir.fault = self.upload_dir.fault, ""
            self.send("stored", number=int(message["number"]), size=self.upload_dir.size, fault=fault)

    def do_go(self, _: dict[str, Any]) -> None:
        """Start the server: all is here."""
        if self.upload_dir and not self.server and self.kill_deadline is None:
            self.spawn()

    def do_seen(self, _: dict[str, Any]) -> None:
        """Take note that the client knows of the end."""
        self.seen = True

    # --- who comes later

    def serve_request(self, client: ControlClient | None) -> None:
        """Do what one who knocked asks for, or say why not."""
        if client is None or client.request is None:
            return
        try:
            method = getattr(self, "ask_" + str(client.request.get("do")), None)
            refusal = method(client, client.request) if method else "unknown"
        except (ValueError, TypeError, KeyError):
            refusal = "unknown"
        if refusal:
            client.answer(error=refusal, **self.record_of())
            client.close()

    def ask_status(self, client: ControlClient, _: dict[str, Any]) -> str:
        """Send the record."""
        client.answer(**self.record_of())
        client.close()
        return ""

    def ask_stop(self, client: ControlClient, request: dict[str, Any]) -> str:
        """End the server; the guest is told when all is over."""
        self.request_stop(float(request.get("patience", PATIENCE)))
        if len(self.waiters) >= MOST_CLIENTS:
            return "busy"
        self.waiters.append(client)
        client.answer(stopping=True)
        return ""

    def ask_adopt(self, client: ControlClient, request: dict[str, Any]) -> str:
        """Change to another client, whose standard input and output come along.

        With the right token it is the same client again, which also ends a session that only seems to be
        there. Without it, it is another one; then the token changes, so that the first does not take the
        server back unasked.
        """
        if self.kill_deadline is not None and self.status is not None and not self.stop_requested:
            if len(self.waiters) >= MOST_CLIENTS:
                return "busy"
            self.waiters.append(client)
            client.answer(over=False)
            return ""
        if self.kill_deadline is not None:
            return "gone"
        if self.ready is None:
            return "starting"
        mark, known = str(request["mark"]), request.get("token") == self.token
        lease, grace = float(request.get("lease", self.lease)), float(request.get("grace", self.grace))
        if self.attached() and not known:
            return "attached"
        if len(client.fds) != 2:
            return "unknown"
        if not known:
            self.token = os.urandom(16).hex()
        self.client_stream.send_taken()
        self.release_client()
        fds, client.fds = client.fds, []
        self.client_stream.replace_client(fds, mark)
        client.answer(adopted=True)
        self.client = client
        self.lease, self.grace = lease, grace
        self.last_client_message, self.client_gone_since, self.since = time.monotonic(), None, time.time()
        self.replay_state()
        return ""

    def replay_state(self) -> None:
        """Send one who came later what was sent to the first."""
        key = self.spec["signing"].get("BOKEH_SECRET_KEY", "") if self.signs() else ""
        self.send("started", token=self.token, detached=self.keep, key=key, **self.started)
        self.send("log", stream="", lines=self.tail(TAIL), again=True)
        if self.sidecar.status:
            self.send("along", word=self.sidecar.status)
        if self.ready:
            self.send(**self.ready)
        if self.halted:
            self.send("stopped")
        if self.was_busy:
            self.send("busy")

    def record_of(self) -> dict[str, Any]:
        """Return all that those may know who come later; the token is not among it."""
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
            along=self.sidecar.status,
            ready=self.ready,
        )
        if self.status is not None:
            record.update(status=self.status, ended=time.time(), log=self.tail(TAIL)[-LAST:])
        return record

    # --- the end

    def finish(self) -> None:
        """Reap what is left, say so, and give the client a moment to take it."""
        self.drain_all()
        if self.guardian:
            self.guardian.dismiss()
        for _ in changes(0):  # the server's zombie is ours now, and its number nobody's
            pass
        if self.upload_dir:
            self.upload_dir.remove()
        told = self.stop_requested or not self.ready
        if told:
            self.leave()
        self.send("gone", status=self.status)
        deadline = time.monotonic() + 2
        while self.client_stream.sinks() or not (told or self.seen or self.client_gone_since):
            if time.monotonic() > deadline:
                break
            readable, _, _ = select.select(self.client_stream.sources(), self.client_stream.sinks(), [], 0.2)
            if readable:
                self.read_client()
            self.flush()
        if self.run_dir and not (told or self.seen):
            self.run_dir.write(self.record_of())  # the client may come back for it
            self.run_dir.clear()
        elif not told:
            self.leave()
        for client in self.waiters:
            client.answer(over=True, status=self.status)
        self.release_client()


def main() -> NoReturn:
    """Read the ``start`` message and do it, out of the reach of the session's end."""
    anchor = detach_session()
    parts, length = [], 0
    while True:
        data = os.read(0, CHUNK)
        length += len(data)
        if not data or length > LONGEST:
            anchor.end(3)
        parts.append(data)
        if b"\n" in data:
            break
    first, _, rest = b"".join(parts).partition(b"\n")
    supervisor = Supervisor(json.loads(first), rest, anchor)
    try:
        supervisor.run()
    except BaseException:  # noqa: BLE001 - the client must be told whatever it is
        import traceback

        supervisor.send("crashed", text=traceback.format_exc())
        supervisor.leave()
        anchor.end(4)
    anchor.end(0)
