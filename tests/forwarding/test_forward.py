"""Both kinds of forward, against every kind of server: one suite of promises."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable

import pytest

import conformance
from beds import Machine, free_port, parse_listeners, until
from bokeh_ssh import (
    Event,
    ForwardingRefusedError,
    GatewayExposedError,
    LocalForward,
    PortInUseError,
    RemoteForward,
    TunnelClosedError,
    UsageError,
    Warned,
)
from processes import proc
from targets import check_on, target_here, target_on


@pytest.mark.parametrize("name", conformance.CHECKS)
def test_local_forward_conforms(machine: Machine, name: str) -> None:
    """A local forward keeps each promise of the suite."""
    with (
        target_on(machine) as port,
        LocalForward(
            machine.host, machine.user, remote_port=port, remote_host="127.0.0.1", **machine.login
        ) as forward,
    ):
        conformance.CHECKS[name](("127.0.0.1", forward.local_port))


@pytest.mark.parametrize("name", conformance.CHECKS)
def test_remote_forward_conforms(machine: Machine, name: str) -> None:
    """A remote forward keeps each promise of the suite, seen from the gateway."""
    with (
        target_here() as port,
        RemoteForward(
            machine.host,
            machine.user,
            remote_port=0,
            local_port=port,
            local_host="127.0.0.1",
            **machine.login,
        ) as forward,
    ):
        done = check_on(machine, name, forward.remote_port)
        assert done.status == 0, done.stderr


def test_local_port_taken_is_told_before_anything_is_dialled(no_leaks) -> None:
    """A local port that is taken is a typed error before anything is connected to."""
    events: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as taken, no_leaks():
        port = taken.getsockname()[1]
        forward = LocalForward("never.invalid", "me", remote_port=1, local_port=port, on_event=events.append)
        with pytest.raises(PortInUseError) as caught:
            forward.open()
    assert (caught.value.port, caught.value.side) == (port, "local")
    assert str(port) in str(caught.value)
    assert events == []
    assert forward.state == "failed"


def test_local_port_none_prefers_5006_and_takes_another(machine: Machine) -> None:
    """With ``local_port=None`` two forwards get two ports, on loopback alone."""
    with (
        LocalForward(machine.host, machine.user, remote_port=9, local_port=None, **machine.login) as one,
        LocalForward(machine.host, machine.user, remote_port=9, local_port=None, **machine.login) as two,
    ):
        assert one.local_port != two.local_port
        table = proc("net/tcp").read_text() + proc("net/tcp6").read_text()
        here = {address for address, port in parse_listeners(table) if port == two.local_port}
        assert here <= {"127.0.0.1", "::1"}
        assert "127.0.0.1" in here


@pytest.mark.parametrize(
    "knobs",
    [{"local_forward": False}, {"permit_open": ("127.0.0.1:1",)}],
    ids=["AllowTcpForwarding no", "PermitOpen"],
)
def test_forbidden_local_forward_fails_on_entering(machine_with, knobs, no_leaks) -> None:
    """A server that forbids the forward is told on entering, not at the first page."""
    machine = machine_with(**knobs)
    with no_leaks(), pytest.raises(ForwardingRefusedError) as caught:
        LocalForward(machine.host, machine.user, remote_port=5006, **machine.login).open()
    assert "AllowTcpForwarding" in str(caught.value)


def test_target_that_is_down_is_a_warning(machine: Machine) -> None:
    """A target that is not up yet does not keep the forward from opening, as with ssh -L; it is told."""
    events: list[object] = []
    with LocalForward(
        machine.host, machine.user, remote_port=1, on_event=events.append, **machine.login
    ) as forward:
        assert any(isinstance(event, Warned) for event in events)
        conformance.expect_reset(("127.0.0.1", forward.local_port))


def test_port_that_somebody_has_on_the_other_loopback_is_told(embedded: Callable[..., Machine]) -> None:
    """Whoever connects to "localhost" on the gateway may get to somebody else on ::1: a warning says so."""
    machine = embedded()
    events: list[Event] = []
    with target_here() as target, socket.create_server(("::1", 0), family=socket.AF_INET6) as other:
        threading.Thread(target=lambda: other.accept()[0].close(), daemon=True).start()
        port = other.getsockname()[1]
        words = {"remote_port": port, "local_port": target, "local_host": "127.0.0.1", **machine.login}
        with RemoteForward(machine.host, machine.user, on_event=events.append, **words):
            conformance.check_echo(("127.0.0.1", port))
            until(lambda: [it for it in events if isinstance(it, Warned) and f"[::1]:{port}" in it.text])


def test_remote_port_taken_is_told_and_the_connection_lives(machine: Machine) -> None:
    """A gateway port that is taken is a typed error, told apart from a prohibition."""
    with (
        target_here() as port,
        RemoteForward(
            machine.host,
            machine.user,
            remote_port=0,
            local_port=port,
            local_host="127.0.0.1",
            **machine.login,
        ) as first,
    ):
        second = RemoteForward(machine.host, machine.user, remote_port=first.remote_port, **machine.login)
        with pytest.raises(PortInUseError) as caught:
            second.open()
        assert (caught.value.port, caught.value.side) == (first.remote_port, "remote")
        assert check_on(machine, "echo", first.remote_port).status == 0


@pytest.mark.parametrize(
    "knobs",
    [{"remote_forward": False}, {"permit_listen": ("localhost:1",)}],
    ids=["AllowTcpForwarding local", "PermitListen"],
)
def test_forbidden_remote_forward_fails_on_entering(machine_with, knobs) -> None:
    """A gateway that forbids listening is told as that, not as a taken port."""
    machine = machine_with(**knobs)
    with pytest.raises(ForwardingRefusedError):
        RemoteForward(machine.host, machine.user, remote_port=45006, **machine.login).open()


def test_gateway_that_permits_a_port_by_the_name_of_ssh(sshd: Callable[..., Machine]) -> None:
    """``ssh -R 5006:...`` asks for "localhost", so that is what PermitListen and permitlisten name. Where
    that is the one port which is permitted, a second one who wants it is told that it is taken."""
    port = free_port()
    machine = sshd(PermitListen=f"localhost:{port}")
    with target_here() as target:
        words = {"remote_port": port, "local_port": target, "local_host": "127.0.0.1", **machine.login}
        with RemoteForward(machine.host, machine.user, **words) as forward:
            assert forward.remote_port == port
            conformance.check_echo(("127.0.0.1", port))
            with pytest.raises(PortInUseError, match="is taken: something listens there") as caught:
                RemoteForward(machine.host, machine.user, **words).open()
            assert "administrator" not in str(caught.value)
        until(lambda: port not in {each for _, each in machine.listening()}, what="the port to be closed")


def test_gateway_that_opens_the_port_to_its_network_is_refused(machine_with) -> None:
    """``GatewayPorts yes`` would open the port to everybody: refused, unless allowed in words."""
    machine = machine_with(gateway_ports="yes")
    with pytest.raises(GatewayExposedError, match=r"open port \d+ to") as caught:
        RemoteForward(machine.host, machine.user, remote_port=0, **machine.login).open()
    exposed = int(re.findall(r"port (\d+)", str(caught.value))[0])
    until(
        lambda: exposed not in {port for _, port in machine.listening()},
        what="the exposed port to be closed again",
    )
    with RemoteForward(
        machine.host, machine.user, remote_port=0, allow_exposed=True, **machine.login
    ) as forward:
        # The control: the port really is open to more than loopback.
        found = {address for address, port in machine.listening() if port == forward.remote_port}
        assert found & {"0.0.0.0", "::"}


def test_remote_listener_is_on_loopback_and_goes_with_us(machine: Machine) -> None:
    """The gateway listens on loopback alone, and stops when the forward is closed."""
    with RemoteForward(machine.host, machine.user, remote_port=0, **machine.login) as forward:
        port = forward.remote_port
        assert {address for address, p in machine.listening() if p == port} <= {"127.0.0.1", "::1"}
    until(lambda: port not in {p for _, p in machine.listening()}, what="the gateway to stop listening")


def test_remote_forward_to_a_closed_port_fails_one_connection_only(machine: Machine) -> None:
    """Where nothing listens here, the connection on the gateway ends; the transport lives."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        closed = gone.getsockname()[1]
    with RemoteForward(
        machine.host, machine.user, remote_port=0, local_port=closed, local_host="127.0.0.1", **machine.login
    ) as forward:
        assert check_on(machine, "echo", forward.remote_port).status != 0
        with socket.create_server(("127.0.0.1", closed), backlog=8) as listener:
            threading.Thread(target=conformance.serve, args=(listener,), daemon=True).start()
            assert check_on(machine, "echo", forward.remote_port).status == 0
            listener.shutdown(socket.SHUT_RDWR)
        assert forward.state == "ready"


