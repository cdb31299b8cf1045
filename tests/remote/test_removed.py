"""The private directory is removed, or opened to others, while a server uses it: still one, and found."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import apps
from beds import Machine, until
from bokeh_ssh import Event, Lost, Reconnected, RemoteForward, Warned
from bokeh_ssh._core.errors import BokehSSHError, ServerGoneError
from bokeh_ssh._forwarding import remote_sockets
from bokeh_ssh._remote import process_tree, run_dir
from bokeh_ssh._remote.control_socket import remove_stale
from bokeh_ssh._remote.run_dir import private
from bokeh_ssh._server import payload, registry
from bokeh_ssh._server import server as server_module
from bokeh_ssh._server.registry import list_servers, stop_server
from bokeh_ssh._server.server import Server
from counting import COUNTER, ask, cabled, servers, tunnel_with_events
from events import kinds
from local_runner import FAKE, Bench, Held, alive

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the remote side is a POSIX system")

#: A web server on a socket, which says who it is.
ON_SOCKET = """
import contextlib, os, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
while True:
    with listener.accept()[0] as sock, contextlib.suppress(OSError):
        sock.sendall(b"%d" % os.getpid())
"""


@pytest.fixture
def place() -> Path:
    """Where the servers of this test are found."""
    return Path(os.environ["BOKEH_SSH_DIR"])


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have what is sent look, and be waited for, twenty times as often; one test has the real pace."""
    send = payload.payload

    def program(name: str) -> bytes:
        text = send(name)
        for old, new in ((b"\nLOOK = 2.0 ", b"\nLOOK = 0.1 "), (b"\nMENDED = 4.0 ", b"\nMENDED = 1.0 ")):
            assert (old in text) == (name == "supervisor" or b"MENDED" in old)
            text = text.replace(old, new)
        return text

    monkeypatch.setattr(server_module, "payload", program)
    monkeypatch.setattr(registry, "payload", program)


def on_socket(bench: Bench, **words: Any) -> Server:
    """Start a server on a socket in its place."""
    return bench.start(
        command=(sys.executable, bench.script("on_socket", ON_SOCKET), "{socket}"), socket=True, **words
    )


def who(path: str) -> int:
    """Ask a socket for the process behind it; 0 where nobody answers."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(30)
        try:
            sock.connect(path)
        except OSError:
            return 0
        return int(sock.recv(100))


def adopted(bench: Bench, server: Server) -> Server:
    """Take it over in a session of its own."""
    ticket = server.server_ref
    assert ticket
    back = Server.adopt(bench.runner(), ticket, launch=server.launch)
    bench.servers.append(back)
    return back


@contextmanager
def halted(pid: int) -> Iterator[None]:
    """Have a process stopped during the block: it neither sees nor undoes what is done there."""
    os.kill(pid, signal.SIGSTOP)
    until(lambda: process_tree.table()[pid][2][:1] == "T", what="it to be stopped")
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


REMOVALS: dict[str, Callable[[Path, Path], object]] = {
    "all": lambda root, inner: shutil.rmtree(root),
    "inner": lambda root, inner: shutil.rmtree(inner),
    "control": lambda root, inner: (inner / "control").unlink(),
    "socket": lambda root, inner: (inner / "server").unlink(),
    "opened": lambda root, inner: root.chmod(0o755),
    "moved": lambda root, inner: root.rename(f"{root}-old"),
}


@pytest.mark.usefixtures("hurried")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a socket has another path on Linux only")
@pytest.mark.parametrize("how", REMOVALS)
def test_place_is_made_again(bench: Bench, place: Path, how: str) -> None:
    """Found, reached and listed again within moments, by the same paths; the control is that it was not."""
    server = on_socket(bench)
    assert server.server_ref
    inner = Path(server.server_ref.place)
    assert who(server.socket) == server.pid
    broken = how in ("socket", "all", "inner", "moved")
    with halted(int(server.server_ref.supervisor.partition(":")[0])):
        REMOVALS[how](place, inner)
        assert (who(server.socket) == 0) == broken

    def well() -> bool:
        listed = list_servers(bench.runner(), python=sys.executable)
        return [each.id for each in listed] == [inner.name] and who(server.socket) == server.pid

    until(well, what="it to be found again")
    assert place.stat().st_mode & 0o777 == 0o700
    assert inner.stat().st_mode & 0o777 == 0o700
    back = adopted(bench, server)
    assert back.pid == server.pid
    assert back.stop()
    until(lambda: not place.exists(), what="nothing to be left")
    shutil.rmtree(f"{place}-old", ignore_errors=True)


def test_directory_that_goes_while_it_is_looked_at_holds_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever ends the last server removes the directory: for others, there is nothing to see then."""
    place.mkdir(0o700)
    monkeypatch.setattr(run_dir, "usable", lambda root: shutil.rmtree(root))
    assert list(run_dir.list_run_dirs()) == []
    assert not place.exists()


