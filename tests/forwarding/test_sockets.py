"""Unix sockets in place of ports: what SSH carries, and what the two forwards make of it."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import conformance
from beds import Machine, until
from bokeh_ssh import (
    ForwardError,
    ForwardingRefusedError,
    GatewayExposedError,
    Host,
    LocalForward,
    Reconnected,
    RemoteForward,
    SocketInUseError,
    TargetUnreachableError,
    UsageError,
    Warned,
)
from bokeh_ssh._core import endpoint
from bokeh_ssh._forwarding import local_sockets as localsocket
from bokeh_ssh._forwarding import remote_sockets
from bokeh_ssh._ssh.connect import connect
from bokeh_ssh._ssh.connection import Connection, bound_port, listening, opening
from bokeh_ssh._ssh.transport import Channel, Reply, forwarded

_ECHO = """
import os, socket, sys, threading
sock = socket.socket(socket.AF_UNIX)
os.umask(0o177)
sock.bind(sys.argv[1])
sock.listen(8)
print("up", flush=True)
def serve(client):
    with client:
        while data := client.recv(65536):
            client.sendall(data)
while True:
    threading.Thread(target=serve, args=(sock.accept()[0],)).start()
"""

_ASK = """
import socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.settimeout(20)
sock.connect(sys.argv[1])
sock.sendall(sys.argv[2].encode())
sock.shutdown(socket.SHUT_WR)
while data := sock.recv(65536):
    sys.stdout.write(data.decode())
"""


@pytest.fixture
def folder(machine: Machine) -> Iterator[str]:
    """A folder on the machine that only the account which logs in may enter."""
    user = machine.user if machine.kind == "docker" else None
    path = str(machine.execute("mktemp -d", user=user))
    yield path
    machine.execute(["rm", "-rf", path])


@pytest.fixture
def here() -> Iterator[Path]:
    """A folder on this machine whose name is short enough for sockets in it."""
    with tempfile.TemporaryDirectory(prefix="sock-") as path:
        yield Path(path)


def login_of(machine: Machine) -> Host:
    """Say how to log in to it."""
    return Host(machine.host, machine.user, **machine.login)


@contextlib.contextmanager
def echo_at(machine: Machine, path: str) -> Iterator[None]:
    """Run a server on the machine that sends back what comes to a socket."""
    user = machine.user if machine.kind == "docker" else None
    with machine.spawn([machine.python, "-u", "-c", _ECHO, path], user=user) as running:
        until(lambda: running.log.strip() == "up", what="the echo to listen")
        yield


def ask_at(machine: Machine, path: str, text: str, *, user: str | None = None) -> Any:
    """Have a program on the machine say something to a socket there, and tell what comes back."""
    user = user or (machine.user if machine.kind == "docker" else None)
    return machine.execute([machine.python, "-c", _ASK, path, text], user=user)


def say(sock: socket.socket, text: bytes) -> bytes:
    """Say something and tell all that comes back."""
    with sock:
        sock.settimeout(20)
        sock.sendall(text)
        sock.shutdown(socket.SHUT_WR)
        return conformance.read_all(sock)


def answer(stream: Channel, connection: Connection) -> None:
    """Take a stream and send back what comes."""
    ours, theirs = socket.socketpair()
    stream.accept()
    stream.attach(connection.io_loop.relay(theirs, stream))

    def echo() -> None:
        with ours:
            ours.sendall(conformance.read_all(ours))

    threading.Thread(target=echo, daemon=True).start()


def test_channel_to_a_socket(machine: Machine, folder: str) -> None:
    """A socket on the server's machine is reached as a port is; half-closes pass."""
    path = f"{folder}/a b.sock"
    with echo_at(machine, path), connect(login_of(machine)) as connection:
        sock = connection.open_socket(path, timeout=20)
        assert say(sock, b"x" * 300_000) == b"x" * 300_000


def test_channel_to_a_socket_that_nobody_serves(machine: Machine, folder: str) -> None:
    """A path that nobody listens on is a typed error, and the connection lives."""
    with connect(login_of(machine)) as connection:
        with pytest.raises(TargetUnreachableError, match=r"none\.sock"):
            connection.open_socket(f"{folder}/none.sock", timeout=20)
        assert connection.ping(20)


