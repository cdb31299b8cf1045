"""SSH servers that mean harm, or are broken: what they do is bounded, and typed."""

from __future__ import annotations

import gc
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from paramiko.message import Message

import bokeh_ssh._ssh.transport
import conformance
import fakes
from beds import until
from bokeh_ssh import (
    BokehSSHError,
    ConnectionLostError,
    DirectTunnel,
    ForwardError,
    ForwardingRefusedError,
    Host,
    LocalForward,
    ProtocolError,
    RemoteForward,
    SessionError,
    TargetUnreachableError,
    Warned,
)
from bokeh_ssh._ssh.connect import connect
from bokeh_ssh._ssh.connection import Connection
from bokeh_ssh._ssh.io_loop import IOLoop
from bokeh_ssh._ssh.session import Session
from bokeh_ssh._ssh.transport import WINDOW, Channel
from fake_forwards import check_alive, local_forward
from fakes import FakeSSH, Listener, Server

_ADJUST, _DATA, _EOF, _CLOSE, _REQUEST = 93, 94, 96, 97, 98
_OPEN, _OPEN_SUCCESS, _OPEN_FAILURE = 90, 91, 92
_SUCCESS, _FAILURE = 81, 82
_UNIMPLEMENTED = 3


def remote_forward(fake: FakeSSH, **keywords: Any) -> RemoteForward:
    """Make a remote forward on the fake."""
    machine = fake.machine
    settings = {
        "remote_port": 0,
        "local_host": "127.0.0.1",
        "allow_exposed": True,
        "reconnect": False,
        **machine.login,
        **keywords,
    }
    return RemoteForward(machine.host, machine.user, **settings)


def forwarded(server: Server, port: int, *, number: int = 77, kind: str = "forwarded-tcpip") -> None:
    """Open a channel as sshd does when somebody connects to its listener."""
    server.send(_OPEN, kind, number, WINDOW, 32768, "127.0.0.1", port, "10.0.0.1", 1234)


@pytest.mark.parametrize(
    ("kind", "rest"),
    [
        ("session", ()),
        ("x11", ("10.0.0.1", 6010)),
        ("auth-agent@openssh.com", ()),
        ("direct-tcpip", ("localhost", 22, "10.0.0.1", 1)),
        ("forwarded-tcpip", ("127.0.0.1", 1, "10.0.0.1", 1)),
        ("forwarded-streamlocal@openssh.com", ("/tmp/x", "")),
        ("forwarded-tcpip", ()),
        ("nonsense", ()),
    ],
)
def test_channels_nobody_asked_for_are_rejected(tmp_path: Path, kind: str, rest: tuple[Any, ...]) -> None:
    """A channel that the server opens unasked is refused, whatever it is; the connection lives."""
    with FakeSSH(tmp_path) as fake, local_forward(fake) as forward:
        fake.session.send(_OPEN, kind, 77, WINDOW, 32768, *rest)
        until(lambda: fake.session.count("open failure"), what="the refusal")
        assert fake.session.count("open success") == 0
        check_alive(forward)


def test_channels_that_were_asked_for_are_taken(tmp_path: Path) -> None:
    """The control of the above: through a listener of ours, the server may open channels."""
    with (
        Listener(fakes.stay) as target,
        FakeSSH(tmp_path) as fake,
        remote_forward(fake, local_port=target.port) as forward,
    ):
        forwarded(fake.session, forward.remote_port)
        until(lambda: fake.session.count("open success"), what="the channel")
        until(lambda: target.count == 1, what="the target to take it")
        forwarded(fake.session, forward.remote_port + 1, number=78)
        until(lambda: fake.session.count("open failure"), what="the refusal")


@pytest.mark.parametrize("kind", ["x11", "direct-tcpip", "auth-agent@openssh.com"])
def test_listener_takes_its_own_kind_alone(tmp_path: Path, kind: str) -> None:
    """A channel of another kind is not taken for a forwarded one, even if it names our listener."""
    with (
        Listener(fakes.stay) as target,
        FakeSSH(tmp_path) as fake,
        remote_forward(fake, local_port=target.port) as forward,
    ):
        forwarded(fake.session, forward.remote_port, kind=kind)
        until(lambda: fake.session.count("open failure"), what="the refusal")
        assert target.count == 0


