"""How connections end: all that came before an end arrives, however it is spelled; a loss is a reset."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import asyncssh.channel
import pytest

import bokeh_ssh._ssh.relay
from beds import Machine, until
from bokeh_ssh import ConnectionLostError, LocalForward, Lost, RemoteForward
from bokeh_ssh._core.backoff import Attempts
from bokeh_ssh._forwarding.listener import LocalAcceptor, bind, open_acceptor
from bokeh_ssh._forwarding.request_filter import RequestFilter
from bokeh_ssh._tunnels.remote_forward import listening, to_peer
from cable import Cable
from conformance import pattern, read_all, read_exactly
from connections import connected
from fakes import Handler, Listener, stay
from processes import children

#: Less than a window, so that the server has sent all of it when it ends the channel, and much more than
#: sockets with small buffers hold.
SIZE = 1_500_000
DATA = pattern(SIZE)
_LOOPBACK = "127.0.0.1"
_PATIENCE = 20.0


class Ending:
    """What a server does at the end of what it forwards.

    :ivar spelled: "CLOSE", as Go's servers and Twisted Conch have it, or "EOF, CLOSE"
    :ivar sent: the channels that it has ended
    """

    def __init__(self, spelled: str) -> None:
        self.spelled = spelled
        self.sent: set[Any] = set()


@pytest.fixture(params=["CLOSE", "EOF, CLOSE"])
def ending(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Ending:
    """Have the embedded servers end what they forward in one of the two ways."""
    made = Ending(request.param)
    channel = asyncssh.channel.SSHChannel
    write_eof = channel.write_eof

    def end(self: Any) -> None:
        if request.param != "CLOSE":
            write_eof(self)
        elif not isinstance(self, asyncssh.channel.SSHServerChannel):  # those say their exit status first
            self.close()
        made.sent.add(self)

    monkeypatch.setattr(channel, "write_eof", end)
    return made


def slow(address: tuple[str, int] | str) -> socket.socket:
    """Connect with a receive buffer that holds next to nothing."""
    sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
    sock.settimeout(_PATIENCE)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(address)
    return sock


def send_and_end(sock: socket.socket, number: int) -> None:
    """Behave as a target that speaks first, and ends."""
    sock.sendall(DATA)


def once_echo(sock: socket.socket, number: int) -> None:
    """Send to the first who connects, and end; echo for those who come after."""
    if not number:
        sock.sendall(DATA)
        return
    while part := sock.recv(65536):
        sock.sendall(part)


def send_on(sock: socket.socket) -> None:
    """Send without end."""
    while True:
        sock.sendall(bytes(65536))


def check_behind(address: tuple[str, int] | str) -> None:
    """See an echo come back the same way: what was sent on that connection before has arrived too."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family) as sock:
        sock.settimeout(_PATIENCE)
        sock.connect(address)
        sock.sendall(b"behind")
        assert read_exactly(sock, 6) == b"behind"


@contextmanager
def forwarded(
    machine: Machine, handler: Handler, ending: Ending | None = None, **keywords: Any
) -> Iterator[LocalForward]:
    """Forward to a target of this test's own; the first connection there is the forward's own try."""
    with (
        Listener(lambda sock, number: handler(sock, number - 1) if number else stay(sock)) as target,
        LocalForward(
            machine.host,
            machine.user,
            remote_port=target.port,
            remote_host=_LOOPBACK,
            reconnect=False,
            **{**machine.login, **keywords},
        ) as forward,
    ):
        if ending:
            until(lambda: ending.sent, what="the end of that try")
            ending.sent.clear()
        yield forward