def test_connection_that_is_tried_again_is_given_back_with_the_line(embedded: Any, here: Path) -> None:
    """A socket that refuses is tried again for seconds; a line that is closed meanwhile forgets nobody."""
    path, back = str(here / "s"), threading.Event()
    with connect(login_of(embedded())) as connection, contextlib.ExitStack() as stack:
        ours, theirs = map(stack.enter_context, socket.socketpair())
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            connection.forward(theirs, path, endpoint.HERE)
            listener.accept()[0].close()
            assert ours.recv(1) == b""  # taken: so what refuses from here on may only have no room
        connection.forward(stack.enter_context(socket.socket()), path, endpoint.HERE, again=back.set)
        until(lambda: connection.io_loop._timers, what="it to be refused")
        connection.close()
        assert back.wait(30)


def test_listening_on_a_socket(machine: Machine, folder: str) -> None:
    """The server listens on a path, hands over what connects to it, and stops when it is told to."""
    one, other = f"{folder}/one.sock", f"{folder}/other.sock"
    with connect(login_of(machine)) as connection:
        for path in (one, other):
            assert connection.listen(path, lambda stream, origin: answer(stream, connection)) == path
        assert str(ask_at(machine, one, "hello")) == "hello"
        assert str(machine.execute(["stat", "-c", "%a", one])) == "600"
        connection.unlisten(one)
        assert ask_at(machine, one, "hello").status != 0
        assert str(ask_at(machine, other, "hello")) == "hello"