def test_flood_of_channel_opens_is_answered_without_growing(tmp_path: Path) -> None:
    """Thousands of unasked channels are refused one by one; nothing of them stays."""
    with FakeSSH(tmp_path) as fake, local_forward(fake) as forward:
        for number in range(3000):
            fake.session.send(_OPEN, "session", number, WINDOW, 32768)
        until(lambda: fake.session.count("open failure") == 3000, timeout=30, what="the refusals")
        check_alive(forward)
        gc.collect()  # what other tests left in circles is not what this one is about
        assert sum(type(thing) is Channel for thing in gc.get_objects()) < 50


def test_flood_through_a_listener_is_capped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels through a listener of ours are bounded in number; those above are refused."""
    monkeypatch.setattr(bokeh_ssh._ssh.transport, "_MOST_INCOMING", 20)
    with (
        Listener(fakes.stay) as target,
        FakeSSH(tmp_path) as fake,
        remote_forward(fake, local_port=target.port) as forward,
    ):
        until(lambda: not len(fake.session._channels), what="the end of what proved the way")
        for number in range(30):
            forwarded(fake.session, forward.remote_port, number=number)
        until(lambda: fake.session.count("open failure") + fake.session.count("open success") == 30)
        assert fake.session.count("open success") == 20
        assert forward.state == "ready"


def test_server_that_asks_and_does_not_read_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_leaks: Any
) -> None:
    """One that asks and asks but takes no answers fills no memory: the connection ends, typed."""
    monkeypatch.setattr(bokeh_ssh._ssh.transport, "_MOST_WAITING", 500)
    many = 200_000  # by far more than fit into the sockets between us, and into what lags behind
    deaf, stuck, done = threading.Event(), threading.Event(), threading.Event()

    def on_open(server: Server, message: Message) -> bool:
        if deaf.is_set():  # on the thread that reads: nothing is read any more
            stuck.set()
            done.wait(fakes.PATIENCE)
        return deaf.is_set()

    with no_leaks(), FakeSSH(tmp_path, on_open=on_open) as fake, local_forward(fake) as forward:
        session = fake.session
        session.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.set()
        with socket.create_connection(("127.0.0.1", forward.local_port), timeout=30):
            assert stuck.wait(30)
            asked = 0
            with fakes.ignored():
                while forward.state == "ready" and asked < many:
                    session.send(_OPEN, "session", asked, WINDOW, 32768)
                    asked += 1
            with pytest.raises(ConnectionLostError):
                forward.wait(20)
            assert asked > 500
        done.set()


class Overrun:
    """Confirms channels to port 9 by itself, and counts what the client answers on them."""

    def __init__(self) -> None:
        self.theirs: list[int] = []

    def __call__(self, server: Server, message: Message) -> bool:
        number = channel_to_nine(message)
        if number is None:
            return False
        server.raw(number)
        self.theirs.append(number)  # who waits for this looks at the other end too
        return True


def test_window_overrun_cuts_that_stream_alone(tmp_path: Path) -> None:
    """A server that sends more than it was given leave to is cut off, on that channel only."""
    overrun = Overrun()
    with (
        FakeSSH(tmp_path, on_open=overrun) as fake,
        local_forward(fake) as good,
        local_forward(fake, remote_port=9) as bad,
    ):
        session = fake.session
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", bad.local_port))
            until(lambda: len(overrun.theirs) == 2, what="the channel")
            raw = session.raws[-1]
            block = struct.pack(">I", 32768) + bytes(32768)
            for _ in range(64):  # the window: taken, and not one byte of it read
                session.send(_DATA, overrun.theirs[-1], block)
            granted = 0
            for _ in range(1000):  # past it, and past what is given back for what the socket holds
                if raw.count(_CLOSE):
                    break
                session.send(_DATA, overrun.theirs[-1], block)
                granted += 1
            until(lambda: raw.count(_CLOSE), what="the client to close the channel")
            assert granted < 1000
            with pytest.raises(ConnectionResetError):
                fakes.stay(sock)
        assert bad.state == "ready"
        check_alive(good)
        assert session.is_active()


def test_second_answers_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A channel that is confirmed twice, or refused after that, goes on; nobody is told twice."""
    overrun = Overrun()
    with FakeSSH(tmp_path, on_open=overrun) as fake, local_forward(fake, remote_port=9) as forward:
        session = fake.session
        with socket.create_connection(("127.0.0.1", forward.local_port), timeout=30) as sock:
            until(lambda: len(overrun.theirs) == 2, what="the channel")
            number = overrun.theirs[-1]
            session.send(_OPEN_SUCCESS, number, session.raws[-1].number, WINDOW, 32768)
            session.send(_OPEN_FAILURE, number, 2, "no", "")
            session.send(_OPEN_SUCCESS, 12345, 1, WINDOW, 32768)
            session.send(_OPEN_FAILURE, 12345, 2, "no", "")
            session.send(_DATA, number, "as before")
            assert sock.recv(100) == b"as before"
        assert forward.state == "ready"
    assert not [record for record in caplog.records if record.exc_info]


