"""Hold a server on the remote machine: start it, drain it, report on it, end it.

What comes in, on standard input, is one JSON object a line with a ``do`` (see ``_remote.client_requests``;
the first is ``start``). What goes out, on standard output, is the mark of this launch and one JSON object a
line, with an ``event``: ``depot``, ``stored``, ``started``, ``address``, ``log``, ``dropped``, ``ready``,
``stopped``, ``continued``, ``beat``, ``busy``, ``answers``, ``along``, ``astray``, ``detached``, ``taken``,
``exit``, ``gone``, ``failed``, ``crashed``. A ``do`` that is not known is skipped, so a newer client can talk
to this.

A client that comes back, or another one, knocks at the control socket (see ``_remote.client_requests`` too).
One that adopts the server hands in its own standard input and output, which replace those that there were:
from then on all is as it was with the first.

There are four processes. This one holds everything. The *server* does the work. The *guardian* is its parent,
and ends it should this process be killed (see ``_remote.guardian``). The *anchor* is what the SSH server has
executed: whatever that does to it when the channel ends, the others are out of its reach (see
``_remote.daemonize``).
"""

from __future__ import annotations

import json
import os
import select
import signal
import time

from bokeh_ssh._remote.client_requests import ClientRequests
from bokeh_ssh._remote.client_stream import CHUNK, LONGEST, Client
from bokeh_ssh._remote.control_group import doom
from bokeh_ssh._remote.control_socket import ControlSocket
from bokeh_ssh._remote.daemonize import Anchor, detach_session
from bokeh_ssh._remote.process_group import PATIENCE, changes
from bokeh_ssh._remote.run_dir import CONTROL, RunDir, make_run_dir, repair_run_dir, usable
from bokeh_ssh._remote.server import Server

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

LOOK = 2.0  # seconds between two looks whether we can still be found: see also _remote.control_client