def test_life_cycle_can_be_misused(machine: Machine, no_leaks) -> None:
    """Enter twice, close twice, use after the end, open again: each does what one expects."""
    with no_leaks():
        forward = LocalForward(machine.host, machine.user, remote_port=1, **machine.login)
        with pytest.raises(TunnelClosedError):
            forward.local_port  # noqa: B018
        with forward:
            port = forward.local_port
            assert forward.open() is forward
            assert forward.local_port == port
        assert forward.state == "closed"
        forward.close()
        with pytest.raises(TunnelClosedError):
            forward.local_port  # noqa: B018
        with forward:
            assert forward.state == "ready"
            closer = threading.Thread(target=forward.close)
            closer.start()
            assert forward.wait(20)
            closer.join(20)
        assert forward.state == "closed"


def test_closing_with_live_transfers_is_bounded(machine: Machine, no_leaks) -> None:
    """Leaving with fifty transfers under way takes no longer, resets them, and leaves nothing."""
    with target_on(machine) as port, no_leaks():
        forward = LocalForward(
            machine.host, machine.user, remote_port=port, remote_host="127.0.0.1", **machine.login
        ).open()
        address = ("127.0.0.1", forward.local_port)
        socks = [conformance.ask(address, "send 50000000") for _ in range(50)]
        for sock in socks:
            assert sock.recv(1)
        closer = threading.Thread(target=forward.close)
        closer.start()
        closer.join(30)
        assert not closer.is_alive()
        for sock in socks:
            with sock, pytest.raises(ConnectionResetError):  # a clean end would look like a whole transfer
                conformance.read_all(sock)


def test_exception_in_the_body_is_kept(machine: Machine) -> None:
    """An exception in the body comes out as it was, and everything is closed."""
    forward = LocalForward(machine.host, machine.user, remote_port=1, **machine.login)
    with pytest.raises(ZeroDivisionError), forward:
        raise ZeroDivisionError
    assert forward.state == "closed"


@pytest.mark.parametrize(
    "arguments",
    [
        {"remote_port": 0},
        {"remote_port": 70000},
        {"remote_port": "5006"},
        {"remote_port": 1, "local_port": -1},
        {"remote_port": 1, "remote_host": "-oProxyCommand=x"},
        {"remote_port": 1, "host_keys": "no"},
        {"remote_port": 1, "timeout": 0},
    ],
)
def test_bad_arguments_are_told_at_once(arguments) -> None:
    """What cannot work is a UsageError, which is a ValueError, before anything is opened."""
    with pytest.raises(UsageError) as caught:
        LocalForward("host.invalid", "me", **arguments)
    assert isinstance(caught.value, ValueError)
    assert caught.value.hint