@pytest.mark.usefixtures("hurried")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells which process holds a server")
def test_supervisor_that_is_late_with_it_lives(bench: Bench, place: Path) -> None:
    """A directory that is empty, for however long, is no sign that nobody holds its server."""
    server = on_socket(bench)
    assert server.server_ref
    inner = Path(server.server_ref.place)
    supervisor = int(server.server_ref.supervisor.partition(":")[0])
    with halted(supervisor):
        shutil.rmtree(inner)
        inner.mkdir(0o700)
        os.utime(inner, (0, 0))
        list_servers(bench.runner(), python=sys.executable)
        assert alive(server.pid)
        assert inner.exists()
    until(lambda: who(server.socket) == server.pid, what="it to be found again")
    assert server.stop()
    assert not [event for event in bench.events if isinstance(event, Warned)]


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("how", ["seen", "unseen", "control"])
def test_place_is_removed_in_the_moment_of_a_loss(bench: Bench, mark: str, place: Path, how: str) -> None:
    """Whether the supervisor has seen the loss or not, who comes back finds the same server."""
    held = Held(bench, mark, grace=60)
    if how == "control":  # who looks meanwhile does not take it for one that is no more
        next(place.glob("*/control")).unlink()
        assert len(list_servers(bench.runner(), python=sys.executable)) == 1
    else:
        with halted(held.supervisor):
            shutil.rmtree(place)
        if how == "seen":
            held.session.vanish()
    back = adopted(bench, held.server)
    assert back.pid == held.server.pid
    assert back.stop()
    held.check_gone()


BARED: dict[str, Callable[[Path, Path], object]] = {
    "nothing": lambda root, inner: None,  # the control
    "files": lambda root, inner: [path.unlink() for path in inner.iterdir()],
    "all, and half made again": lambda root, inner: [shutil.rmtree(root), root.mkdir(), inner.mkdir()],
}


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("how", BARED)
def test_who_looks_before_it_is_made_again_ends_nothing(
    bench: Bench, mark: str, place: Path, how: str
) -> None:
    """With neither socket nor record nothing tells whose place it is: its supervisor has time to say."""
    held = Held(bench, mark, grace=60)
    ticket = held.server.server_ref
    assert ticket
    with halted(held.supervisor):
        with private():
            BARED[how](place, Path(ticket.place))
        assert not remove_stale()
        assert held.alive()
    [listed] = list_servers(bench.runner(), python=sys.executable)
    assert listed.pid == held.server.pid
    assert adopted(bench, held.server).pid == held.server.pid


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs a folder of another user")
@pytest.mark.usefixtures("hurried")
def test_place_that_another_user_has_replaced_is_not_used(bench: Bench, mark: str, place: Path) -> None:
    """While the directory was open to others, one put a place of his own there: nothing is made in it."""
    held = Held(bench, mark, grace=60)
    ticket = held.server.server_ref
    assert ticket
    inner = Path(ticket.place)
    with halted(held.supervisor):
        shutil.rmtree(inner)
        inner.mkdir(mode=0o700)
        os.chown(inner, 65534, -1)
        place.chmod(0o777)
    until(lambda: any(isinstance(event, Warned) for event in bench.events), what="it to be told")
    assert not list(inner.iterdir())
    assert held.server.stop()