def test_replies_nobody_asked_for_are_passed_over(tmp_path: Path) -> None:
    """Answers to questions that were not asked disturb nothing, neither now nor at the next question."""
    with FakeSSH(tmp_path) as fake, local_forward(fake) as forward:
        for _ in range(50):
            fake.session.send(_SUCCESS)
            fake.session.send(_FAILURE)
        check_alive(forward)


def test_garbage_after_the_key_exchange_is_a_typed_loss(tmp_path: Path, no_leaks: Any) -> None:
    """Bytes that are no packets are told as a loss, and local connections are reset."""
    with no_leaks(), FakeSSH(tmp_path) as fake, local_forward(fake) as forward:
        check_alive(forward)
        with socket.create_connection(("127.0.0.1", forward.local_port), timeout=30) as sock:
            sock.sendall(b"x")
            assert sock.recv(1) == b"x"
            fake.session.sock.sendall(os.urandom(100_000))
            with pytest.raises(ConnectionLostError):
                forward.wait(20)
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
        assert forward.state == "failed"


@pytest.mark.parametrize("length", [0, 1, 300_000, 0xFFFFFFFF])
def test_packet_lengths_that_cannot_be_are_refused(tmp_path: Path, length: int) -> None:
    """A packet that claims a length beyond reason is not waited for."""
    with FakeSSH(tmp_path) as fake, local_forward(fake) as forward:
        check_alive(forward)
        # With AES-GCM the length is in the clear: this needs no key.
        fake.session.sock.sendall(struct.pack(">I", length) + bytes(100))
        with pytest.raises(ConnectionLostError):
            forward.wait(30)


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        (b"\xff\xfe who?\r\nSSH-1.5-old\r\n", ProtocolError, "SSH 1.5"),
        (b"SSH-1.5-old\r\n", ProtocolError, "SSH 1.5"),
        (b"SSH-2.0-\xff\xfe\r\n", ProtocolError, ""),
        (b"SSH-2.0-ok\r\n" + bytes(4096), ProtocolError, "key exchange"),
        (b"SSH-2.0-ok\r\n" + b"\xff" * 4096, ProtocolError, "key exchange"),
        (b"220 mail.example ESMTP\r\n", ProtocolError, "220 mail.example"),
    ],
)
def test_bad_first_words_are_told(text: bytes, error: type[BokehSSHError], said: str, no_leaks: Any) -> None:
    """What cannot be the beginning of SSH is a typed error, in any bytes, at the first try."""
    with no_leaks(), Listener(fakes.saying(text)) as fake, pytest.raises(error) as caught:
        connect_to(fake.port, timeout=10)
    assert said in str(caught.value)
    assert fake.count == 1


def connect_to(port: int, **keywords: Any) -> None:
    """Try to open a forward through whatever is at the port."""
    login = {"ssh_config": None, "allow_agent": False, "look_for_keys": False, **keywords}
    with LocalForward("127.0.0.1", "me", port=port, remote_port=7, **login):
        raise AssertionError("it opened")


@pytest.mark.parametrize("text", [b"hello\r\n", b"x", b"\n", b"\xff\n"])
def test_endless_banner_is_bounded(text: bytes, no_leaks: Any) -> None:
    """Neither endless lines before the version nor one endless line hold us up or fill memory."""
    sent = [0]
    began = time.monotonic()
    with no_leaks(), Listener(fakes.endless(text, sent)) as fake, pytest.raises(ProtocolError):
        connect_to(fake.port, timeout=20)
    assert time.monotonic() - began < 15
    assert 0 < sent[0] < 16 << 20  # what the sockets hold, and no more


