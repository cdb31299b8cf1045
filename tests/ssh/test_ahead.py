"""What is wanted once we are logged in is asked for with the login, where that is known to succeed."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncssh
import pytest
from asyncssh.constants import (
    MSG_CHANNEL_OPEN,
    MSG_CHANNEL_OPEN_CONFIRMATION,
    MSG_GLOBAL_REQUEST,
    MSG_KEXINIT,
    MSG_NEWKEYS,
    MSG_SERVICE_ACCEPT,
    MSG_USERAUTH_REQUEST,
    MSG_USERAUTH_SUCCESS,
)

import beds
from auth_servers import USER, Bed, Rules, Sshd, make_key
from beds import Key, Knobs
from bokeh_ssh import (
    BokehSSHError,
    ConnectionLostError,
    ConnectTimeoutError,
    Host,
    ProtocolError,
    Question,
)
from bokeh_ssh._core.this_machine.private_folder import find_folder
from bokeh_ssh._ssh.auth.key_memory import KeyMemory
from bokeh_ssh._ssh.auth.userauth import UserAuth
from bokeh_ssh._ssh.connect import connect
from bokeh_ssh._ssh.connection import Connection
from bokeh_ssh._ssh.sftp_writer import Sftp, SftpError
from fakes import Listener

LOOPBACK = "127.0.0.1"


class Target:
    """Speaks first, and says how many have come."""

    def __init__(self) -> None:
        self.count = 0

    def answer(self, sock: Any, number: int) -> None:
        self.count += 1
        sock.sendall(b"%d" % self.count)
        sock.recv(1)


@pytest.fixture
def enter(account: object, tmp_path: Path) -> Callable[..., Connection]:
    """Log in with keys of these names, to a server on loopback."""

    def log_in(port: int, *names: str, **keywords: Any) -> Connection:
        words = {"ssh_config": None, "allow_agent": False, "look_for_keys": False, "timeout": 10}
        known = {"known_hosts": str(tmp_path / "known"), "host_keys": "accept-new"}
        keys = [str(tmp_path / name) for name in names]
        words |= known | keywords.pop("login", {})
        host = Host(LOOPBACK, USER, port=port, key_filename=keys, **words)
        return connect(host, **keywords)

    return log_in


def remembered() -> str:
    """Return what is written down of the one server, behind its key."""
    (path,) = find_folder("logins").iterdir()
    return path.read_text()[64:]


def run(connection: Connection, command: str) -> bytes:
    """Return what a command says."""
    said: list[bytes] = []
    session = connection.run(
        command, on_stdout=said.append, on_stderr=said.append, on_exit=lambda status: None, timeout=10
    )
    assert session.ended.wait(10)
    return b"".join(said)


@pytest.mark.parametrize("newest", [False, True])
def test_second_login_asks_with_the_key(
    enter: Callable[..., Connection], asked: list[int], key: Key, tmp_path: Path, newest: bool
) -> None:
    """A session and a channel are there with the login; what came on it is kept, and the next is new."""
    folder = os.environ.get("OPENSSH_NEWEST", "")
    if newest and not folder:
        pytest.skip("there is no newer OpenSSH here")
    target = Target()
    with (
        Listener(target.answer) as listener,
        beds.local_sshd(key, tmp_path, {}, newest=folder if newest else "") as machine,
    ):
        where = LOOPBACK, listener.port
        for count in (0, 2):
            with enter(machine.port, machine.key_path.name, ahead=[where, None]) as connection:
                assert run(connection, "echo here") == b"here\n"
                before = target.count
                for _ in range(2):
                    with connection.open_socket(where, timeout=10) as sock:
                        sock.settimeout(10)
                        assert int(sock.recv(9)) >= before
            assert asked.pop() == count
        assert target.count == 4


@pytest.mark.parametrize("most", [1, 10])
def test_session_for_files_is_asked_for_as_well(
    enter: Callable[..., Connection], asked: list[int], key: Key, tmp_path: Path, most: int
) -> None:
    """A second session is there for SFTP, with no other channel; where the server has one session only, that
    is the command's, and SFTP is refused."""
    directives = {"Subsystem": "sftp internal-sftp", "MaxSessions": str(most)}
    with beds.local_sshd(key, tmp_path, directives) as machine:
        for count in (0, 2):
            with enter(machine.port, machine.key_path.name, ahead=[None, None]) as connection:
                words: dict[str, Any] = {"on_stdout": len, "on_stderr": len, "on_exit": bool, "timeout": 10}
                command = connection.run("cat", **words)
                number = next(connection.transport._numbers._left)
                with contextlib.closing(Sftp(connection)) as sftp:
                    if most > 1:
                        sftp.wait()
                    else:
                        with pytest.raises(SftpError, match="refuses to open a session"):
                            sftp.wait()
                    used = next(connection.transport._numbers._left) - number - 1
                assert used == (0 if count else 1)
                command.close()
            assert asked.pop() == count