@pytest.mark.parametrize("kind", ["port", "socket"])
def test_end_of_a_local_forward(embedded: Any, ending: Ending, kind: str) -> None:
    """A reader that takes its time gets all that the target sent before it ended, and then the end."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        here = {"local_socket": f"{folder}/s"} if kind == "socket" else {}
        with forwarded(embedded(), once_echo, ending, **here) as forward:
            address = forward.local_socket or (_LOOPBACK, forward.local_port)
            with slow(address) as sock:
                until(lambda: ending.sent, what="the server to end it")
                check_behind(address)
                assert read_all(sock) == DATA
            assert forward.state == "ready"


@pytest.mark.parametrize("kind", ["port", "socket"])
def test_loss_of_a_local_forward(embedded: Any, ending: Ending, tmp_path: Path, kind: str) -> None:
    """The control of the above: where the line is lost, a reset; a Unix socket has none, and ends early."""
    machine = embedded()
    with (
        Cable(machine.host, machine.port) as cable,
        tempfile.TemporaryDirectory(dir="/tmp") as folder,
        forwarded(
            cable.machine(machine, tmp_path),
            lambda sock, number: sock.sendall(DATA * 20),
            **({"local_socket": f"{folder}/s"} if kind == "socket" else {}),
        ) as forward,
        slow(forward.local_socket or (_LOOPBACK, forward.local_port)) as sock,
    ):
        assert read_exactly(sock, 100_000) == DATA[:100_000]
        cable.pull()
        with pytest.raises(ConnectionLostError):
            forward.wait(_PATIENCE)
        if kind == "port":
            with pytest.raises(ConnectionResetError):
                read_all(sock)
        else:
            assert len(read_all(sock)) < len(DATA * 20) - 100_000


@pytest.mark.parametrize("direction", ["to the target", "from the target"])
@pytest.mark.parametrize("kind", ["port", "socket"])
def test_end_of_a_remote_forward(embedded: Any, ending: Ending, kind: str, direction: str) -> None:
    """What comes in at a gateway ends as whole, in both directions."""
    machine = embedded()
    got: list[bytes] = []
    may_read, done = threading.Event(), threading.Event()

    def receive(sock: socket.socket, number: int) -> None:
        if direction == "from the target":
            sock.sendall(DATA)
            return
        assert may_read.wait(_PATIENCE)
        try:
            got.append(read_all(sock))
        finally:
            done.set()

    with tempfile.TemporaryDirectory(dir="/tmp") as folder, Listener(receive) as target:
        where = {"remote_socket": f"{folder}/s"} if kind == "socket" else {"remote_port": 0}
        with RemoteForward(
            machine.host,
            machine.user,
            local_port=target.port,
            local_host=_LOOPBACK,
            reconnect=False,
            **where,
            **machine.login,
        ) as forward:
            address = forward.remote_socket or (_LOOPBACK, forward.remote_port)
            if direction == "from the target":
                with slow(address) as sock:
                    assert read_all(sock) == DATA
                return
            with socket.socket(socket.AF_UNIX if kind == "socket" else socket.AF_INET) as sock:
                sock.settimeout(_PATIENCE)
                sock.connect(address)
                sock.sendall(DATA)
            until(lambda: ending.sent, what="the server to end it")
            may_read.set()
            assert done.wait(_PATIENCE)
            assert got == [DATA]


@pytest.mark.parametrize("direction", ["to the target", "from the target"])
def test_end_of_a_relay(embedded: Any, ending: Ending, direction: str) -> None:
    """What is led from one server to another ends as whole, in both directions; a target may speak first."""
    got: list[bytes] = []
    done = threading.Event()

    def handle(sock: socket.socket, number: int) -> None:
        if direction == "from the target":
            sock.sendall(DATA)
            return
        got.append(read_all(sock))
        done.set()

    with (
        Listener(handle) as target,
        connected(embedded()) as gateway,
        connected(embedded()) as peer,
        listening(
            gateway, (_LOOPBACK, 0), to_peer(gateway, peer, (_LOOPBACK, target.port)), allow_exposed=False
        ) as (_, port),
    ):
        with slow((_LOOPBACK, int(port))) as sock:
            if direction == "from the target":
                until(lambda: ending.sent, what="the server to end it")
                assert read_all(sock) == DATA
            else:
                sock.sendall(DATA)
        if direction == "to the target":
            assert done.wait(_PATIENCE)
            assert got == [DATA]
        until(
            lambda: not gateway.io_loop.open_relays and not peer.io_loop.open_relays,
            what="both halves to end",
        )


def test_end_of_a_socket(embedded: Any, ending: Ending) -> None:
    """What is read through a channel of one's own (a jump host's next hop) ends as whole."""
    with Listener(send_and_end) as target, connected(embedded()) as connection:
        with connection.open_socket((_LOOPBACK, target.port), timeout=_PATIENCE) as sock:
            sock.settimeout(_PATIENCE)
            until(lambda: ending.sent, what="the server to end it")
            assert connection.ping(_PATIENCE)
            assert read_all(sock) == DATA
        until(lambda: not connection.io_loop.open_relays, what="the channel to end")


def test_end_of_a_forward_that_is_checked(embedded: Any, ending: Ending) -> None:
    """What a target says, and its end, wait for the word that something may go there."""
    verdicts: list[Any] = []
    with Listener(send_and_end) as target, connected(embedded()) as connection, tcp_pair() as (ours, theirs):
        ours.settimeout(_PATIENCE)
        connection.forward(
            theirs, (_LOOPBACK, target.port), (_LOOPBACK, 1), lambda verdict, _: verdicts.append(verdict)
        )
        until(lambda: ending.sent, what="the server to end it")
        assert connection.ping(_PATIENCE)
        verdicts[0](True)
        assert read_all(ours) == DATA
        ours.shutdown(socket.SHUT_WR)
        until(lambda: not connection.transport._channels, what="the channel to end")


def test_end_of_a_command(embedded: Any, ending: Ending) -> None:
    """A command's output and exit status are all there, and those of one after it."""
    machine = embedded()
    with connected(machine) as connection:
        for _ in range(2):
            out: list[bytes] = []
            status: list[int | None] = []
            session = connection.run(
                f"{machine.python} -c \"print('x' * 1500000); raise SystemExit(3)\"",
                on_stdout=out.append,
                on_stderr=lambda data: None,
                on_exit=status.append,
                timeout=_PATIENCE,
            )
            assert session.ended.wait(_PATIENCE)
            assert len(b"".join(out)) == 1_500_001
            assert status == [3]