class Supervisor:
    """Hold one server: wait for what happens, do what is due, and end it in time.

    :param spec: the ``start`` message
    :param inbox: what was read past that message
    :param anchor: the line to the process that the SSH server has executed
    """

    def __init__(self, spec: dict[str, Any], inbox: bytes, anchor: Anchor) -> None:
        self.anchor = anchor
        self.client = Client(spec, inbox)
        self.server = Server(spec, self.client)
        self.requests = ClientRequests(self.server)
        self.control_socket: ControlSocket | None = None
        self.wake = -1  # readable once a signal has come
        self.termed = False  # somebody sent us TERM
        self.looked_at = 0.0  # when it was seen whether we can be found
        self.bare = False  # what was brought has been removed

    def run(self) -> None:
        """Start the server, once what it needs is here, and hold it until its whole group is gone."""
        server = self.server
        self.arm()
        server.run_dir, self.control_socket, server.nowhere = make_run_dir(
            lambda path: ControlSocket(os.path.join(path, CONTROL))
        )
        if server.run_dir:
            self.anchor.watch(server.run_dir)
        server.started["doomed"] = doom()
        try:
            server.prepare()
            self.requests.run()
            while not server.process.is_over():
                self.turn()
        finally:
            server.process.kill()
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

    def turn(self) -> None:
        """Wait for whatever comes first, and deal with it; what arrived counts before what ran out."""
        server, client = self.server, self.client
        streams, looks = server.output.streams, server.watch.fds()
        knocks = self.control_socket.fds() if self.control_socket else []
        held = client.session.fileno() if client.session else -1
        guard = server.process.guardian.fileno() if server.process.guardian else -1
        sources = [self.wake, *streams, *client.stream.sources(), *knocks, *looks]
        sources += [fd for fd in (held, guard, self.anchor.fd) if fd >= 0]
        try:
            readable, writable, _ = select.select(sources, client.stream.sinks(), [], self.pause())
        except InterruptedError:
            return
        for fd in readable:
            if fd == self.wake:
                os.read(fd, CHUNK)
            elif fd == 0:
                self.read_client()
            elif fd in streams:
                server.output.drain(fd)
            elif fd in looks:
                server.watch.answered()
            elif fd == guard:
                server.read_guardian()
            elif fd == held:  # whoever held the client's session has ended
                client.note_gone()
            elif fd == self.anchor.fd:
                self.anchor.let_go()
                client.note_session_ended()
        for fd in readable:
            if self.control_socket and fd in knocks:
                self.requests.serve(self.control_socket.handle_readable(fd))
                break  # all descriptors may be others now
        if writable:
            client.flush()
        server.reap()
        self.check(time.monotonic())

    def read_client(self) -> None:
        """Read what the client says, and obey."""
        self.client.read()
        self.requests.run()

    def pause(self) -> float:
        """Return how long nothing has to be done, in seconds."""
        pause = self.server.pause()
        if self.server.process.ending:
            return pause
        due = self.limit() - time.monotonic()
        return max(0.0, min(pause, due, LOOK if self.server.run_dir else 60.0))

    def limit(self) -> float:
        """Return when the server must end, unless the client is heard from before."""
        return self.client.lease.deadline(self.server.is_findable())

    def check(self, now: float) -> None:
        """Do what is due."""
        server = self.server
        if self.termed or now >= self.limit():
            server.process.end(PATIENCE, requested=True)
        if self.control_socket:
            self.control_socket.drop_idle()
        if server.run_dir:
            server.run_dir.touch()
            gone = self.client.lease.gone_since or 0.0  # whoever comes back is to find us
            due = now >= self.looked_at + LOOK or self.looked_at < gone
            if due and not server.process.ending:
                self.looked_at = now
                self.check_run_dir(server.run_dir)
        server.check(now)

    def check_run_dir(self, run_dir: RunDir) -> None:
        """See whether the directory is as it was: a person, or what cleans /tmp, may have removed it."""
        before = run_dir.fault, self.bare
        try:
            run_dir.fault = self.repair(run_dir)
        except OSError as exc:
            run_dir.fault = exc.strerror or "it cannot be made again"
        upload_dir = self.server.upload_dir
        self.bare = bool(upload_dir and not os.path.isdir(upload_dir.path))
        if (run_dir.fault, self.bare) != before:
            self.client.send("astray", why=run_dir.fault, bare=self.bare)

    def repair(self, run_dir: RunDir) -> str:
        """Make good what was removed; return why it cannot be."""
        assert self.control_socket
        control, probe = run_dir.at(CONTROL), self.server.probe
        if usable(os.path.dirname(run_dir.path)) or not self.control_socket.is_at(control):
            fault = repair_run_dir(run_dir)
            if fault:
                return fault
            if not self.control_socket.is_at(control):
                self.control_socket.rebind(control)
            self.server.write_record()
        if probe.socket and probe.ready and not probe.hold_socket():
            return "the server's socket is gone"
        return ""

    def finish(self) -> None:
        """Reap what is left, say so, and give the client a moment to take it."""
        server, client = self.server, self.client
        server.output.drain_all()
        if server.process.guardian:
            server.process.guardian.dismiss()
        for _ in changes(0):  # the server's zombie is ours now, and its number nobody's
            pass
        if server.upload_dir:
            server.upload_dir.remove()
        ordered = server.process.stop_requested or not server.probe.ready
        if ordered:
            server.leave()
        client.send("gone", status=server.process.status)
        deadline = time.monotonic() + 2
        while client.stream.sinks() or not (ordered or client.seen or client.lease.gone_since):
            if time.monotonic() > deadline:
                break
            readable, _, _ = select.select(client.stream.sources(), client.stream.sinks(), [], 0.2)
            if readable:
                self.read_client()
            client.flush()
        if server.run_dir and not (ordered or client.seen):
            server.write_record()  # the client may come back for it
            server.run_dir.clear()
        elif not ordered:
            server.leave()
        for waiter in self.requests.waiters:
            waiter.answer(over=True, status=server.process.status)
        client.release()


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
    except BaseException:  # noqa: BLE001 - it is reported to the client, whatever it is
        import traceback

        supervisor.client.send("crashed", text=traceback.format_exc())
        supervisor.server.leave()
        anchor.end(4)
    anchor.end(0)