def test_record_is_written_nowhere_else(tmp_path: Path) -> None:
    """Not to where a link in its way leads, nor into a directory that is another user's by now."""
    inner = tmp_path / "place"
    inner.mkdir(mode=0o700)
    theirs = tmp_path / "theirs"
    theirs.write_text("as it was")
    (inner / "record.new").symlink_to(theirs)
    run_dir.RunDir(str(inner)).write({})
    assert theirs.read_text() == "as it was"
    (inner / "record.new").unlink()
    run_dir.RunDir(str(inner)).write({})  # the control
    assert (inner / "record").read_text() == "{}"
    if os.geteuid() == 0:
        (inner / "record").unlink()
        os.chown(inner, 65534, -1)
        run_dir.RunDir(str(inner)).write({})
        assert not list(inner.iterdir())


@pytest.mark.usefixtures("hurried")
def test_server_whose_socket_is_to_be_made_again_is_stopped(bench: Bench, mark: str, place: Path) -> None:
    """Who wants to end it waits for that, as who wants it back does."""
    held = Held(bench, mark, grace=60)
    next(place.glob("*/control")).unlink()
    stop_server(bench.runner(), next(place.iterdir()).name, python=sys.executable)
    held.check_gone()


@pytest.mark.usefixtures("hurried")
def test_place_that_cannot_be_made_again_is_told(bench: Bench, mark: str, place: Path) -> None:
    """A warning says what it means; who comes back finds none, and the old server has ended: never two."""
    held = Held(bench, mark, grace=600)
    with halted(held.supervisor):
        shutil.rmtree(place)
        place.write_text("in the way")

    def warnings() -> list[str]:
        return [event.text for event in bench.events if isinstance(event, Warned)]

    until(warnings, what="it to be told")
    assert "private directory" in warnings()[0]
    assert "a new server is started" in warnings()[0]
    assert held.alive()
    with pytest.raises(BokehSSHError):
        held.server.keep(1)
    with pytest.raises(ServerGoneError):
        adopted(bench, held.server)
    held.check_gone()
    assert len(warnings()) == 1
    place.unlink()


def test_server_that_nobody_can_find_has_no_grace(bench: Bench, mark: str, place: Path) -> None:
    """Without a directory from the start nobody can come back: it ends with its client, without a grace."""
    place.write_text("in the way")
    held = Held(bench, mark, grace=600)
    assert held.server.server_ref is None
    trace = held.server.adoptable_ref
    assert trace
    held.session.vanish()
    held.check_gone()
    other = Held(bench, mark + "x", grace=600)  # one whose client only seems to be there
    trace = other.server.adoptable_ref
    assert trace
    with pytest.raises(ServerGoneError):
        Server.adopt(bench.runner(), trace, launch=other.server.launch)
    assert not alive(other.server.pid)
    place.unlink()


def test_another_process_of_that_number_is_left_alone(bench: Bench, mark: str, place: Path) -> None:
    """Only the supervisor itself is ended, and not what has its number by now."""
    place.write_text("in the way")
    held = Held(bench, mark)
    trace = held.server.adoptable_ref
    assert trace
    pid, _, began = trace.supervisor.partition(":")
    other = dataclasses.replace(trace, supervisor=f"{pid}:{int(began) - 1}")
    with pytest.raises(ServerGoneError):
        Server.adopt(bench.runner(), other, launch=held.server.launch)
    assert held.alive()
    assert held.server.stop()
    place.unlink()