def test_banner_that_drips_ends_at_the_deadline(no_leaks: Any) -> None:
    """A byte now and then does not extend the time there is to connect."""
    drips = threading.Semaphore(0)

    def drip(sock: socket.socket, number: int) -> None:
        pause = threading.Event()
        while not pause.wait(0.05):
            sock.sendall(b"x\n")
            drips.release()

    began = time.monotonic()
    with no_leaks(), Listener(drip) as fake, pytest.raises(BokehSSHError) as caught:
        connect_to(fake.port, timeout=1)
    assert time.monotonic() - began < 15
    assert drips.acquire(timeout=0)
    assert caught.value.stage == "connect"


def test_goodbye_in_any_bytes_is_told(tmp_path: Path) -> None:
    """A disconnect message that is not UTF-8 is shown as well as can be; the loss is typed."""
    with FakeSSH(tmp_path) as fake, local_forward(fake) as forward:
        fake.session.send(1, 11, struct.pack(">I", 9) + b"\xff\xfe enough" + bytes(4))
        with pytest.raises(ConnectionLostError, match="enough") as caught:
            forward.wait(20)
        assert "\xff" not in str(caught.value)


def test_refusal_in_any_bytes_is_told(tmp_path: Path) -> None:
    """A channel's refusal that is not UTF-8 is a refusal, and the connection lives."""

    def refuse(server: Server, message: Message) -> bool:
        message.get_binary()
        server.send(_OPEN_FAILURE, message.get_int(), 1, struct.pack(">I", 5) + b"\xff\xfe no" + bytes(4))
        return True

    with FakeSSH(tmp_path, on_open=refuse) as fake, pytest.raises(ForwardingRefusedError):
        local_forward(fake).open()


@pytest.mark.parametrize(
    ("code", "said", "error", "told"),
    [
        (0, "java.nio.channels.UnresolvedAddressException", TargetUnreachableError, "UnresolvedAddress"),
        (0, "", TargetUnreachableError, "reason 0"),
        (0xFE000001, "not today", TargetUnreachableError, "not today"),
        (2, "Forwarding disabled", ForwardingRefusedError, "Forwarding disabled"),
        (0, "forwarding is not permitted", ForwardingRefusedError, "not permitted"),
        (2, "Permission denied", TargetUnreachableError, "Permission denied"),  # an errno's words
        (2, "Operation not permitted", TargetUnreachableError, "Operation not permitted"),
        (3, "direct-tcpip?", ForwardingRefusedError, "or to any other port"),
        (4, "too many channels", ForwardError, "too many channels"),
        (1, "", ForwardingRefusedError, "forbids"),  # the control
        (2, "Connection refused", TargetUnreachableError, "Connection refused"),
    ],
)
def test_refusal_for_any_reason_is_one(
    tmp_path: Path, code: int, said: str, error: type[BokehSSHError], told: str
) -> None:
    """A channel that is refused with any code is a refusal, with the server's words, and no lost connection;
    words that forbid mean what they say, whatever the code."""

    def refuse(server: Server, message: Message) -> bool:
        message.get_binary()
        server.send(_OPEN_FAILURE, message.get_int(), code, said, "")
        return True

    with FakeSSH(tmp_path, on_open=refuse) as fake:
        machine = fake.machine
        with connect(Host(machine.host, machine.user, **machine.login)) as connection:
            with pytest.raises(error, match=told) as caught:
                connection.open_socket(("db.example", 7), timeout=20)
            assert type(caught.value) is error
            quiet: dict[str, Any] = {name: lambda _: None for name in ("on_stdout", "on_stderr", "on_exit")}
            with pytest.raises(SessionError, match=said or f"reason {code}"):
                connection.run("true", timeout=20, **quiet)
            assert connection.ping(20)


def test_connection_that_dies_is_no_refusal(tmp_path: Path) -> None:
    """The control: where the connection ends before the answer, it is the connection that is told."""

    def hang_up(server: Server, message: Message) -> bool:
        server.close()
        return True

    with FakeSSH(tmp_path, on_open=hang_up) as fake:
        machine = fake.machine
        with connect(Host(machine.host, machine.user, **machine.login)) as connection:
            with pytest.raises(ConnectionLostError):
                connection.open_socket(("db.example", 7), timeout=20)


