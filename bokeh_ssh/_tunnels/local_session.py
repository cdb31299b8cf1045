"""What is open in this process: its connections, each of which it is lost with, and made again."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from bokeh_ssh._core.backoff import Attempts, pause_before
from bokeh_ssh._core.endpoint import Endpoint, Origin
from bokeh_ssh._core.errors import (
    BokehSSHError,
    ConnectionLostError,
    ForwardingRefusedError,
    ServerExitedError,
    ServerTakenError,
    UsageError,
)
from bokeh_ssh._core.events import (
    Event,
    HostKeyVerified,
    Ready,
    Reconnected,
    Reconnecting,
    ServerExited,
    ServerTaken,
    Warned,
)
from bokeh_ssh._core.host import Host
from bokeh_ssh._core.settings import setting
from bokeh_ssh._core.this_machine.network_changes import NetworkWatch
from bokeh_ssh._core.this_machine.scarcity import scarcity_of
from bokeh_ssh._core.threads import Thread
from bokeh_ssh._core.waiting import wanted
from bokeh_ssh._forwarding.listener import LocalAcceptor, open_acceptor
from bokeh_ssh._forwarding.status import HopStatus, StateName, TunnelStatus
from bokeh_ssh._server.diagnosis import expired_password
from bokeh_ssh._server.server import Server
from bokeh_ssh._ssh.auth.prompt_cache import PromptCache
from bokeh_ssh._ssh.connect import OpenStream, connect, has_others
from bokeh_ssh._ssh.connection import Connection
from bokeh_ssh._ssh.remote_shell import read_complaint
from bokeh_ssh._tunnels.lifecycle import GIVING_UP, Lifecycle, Opening, TunnelInfo

log = logging.getLogger("bokeh_ssh")

#: Seconds that a server has to show that it is there before what it holds for us is ended over it.
_LAST_WORD = 1.0
#: Seconds after which a connection that the server ends as unused has been worth making.
_SHORT_LIFE = 3600.0
#: Addresses of machines that are remembered.
_MOST_PEERS = 8


class Parts(Protocol):
    """What a tunnel or forward consists of: opened by a session, which closes it by way of two stacks."""

    @property
    def info(self) -> TunnelInfo:
        """What is known by now."""

    def open_local(self) -> None:
        """Open what outlives a loss; what must be closed goes on the life's stack."""

    def connect_all(self) -> tuple[Ready, bool]:
        """Open everything that goes over SSH; what must be closed goes on the session's stack.

        Called again after a loss.

        :returns: that it works, and whether the remote server, if there is one, is the one from before
        """