def test_each_hop_is_remembered_for_itself(
    enter: Callable[..., Connection], asked: list[int], key: Key, tmp_path: Path
) -> None:
    """Through two jump hosts, each login asks for the channel to the next machine; one of them that minds is
    spared, and the others are asked as before."""
    target = Target()
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(Listener(target.answer))
        machines = [stack.enter_context(beds.local_sshd(key, tmp_path, {})) for _ in range(3)]
        where, port = (LOOPBACK, listener.port), machines[2].port
        words: dict[str, Any] = {"ssh_config": None, "allow_agent": False, "look_for_keys": False}
        words |= {"known_hosts": str(tmp_path / "known"), "host_keys": "accept-new"}
        words["key_filename"] = str(machines[0].key_path)
        jump = [Host(LOOPBACK, USER, port=machine.port, **words) for machine in machines[:2]]
        texts: list[dict[str, str]] = []
        for expected in ([0, 0, 0], [1, 1, 1], [1, 0, 1]):
            asked.clear()
            with (
                enter(port, machines[0].key_path.name, ahead=[where], login={"jump": jump}) as connection,
                connection.open_socket(where, timeout=10) as sock,
            ):
                sock.settimeout(10)
                assert sock.recv(9)
            assert asked == expected
            texts.append({path.name: path.read_text() for path in find_folder("logins").iterdir()})
            if expected == [1, 1, 1]:
                middle: Any = connection._jump
                memory = KeyMemory(middle.transport.host_key_blob, USER)
                known = memory.recall()
                assert known
                memory._write(known._replace(more=" waits"))
    assert len(texts[0]) == 3
    assert texts[0] == texts[1]
    assert len(texts[2].items() - texts[0].items()) == 1
    assert target.count == 3


def test_key_that_fits_no_more_takes_nothing_along(
    enter: Callable[..., Connection], asked: list[int], tmp_path: Path
) -> None:
    """Another key logs in on the same connection, and what is wanted is asked for again."""
    keys = [make_key(tmp_path / name) for name in "ab"]
    target = Target()
    with (
        contextlib.closing(Sshd(tmp_path, keys[:1])) as sshd,
        Listener(target.answer) as listener,
    ):
        where = LOOPBACK, listener.port
        for _ in range(2):
            enter(sshd.port, "a", ahead=[where]).close()
        (tmp_path / "authorized").write_bytes(keys[1].export_public_key())
        with enter(sshd.port, "a", "b", ahead=[where, None]) as connection:
            assert not connection.transport._channels
            assert run(connection, "echo here") == b"here\n"
            with connection.open_socket(where, timeout=10) as sock:
                assert int(sock.recv(9)) == 2
        with enter(sshd.port, "b", ahead=[None], login={"compression": True}) as connection:
            assert run(connection, "echo here") == b"here\n"
        assert asked == [0, 1, 2, 0]
        assert sshd.connections == 4


def test_second_factor_takes_nothing_along(
    enter: Callable[..., Connection], asked: list[int], tmp_path: Path
) -> None:
    """Where the key is one of two methods, nothing is asked for with it."""
    key = make_key(tmp_path / "a")
    rules = Rules
    bed = Bed(lambda: rules(("publickey", "password"), keys=(key,)))
    with contextlib.closing(bed):
        for _ in range(2):
            enter(bed.port, "a", ahead=[None], login={"password": "right"}).close()
    assert asked == [0, 0]