def test_silence_after_a_channel_open_has_a_deadline(tmp_path: Path, no_leaks: Any) -> None:
    """A server that never answers a channel open is told at the deadline."""
    began = time.monotonic()
    deaf = {"on_open": lambda server, message: True, "on_request": lambda server, message: True}
    with no_leaks(), FakeSSH(tmp_path, **deaf) as fake:
        with pytest.raises(ConnectionLostError, match="channel"):
            local_forward(fake, timeout=3).open()
        assert sum(b"direct-tcpip" in rest for kind, rest in fake.session.seen if kind == "open") == 1
    assert time.monotonic() - began < 30


def test_target_that_never_answers_is_told_as_that(tmp_path: Path, no_leaks: Any) -> None:
    """Where the server answers, but its own connection to the target never comes about, that is a warning."""
    told: list[Any] = []
    with no_leaks(), FakeSSH(tmp_path, on_open=lambda server, message: True) as fake:
        with local_forward(fake, timeout=3, on_event=told.append) as forward:
            assert forward.state == "ready"
        assert any(isinstance(event, Warned) and "did not answer" in event.text for event in told)


def test_silence_after_a_global_request_has_a_deadline(tmp_path: Path, no_leaks: Any) -> None:
    """A server that answers no global request is alive as long as it refuses channels; what it does not do is
    told at the deadline, and is nothing to try again for. Where it answers nothing, the line is to blame."""
    began = time.monotonic()
    deaf: dict[str, Any] = {"on_request": lambda server, message: True}
    with no_leaks(), FakeSSH(tmp_path, **deaf) as fake:
        with pytest.raises(ForwardingRefusedError, match="does not answer the request to listen") as caught:
            remote_forward(fake, timeout=3).open()
        assert not caught.value.temporary
        assert any(b"tcpip-forward" in rest for kind, rest in fake.session.seen if kind == "global request")
    deaf["on_open"] = lambda server, message: True
    with no_leaks(), FakeSSH(tmp_path, **deaf) as fake:
        with pytest.raises(ConnectionLostError, match="no answer"):
            remote_forward(fake, timeout=3).open()
    assert time.monotonic() - began < 60


def test_server_that_answers_no_global_request_is_not_given_up(tmp_path: Path, no_leaks: Any) -> None:
    """The keepalive takes any answer for a sign of life, the refusal of a channel as well."""
    config = tmp_path / "config"
    config.write_text("ServerAliveInterval 1\nServerAliveCountMax 2\n", encoding="utf-8")
    with no_leaks(), FakeSSH(tmp_path, on_request=lambda server, message: True) as fake:
        machine = fake.machine
        host = Host(machine.host, machine.user, **{**machine.login, "ssh_config": config})
        with connect(host) as connection:
            until(lambda: fake.session.count("open") == 3 or not connection.alive, what="three channels")
            assert connection.alive


def test_request_that_a_server_does_not_know_is_an_answer(tmp_path: Path) -> None:
    """A server that knows no global requests, and says so (TinySSH), is alive, and cannot listen."""

    def unknown(server: Server, message: Message) -> bool:
        server.send(_UNIMPLEMENTED, message.seqno)
        return True

    began = time.monotonic()
    with FakeSSH(tmp_path, on_request=unknown) as fake:
        with pytest.raises(ForwardingRefusedError, match="does not know the request to listen"):
            remote_forward(fake).open()
    assert time.monotonic() - began < 10  # not at the deadline


def test_silence_during_the_login_has_a_deadline(tmp_path: Path, no_leaks: Any) -> None:
    """A server that exchanges keys and then says nothing is told at the deadline."""
    began = time.monotonic()
    with no_leaks(), FakeSSH(tmp_path, login=threading.Event()) as fake:
        with pytest.raises(BokehSSHError) as caught:
            local_forward(fake, timeout=1).open()
        assert caught.value.stage == "connect"
        fake.login.set()
    assert time.monotonic() - began < 15


