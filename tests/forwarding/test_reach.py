"""What a server says is there, and what is: only what comes back counts. Real servers, that say too much."""

from __future__ import annotations

import http.server
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import paramiko
import pytest

import bokeh_ssh._forwarding.listener_probe
import conformance
import fakes
import other_servers
from beds import Key, Machine, free_port
from bokeh_ssh import (
    ConnectionLostError,
    DirectTunnel,
    ForwardingRefusedError,
    Host,
    LocalForward,
    PortInUseError,
    RemoteForward,
    ServerNotFoundError,
    TargetUnreachableError,
)
from bokeh_ssh._cli import doctor
from bokeh_ssh._server.probe import is_answering, probe_port
from bokeh_ssh._ssh.connect import connect
from bokeh_ssh._ssh.connection import Connection
from cable import Cable
from doctor import CHECKS, examine
from fakes import Listener
from skips import missing
from targets import target_here

if os.name != "posix":
    pytest.skip("the servers are POSIX programs", allow_module_level=True)


def command(name: str, factory: pytest.TempPathFactory) -> list[str]:
    """Return a server's command; the test is skipped where it is not installed."""
    try:
        return other_servers.command(name, factory.mktemp("server"))
    except other_servers.MissingError as exc:
        missing(str(exc))
        raise AssertionError from exc