def test_server_that_minds_is_spared(
    enter: Callable[..., Connection], asked: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that hangs up at a request before it has judged the key: logged in without, for a week."""
    key = make_key(tmp_path / "a")
    handlers = asyncssh.SSHServerConnection._packet_handlers
    usual = handlers[MSG_USERAUTH_REQUEST]

    def hesitate(conn: Any, *args: Any) -> Any:
        return None if len(bed.seen) == 2 else usual(conn, *args)

    bed = Bed(lambda: Rules(("publickey",), keys=(key,)))
    with contextlib.closing(bed):
        enter(bed.port, "a", ahead=[None]).close()
        assert remembered().endswith(" alone\n")
        monkeypatch.setitem(handlers, MSG_USERAUTH_REQUEST, hesitate)
        for _ in range(2):
            enter(bed.port, "a", ahead=[None]).close()
            assert remembered().endswith(" waits\n")
        assert asked == [0, 0, 0]
        assert len(bed.seen) == 4
        (path,) = find_folder("logins").iterdir()
        os.utime(path, (0, time.time() - 8 * 86400))
        enter(bed.port, "a", ahead=[None]).close()
        assert remembered().endswith(" alone\n")  # tried again the next time


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("methods", [("publickey",), ("publickey", "password")])
def test_server_that_hangs_up_once_the_key_is_not_enough(
    enter: Callable[..., Connection],
    asked: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    methods: tuple[str, ...],
    known: bool,
) -> None:
    """It is logged in to again, with another key or a password too; it is known to hang up, or found to."""
    keys = [make_key(tmp_path / name) for name in "ab"]
    rules = [Rules(("publickey",), keys=(keys[0],))]
    bed = Bed(lambda: rules.pop(0) if rules else Rules(methods, keys=(keys[2 - len(methods)],)))
    questions: list[str] = []

    def answer(question: Question) -> str:
        questions.append(question.text)
        return "right"

    if not known:
        monkeypatch.setattr(UserAuth, "passes_over", True)
    login = {"prompt": answer} if known else {"password": "right"}
    with contextlib.closing(bed):
        for _ in range(3):
            with enter(bed.port, "a", "b", ahead=[None], login=login) as connection:
                count = len(connection.methods)
        # Where it is not known to hang up, the next method may come first, and the login goes on.
        goes_on = not known and asked == [0, 1, 0]
        assert goes_on or asked == [0, 0, 0]
        assert len(bed.seen) == (3 if goes_on else 4)
    assert count == len(methods)
    assert len(questions) == (2 if known and count == 2 else 0)
    assert "alone" not in remembered() or count == 1


def test_server_that_falls_silent_is_spared(
    enter: Callable[..., Connection], asked: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a login with requests gets no answer twice, as on no line by chance, the next ones go without."""
    key = make_key(tmp_path / "a")
    handlers = asyncssh.SSHServerConnection._packet_handlers
    usual = handlers[MSG_USERAUTH_REQUEST]

    def hear(conn: Any, *args: Any) -> Any:
        if len(bed.seen) not in (2, 4):
            return usual(conn, *args)
        conn._auth_complete = True  # else it hangs up at the next message
        return None

    bed = Bed(lambda: Rules(("publickey",), keys=(key,)))
    with contextlib.closing(bed):
        enter(bed.port, "a", ahead=[None]).close()
        monkeypatch.setitem(handlers, MSG_USERAUTH_REQUEST, hear)
        monkeypatch.setitem(handlers, MSG_CHANNEL_OPEN, lambda *args: None)
        for _ in range(2):
            with pytest.raises(ConnectTimeoutError):
                enter(bed.port, "a", ahead=[None], login={"timeout": 3})
            assert remembered().endswith((" alone!\n", " waits\n"))
            enter(bed.port, "a", ahead=[None]).close()
        enter(bed.port, "a", ahead=[None]).close()
        assert asked == [0, 0, 0, 0]
    assert remembered().endswith(" waits\n")


def test_server_that_loses_what_came_with_the_login(
    enter: Callable[..., Connection],
    asked: list[int],
    key: Key,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is asked once more when it has answered two other questions, of which the login sends one."""
    handlers = asyncssh.SSHServerConnection._packet_handlers
    usual = handlers[MSG_CHANNEL_OPEN], handlers[MSG_GLOBAL_REQUEST]
    reads: set[int] = set()

    def lose(conn: Any, *args: Any) -> Any:
        return usual[0](conn, *args) if id(conn) in reads else None

    def read(conn: Any, *args: Any) -> Any:
        reads.add(id(conn))
        return usual[1](conn, *args)

    monkeypatch.setitem(handlers, MSG_CHANNEL_OPEN, lose)
    monkeypatch.setitem(handlers, MSG_GLOBAL_REQUEST, read)
    with beds.embedded(Knobs(), key, tmp_path) as machine:
        for _ in range(2):
            with enter(machine.port, machine.key_path.name, ahead=[None]) as connection:
                assert connection.ping(10)
                assert run(connection, "echo here") == b"here\n"
    assert asked in ([0, 1], [0, 0])  # older ones may hang up, before they have judged the key


#: What a server sends on the way into it, in this order.
_STEPS = {
    "banner": -1,
    "kexinit": MSG_KEXINIT,
    "newkeys": MSG_NEWKEYS,
    "service": MSG_SERVICE_ACCEPT,
    "success": MSG_USERAUTH_SUCCESS,
    "channel": MSG_CHANNEL_OPEN_CONFIRMATION,
}


@pytest.mark.skipif(beds.MADE_ANEW, reason="this asyncssh may hang up by itself where it is asked ahead")
@pytest.mark.parametrize("step", _STEPS)
def test_line_that_is_cut_on_the_way_in(
    enter: Callable[..., Connection],
    asked: list[int],
    key: Key,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
) -> None:
    """Wherever the line is cut during a login with requests, the error says so, nothing of the login is left,
    and the next one asks with the key as before. Where it looks as if the server had hung up because of the
    requests, the login is made again without; only if the next one ends so too, that is remembered."""
    cut: list[int] = []
    server = asyncssh.SSHServerConnection
    send_packet, send_version = server.send_packet, server._send_version

    def send(conn: Any, kind: int, *args: Any, **words: Any) -> None:
        send_packet(conn, kind, *args, **words)
        if isinstance(conn, server) and kind in cut:
            cut.clear()
            conn._transport.close()

    def greet(conn: Any) -> None:
        send_version(conn)
        if isinstance(conn, server) and cut == [-1]:
            cut.clear()
            conn._transport.close()

    monkeypatch.setattr(server, "send_packet", send)
    monkeypatch.setattr(server, "_send_version", greet)
    with beds.embedded(Knobs(), key, tmp_path) as machine:
        enter(machine.port, machine.key_path.name, ahead=[None]).close()
        threads = set(threading.enumerate())
        cut.append(_STEPS[step])
        error: BokehSSHError | None = None
        try:
            with enter(machine.port, machine.key_path.name, ahead=[None]) as connection:
                run(connection, "echo here")
        except BokehSSHError as exc:
            error = exc
        assert cut == []
        doubted = remembered().endswith(" alone?\n")  # it looks like a server that minds
        assert doubted if step == "service" else (not doubted or step == "newkeys")
        expected = ProtocolError if step == "banner" else ConnectionLostError
        assert error is None if doubted else isinstance(error, expected)
        beds.until(lambda: set(threading.enumerate()) <= threads, what="the threads to end")
        with enter(machine.port, machine.key_path.name, ahead=[None]) as connection:
            assert run(connection, "echo here") == b"here\n"
            beds.until(lambda: not connection.transport._channels, what="no channel to be left")
        assert remembered().endswith(" alone\n")
        assert asked.pop() == 1
        if not doubted:
            return
        for _ in range(2):
            cut.append(_STEPS[step])
            with contextlib.suppress(ConnectionLostError):
                enter(machine.port, machine.key_path.name, ahead=[None]).close()
        assert remembered().endswith(" waits\n") or step == "newkeys"


def test_channel_that_has_ended_is_not_used(
    enter: Callable[..., Connection], asked: list[int], key: Key, tmp_path: Path
) -> None:
    """Where the target has ended the connection before anybody took it, another one is made."""
    ends = [False, True, False]  # at the first connection of the second login

    def answer(sock: Any, number: int) -> None:
        if ends.pop():
            return
        sock.sendall(b"here")
        sock.recv(1)

    with Listener(answer) as listener, beds.local_sshd(key, tmp_path, {}) as machine:
        where = LOOPBACK, listener.port
        for _ in range(2):
            with enter(machine.port, machine.key_path.name, ahead=[where]) as connection:
                for channel in list(connection.transport._channels.values()):
                    beds.until(lambda channel=channel: channel.over)  # type: ignore[misc]
                with connection.open_socket(where, timeout=10) as sock:
                    sock.settimeout(10)
                    assert sock.recv(9) == b"here"
    assert asked == [0, 1]


def test_line_that_is_lost_ends_the_wait(
    enter: Callable[..., Connection], asked: list[int], key: Key, tmp_path: Path
) -> None:
    """Whoever takes a channel that was asked for with the login hears of a line that went down since."""
    target = Target()
    with Listener(target.answer) as listener, beds.embedded(Knobs(), key, tmp_path) as machine:
        where = LOOPBACK, listener.port
        for _ in range(2):
            connection = enter(machine.port, machine.key_path.name, ahead=[where])
            connection.give_up("the test ends it")
            lost = threading.Event()
            connection.on_lost(lambda reason, lost=lost: lost.set())  # type: ignore[misc]
            assert lost.wait(10)
            with pytest.raises(ConnectionLostError), connection:
                connection.open_socket(where, timeout=10)
