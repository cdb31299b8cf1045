"""Channels are open before anybody connects: a request goes out at once, and nothing is lost by that."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import apps
from beds import Machine, until
from bokeh_ssh._core.backoff import Attempts
from bokeh_ssh._forwarding import spare_channels
from bokeh_ssh._forwarding.listener import LocalAcceptor, bind, open_acceptor
from bokeh_ssh._forwarding.request_filter import RequestFilter
from bokeh_ssh._forwarding.spare_channels import SpareChannels, open_spare
from bokeh_ssh._ssh.connection import Connection
from bokeh_ssh._ssh.transport import EarlyChannel
from cable import Cable
from connections import connected
from direct_tunnels import port_of, serve_on, tunnel_to
from fakes import Listener
from processes import proc

LOOPBACK = "127.0.0.1"
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"


class Target:
    """Where a forward leads: says on which of its connections a request came.

    :ivar came: the requests, each with its connection's number
    :ivar count: how many connections there have been
    """

    def __init__(self, *, greeting: bytes = b"", ends: int = 0) -> None:
        self.came: list[tuple[int, bytes]] = []
        self.count = 0
        self._greeting = greeting
        self._ends = ends  # so many connections are ended as they come

    def answer(self, sock: socket.socket, number: int) -> None:
        number += 1  # as they were accepted: their threads may start in another order
        self.count = max(self.count, number)
        if number <= self._ends:
            return
        if self._greeting:
            sock.sendall(self._greeting + b" %d\n" % number)
        while head := sock.recv(65536):
            self.came.append((number, head))
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n%d" % number)


@contextmanager
def forwarding(
    connection: Connection, target: Target, *, ahead: bool = True, http: bool = True
) -> Iterator[tuple[LocalAcceptor, SpareChannels | None]]:
    """Lead a local port to the target; gives the channels ahead too."""
    with ExitStack() as stack:
        port = stack.enter_context(Listener(target.answer)).port
        acceptor = open_acceptor(stack, bind(0), lambda _: None, True, Attempts())
        request_filter = RequestFilter(acceptor.port) if http else None
        spare = spare_to(connection, port) if ahead else None
        stack.enter_context(acceptor.forwarding(connection, (LOOPBACK, port), request_filter, spare=spare))
        yield acceptor, spare


def spare_to(connection: Connection, port: int) -> SpareChannels:
    """Ask for spare channels to a port."""
    return open_spare(connection, (LOOPBACK, port), None)


def count_spare(connection: Connection) -> int:
    """Return how many channels are open that nobody uses, here or there."""
    handlers = [channel.handler for channel in list(connection.transport._channels.values())]
    return sum(isinstance(handler, EarlyChannel) and handler.untouched for handler in handlers)


def are_touched(spare: SpareChannels | None) -> bool:
    """Return whether both channels ahead are open, and something has come on each."""
    assert spare
    return [early.untouched for early in list(spare._unused)] == [False, False]


def fetch(port: int, request: bytes = GET) -> bytes:
    """Return the body of the answer, on a connection of its own."""
    with socket.create_connection((LOOPBACK, port), timeout=30) as sock:
        sock.sendall(request)
        return sock.recv(1000).rpartition(b"\n")[2]


def test_request_goes_out_on_a_channel_that_was_open(embedded: Callable[..., Machine]) -> None:
    """The target has two connections before anybody connects here, and another one for each that is used."""
    target = Target()
    with connected(embedded()) as connection, forwarding(connection, target) as (acceptor, _):
        for number in (1, 2, 3):
            until(lambda: count_spare(connection) == 2, what="those ahead")
            until(lambda: target.count == number + 1, what="those ahead to be taken there")  # noqa: B023
            assert fetch(acceptor.port) == b"%d" % number
        until(lambda: target.count == 5, what="the next one")
        assert target.came == [(1, GET), (2, GET), (3, GET)]


def test_one_that_is_under_way_is_waited_for(embedded: Callable[..., Machine], tmp_path: Path) -> None:
    """Who connects while those ahead are under way takes the first of them: it was asked for earlier."""
    machine = embedded()
    target = Target()
    with Cable(machine.host, machine.port) as cable:
        with connected(cable.machine(machine, tmp_path)) as connection:
            cable.cut()
            with forwarding(connection, target) as (acceptor, _):
                until(lambda: cable.held, what="the channels to be asked for")
                with socket.create_connection((LOOPBACK, acceptor.port), timeout=30) as sock:
                    sock.sendall(GET)
                    cable.mend()
                    assert sock.recv(1000)[-1:] in (b"1", b"2")
                until(lambda: target.count == 3, what="one more, and no more")


def test_none_is_open_where_none_is_wanted(embedded: Callable[..., Machine]) -> None:
    """Without it, the target sees just the connections that are made here."""
    target = Target()
    with connected(embedded()) as connection, forwarding(connection, target, ahead=False) as (acceptor, _):
        assert fetch(acceptor.port) == b"1"
        assert fetch(acceptor.port) == b"2"
        assert target.count == 2


def test_one_that_has_ended_is_not_used(embedded: Callable[..., Machine]) -> None:
    """A target that ends idle connections does not end a request with them."""
    target = Target(ends=2)
    with connected(embedded()) as connection, forwarding(connection, target) as (acceptor, spare):
        until(lambda: are_touched(spare), what="their end to be known")
        assert fetch(acceptor.port) == b"3"


def test_one_that_is_old_is_not_used(
    embedded: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that ends what is idle for long might be about to."""
    target = Target()
    with connected(embedded()) as connection, forwarding(connection, target) as (acceptor, _):
        until(lambda: count_spare(connection) == 2, what="the connections ahead")
        monkeypatch.setattr(spare_channels, "_MOST_AGE", 0.0)
        assert fetch(acceptor.port) == b"3"