def test_exception_in_a_handler_fails_one_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An OSError with one argument where a connection is handled costs that connection alone."""
    dial = IOLoop.dial
    broken: list[object] = []

    def fail_once(self: IOLoop, *args: Any) -> None:
        if not broken:
            broken.append(args)
            raise OSError("one argument")
        dial(self, *args)

    with (
        Listener(fakes.stay) as target,
        FakeSSH(tmp_path) as fake,
        remote_forward(fake, local_port=target.port) as forward,
    ):
        monkeypatch.setattr(IOLoop, "dial", fail_once)
        forwarded(fake.session, forward.remote_port)
        until(lambda: fake.session.count("open failure") == 1, what="the refusal")
        assert broken
        forwarded(fake.session, forward.remote_port, number=78)
        until(lambda: fake.session.count("open success") == 1, what="the next one")
        assert forward.state == "ready"
    assert "a forwarded connection failed" in caplog.text


def test_data_on_channels_that_do_not_exist_is_a_typed_loss(tmp_path: Path) -> None:
    """A message for a channel that never was ends the connection, told as a loss."""
    with FakeSSH(tmp_path) as fake, local_forward(fake) as forward:
        fake.session.send(_DATA, 4711, "what?")
        with pytest.raises(ConnectionLostError, match="speaks of a channel that never was"):
            forward.wait(20)


_LATE: dict[str, tuple[Any, ...]] = {
    "exit-status": (_REQUEST, "exit-status", b"\x00", 0),
    "request with a reply": (_REQUEST, "keepalive@openssh.com", b"\x01"),
    "data": (_DATA, "too late"),
    "extended data": (95, 1, "too late"),
    "window adjust": (_ADJUST, 1000),
    "EOF": (_EOF,),
    "CLOSE": (_CLOSE,),
    "success": (99,),
    "failure": (100,),
}


@pytest.mark.parametrize("late", _LATE)
def test_late_messages_for_a_closed_channel_are_passed_over(tmp_path: Path, late: str) -> None:
    """What a server still says on a channel that both sides have closed ends nothing, and has no answer."""
    overrun = Overrun()
    with (
        FakeSSH(tmp_path, on_open=overrun) as fake,
        local_forward(fake, remote_port=9) as forward,
        local_forward(fake) as good,
        socket.create_connection(("127.0.0.1", forward.local_port), timeout=30) as sock,
    ):
        until(lambda: len(overrun.theirs) == 2, what="the channel")
        session = fake.sessions[0]
        number, raw = overrun.theirs[-1], session.raws[-1]
        session.send(_CLOSE, number)
        assert sock.recv(1) == b""
        until(lambda: raw.count(_CLOSE), what="the answer")
        kind, *rest = _LATE[late]
        session.send(kind, number, *rest)
        session.send(kind, number, *rest)
        with socket.create_connection(("127.0.0.1", forward.local_port), timeout=30):
            until(lambda: len(overrun.theirs) == 3, what="another channel")
        assert raw.seen[-1] == _CLOSE
        assert forward.state == "ready"
        check_alive(good)


def channel_to_nine(message: Message) -> int | None:
    """Read a request for a channel; give its number if it is to lead to port 9, else leave it unread."""
    at = message.packet.tell()
    message.get_binary()
    number = message.get_int()
    message.get_int(), message.get_int(), message.get_binary()
    if message.get_int() == 9:
        return number
    message.packet.seek(at)
    return None


def test_late_messages_for_a_refused_channel_are_passed_over(tmp_path: Path) -> None:
    """A channel that was refused is no more either: what comes for it ends nothing."""
    refused: list[int] = []

    def refuse(server: Server, message: Message) -> bool:
        number = channel_to_nine(message)
        if number is None:
            return False
        refused.append(number)
        server.send(_OPEN_FAILURE, number, 2, "no", "")
        return True

    with FakeSSH(tmp_path, on_open=refuse) as fake, local_forward(fake, remote_port=9) as forward:
        until(lambda: refused, what="the refusal")
        for kind, *rest in _LATE.values():
            fake.session.send(kind, refused[0], *rest)
        fake.session.send(_OPEN_SUCCESS, refused[0], 1, WINDOW, 32768)
        with suppress(ConnectionResetError):  # it may come before the connection is taken for made
            socket.create_connection(("127.0.0.1", forward.local_port), timeout=30).close()
        until(lambda: len(refused) == 2, what="the next one")
        assert forward.state == "ready"


@pytest.mark.parametrize("first", ["CLOSE", "data, EOF, CLOSE"])
def test_close_in_place_of_an_answer_is_a_refusal(tmp_path: Path, first: str) -> None:
    """A channel that is closed before it was confirmed is refused at once; a confirmation comes too late."""

    def close(server: Server, message: Message) -> bool:
        number = channel_to_nine(message)
        if number is None:
            return False
        if first != "CLOSE":
            server.send(_DATA, number, "too early")
            server.send(_EOF, number)
        server.send(_CLOSE, number)
        server.raw(number)
        return True

    began = time.monotonic()
    with FakeSSH(tmp_path, on_open=close) as fake:
        told: list[Any] = []
        with local_forward(fake, remote_port=9, on_event=told.append) as forward:
            assert any(isinstance(event, Warned) and "the server closed it" in event.text for event in told)
            conformance.expect_reset(("127.0.0.1", forward.local_port))
            assert forward.state == "ready"
    assert time.monotonic() - began < 15


def test_close_is_answered_before_all_is_delivered(tmp_path: Path) -> None:
    """A CLOSE has its answer at once, after which nothing is said; a reader that comes late gets all."""
    overrun = Overrun()
    with (
        FakeSSH(tmp_path, on_open=overrun) as fake,
        local_forward(fake, remote_port=9) as forward,
        socket.socket() as sock,
    ):
        sock.settimeout(20)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", forward.local_port))
        until(lambda: len(overrun.theirs) == 2, what="the channel")
        number, raw = overrun.theirs[-1], fake.session.raws[-1]
        block = os.urandom(32768)
        for _ in range(60):
            fake.session.send(_DATA, number, struct.pack(">I", len(block)) + block)
        fake.session.send(_CLOSE, number)
        until(lambda: raw.count(_CLOSE), what="the answer")
        got = b"".join(iter(lambda: sock.recv(65536), b""))
        assert got == block * 60
        sock.close()
        with socket.create_connection(("127.0.0.1", forward.local_port), timeout=30):
            until(lambda: len(overrun.theirs) == 3, what="another channel")
        assert raw.seen[-1] == _CLOSE


@contextmanager
def session_of(fake_sessions: list[int], directory: Path) -> Iterator[tuple[FakeSSH, Connection]]:
    """Log in to a server whose sessions are channels that only keep what they are told."""

    def session(server: Server, message: Message) -> bool:
        at = message.packet.tell()
        if message.get_binary() != b"session":
            message.packet.seek(at)
            return False
        fake_sessions.append(message.get_int())
        server.raw(fake_sessions[-1])
        return True

    with FakeSSH(directory, on_open=session) as fake:
        machine = fake.machine
        with connect(Host(machine.host, machine.user, **machine.login)) as connection:
            yield fake, connection


def start(connection: Connection, ends: list[int | None]) -> tuple[threading.Thread, list[Session]]:
    """Run a command, on a thread: the fake has yet to be told to answer."""
    made: list[Session] = []

    def run() -> None:
        made.append(
            connection.run(
                "true",
                on_stdout=lambda data: None,
                on_stderr=lambda data: None,
                on_exit=ends.append,
                timeout=20,
            )
        )

    asking = threading.Thread(target=run)
    asking.start()
    return asking, made


def test_exit_status_after_the_close_is_passed_over(tmp_path: Path) -> None:
    """A session whose server says its exit status after its CLOSE has ended; the connection lives."""
    theirs: list[int] = []
    ends: list[int | None] = []
    with session_of(theirs, tmp_path) as (fake, connection):
        asking, _ = start(connection, ends)
        until(lambda: fake.session.raws and fake.session.raws[0].count(_REQUEST), what="the command")
        for kind, *rest in ((99,), (_EOF,), (_CLOSE,), (_REQUEST, "exit-status", b"\x00", 0)):
            fake.session.send(kind, theirs[0], *rest)
        asking.join(20)
        until(lambda: ends, what="the end")
        assert connection.ping(20)
        assert fake.session.raws[0].seen[-1] == _CLOSE


@pytest.mark.parametrize("status", [None, 3])
def test_end_of_what_a_session_says_is_its_end(tmp_path: Path, status: int | None) -> None:
    """A session whose server says EOF, and neither an exit status nor CLOSE, has ended, and is closed; one
    that says its status after the EOF, as OpenSSH may, is the control."""
    theirs: list[int] = []
    ends: list[int | None] = []
    with session_of(theirs, tmp_path) as (fake, connection):
        asking, _ = start(connection, ends)
        until(lambda: fake.session.raws and fake.session.raws[0].count(_REQUEST), what="the command")
        for kind in (99, _EOF):
            fake.session.send(kind, theirs[0])
        if status is not None:
            fake.session.send(_REQUEST, theirs[0], "exit-status", b"\x00", status)
        asking.join(20)
        until(lambda: ends, what="the end")
        assert ends == [status]
        until(lambda: fake.session.raws[0].count(_CLOSE), what="our CLOSE")
        assert connection.ping(20)


def test_launch_whose_session_only_ends_is_told_at_once(tmp_path: Path) -> None:
    """A launch over a session that the server ends without CLOSE fails at once, not after its timeout."""
    theirs: list[int] = []
    errors: list[BaseException] = []
    with session_of(theirs, tmp_path) as (fake, _):
        machine = fake.machine
        tunnel = DirectTunnel(machine.host, machine.user, launch=True, isolate=False, **machine.login)

        def launch() -> None:
            try:
                tunnel.open()
            except BokehSSHError as exc:
                errors.append(exc)

        began = time.monotonic()
        opening = threading.Thread(target=launch)
        opening.start()
        until(lambda: len(fake.sessions) > 1 and fake.session.raws, what="the command")
        until(lambda: fake.session.raws[0].count(_REQUEST), what="the command")
        for kind in (99, _EOF):
            fake.session.send(kind, theirs[0])
        opening.join(20)
        assert time.monotonic() - began < 15
        assert [type(error) for error in errors] == [ConnectionLostError], errors


def test_our_end_of_a_session_is_an_eof_and_a_close(tmp_path: Path) -> None:
    """What we end has an EOF before its CLOSE, and nothing after it, whatever is asked of it then."""
    theirs: list[int] = []
    with session_of(theirs, tmp_path) as (fake, connection):
        asking, made = start(connection, [])
        until(lambda: fake.session.raws and fake.session.raws[0].count(_REQUEST), what="the command")
        fake.session.send(99, theirs[0])
        asking.join(20)
        made[0].write(b"last words")
        made[0].close()
        made[0].close()
        raw = fake.session.raws[0]
        until(lambda: raw.count(_CLOSE), what="the end")
        made[0].signal("KILL")
        fake.session.send(_REQUEST, theirs[0], "keepalive@openssh.com", b"\x01")
        assert connection.ping(20)
        assert raw.seen == [_REQUEST, _DATA, _EOF, _CLOSE]


@pytest.mark.parametrize("kind", [_DATA, 93, 95, _EOF, _CLOSE, 98, 99, 100])
def test_messages_cut_short_do_not_end_us(tmp_path: Path, kind: int, no_leaks: Any) -> None:
    """A channel message that ends in the middle is survived or told, and leaves nothing behind."""
    overrun = Overrun()
    with (
        no_leaks(),
        FakeSSH(tmp_path, on_open=overrun) as fake,
        local_forward(fake) as good,
        local_forward(fake, remote_port=9) as bad,
        socket.create_connection(("127.0.0.1", bad.local_port), timeout=30),
    ):
        until(lambda: len(overrun.theirs) == 2, what="the channel")
        fake.session.send(kind, overrun.theirs[-1])
        fake.session.send(kind, overrun.theirs[-1], b"\xff\xff\xff\xff")
        fake.session.send(kind, overrun.theirs[-1], b"\x00\x00")
        check_alive(good)


def test_port_zero_needs_a_port_in_the_answer(tmp_path: Path) -> None:
    """A server that grants any free port without saying which is a typed error (RFC 4254, section 7.1)."""

    def grant(server: Server, message: Message) -> bool:
        threading.Thread(target=server.send, args=(_SUCCESS,)).start()
        return True

    with FakeSSH(tmp_path, on_request=grant) as fake, pytest.raises(ForwardError, match="which port"):
        remote_forward(fake).open()


def test_fakes_are_gone(no_leaks: Callable[..., Any], tmp_path: Path) -> None:
    """The control of all the above: a fake that is not bent serves, and leaves nothing behind."""
    with no_leaks(), FakeSSH(tmp_path) as fake, local_forward(fake) as forward:
        check_alive(forward)