@pytest.mark.usefixtures("hurried")
def test_what_was_brought_is_removed(bench: Bench) -> None:
    """That it is gone is told, once."""

    def bring(uploads: Any) -> None:
        uploads.send_order(do="put", name="app.py", data="eA==", last=True, runs=False)
        uploads.wait_for_sync(uploads.request_sync(), 10)

    server = bench.start(command=FAKE, app=("app.py",), brings=True, bring=bring)
    shutil.rmtree(server.uploads.directory)

    def warnings() -> list[str]:
        return [event.text for event in bench.events if isinstance(event, Warned)]

    until(warnings, what="it to be told")
    assert "uploaded files" in warnings()[0]


def _is_led_in(path: Path) -> bool:
    """Tell whether somebody listens on a socket: it is there a moment before that."""
    with socket.socket(socket.AF_UNIX) as sock, suppress(OSError):
        sock.connect(str(path))
        return True
    return False


@pytest.mark.parametrize("what", ["socket", "directory"])
def test_socket_of_a_publication_is_made_again(
    sshd: Callable[..., Machine], place: Path, no_leaks: Any, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Its socket on the gateway is removed: it is there again, on the same line, and leads where it did."""
    monkeypatch.setattr(remote_sockets, "_PAUSE", 0.2)
    gateway = sshd(SetEnv=f"BOKEH_SSH_DIR={place}")
    path = place / "pub-app"
    with socket.create_server(("127.0.0.1", 0)) as target, no_leaks():
        port = target.getsockname()[1]
        with RemoteForward(
            gateway.host,
            gateway.user,
            name="app",
            local_port=port,
            local_host="127.0.0.1",
            isolate=False,
            **gateway.login,
        ) as forward:
            if what == "socket":
                path.unlink()
            else:
                shutil.rmtree(place)
            until(lambda: _is_led_in(path), what="it to be back")
            assert path.stat().st_mode & 0o777 == 0o600
            target.settimeout(30)
            target.accept()[0].close()
            assert forward.state == "ready"
    assert not place.exists()


def test_socket_of_a_publication_that_cannot_be_made_again(
    sshd: Callable[..., Machine], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where something else is in its place by then, the forward is lost, says why, and tries again."""
    monkeypatch.setattr(remote_sockets, "_PAUSE", 0.2)
    gateway = sshd(SetEnv=f"BOKEH_SSH_DIR={place}")
    events: list[Event] = []
    with RemoteForward(
        gateway.host, gateway.user, name="app", isolate=False, on_event=events.append, **gateway.login
    ):
        path = place / "pub-app"
        path.unlink()
        path.write_text("in the way")
        until(lambda: Lost in kinds(events), what="it to be told")
        assert "removed" in next(event.reason for event in events if isinstance(event, Lost))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a socket has another path on Linux only")
@pytest.mark.parametrize("kind", ["sshd", "none"])
def test_tunnel_whose_directory_is_removed(
    sshd: Callable[..., Machine], place: Path, tmp_path: Path, kind: str
) -> None:
    """A real tunnel: pages open again by themselves, and after a loss it is the same server, and one only.

    Where there was no directory at all, a new one is started after a loss, and the old one has ended.
    """
    if kind == "none":
        place.write_text("in the way")
    machine = sshd(SetEnv=f"BOKEH_SSH_DIR={place}")
    app = apps.put(machine, "counter.py", COUNTER)
    events: list[Event] = []
    with cabled(machine, tmp_path) as (cable, there):
        with tunnel_with_events(there, app, events, isolate=False) as tunnel:
            before = ask(tunnel)
            if kind == "sshd":
                shutil.rmtree(place)
                until(lambda: place.exists(), what="the directory to be back")
                assert ask(tunnel) == before.replace("seen 1", "seen 2")
                shutil.rmtree(place)
            cable.pull()
            until(lambda: Reconnected in kinds(events), what="the line to be back")
            [back] = [event for event in events if isinstance(event, Reconnected)]
            assert back.same_server == (kind == "sshd")
            assert len(servers(machine, app)) == 1
            if kind == "sshd":
                assert ask(tunnel) == before.replace("seen 1", "seen 3")
    until(lambda: not servers(machine, app), what="nothing to be left")
    assert place.exists() == (kind == "none")
    if kind == "none":
        place.unlink()