def test_old_greeting_is_shown_to_nobody(embedded: Callable[..., Machine]) -> None:
    """A target that speaks first is heard when somebody connects; after one try none is opened ahead."""
    target = Target(greeting=b"hello")
    with connected(embedded()) as connection, forwarding(connection, target, http=False) as (acceptor, spare):
        until(lambda: are_touched(spare), what="their greeting to be here")
        for number in (3, 4):
            with socket.create_connection((LOOPBACK, acceptor.port), timeout=30) as sock:
                assert sock.recv(100) == b"hello %d\n" % number


@pytest.mark.parametrize("request_", [GET, POST], ids=["GET", "POST"])
def test_request_on_a_line_that_is_dead(
    embedded: Callable[..., Machine], tmp_path: Path, request_: bytes
) -> None:
    """A request that went out at once, onto a line that nobody knew to be dead, goes out again over the next;
    one that must not be sent twice is reset, since nobody can tell whether it has arrived."""
    machine = embedded()
    before, after = Target(), Target()
    with ExitStack() as stack:
        first_port = stack.enter_context(Listener(before.answer)).port
        second_port = stack.enter_context(Listener(after.answer)).port
        cable = stack.enter_context(Cable(machine.host, machine.port))
        first = stack.enter_context(connected(cable.machine(machine, tmp_path)))
        second = stack.enter_context(connected(machine))
        acceptor = open_acceptor(stack, bind(0), lambda _: None, True, Attempts())
        request_filter = RequestFilter(acceptor.port)
        with acceptor.forwarding(
            first, (LOOPBACK, first_port), request_filter, spare=spare_to(first, first_port)
        ):
            until(lambda: count_spare(first) == 2, what="the connections ahead")
            cable.cut()
            sock = stack.enter_context(socket.create_connection((LOOPBACK, acceptor.port), timeout=30))
            sock.sendall(request_)
            until(lambda: cable.held > len(request_), what="the request to be on the line")
            cable.refuse()
            cable.mend()
            until(lambda: not first.alive, what="the loss")
            if request_ == POST:
                with pytest.raises(ConnectionResetError):
                    sock.recv(1)
                return
            until(lambda: acceptor._held, what="it to wait")
        stack.enter_context(acceptor.forwarding(second, (LOOPBACK, second_port), request_filter))
        assert sock.recv(1000).startswith(b"HTTP/1.1 200")
    assert (before.came, after.came) == ([], [(1, GET)])


def test_answer_that_has_begun_is_reset(embedded: Callable[..., Machine], tmp_path: Path) -> None:
    """Once something of the answer is here, a loss resets the connection: a second answer would follow."""
    machine = embedded()

    def answer(sock: socket.socket, number: int) -> None:
        if sock.recv(65536):
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\npart")
            sock.recv(1)

    with ExitStack() as stack:
        port = stack.enter_context(Listener(answer)).port
        cable = stack.enter_context(Cable(machine.host, machine.port))
        connection = stack.enter_context(connected(cable.machine(machine, tmp_path)))
        acceptor = open_acceptor(stack, bind(0), lambda _: None, True, Attempts())
        request_filter = RequestFilter(acceptor.port)
        with acceptor.forwarding(
            connection, (LOOPBACK, port), request_filter, spare=spare_to(connection, port)
        ):
            with socket.create_connection((LOOPBACK, acceptor.port), timeout=30) as sock:
                sock.sendall(GET)
                assert sock.recv(1000).endswith(b"part")
                cable.refuse()
                with pytest.raises(ConnectionResetError):
                    sock.recv(1)


def test_tunnel_to_a_bokeh_server_has_one(sshd: Callable[..., Machine]) -> None:
    """A tunnel to Bokeh's own server has connections to it before a page is asked for."""
    machine = sshd()
    with serve_on(machine, apps.put(machine, "sliders.py", apps.SLIDER)) as running:
        port = port_of(running)

        def established() -> int:
            table = proc("net/tcp").read_text(encoding="ascii").splitlines()[1:]
            return sum(f":{port:04X} " in line.split()[1] + " " and line.split()[3] == "01" for line in table)

        with tunnel_to(machine, remote_port=port, launch=False):
            until(lambda: established() == 2, what="the connections ahead")
        until(lambda: established() == 0, what="its end")