class LocalSession:
    """What is open in this process during one life.

    :param what: what to open; its parts are made with this session first, which they connect by
    :param prompt_cache: what a person has answered before
    :ivar connection_stack: what goes over SSH, and is closed when a connection is lost
    :ivar attempts: the attempts to connect again
    :ivar server: the server that it holds; set by the parts
    """

    def __init__(self, life: Lifecycle, what: Opening, prompt_cache: PromptCache) -> None:
        self.life = life
        self.attempts = Attempts()
        self.server: Server | None = None
        self._reconnect = what.reconnect
        self._prompt_cache = prompt_cache
        self._connections: list[Connection] = []
        self._direct: list[Connection] = []  # those that no other one of them carries
        self._meter = Meter()
        self._useless: tuple[str, ...] = ()  # addresses of machines that took a login, and ran nothing
        self._peers: tuple[str, ...] = ()  # addresses of the machines that it has reached from here
        self.connection_stack = contextlib.ExitStack()
        self._kept_stack = contextlib.ExitStack()  # what stays while only other connections are lost
        self._answered = False  # whether the attempt under way has met the server
        self._unused = 0  # how often the server has ended it in a row since nothing used it
        self._warned: set[Warned] = set()  # told once, however often it is connected
        self._listening: list[Origin] = []  # where it listens here
        self._recovery: threading.Thread | None = None
        self._parts: Parts = what.parts(self, *what.args)

    @property
    def info(self) -> TunnelInfo:
        """What is known of it by now."""
        return self._parts.info

    @property
    def log(self) -> tuple[str, ...]:
        """The last lines of the server that it has started."""
        return self.server.log if self.server else ()

    # Opening.

    def open(self) -> Event:
        """Open all of it; return that it is ready."""
        self._parts.open_local()
        ready, _ = self._connect_all()
        # Without the id of a session, which opens the app for whoever reads the log.
        log.info("%s", dataclasses.replace(ready, url=ready.url.partition("?")[0]))
        return ready

    def _connect_all(self) -> tuple[Ready, bool]:
        try:
            return self._parts.connect_all()
        except ForwardingRefusedError as exc:
            for connection in self._connections:
                if connection.name == exc.host:
                    check_password(connection)
            raise

    def connect(
        self,
        host: Host,
        via: Connection | None = None,
        *,
        stack: contextlib.ExitStack | None = None,
        stream: OpenStream | None = None,
        stream_by: str = "",
        ahead: Sequence[Endpoint | None] = (),
    ) -> Connection:
        """Connect and log in, with what a person has answered before; when it is lost, so is this.

        :param stack: what closes it; None: with all that goes over SSH
        :param ahead: what channels will be wanted to, and None for a session
        """
        stack = stack or self.connection_stack
        connection = connect(
            host,
            via=via,
            on_event=self._on_connect_event,
            prompt_cache=self._prompt_cache,
            stream=stream,
            stream_by=stream_by,
            prefer=self._peers,
            avoid=self._useless,
            ahead=ahead,
            on_dialled=self._check_peer,
        )
        stack.callback(connection.close)
        began = time.monotonic()
        self._connections.append(connection)
        self._peers = tuple(dict.fromkeys((*self._peers, *connection.peers)))[-_MOST_PEERS:]
        stack.callback(self._connections.remove, connection)
        if via is None and stream is None:
            self._direct.append(connection)
            stack.callback(self._stop_counting, connection)
        connection.on_lost(lambda _: self._on_lost(connection, began))
        return connection

    def open_acceptor(self, sockets: list[socket.socket], others: bool | None) -> LocalAcceptor:
        """Let connections in that come to these sockets, until it is closed; see :class:`LocalAcceptor`."""
        names = [sock.getsockname() for sock in sockets]
        self._listening += [(name[0], name[1]) for name in names if isinstance(name, tuple)]
        return open_acceptor(self.life.stack, sockets, self.life.warn, others, self.attempts)

    def _check_peer(self, sock: socket.socket, host: str) -> None:
        """Refuse to log in where this tunnel itself listens: nothing would answer.

        :raises UsageError: if it leads there
        """
        with contextlib.suppress(OSError):  # it has ended already, as whoever goes on is told
            here, there = sock.getsockname()[:2], sock.getpeername()[:2]
            everywhere = [("0.0.0.0", there[1]), ("::", there[1])] if here[0] == there[0] else []  # noqa: S104
            if not {there, *everywhere}.isdisjoint(self._listening):
                msg = f"port {there[1]} of this machine is where this itself listens, and not an SSH server"
                raise UsageError(msg, host=host, hint=f"choose another {setting('local_port')}")

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """Keep what is opened meanwhile, and stands, when other connections are lost."""
        others = self.connection_stack.pop_all()
        try:
            yield
            self._kept_stack.push(self.connection_stack.pop_all())
        finally:
            self.connection_stack.push(others)

    def drop_kept(self) -> None:
        """Close what was kept, which is of no use any more."""
        with wanted(None):
            self._kept_stack.close()

    @property
    def holds_server(self) -> bool:
        """Whether there is a server that runs and listens to us."""
        server = self.server
        return server is not None and server.connected and server.exit_status is None and not server.lost

    def pass_over(self, connection: Connection) -> bool:
        """Connect to another machine of that name from now on, where there is one.

        :returns: whether there is one that has not been of no use yet
        """
        hop, here = connection.hop, connection.address
        self._useless = (*self._useless, here)[-_MOST_PEERS:]
        self._peers = tuple(peer for peer in self._peers if peer != here)
        return bool(here) and has_others(hop, self._useless)

    def _on_lost(self, connection: Connection, began: float) -> None:
        # A server that ends what nobody uses does so again: without the count, every few seconds for ever.
        again = connection.unused and time.monotonic() - began < _SHORT_LIFE
        self._unused = self._unused + 1 if again else 0
        self.lose(connection.lost_error())

    def _stop_counting(self, connection: Connection) -> None:
        self._direct.remove(connection)
        self._meter.add(connection)

    def status(self) -> TunnelStatus:
        """Return what it does now."""
        state: StateName = self.life.state.value
        return self._meter.status(state, list(self._connections), list(self._direct))

    def _on_connect_event(self, event: Event) -> None:
        self._answered = self._answered or isinstance(event, HostKeyVerified)
        if isinstance(event, Warned):
            if event in self._warned:
                return
            self._warned.add(event)
        self.life.emit(event)

    def on_ready(self) -> None:
        """Count from now on; after a loss, let nobody wait for an attempt any more."""
        self._meter.note_ready(self._connections)
        if self._recovery:
            self.attempts.succeed()

    # Losing a connection, and making it again.

    def lose(self, error: BokehSSHError, told: Event | None = None) -> None:
        """Note that it broke; from any thread, never blocks.

        :param told: what broke it; a handler of that finds it broken, also where it closes it at once
        """
        again = self._reconnect and error.temporary
        recovery = Thread(self._recover, error.message, name=f"bokeh-ssh reconnect {self.life.label}")
        with self.life.change:
            lost = self.life.lose(error, again=again, told=told)
            if lost and again:
                self.attempts.begin()
                self._recovery = recovery
            elif lost:
                self.attempts.stop()
        for event in filter(None, (told, lost)):
            log.info("%s", event)
        if lost and again:
            try:
                recovery.start()
            except RuntimeError as exc:  # no thread is to be had: nobody would make it again
                self.life.retry()
                self.life.fail_attempt(BokehSSHError(f"the connection is not made again ({exc})"))
                self.attempts.stop()

    def _recover(self, reason: str) -> None:
        """Connect again, however often that takes, until it stands, or nobody wants it any more.

        :param reason: why the connection was lost
        """
        with NetworkWatch(self.attempts.note_change, self._peers, self.life.label):
            for attempt in itertools.count(max(1, self._unused)):
                self._close_connections()
                if self.life.leaving:
                    return
                # Who holds connections meanwhile has an attempt made as soon as one comes.
                pause = pause_before(attempt, needed=not (self._unused and self.attempts.listeners))
                told = Reconnecting(host=self.life.label, attempt=attempt, delay=pause, reason=reason)
                self.life.emit(told)
                early = functools.partial(self.life.emit, dataclasses.replace(told, delay=0.0))
                # The first is made at once anyway, and who is told of it is told of the loss.
                due = self.attempts.wait(pause, early if attempt > 1 else lambda: None)
                if not due or not self.life.retry():
                    return
                error = self._connect_again()
                if error is None:
                    return
                if not self.life.fail_attempt(error):
                    self.attempts.stop()
                    self._close_connections()
                    return
                reason = error.message
                self.attempts.fail()

    def _connect_again(self) -> BokehSSHError | None:
        """Make one attempt; return why it has failed, if it has."""
        self._answered = False
        try:
            with wanted(self._check_attempt):
                _, same = self._connect_all()
            back = Reconnected(host=self.life.label, same_server=same)
            self.life.become_ready(back)
        except BokehSSHError as exc:
            return scarcity_of(exc, self.life.label) or exc
        except Exception as exc:  # a defect of ours; nobody above us would see it
            if scarce := scarcity_of(exc, self.life.label):
                return scarce
            log.exception("making the connection again failed")
            return BokehSSHError(f"making the connection again failed ({exc!r})")
        log.info("%s", back)
        return None

    def _check_attempt(self) -> None:
        """Stop an attempt that waits for nothing as well: this machine left the network that it began on.

        Once the server has answered it goes on: a person may be asked for a code.

        :raises TunnelClosedError: if it is being closed
        :raises ConnectionLostError: if the network has changed
        """
        self.life.check_wanted()
        if self.attempts.stale and not self._answered:
            msg = "this machine's network changed while it was reached"
            raise ConnectionLostError(msg, host=self.life.label)

    def _close_connections(self) -> None:
        with wanted(None):
            self.connection_stack.close()
        if not (self.holds_server and all(connection.alive for connection in self._connections)):
            self.drop_kept()

    # The server.

    def on_server_event(self, event: Event) -> None:
        """Report what became of the server; where it has ended or is another's, so has this."""
        if isinstance(event, ServerExited):
            error = ServerExitedError.of(event.host, event.exit_status, self.log, event.memory_limit)
            self.lose(error, event)
        elif isinstance(event, ServerTaken):
            msg = "another client has taken the server over"
            hint = f"start one of your own with {setting('launch=True')}"
            self.lose(ServerTakenError(msg, host=event.host, hint=hint), event)
        else:
            self.life.emit(event)

    # Closing.

    def close(self, *, at_once: bool = False) -> None:
        """Close everything that goes over SSH, and end what was started elsewhere."""
        recovery = self._recovery
        self.attempts.stop()
        self._meter.note_closed()
        with wanted(None):
            if not at_once:
                self._drop_silent_connections()
            self._close_all()
            if recovery:
                recovery.join(GIVING_UP)
            self._close_all()  # what an attempt that was under way still added

    def _close_all(self) -> None:
        self.connection_stack.close()
        self._kept_stack.close()

    def _drop_silent_connections(self) -> None:
        """Close connections that do not answer, so that ending what they carry does not wait for them."""
        asked = [
            (connection, connection.send_keepalive())
            for connection in list(self._connections)
            if connection.alive
        ]
        deadline = time.monotonic() + _LAST_WORD
        for connection, reply in asked:
            if not reply.wait(max(0.0, deadline - time.monotonic())):
                connection.give_up(f"the server did not answer for {_LAST_WORD:g} s")