@pytest.fixture
def conch(key: Key, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Twisted Conch: confirms a channel to anything, and connects then."""
    with other_servers.running(command("conch", tmp_path_factory), key, tmp_path) as machine:
        yield machine


@pytest.fixture
def mina(key: Key, tmp_path: Path) -> Iterator[Machine]:
    """Apache MINA: refuses for reason 0, with the name of what Java has raised."""
    try:
        words = other_servers.command("mina", tmp_path)
    except other_servers.MissingError as exc:  # not in every distribution: test_hostile.py has its answers
        pytest.skip(str(exc))
    with other_servers.running(words, key, tmp_path) as machine:
        yield machine


@pytest.fixture
def dropbear(key: Key, tmp_path: Path) -> Iterator[Machine]:
    """Dropbear: listens where it can of 127.0.0.1 and ::1, and says that all is well."""
    try:
        with other_servers.dropbear(key, tmp_path) as machine:
            yield machine
    except other_servers.MissingError as exc:
        missing(str(exc))


def to(machine: Machine) -> Connection:
    """Log in."""
    return connect(Host(machine.host, machine.user, **machine.login))


def remote_forward(machine: Machine, port: int, target: int, **keywords: Any) -> RemoteForward:
    """Make a forward from a port there to one here."""
    return RemoteForward(
        machine.host,
        machine.user,
        remote_port=port,
        local_port=target,
        local_host="127.0.0.1",
        **{**machine.login, **keywords},
    )


def check_remote(forward: RemoteForward) -> None:
    """See that what connects to a remote forward, by "localhost", gets to its target."""
    conformance.check_echo(("localhost", forward.remote_port))


@contextmanager
def web_server() -> Iterator[int]:
    """Answer HTTP requests that are in order, and say nothing before; gives the port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", free_port()), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


# --- a forward that is granted, and leads elsewhere


@pytest.mark.parametrize("who", ["web", "silent", "hangs up"])
def test_port_that_is_taken_on_one_address_is_taken(
    dropbear: Machine, who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropbear grants a port that somebody has on 127.0.0.1, and listens on ::1 alone: that is an error like
    any other port that is taken, whatever who has it says."""
    with target_here() as target:
        taken = web_server() if who == "web" else _listening(fakes.stay if who == "silent" else fakes.hang_up)
        with taken as port:
            with monkeypatch.context() as patch:
                if who == "silent":  # a port of one's own has more time, on a machine with much to do
                    patch.setattr(bokeh_ssh._forwarding.listener_probe, "_PATIENCE", 1.0)
                with pytest.raises(PortInUseError, match="taken") as caught:
                    remote_forward(dropbear, port, target).open()
            assert (caught.value.port, caught.value.side) == (port, "remote")
        with remote_forward(dropbear, port, target) as forward:  # the control: when it is free
            check_remote(forward)
        with remote_forward(dropbear, 0, target) as forward:
            check_remote(forward)


def test_port_that_is_taken_on_both_addresses_is_taken(dropbear: Machine) -> None:
    """So it is where Dropbear can listen on none of the two, and says so."""
    with target_here() as target, socket.create_server(("127.0.0.1", free_port())) as taken:
        port = taken.getsockname()[1]
        with socket.create_server(("::1", port), family=socket.AF_INET6):
            with pytest.raises(PortInUseError, match="taken"):
                remote_forward(dropbear, port, target).open()


@contextmanager
def _listening(handler: fakes.Handler) -> Iterator[int]:
    with Listener(handler) as listener:
        yield listener.port


@pytest.mark.parametrize("name", ["conch", "gliderlabs", "erlang"])
def test_port_of_ones_own_is_reached(
    name: str, key: Key, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A forward that is granted and listens is neither taken nor exposed, on servers of all kinds; Conch,
    which confirms a channel to any address of this machine, among them."""
    with target_here() as target:
        with other_servers.running(command(name, tmp_path_factory), key, tmp_path) as machine:
            with remote_forward(machine, free_port(), target) as forward:
                check_remote(forward)


def test_control_exposed_port_is_told(sshd: Callable[..., Machine]) -> None:
    """The control: one that is open to the network is seen to be, by what comes back from another address."""
    from bokeh_ssh import GatewayExposedError

    machine = sshd(GatewayPorts="yes")
    with target_here() as target:
        with pytest.raises(GatewayExposedError):
            remote_forward(machine, 0, target).open()
        with remote_forward(machine, 0, target, allow_exposed=True) as forward:
            check_remote(forward)


def _confirming(server: fakes.Server, message: paramiko.Message) -> fakes.Raw:
    """Confirm a channel that the client asks for."""
    message.get_binary()
    return server.raw(message.get_int())


def test_line_that_is_lost_is_no_port_that_is_taken(tmp_path: Path) -> None:
    """Where the line goes down while it is found out whether a port is reached, that is what is told."""

    def hang_up(server: fakes.Server, message: paramiko.Message) -> bool:
        _confirming(server, message)
        server.close()
        return True

    with fakes.FakeSSH(tmp_path, on_open=hang_up) as fake, pytest.raises(ConnectionLostError):
        remote_forward(fake.machine, 40001, 1).open()


def test_line_that_is_lost_is_no_answer(tmp_path: Path) -> None:
    """Nor is it taken for a port where nothing listens, or something else than a Bokeh server does."""

    def hang_up(server: fakes.Server, message: paramiko.Message) -> bool:
        _confirming(server, message)
        server.close()
        return True

    with fakes.FakeSSH(tmp_path, on_open=hang_up) as fake:
        for ask in (
            probe_port,
            lambda connection, port, **more: is_answering(connection, ("localhost", port), **more),
        ):
            with to(fake.machine) as connection, pytest.raises(ConnectionLostError):
                ask(connection, 5006, timeout=20)


def test_answer_waits_for_a_window() -> None:
    """A server that lets nothing be sent at first, on a channel to a listener, is answered once it does."""
    room, said = [0], []
    stream = SimpleNamespace(writable=lambda: room[0], send=lambda data: said.append(bytes(data)))
    connection = SimpleNamespace(io_loop=SimpleNamespace(post=lambda call: call()))
    ear = bokeh_ssh._forwarding.listener_probe._ProbeChannel(connection, stream, b"word", b"answer")  # type: ignore[arg-type]
    ear.on_data([memoryview(b"wo"), memoryview(b"rd")])
    assert said == []
    room[0] = len(b"answer")
    ear.on_window()
    ear.on_window()
    assert said == [b"answer"]


def test_line_that_stalls_is_no_port_that_is_taken(
    sshd: Callable[..., Machine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line that carries nothing for longer than the word may take, and then goes on, is none either; the
    control is a port that is silent though the line is not (above)."""
    monkeypatch.setattr(bokeh_ssh._forwarding.listener_probe, "_PATIENCE", 0.5)
    plain_open, plain_ping = Connection.open_socket, Connection.ping

    def open_socket(connection: Connection, *args: Any, **keywords: Any) -> socket.socket:
        sock = plain_open(connection, *args, **keywords)
        cable.cut()
        return sock

    def ping(connection: Connection, timeout: float) -> bool:
        cable.mend()
        return plain_ping(connection, timeout)

    monkeypatch.setattr(Connection, "open_socket", open_socket)
    monkeypatch.setattr(Connection, "ping", ping)
    machine = sshd()
    with target_here() as target, Cable(machine.host, machine.port) as cable:
        with remote_forward(cable.machine(machine, tmp_path), 0, target) as forward:
            assert cable.held
            check_remote(forward)


# --- what listens there, and what does not


def test_dead_port_is_dead(conch: Machine) -> None:
    """A port where nothing listens is that, where the server confirms the channel; who answers is found."""
    with to(conch) as connection, web_server() as port:
        assert probe_port(connection, free_port(), timeout=20) is None
        assert not is_answering(connection, ("127.0.0.2", port), timeout=20)
        found = probe_port(connection, port, timeout=20)
        assert found
        assert found.status == 404
        assert is_answering(connection, ("127.0.0.1", port), timeout=20)
        with _listening(fakes.saying(b"220 mail.example\r\n")) as other:
            found = probe_port(connection, other, timeout=20)
            assert found
            assert not found.is_bokeh


def test_nothing_to_attach_to_is_told_as_that(conch: Machine) -> None:
    """Attaching to a dead port is told as such, and not as a port that something else has."""
    keywords: dict[str, Any] = {"launch": False, "isolate": False, **conch.login}
    with pytest.raises(ServerNotFoundError):
        DirectTunnel(conch.host, conch.user, remote_port=free_port(), **keywords).open()
    with web_server() as port, pytest.raises(PortInUseError, match="not a Bokeh server"):
        DirectTunnel(conch.host, conch.user, remote_port=port, **keywords).open()


def test_local_forward_through_conch(conch: Machine) -> None:
    """The control: what listens is reached through it."""
    with target_here() as port:
        with LocalForward(
            conch.host, conch.user, remote_port=port, remote_host="127.0.0.1", **conch.login
        ) as forward:
            conformance.check_echo(("127.0.0.1", forward.local_port))


# --- doctor


def test_doctor_goes_on_to_the_end(conch: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that hangs up when it is asked to listen is a worse gateway and no worse host: what follows is
    looked at over a new connection. What it confirms is not taken for what is there."""
    found = examine(conch)
    assert list(found) == CHECKS
    assert found["forwarding"][0] == "good"
    monkeypatch.setattr(doctor, "BOKEH_PORT", free_port())
    with to(conch) as connection, web_server() as port:
        assert "nothing listens" in doctor._check_forwarding(connection).text
        monkeypatch.setattr(doctor, "BOKEH_PORT", port)
        assert "something listens" in doctor._check_forwarding(connection).text
    assert found["as a gateway"][0] == "note"
    assert found["server"][0] in ("good", "note")
    assert found["your servers"][0] in (
        "good",
        "note",
    )  # all of the account's own


def test_doctor_tells_what_forbids_in_other_words(
    key: Key, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Erlang forbids a forward with the reason of a target that does not answer; doctor is not taken in."""
    words = command("erlang-forbid", tmp_path_factory)
    with other_servers.running(words, key, tmp_path) as machine:
        with to(machine) as connection, pytest.raises(ForwardingRefusedError, match="Forwarding disabled"):
            connection.open_socket(("127.0.0.1", free_port()), timeout=20)
        found = examine(machine, code=1)
        assert found["forwarding"][0] == "bad"
    words = command("erlang", tmp_path_factory)
    with other_servers.running(words, key, tmp_path) as machine:  # the control
        with to(machine) as connection:
            assert probe_port(connection, free_port(), timeout=20) is None


def test_refusal_for_no_reason_is_one(mina: Machine) -> None:
    """A name that does not resolve there, and a port where nobody listens, are told in the server's words."""
    dead = ("127.0.0.1", free_port())
    with target_here() as port, to(mina) as connection:
        for target, words in ((("no-such-host.invalid", 80), "Unresolved"), (dead, "nothing answers")):
            with pytest.raises(TargetUnreachableError, match=words):
                connection.open_socket(target, timeout=10)
        connection.open_socket(("127.0.0.1", port), timeout=10).close()  # the control: the connection lives