def test_program_that_still_sends_gets_all(embedded: Any, ending: Ending) -> None:
    """Who sends to a target that has ended, and reads only then, gets all that was sent, and the end."""
    with forwarded(embedded(), once_echo, ending) as forward:
        address = (_LOOPBACK, forward.local_port)
        with slow(address) as sock:
            until(lambda: ending.sent, what="the server to end it")
            check_behind(address)
            sock.sendall(bytes(8 << 20))  # more than all buffers and windows hold
            assert read_all(sock) == DATA


def test_program_that_goes_on_sending_is_told(
    embedded: Any, ending: Ending, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who sends without end to a target that has gone gets an error soon, and all that was sent before."""
    monkeypatch.setattr(bokeh_ssh._ssh.relay, "_LINGER", 0.5)
    with forwarded(embedded(), lambda sock, number: sock.sendall(b"bye"), ending) as forward:
        with socket.create_connection((_LOOPBACK, forward.local_port), timeout=_PATIENCE) as sock:
            until(lambda: ending.sent, what="the server to end it")
            with pytest.raises((ConnectionResetError, BrokenPipeError)):
                send_on(sock)
            assert sock.recv(10) == b"bye"
        assert forward.state == "ready"


def test_program_that_goes_on_sending_through_sshd_is_told(
    sshd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same through OpenSSH, which ends the channel when it cannot write to the target."""
    monkeypatch.setattr(bokeh_ssh._ssh.relay, "_LINGER", 0.5)
    with (
        forwarded(sshd(), lambda sock, number: sock.sendall(b"bye")) as forward,
        socket.create_connection((_LOOPBACK, forward.local_port), timeout=_PATIENCE) as sock,
    ):
        assert sock.recv(10) == b"bye"
        assert sock.recv(10) == b""
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            send_on(sock)
        assert forward.state == "ready"


def test_program_that_sends_and_reads_nothing_is_told(
    embedded: Any, ending: Ending, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So does one that never reads; one that is only silent may take its time."""
    monkeypatch.setattr(bokeh_ssh._ssh.relay, "_LINGER", 0.1)
    monkeypatch.setattr(bokeh_ssh._ssh.relay, "_STALLED", 0.5)
    monkeypatch.setattr(bokeh_ssh._ssh.relay, "_TICK", 0.1)
    with forwarded(embedded(), send_and_end) as forward:
        address = (_LOOPBACK, forward.local_port)
        with slow(address) as silent, slow(address) as sock:
            with pytest.raises((ConnectionResetError, BrokenPipeError)):
                send_on(sock)
            assert read_all(silent) == DATA


@pytest.fixture(params=["embedded", "sshd"])
def either(request: pytest.FixtureRequest) -> Machine:
    """The embedded server, and OpenSSH's."""
    made: Machine = request.getfixturevalue(request.param)()
    return made


@contextmanager
def tcp_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Make two TCP sockets that are connected to each other."""
    with socket.create_server((_LOOPBACK, 0)) as listener:
        with socket.create_connection(listener.getsockname(), timeout=_PATIENCE) as ours:
            theirs, _ = listener.accept()
            yield ours, theirs


@pytest.mark.parametrize("banner", [0, 100_000])
def test_program_that_sends_and_closes_at_once(sshd: Callable[..., Machine], banner: int) -> None:
    """What it sent is delivered, though it never read what the target had to say."""
    machine = sshd()
    begun, go, got = threading.Event(), threading.Event(), threading.Event()
    seen: list[bytes] = []

    def handle(sock: socket.socket, number: int) -> None:
        assert sock.recv(1) == b"h"
        begun.set()
        assert go.wait(_PATIENCE)
        for _ in range(10):
            sock.sendall(bytes(banner // 10))
        seen.append(read_all(sock))
        got.set()

    with Listener(handle) as target, connected(machine) as connection, tcp_pair() as (ours, theirs):
        connection.forward(theirs, (_LOOPBACK, target.port), ("127.0.0.1", 1))
        ours.sendall(b"h")
        assert begun.wait(_PATIENCE)
        connection.io_loop.chunk = connection.io_loop.chunk[:4096]  # it takes several turns to read all of it
        held, release = threading.Event(), threading.Event()
        connection.io_loop.post(lambda: held.set() or release.wait(_PATIENCE))  # type: ignore[func-returns-value]
        assert held.wait(_PATIENCE)
        ours.sendall(DATA[:60_000])
        ours.close()
        go.set()  # from here on, writing to it fails
        if banner:
            [stream] = connection.transport._channels.values()
            until(lambda: stream.window.received >= banner, what="the banner")
        release.set()
        assert got.wait(_PATIENCE)
        assert hashlib.sha256(seen[0]).digest() == hashlib.sha256(DATA[:60_000]).digest()
        until(lambda: not connection.transport._channels, what="the channel to end")
        assert connection.alive


def test_program_that_goes_away_ends_a_target_that_never_does(either: Machine) -> None:
    """The control of the above: a target that sends without end is told that nobody reads."""
    told = threading.Event()

    def handle(sock: socket.socket, number: int) -> None:
        try:
            while True:
                sock.sendall(bytes(65536))
        except ConnectionError:
            told.set()

    with Listener(handle) as target, connected(either) as connection, tcp_pair() as (ours, theirs):
        connection.forward(theirs, (_LOOPBACK, target.port), ("127.0.0.1", 1))
        assert ours.recv(1)
        ours.close()
        assert told.wait(_PATIENCE)
        until(lambda: not connection.transport._channels, what="the channel to end")


def test_loss_on_one_side_of_a_relay_is_no_end(embedded: Any) -> None:
    """What was cut off on its way through a relay is told to the other server without an EOF."""
    ends: list[str] = []
    with (
        Listener(lambda sock, number: sock.sendall(DATA * 20)) as target,
        connected(embedded()) as gateway,
        connected(embedded()) as peer,
        listening(
            gateway, (_LOOPBACK, 0), to_peer(gateway, peer, (_LOOPBACK, target.port)), allow_exposed=False
        ) as (_, port),
        slow((_LOOPBACK, int(port))) as sock,
    ):
        assert read_exactly(sock, 100_000) == DATA[:100_000]
        [stream] = gateway.transport._channels.values()
        send_eof = stream._transport.send_now

        def watch(packet: Any) -> None:
            if isinstance(packet, bytes):
                ends.append(f"message {packet[0]}")
            send_eof(packet)

        gateway.transport.send_now = watch  # type: ignore[method-assign]
        peer.transport.packetizer.close()
        until(lambda: not gateway.io_loop.open_relays, what="the other half to end")
        assert gateway.ping(_PATIENCE)
        assert "message 97" in ends  # CLOSE
        assert "message 96" not in ends  # EOF


def test_end_is_delivered_after_the_socket_is_closed(embedded: Any) -> None:
    """What the system still holds for a slow reader arrives after a clean close; so does the end."""

    def answer(sock: socket.socket, number: int) -> None:
        assert read_all(sock) == b"question"
        sock.sendall(DATA[:30_000])

    with ExitStack() as stack:
        target = stack.enter_context(Listener(answer))
        connection = stack.enter_context(connected(embedded()))
        entrance = open_acceptor(stack, bind(0), lambda _: None, True, Attempts())
        stack.enter_context(entrance.forwarding(connection, (_LOOPBACK, target.port)))
        with slow((_LOOPBACK, entrance.port)) as sock:
            sock.sendall(b"question")
            sock.shutdown(socket.SHUT_WR)
            until(lambda: target.count, what="the target")
            until(lambda: not connection.io_loop.open_relays, what="our side to be closed")
            assert read_all(sock) == DATA[:30_000]


# A process that dies.


def test_child_that_is_killed_resets_downloads(embedded: Any) -> None:
    """Half a download ends in a reset when the child process is killed, and the tunnel says what happened."""
    events: list[Any] = []
    with forwarded(
        embedded(), lambda sock, number: sock.sendall(DATA * 20), isolate=True, on_event=events.append
    ) as forward:
        with slow((_LOOPBACK, forward.local_port)) as sock:
            assert read_exactly(sock, 100_000) == DATA[:100_000]
            [child] = children()
            os.kill(child, signal.SIGKILL)
            with pytest.raises(ConnectionResetError):
                read_all(sock)
        with pytest.raises(ConnectionLostError, match=r"child process .* was killed \(signal 9: ") as caught:
            forward.wait(_PATIENCE)
        assert "open it again" in caught.value.hint
        assert forward.state == "failed"
    assert [type(event) for event in events].count(Lost) == 1


def test_child_that_ends_by_itself_is_told(embedded: Any) -> None:
    """One that was asked to end (SIGTERM) is told with its signal; who asked is not known."""
    with forwarded(embedded(), send_and_end, isolate=True) as forward:
        [child] = children()
        os.kill(child, signal.SIGTERM)
        with pytest.raises(ConnectionLostError, match=r"was killed \(signal 15\)"):
            forward.wait(_PATIENCE)


def test_child_that_lives_ends_downloads(embedded: Any, ending: Ending) -> None:
    """The control of the above: a whole download through a child process ends, and is not reset."""
    with forwarded(embedded(), send_and_end, isolate=True) as forward:
        with slow((_LOOPBACK, forward.local_port)) as sock:
            assert read_all(sock) == DATA


def test_child_that_is_killed_resets_uploads(embedded: Any) -> None:
    """What comes in at a gateway and was cut off is a reset for the target here, not an end."""
    machine = embedded()
    told: list[BaseException | None] = []
    began, done = threading.Event(), threading.Event()

    def receive(sock: socket.socket, number: int) -> None:
        try:
            while sock.recv(65536):
                began.set()
            told.append(None)
        except OSError as exc:
            told.append(exc)
        done.set()

    with (
        Listener(receive) as target,
        RemoteForward(
            machine.host,
            machine.user,
            remote_port=0,
            local_port=target.port,
            local_host=_LOOPBACK,
            isolate=True,
            reconnect=False,
            **machine.login,
        ) as forward,
        socket.create_connection((_LOOPBACK, forward.remote_port), timeout=_PATIENCE) as sock,
    ):
        sock.sendall(DATA)
        assert began.wait(_PATIENCE)
        [child] = children()
        os.kill(child, signal.SIGKILL)
        assert done.wait(_PATIENCE)
        assert isinstance(told[0], ConnectionResetError)


def _is_let_go_of_in_children(acceptor: LocalAcceptor, client: socket.socket) -> bool:
    for sock in list(acceptor._accepted):
        with suppress(OSError):
            if sock.getpeername() == client.getsockname():
                return True
    return False


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("stage", ["nothing said", "channel asked for", "joined"])
def test_fork_keeps_no_local_connection_open(embedded: Any, tmp_path: Path, stage: str) -> None:
    """What is reset here is reset, at whatever stage it was when a child was forked that lives on."""
    machine = embedded()
    with ExitStack() as stack:
        target = stack.enter_context(Listener(stay))
        cable = stack.enter_context(Cable(machine.host, machine.port))
        connection = stack.enter_context(connected(cable.machine(machine, tmp_path)))
        attempts = Attempts()
        entrance = open_acceptor(stack, bind(0), lambda _: None, True, attempts)
        with ExitStack() as leading:
            leading.enter_context(
                entrance.forwarding(connection, (_LOOPBACK, target.port), RequestFilter(entrance.port))
            )
            sock = stack.enter_context(
                socket.create_connection((_LOOPBACK, entrance.port), timeout=_PATIENCE)
            )
            if stage == "channel asked for":
                cable.cut()
            if stage != "nothing said":
                sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            if stage == "joined":
                until(lambda: target.count, what="the target")
            elif stage == "channel asked for":
                until(lambda: cable.held, what="the request for a channel")
            assert connection.io_loop.drain(_PATIENCE)
            until(lambda: _is_let_go_of_in_children(entrance, sock), what="it to be accepted")
            pid = os.fork()
            if not pid:
                signal.pause()
                os._exit(0)
            try:
                attempts.stop()
                connection.give_up("the child has a copy of the cable too, so that this is not pulled")
                leading.close()
                with pytest.raises(ConnectionResetError):
                    sock.recv(1)
            finally:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


_PROGRAM = """
import os, sys, threading
from bokeh_ssh import LocalForward

host, port, target, key, known_hosts = sys.argv[1:]
login = {"port": int(port), "key_filename": key, "known_hosts": known_hosts, "ssh_config": None}
with LocalForward(host, "me", remote_port=int(target), remote_host="127.0.0.1", **login) as forward:
    print(forward.local_port, flush=True)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            os._exit(0)
        os.waitpid(child, 0)
        print("forked", flush=True)
"""


def test_program_that_is_killed_resets_downloads(embedded: Any) -> None:
    """So does a program without a child process; a fork of it that ends does not."""
    machine = embedded()
    with (
        Listener(lambda sock, number: sock.sendall(DATA * 20)) as target,
        subprocess.Popen(
            [
                *(sys.executable, "-c", _PROGRAM, machine.host, str(machine.port), str(target.port)),
                *(str(machine.key_path), str(machine.known_hosts)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        ) as program,
    ):
        assert program.stdin
        assert program.stdout
        try:
            port = int(program.stdout.readline())
            with slow((_LOOPBACK, port)) as sock:
                assert read_exactly(sock, 100_000) == DATA[:100_000]
                program.stdin.write(b"\n")
                program.stdin.flush()
                assert program.stdout.readline() == b"forked\n"
                assert read_exactly(sock, 400_000) == (DATA * 2)[100_000:500_000]
                program.kill()
                with pytest.raises(ConnectionResetError):
                    read_all(sock)
        finally:
            program.kill()