def check_password(connection: Connection) -> None:
    """Find out whether an account may not forward since its password has run out: only a command hears that.

    :raises SessionError: if so
    """
    said = read_complaint(connection, timeout=connection.hop.timeout)
    if expired := expired_password(connection.name, said):
        raise expired


class Meter:
    """Counts what one life of a tunnel carries, over all its connections. Thread-safe."""

    def __init__(self) -> None:
        self._opened_at = self._closed_at = 0.0
        self._received = self._sent = 0
        self._names: tuple[str, ...] = ()
        self._losses = 0

    def note_ready(self, connections: Sequence[Connection]) -> None:
        """Note that it stands, by these connections; not for the first time if a loss was made good."""
        self._losses += bool(self._opened_at)
        self._opened_at = self._opened_at or time.monotonic()
        names = [hop.name for connection in connections for hop in connection.hops]
        before = {name: number for number, name in enumerate(self._names)}
        self._names = tuple(sorted(names, key=lambda name: before.get(name, len(before))))

    def note_closed(self) -> None:
        """Note that it is over."""
        self._closed_at = self._closed_at or time.monotonic()

    def add(self, connection: Connection) -> None:
        """Count what a connection has carried that is about to be closed."""
        received, sent = connection.first.transport.carried
        self._received += received
        self._sent += sent

    def status(
        self, state: StateName, connections: Sequence[Connection], direct: Sequence[Connection]
    ) -> TunnelStatus:
        """Return what it does now.

        :param connections: those that are open
        :param direct: those among them whose bytes go over this machine's network, and not over another's
        """
        carried = [connection.first.transport.carried for connection in direct]
        hops = {hop.host: hop for hop in _hops(connections)}
        names = (*self._names, *(name for name in hops if name not in self._names))
        return TunnelStatus(
            state=state,
            hops=tuple(hops.get(name, HopStatus(name)) for name in names),
            uptime=(self._closed_at or time.monotonic()) - self._opened_at if self._opened_at else 0.0,
            received=self._received + sum(received for received, _ in carried),
            sent=self._sent + sum(sent for _, sent in carried),
            sessions=sum(connection.io_loop.open_relays for connection in connections),
            losses=self._losses,
        )


def _hops(connections: Iterable[Connection]) -> list[HopStatus]:
    return [
        HopStatus(
            hop.name,
            "open" if hop.alive else "lost",
            (hop.transport.rtt or None) if hop.alive else None,
        )
        for connection in connections
        for hop in connection.hops
    ]