@pytest.mark.parametrize("where", ["socket", "port"])
def test_who_connects_at_once_is_let_in(
    sshd: Any, here: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Who connects in the moment in which the server begins to listen is not sent away."""
    path, said = f"{here}/a.sock", []
    plain = Reply.wait

    def wait(self: Reply, timeout: float) -> bool:
        found = plain(self, timeout)
        if self.granted:  # whoever asked does not know yet
            by_path = where == "socket"
            with socket.socket(socket.AF_UNIX if by_path else socket.AF_INET) as sock:
                sock.connect(path if by_path else ("127.0.0.1", bound_port(self.payload)))
                said.append(say(sock, b"hello"))
        return found

    monkeypatch.setattr(Reply, "wait", wait)
    with connect(login_of(sshd())) as connection:
        asked = path if where == "socket" else ("127.0.0.1", 0)
        connection.listen(asked, lambda stream, origin: answer(stream, connection))
    assert said == [b"hello"]


def test_forbidden_sockets_are_told(machine_with: Any) -> None:
    """Where sockets may not be forwarded, listening says so; a channel says so where it can."""
    machine = machine_with(streamlocal=False)
    with connect(login_of(machine)) as connection:
        with pytest.raises(ForwardingRefusedError, match="AllowStreamLocalForwarding"):
            connection.listen("/tmp/bokeh-ssh-never.sock", lambda stream, origin: None)
        # OpenSSH has one reason for all that it refuses here.
        with pytest.raises(
            (ForwardingRefusedError, TargetUnreachableError), match="AllowStreamLocalForwarding"
        ):
            connection.open_socket("/tmp/bokeh-ssh-never.sock", timeout=20)
        assert connection.ping(20)


@pytest.mark.parametrize("path", ["", "a.sock", "./a", "~/a", "/a/", "/a\0b", "/a\nb", "/" + "x" * 107])
def test_paths_that_cannot_be(path: str) -> None:
    """A path that no Unix socket can have is a UsageError that says why."""
    with pytest.raises(UsageError) as caught:
        endpoint.check_path(path, "remote_socket")
    assert "remote_socket" in str(caught.value)
    assert caught.value.hint


def test_longest_path_fits() -> None:
    """The longest path that is taken is the longest that a socket here can be bound to."""
    path = "/" + "x" * (endpoint.LONGEST_PATH - 1)
    endpoint.check_path(path, "remote_socket")
    with socket.socket(socket.AF_UNIX) as sock, pytest.raises(OSError, match="AF_UNIX path too long"):
        sock.bind(path + "x")


@given(raw=st.binary(max_size=100))
def test_a_forwarded_socket_is_read_as_it_was_asked_for(raw: bytes) -> None:
    """The path that the server names is the one it was told, in whatever bytes."""
    path = raw.decode("utf-8", "surrogateescape")
    rest = listening(path)[1] + b"\0\0\0\0"
    assert forwarded(b"forwarded-streamlocal@openssh.com", rest) == (path, endpoint.HERE)


@given(
    host=st.text(st.characters(codec="ascii"), max_size=50),
    port=st.integers(0, 2**32 - 1),
    kind=st.sampled_from([b"forwarded-tcpip", b"forwarded-streamlocal@openssh.com", b"x11", b""]),
    cut=st.integers(0, 200),
    junk=st.binary(max_size=200),
)
def test_any_bytes_for_a_forwarded_channel(host: str, port: int, kind: bytes, cut: int, junk: bytes) -> None:
    """Whatever follows the type of a forwarded channel is read, or not; it never fails, or grows."""
    message = opening((host, port), ("10.0.0.1", 1))[1]
    for rest in (junk, message[:cut] + junk, b"\xff\xff\xff\xff" + junk):
        found = forwarded(kind, rest)
        assert found is None or len(found[0]) <= 1024


def connected(path: Path | str) -> socket.socket:
    """Connect to a socket on this machine."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(20)
    sock.connect(str(path))
    return sock


@contextlib.contextmanager
def echo_here(path: Path) -> Iterator[None]:
    """Run a server on this machine that sends back what comes to a socket."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(8)

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    sock, _ = listener.accept()
                    threading.Thread(target=echo, args=(sock,), daemon=True).start()

        def echo(sock: socket.socket) -> None:
            with sock, contextlib.suppress(OSError):  # who only looks whether we are there is gone already
                sock.sendall(conformance.read_all(sock))

        threading.Thread(target=serve, daemon=True).start()
        yield
        listener.shutdown(socket.SHUT_RDWR)
    path.unlink(missing_ok=True)


def leave_stale(path: Path) -> None:
    """Leave a socket as a program that was killed does."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


# The socket on this machine.


def test_local_socket_leads_to_a_port_or_a_socket(machine: Machine, folder: str, here: Path) -> None:
    """``-L /path:host:port`` and ``-L /path:/path``: only this account may connect, and it goes with us."""
    path, far = here / "app.sock", f"{folder}/far.sock"
    with (
        echo_at(machine, far),
        LocalForward(
            machine.host, machine.user, local_socket=path, remote_socket=far, **machine.login
        ) as forward,
    ):
        assert forward.local_socket == str(path)
        assert forward.remote_socket == far
        assert (forward.local_port, forward.remote_port) == (0, 0)
        assert say(connected(path), b"hello") == b"hello"
        mode = path.lstat().st_mode
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o600
    assert not path.exists()


def test_local_port_leads_to_a_socket(machine: Machine, folder: str) -> None:
    """``-L port:/path``."""
    path = f"{folder}/far.sock"
    with (
        echo_at(machine, path),
        LocalForward(machine.host, machine.user, remote_socket=path, **machine.login) as forward,
    ):
        sock = socket.create_connection(("127.0.0.1", forward.local_port), timeout=20)
        assert say(sock, b"x" * 3_000_000) == b"x" * 3_000_000


def test_target_socket_that_is_down_is_a_warning(machine: Machine, folder: str) -> None:
    """A socket that nobody serves yet does not keep the forward from opening, as with a port; it is told."""
    events: list[object] = []
    with LocalForward(
        machine.host,
        machine.user,
        remote_socket=f"{folder}/later.sock",
        on_event=events.append,
        **machine.login,
    ) as forward:
        assert any(isinstance(event, Warned) for event in events)
        conformance.expect_reset(("127.0.0.1", forward.local_port))


def test_forbidden_target_socket_fails_on_entering(machine_with: Any) -> None:
    """AllowStreamLocalForwarding no is told on entering, though OpenSSH gives no reason."""
    machine = machine_with(streamlocal=False)
    user = machine.user if machine.kind == "docker" else None
    path = str(machine.execute("mktemp -d", user=user)) + "/app.sock"
    with echo_at(machine, path), pytest.raises(ForwardingRefusedError, match="AllowStreamLocalForwarding"):
        LocalForward(machine.host, machine.user, remote_socket=path, **machine.login).open()


def test_local_socket_that_was_left_is_removed(here: Path) -> None:
    """A socket of a program that has ended is in nobody's way."""
    path = here / "app.sock"
    leave_stale(path)
    with pytest.raises(OSError, match="in use"), socket.socket(socket.AF_UNIX) as control:
        control.bind(str(path))
    made = localsocket.bind(str(path))
    with connected(path):
        pass
    made.close()
    made.close()
    assert not path.exists()


def test_local_socket_that_is_served_is_left_alone(here: Path) -> None:
    """Where somebody listens, or something is that is no socket, it is a typed error and stays as it was."""
    served, file = here / "served.sock", here / "file"
    file.write_text("precious")
    with echo_here(served):
        with pytest.raises(SocketInUseError) as caught:
            localsocket.bind(str(served))
        assert (caught.value.path, caught.value.side) == (str(served), "local")
        assert say(connected(served), b"still here") == b"still here"
    with pytest.raises(SocketInUseError, match="not a socket"):
        localsocket.bind(str(file))
    assert file.read_text() == "precious"
    with pytest.raises(ForwardError, match="none"):
        localsocket.bind(str(here / "none" / "app.sock"))


def test_local_socket_of_another_that_took_its_place_stays(here: Path) -> None:
    """What is not the file that we made is not removed at the end."""
    path = here / "app.sock"
    made = localsocket.bind(str(path))
    path.unlink()
    with echo_here(path):
        made.close()
        assert say(connected(path), b"hello") == b"hello"


def test_local_socket_in_a_folder_of_everybody_is_refused(here: Path) -> None:
    """Where others could put a socket of theirs in its place, none is made."""
    open_to_all = here / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    with pytest.raises(ForwardError, match="everybody may write"):
        localsocket.bind(str(open_to_all / "app.sock"))
    assert not list(open_to_all.iterdir())
    open_to_all.chmod(0o1777)  # the control: as /tmp is
    localsocket.bind(str(open_to_all / "app.sock")).close()


def test_local_socket_in_a_forked_child_is_the_parents(here: Path) -> None:
    """A forked child that closes its copy leaves the file to its parent."""
    path = here / "app.sock"
    made = localsocket.bind(str(path))
    pid = os.fork()
    if not pid:
        made.close()
        os._exit(0)
    os.waitpid(pid, 0)
    assert path.exists()
    made.close()


@pytest.mark.parametrize("path", ["", "x/", "/a\0b", "/" + "x" * 107])
def test_local_paths_that_cannot_be(path: str) -> None:
    """A path that no socket here can have is told before anything is opened."""
    with pytest.raises(UsageError):
        LocalForward("host.invalid", "me", remote_port=1, local_socket=path)
    with pytest.raises(UsageError):
        RemoteForward("host.invalid", "me", local_socket=path)


def test_systems_without_unix_sockets_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Python has no AF_UNIX, as on Windows, a local socket is a UsageError; a remote one is fine."""
    monkeypatch.delattr(socket, "AF_UNIX")
    with pytest.raises(UsageError, match="Unix sockets"):
        LocalForward("host.invalid", "me", remote_port=1, local_socket="x.sock")
    with pytest.raises(UsageError, match="Unix sockets"):
        RemoteForward("host.invalid", "me", local_socket="x.sock")
    LocalForward("host.invalid", "me", remote_socket="/run/x.sock")


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"remote_port": 1, "remote_socket": "/x"},
        {"remote_host": "x", "remote_socket": "/x"},
        {"remote_socket": "/x", "local_socket": "/y", "local_port": 1},
        {"remote_socket": "/x", "local_socket": "/y", "bind_address": "127.0.0.1"},
        {"remote_socket": "relative"},
    ],
)
def test_a_socket_and_a_port_are_not_mixed(keywords: dict[str, Any]) -> None:
    """A socket stands in for host and port: both together, or neither, is a UsageError."""
    with pytest.raises(UsageError):
        LocalForward("host.invalid", "me", **keywords)


# The socket on the gateway.


def published(machine: Machine, path: str, target: Path, **keywords: Any) -> RemoteForward:
    """Make a forward from a socket on the machine to one here."""
    return RemoteForward(
        machine.host, machine.user, remote_socket=path, local_socket=target, **machine.login, **keywords
    )


def test_remote_socket_leads_to_a_socket_here(machine: Machine, folder: str, here: Path) -> None:
    """``-R /path:/path``: only the account there may connect, and the file goes with us."""
    path, target = f"{folder}/it's.sock", here / "app.sock"
    with echo_here(target), published(machine, path, target) as forward:
        assert forward.remote_socket == path
        assert forward.local_socket == str(target)
        assert (forward.remote_port, forward.local_port) == (0, 0)
        assert str(ask_at(machine, path, "hello")) == "hello"
        assert str(machine.execute(["stat", "-c", "%a", path])) == "600"
    assert machine.execute(["ls", path]).status != 0


def test_remote_socket_leads_to_a_port_here(machine: Machine, folder: str) -> None:
    """``-R /path:host:port``, several connections at once, and one that finds nobody here."""
    path = f"{folder}/app.sock"
    with conformance.listen() as listener:
        port = listener.getsockname()[1]
    with RemoteForward(
        machine.host,
        machine.user,
        remote_socket=path,
        local_host="127.0.0.1",
        local_port=port,
        **machine.login,
    ) as forward:
        assert ask_at(machine, path, "echo\nhello").stdout == ""
        with socket.create_server(("127.0.0.1", port)) as listener:
            threading.Thread(target=conformance.serve, args=(listener,), daemon=True).start()
            assert str(ask_at(machine, path, "echo\nhello")) == "hello"
            listener.shutdown(socket.SHUT_RDWR)
        assert forward.state == "ready"


def test_remote_socket_that_was_left_is_removed(machine: Machine, folder: str, here: Path) -> None:
    """What a lost connection has left there is in nobody's way (StreamLocalBindUnlink is off)."""
    path, target = f"{folder}/app.sock", here / "app.sock"
    user = machine.user if machine.kind == "docker" else None
    code = "import socket, sys; socket.socket(socket.AF_UNIX).bind(sys.argv[1])"
    assert machine.execute([machine.python, "-c", code, path], user=user).status == 0
    with connect(login_of(machine)) as connection, pytest.raises(ForwardingRefusedError):
        connection.listen(path, lambda stream, origin: None)  # the control: it is in the way
    with echo_here(target), published(machine, path, target):
        assert str(ask_at(machine, path, "hello")) == "hello"


def test_remote_socket_comes_back_with_the_line(embedded: Any, here: Path) -> None:
    """After a loss the same path is listened on again, though the old socket lies there."""
    machine = embedded()
    path, target = str(here / "far.sock"), here / "app.sock"
    events: list[object] = []
    with echo_here(target), published(machine, path, target, on_event=events.append) as forward:
        before = Path(path).lstat().st_mtime_ns
        assert machine.server.drop_connections() == 1
        until(lambda: any(isinstance(event, Reconnected) for event in events), timeout=20)
        assert forward.state == "ready"
        assert Path(path).lstat().st_mtime_ns != before  # the fault fired: it is another one
        assert str(ask_at(machine, path, "hello")) == "hello"


@pytest.mark.skipif(not Path("/proc/net/unix").exists(), reason="needs a list of who listens")
@pytest.mark.parametrize("returns", [True, False])
def test_remote_socket_made_anew_outlives_what_the_lost_line_left(here: Path, returns: bool) -> None:
    """What waits there for the end of a lost connection removes its socket, not one made meanwhile."""
    path, tools = here / "far.sock", here / "tools"
    tools.mkdir()
    with socket.socket(socket.AF_UNIX) as lost:
        lost.bind(str(path))
    if returns:  # just when it has begun to look
        code = f'import socket; s = socket.socket(socket.AF_UNIX); s.bind("{path}")'
        program = f"""#!/bin/sh\n{shutil.which("ln")} "$@" && rm {path} && {sys.executable} -c '{code}'\n"""
        (tools / "ln").write_text(program)
        (tools / "ln").chmod(0o700)
    before = path.stat().st_ino
    script = "say() { :; }\n" + remote_sockets._about(str(path), remote_sockets._KEEP)
    env = {"PATH": f"{tools}:{os.environ['PATH']}"}
    words = ["sh", "-c", script]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, env=env, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    left = [each.name for each in here.iterdir() if each != tools]
    assert left == (["far.sock"] if returns else [])
    assert not returns or path.stat().st_ino != before  # it did happen


def test_remote_socket_that_is_served_is_left_alone(machine: Machine, folder: str, here: Path) -> None:
    """Where somebody listens, or something is that is no socket, it is a typed error and stays as it was."""
    path, file = f"{folder}/app.sock", f"{folder}/file"
    user = machine.user if machine.kind == "docker" else None
    machine.execute(f"echo precious > {file}", user=user)
    with echo_at(machine, path):
        with pytest.raises(SocketInUseError) as caught:
            published(machine, path, here / "app.sock").open()
        assert (caught.value.path, caught.value.side) == (path, "remote")
        assert str(ask_at(machine, path, "still here")) == "still here"
    with pytest.raises(SocketInUseError, match="not a socket"):
        published(machine, file, here / "app.sock").open()
    assert str(machine.execute(["cat", file])) == "precious"
    with pytest.raises(ForwardError, match="folder"):
        published(machine, f"{folder}/none/app.sock", here / "app.sock").open()


def test_remote_socket_that_sshd_would_take_over_is_left_alone(container: Any, here: Path) -> None:
    """With StreamLocalBindUnlink yes sshd would take a socket from whoever serves it: we ask first."""
    machine = container(directives={"StreamLocalBindUnlink": "yes"})
    path = "/tmp/app.sock"
    with echo_at(machine, path):
        with pytest.raises(SocketInUseError):
            published(machine, path, here / "app.sock").open()
        assert str(ask_at(machine, path, "still here")) == "still here"
        with connect(login_of(machine)) as connection:  # the control
            connection.listen(path, lambda stream, origin: None)
        assert str(ask_at(machine, path, "still here")) != "still here"


def test_forbidden_remote_socket_fails_on_entering(machine_with: Any, here: Path) -> None:
    """A gateway that forbids sockets is told as that, not as a stale file."""
    machine = machine_with(streamlocal=False)
    user = machine.user if machine.kind == "docker" else None
    path = str(machine.execute("mktemp -d", user=user)) + "/app.sock"
    with pytest.raises(ForwardingRefusedError, match="AllowStreamLocalForwarding"):
        published(machine, path, here / "app.sock").open()


def test_other_users_of_the_gateway_do_not_get_in(container: Any, here: Path) -> None:
    """Another account there cannot connect, whatever sshd's mask is; with a port it can."""
    machine = container(directives={"StreamLocalBindMask": "0000"})
    path, target = "/tmp/app.sock", here / "app.sock"
    with echo_here(target), published(machine, path, target):
        assert str(ask_at(machine, path, "mine")) == "mine"
        refused = ask_at(machine, path, "theirs", user="mallory")
        assert "PermissionError" in refused.stderr
    with echo_here(target), connect(login_of(machine)) as connection:  # the control: the mask alone
        connection.listen(path, lambda stream, origin: answer(stream, connection))
        assert str(ask_at(machine, path, "theirs", user="mallory")) == "theirs"


def test_remote_socket_in_a_folder_of_everybody_is_refused(container: Any, here: Path) -> None:
    """Where others could put a socket of theirs in its place it is refused, unless allowed in words."""
    machine = container()
    machine.execute("mkdir -m 0777 /srv/open")
    path, target = "/srv/open/app.sock", here / "app.sock"
    with pytest.raises(GatewayExposedError):
        published(machine, path, target).open()
    assert str(machine.execute(["ls", "/srv/open"])) == ""
    with echo_here(target), published(machine, path, target, allow_exposed=True):
        assert str(ask_at(machine, path, "hello")) == "hello"


def test_account_that_may_run_nothing_has_sockets_too(container: Any, here: Path) -> None:
    """Where no command may be run, sockets work all the same; what stays behind is told at the next time."""
    machine = container(directives={"MaxSessions": "0"})
    path, target = "/tmp/app.sock", here / "app.sock"
    with echo_here(target), published(machine, path, target):
        assert str(ask_at(machine, path, "hello")) == "hello"
    with pytest.raises(ForwardingRefusedError, match="in the way"):
        published(machine, path, target).open()


@pytest.mark.skipif(not shutil.which("ssh"), reason="ssh is not installed")
@pytest.mark.parametrize(
    "spec",
    [
        "6006:localhost:5006",
        "[::1]:6:[fe80::2]:5",
        "5006:/run/a.sock",
        "lo:5:/x/y",
        "/run/a.sock:db:5432",
        "/a:/b",
        r"/a\:b:x:1",
        "[/a:b]:x:1",
        "1:[/x:y]",
        "a/b:c:d",
        "/x:/y:/z",
        "[1:x:2",
        "x:1:y:2:z",
        "[a]b:1:x:2",
    ],
)
def test_forwards_are_read_as_ssh_reads_them(spec: str) -> None:
    """``-L`` means what it means to ``ssh``, by ``ssh``'s own word."""
    from bokeh_ssh._cli.forward import parse_forward

    said = subprocess.run(
        ["ssh", "-F", "none", "-G", "-L", spec, "host"], capture_output=True, text=True, check=False
    )
    lines = [line for line in said.stdout.splitlines() if line.startswith("localforward ")]
    if not lines:
        with pytest.raises(UsageError):
            parse_forward(spec)
        return
    listen, target = parse_forward(spec)
    if isinstance(listen, tuple):
        bind, port = listen
        listen = str(port) if bind is None else f"[{bind}]:{port}"
    if isinstance(target, tuple):
        target = f"[{target[0]}]:{target[1]}"
    assert lines == [f"localforward {listen} {target}"]
