"""Reaching a machine: what can stand in the way, and the ways that lead through others."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import logging
import os
import re
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import beds
import fakes
from beds import Key, Knobs, Machine, until
from bokeh_ssh import (
    Authenticated,
    AuthenticationError,
    BokehSSHError,
    ChangedHostKeyError,
    ConfigError,
    ConnectError,
    Connecting,
    ConnectionLostError,
    ConnectTimeoutError,
    DirectTunnel,
    Event,
    Host,
    HostKeyAdded,
    LocalForward,
    ProtocolError,
    Question,
    RefusedError,
    RemoteForward,
    ResolveError,
    SessionError,
    UnknownHostKeyError,
    UsageError,
)
from bokeh_ssh._ssh.connect import connect
from bokeh_ssh._ssh.connection import _RelayOnOpen
from bokeh_ssh._ssh.route import find_hop
from bokeh_ssh._ssh.tcp import dial
from bokeh_ssh._ssh.transport import Channel
from connections import connected
from fakes import Listener
from processes import proc

_LOGIN: dict[str, Any] = {"ssh_config": None, "allow_agent": False, "look_for_keys": False}
#: Seconds above a deadline that a busy machine may need.
_SLACK = 10.0


def forward_to(host: str, port: int, **keywords: Any) -> LocalForward:
    """Make a forward through whatever is at that address."""
    return LocalForward(host, "me", port=port, remote_port=9, **{**_LOGIN, **keywords})


def through(machine: Machine, **keywords: Any) -> LocalForward:
    """Make a forward through a machine."""
    return LocalForward(machine.host, machine.user, **{"remote_port": 9, **machine.login, **keywords})


@contextmanager
def within(seconds: float) -> Any:
    """Check that the block is done in time."""
    began = time.monotonic()
    yield
    took = time.monotonic() - began
    assert took < seconds, f"took {took:.1f} s"


# What answers, and what does not.


def test_closed_port_is_refused_at_once(no_leaks: Any) -> None:
    """Where nothing listens, a typed error names host and port at once."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with no_leaks(), within(_SLACK), pytest.raises(RefusedError, match=f"port {port}") as caught:
        forward_to("127.0.0.1", port, timeout=20).open()
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ECONNREFUSED
    assert (caught.value.stage, caught.value.host) == ("connect", "127.0.0.1")


@pytest.mark.parametrize("then", [fakes.hang_up, fakes.stay], ids=["hangs up", "keeps it open"])
def test_http_server_is_not_an_ssh_server(then: fakes.Handler, no_leaks: Any) -> None:
    """A port where HTTP answers is told as that, with what it said."""
    text = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"
    with no_leaks(), Listener(fakes.saying(text, then=then)) as web:
        with within(3 + _SLACK), pytest.raises(ProtocolError, match=r"HTTP/1\.1 400") as caught:
            forward_to("127.0.0.1", web.port, timeout=3).open()
        assert web.count == 1
    assert "not an SSH server" in str(caught.value)


def test_silent_listener_ends_at_the_connect_deadline(no_leaks: Any) -> None:
    """One that takes connections and says nothing is told at the deadline, and tried once."""
    with no_leaks(), Listener(fakes.stay) as silent:
        with within(1 + _SLACK), pytest.raises(ConnectTimeoutError, match="within 1 s"):
            forward_to("127.0.0.1", silent.port, timeout=1).open()
        assert silent.count == 1


def test_server_that_says_no_more_than_its_version_is_told() -> None:
    """Where large packets are lost, as in a VPN with a wrong MTU, the port is right."""
    greeting = b"Welcome\r\nSSH-2.0-OpenSSH_9.2\r\n"
    told = r"does not exchange keys within 3 s; .*MTU"
    with (
        Listener(fakes.saying(greeting, then=fakes.stay)) as silent,
        pytest.raises(ConnectTimeoutError, match=told),
    ):
        forward_to("127.0.0.1", silent.port, timeout=3).open()


def test_connect_timeout_of_the_ssh_config_counts(account: Path, no_leaks: Any) -> None:
    """``ConnectTimeout`` is the deadline where ``timeout`` is not given."""
    with no_leaks(), Listener(fakes.stay) as silent:
        config = account / ".ssh" / "config"
        config.write_text(f"Host quiet\n  HostName 127.0.0.1\n  Port {silent.port}\n  ConnectTimeout 1\n")
        with within(1 + _SLACK), pytest.raises(ConnectTimeoutError) as caught:
            LocalForward("quiet", "me", remote_port=9).open()
    assert caught.value.host == "quiet"


def test_name_without_an_address_is_told(no_leaks: Any) -> None:
    """A name that does not exist is a typed error."""
    with no_leaks(), pytest.raises(ResolveError, match=r"no-such-host\.invalid") as caught:
        forward_to("no-such-host.invalid", 22, timeout=10).open()
    assert isinstance(caught.value.__cause__, socket.gaierror)


def test_name_server_that_does_not_answer_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look-up that hangs is given up at the deadline."""
    with ExitStack() as stack:
        ear, mouth = (stack.enter_context(sock) for sock in socket.socketpair())

        def hang(*args: object, **keywords: object) -> list[Any]:
            ear.recv(1)
            raise socket.gaierror(socket.EAI_NONAME, "too late")

        monkeypatch.setattr(socket, "getaddrinfo", hang)
        with within(0.5 + _SLACK), pytest.raises(ResolveError, match="more than"):
            forward_to("slow.example", 22, timeout=0.5).open()
        mouth.send(b"!")


def answer_with(monkeypatch: pytest.MonkeyPatch, *addresses: tuple[str, int]) -> list[str]:
    """Have every look-up answer with these; gives the names that are looked up."""
    asked: list[str] = []
    real: Callable[..., list[Any]] = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, *args: object, **keywords: object) -> list[Any]:
        if host in ("127.0.0.1", "localhost"):  # the server is in this process too
            return real(host, port, *args, **keywords)
        asked.append(host)
        found = []
        for address, number in addresses:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            end = (address, number, 0, 0) if family == socket.AF_INET6 else (address, number)
            found.append((family, socket.SOCK_STREAM, 6, "", end))
        return found

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


def test_address_that_was_reached_before_is_dialled_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a name with several machines behind it, the one from before is dialled first, if there is one."""
    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.create_server(("::1", 0), family=socket.AF_INET6) as other,
    ):
        answer_with(monkeypatch, one.getsockname()[:2], other.getsockname()[:2])
        for prefer, first in (
            ((), "127.0.0.1"),
            (("::1",), "::1"),
            (("192.0.2.1", "127.0.0.1"), "127.0.0.1"),
        ):
            with dial("several.example", 22, name="it", timeout=5, prefer=prefer) as sock:
                assert sock.getpeername()[0] == first


def known_as(machine: Machine, name: str, tmp_path: Path) -> str:
    """Write a known_hosts file in which the machine has another name; gives its path."""
    key = machine.known_hosts.read_text().split(None, 1)[1]
    path = tmp_path / f"known_hosts-{name}"
    path.write_text(f"[{name}]:{machine.port} {key}")
    return str(path)


@pytest.mark.parametrize("dead", ["closed", "silent"])
def test_dead_ipv6_beside_live_ipv4_falls_back(
    dead: str,
    embedded: Callable[..., Machine],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    no_leaks: Any,
) -> None:
    """A first address that refuses, or that never answers, costs a moment and not the deadline."""
    machine = embedded()
    with ExitStack() as stack:
        if dead == "silent":
            port = stack.enter_context(fakes.black_hole("::1"))
        else:
            with socket.create_server(("::1", 0), family=socket.AF_INET6) as gone:
                port = gone.getsockname()[1]
        asked = answer_with(monkeypatch, ("::1", port), ("127.0.0.1", machine.port))
        login = {**machine.login, "known_hosts": known_as(machine, "both.example", tmp_path)}
        forward = LocalForward("both.example", machine.user, remote_port=9, **login)
        with no_leaks(), within(_SLACK), forward:
            assert forward.state == "ready"
    assert asked[0] == "both.example"


def test_addresses_that_all_fail_are_told_together(monkeypatch: pytest.MonkeyPatch, no_leaks: Any) -> None:
    """Where every address refuses it is told at once; where one never answers, at the deadline."""
    with fakes.black_hole() as hole, socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
        gone.close()
        answer_with(monkeypatch, ("127.0.0.1", port), ("127.0.0.1", port))
        with no_leaks(), within(_SLACK), pytest.raises(RefusedError):
            forward_to("both.example", 22, timeout=20).open()
        answer_with(monkeypatch, ("127.0.0.1", port), ("127.0.0.1", hole))
        with no_leaks(), within(1 + _SLACK), pytest.raises(ConnectTimeoutError):
            forward_to("both.example", 22, timeout=1).open()


def test_dropped_syn_ends_at_the_deadline_and_leaves_nothing(no_leaks: Any) -> None:
    """Where packets vanish, the deadline holds, and no thread or descriptor stays."""
    with (
        fakes.black_hole() as port,
        no_leaks(),
        within(1 + _SLACK),
        pytest.raises(ConnectTimeoutError, match="did not answer within 1 s") as caught,
    ):
        forward_to("127.0.0.1", port, timeout=1).open()
    assert "jump=" in str(caught.value)


# A server that is full.


def test_server_that_is_full_for_a_moment_is_tried_again(
    embedded: Callable[..., Machine], no_leaks: Any
) -> None:
    """A server that hangs up before its banner (MaxStartups) is tried again a few times."""
    machine = embedded()
    with Listener(fakes.relay(lambda n: None if n < 2 else (machine.host, machine.port))) as door:
        known = door_key(machine, door)
        with no_leaks(), through(machine, port=door.port, known_hosts=known) as forward:
            assert forward.state == "ready"
        assert door.count == 3


def door_key(machine: Machine, door: Listener) -> str:
    """Write a known_hosts file with the machine's key under the relay's address; gives its path."""
    key = machine.known_hosts.read_text().split(None, 1)[1]
    path = machine.known_hosts.with_name(f"known_hosts-door-{door.port}")
    path.write_text(f"[127.0.0.1]:{door.port} {key}")
    return str(path)


def test_server_that_stays_full_is_told_after_a_bounded_number_of_tries(no_leaks: Any) -> None:
    """One that goes on hanging up is told as that, after a few tries with pauses between them."""
    times: list[float] = []

    def hang_up(sock: socket.socket, number: int) -> None:
        times.append(time.monotonic())

    with no_leaks(), Listener(hang_up) as full, pytest.raises(RefusedError, match="MaxStartups"):
        forward_to("127.0.0.1", full.port, timeout=20).open()
    assert 2 <= len(times) <= 5
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert min(pauses) >= 0.15
    assert sum(pauses) < 10


def test_penalty_is_told_and_not_tried_again(no_leaks: Any) -> None:
    """A server that refuses the address after failed logins (PerSourcePenalties) is left alone."""
    refuse = fakes.saying(b"Not allowed at this time\r\n")
    with no_leaks(), Listener(refuse) as server, pytest.raises(RefusedError, match="PerSourcePenalties"):
        forward_to("127.0.0.1", server.port, timeout=20).open()
    assert server.count == 1


def test_penalty_of_a_real_server_is_told(key: Key, tmp_path: Path) -> None:
    """OpenSSH 10.6 refuses an address after one login with a wrong key, the right one's too."""
    newest = os.environ.get("OPENSSH_NEWEST", "")
    if not newest:
        pytest.skip("no OpenSSH with PerSourcePenalties is here (OPENSSH_NEWEST)")
    wrong = Key.generate().write(tmp_path / "wrong")
    penalty = {"PerSourcePenalties": "authfail:60s"}  # above the least that is enforced, which a look is not
    with beds.local_sshd(key, tmp_path, penalty, newest=newest) as machine:
        with machine_forward(machine):
            pass  # the control
        with pytest.raises(AuthenticationError):
            machine_forward(machine, key_filename=str(wrong)).open()
        until(lambda: not beds.has_banner(machine.host, machine.port), what="the penalty")
        with pytest.raises(RefusedError, match="PerSourcePenalties"):
            machine_forward(machine).open()


def machine_forward(machine: Machine, **keywords: Any) -> LocalForward:
    """Make a forward to the machine's own SSH port."""
    return LocalForward(machine.host, machine.user, remote_port=machine.port, **{**machine.login, **keywords})


def test_tries_end_at_the_deadline(no_leaks: Any) -> None:
    """The pauses between tries do not outlast the connect deadline."""
    with no_leaks(), Listener(fakes.hang_up) as full, within(1 + _SLACK), pytest.raises(RefusedError):
        forward_to("127.0.0.1", full.port, timeout=0.5).open()
    assert full.count <= 2


def only_one(machine: Machine) -> socket.socket | None:
    """Take a place before the login; None where there is none yet."""
    sock = socket.create_connection((machine.host, machine.port), timeout=30)
    if sock.recv(4) == b"SSH-":
        return sock
    sock.close()
    return None


def test_real_sshd_that_drops_startups(sshd: Callable[..., Machine], no_leaks: Any) -> None:
    """A real sshd that drops what is above MaxStartups: refused while full, let in afterwards."""
    machine = sshd(MaxStartups="1:100:1", LoginGraceTime="30")
    with no_leaks():
        first = until(lambda: only_one(machine), what="the one place there is")
        with first, pytest.raises(RefusedError):
            through(machine, timeout=5).open()
        # Its place is free again a moment after we hung up, which is what the tries are for.
        with through(machine) as forward:
            assert forward.state == "ready"


# Who it is.


def unknown_hosts(tmp_path: Path) -> str:
    """Give the path of a file that knows nobody."""
    path = tmp_path / "known-nobody"
    path.touch()
    return str(path)


def test_unknown_key_is_refused_before_any_credential(sshd: Callable[..., Machine], tmp_path: Path) -> None:
    """An unknown host key is refused, with its fingerprint, before a user name or key is sent."""
    machine = sshd(LogLevel="DEBUG1")
    log = tmp_path / "sshd.log"
    with pytest.raises(UnknownHostKeyError, match="SHA256:") as caught:
        through(machine, known_hosts=unknown_hosts(tmp_path), password="never sent").open()
    assert caught.value.fingerprint.startswith("SHA256:")
    assert caught.value.key_type == "ssh-ed25519"
    until(lambda: "Connection closed by" in log.read_text(), what="sshd to see us go")
    assert "userauth-request" not in log.read_text()
    with through(machine):  # the control: a known one gets as far as that
        until(lambda: "userauth-request" in log.read_text())


def test_unknown_key_can_be_accepted_once_and_for_all(
    embedded: Callable[..., Machine], tmp_path: Path
) -> None:
    """With "accept-new" an unknown key is added, told as an event, and known from then on."""
    machine = embedded()
    hosts = unknown_hosts(tmp_path)
    events: list[Event] = []
    with through(machine, known_hosts=hosts, host_keys="accept-new", on_event=events.append):
        pass
    [added] = [event for event in events if isinstance(event, HostKeyAdded)]
    assert added.path == hosts
    assert f"[127.0.0.1]:{machine.port} ssh-ed25519" in Path(hosts).read_text()
    with through(machine, known_hosts=hosts):
        pass


@pytest.mark.parametrize("answer", ["yes", "no", None])
def test_unknown_key_can_be_asked_about(
    answer: str | None, embedded: Callable[..., Machine], tmp_path: Path
) -> None:
    """With "ask" the question has the fingerprint, and only "yes" lets it pass."""
    machine = embedded()
    asked: list[Any] = []

    def prompt(question: Any) -> str | None:
        asked.append(question)
        return answer

    forward = through(machine, known_hosts=unknown_hosts(tmp_path), host_keys="ask", prompt=prompt)
    if answer == "yes":
        with forward:
            assert forward.state == "ready"
    else:
        with pytest.raises(UnknownHostKeyError):
            forward.open()
        assert machine.server.logins == 0
    assert [question.kind for question in asked] == ["host_key"]
    assert "SHA256:" in asked[0].text + asked[0].instructions


@pytest.mark.parametrize("policy", ["strict", "ask", "accept-new"])
def test_changed_key_is_always_refused(
    policy: str, embedded: Callable[..., Machine], tmp_path: Path, no_leaks: Any
) -> None:
    """A key other than the one on file is refused whatever the policy; the file stays as it was."""
    machine = embedded()
    hosts = tmp_path / "changed"
    hosts.write_text(f"[127.0.0.1]:{machine.port} {Key.generate().public}\n")
    before = hosts.read_bytes()
    with no_leaks(), pytest.raises(ChangedHostKeyError):
        through(machine, known_hosts=str(hosts), host_keys=policy, prompt=lambda question: "yes").open()
    assert hosts.read_bytes() == before
    assert machine.server.logins == 0


def test_revoked_key_is_refused_even_if_listed(embedded: Callable[..., Machine], tmp_path: Path) -> None:
    """``@revoked`` wins over a plain line with the same key, whichever comes first."""
    from bokeh_ssh import RevokedHostKeyError

    machine = embedded()
    line = machine.known_hosts.read_text()
    for text in (f"{line}@revoked * {line.split(None, 1)[1]}", f"@revoked {line}{line}"):
        hosts = tmp_path / "revoked"
        hosts.write_text(text)
        with pytest.raises(RevokedHostKeyError):
            through(machine, known_hosts=str(hosts), host_keys="accept-new").open()
    assert machine.server.logins == 0


def test_key_that_changes_between_two_openings_is_refused(
    embedded: Callable[..., Machine], no_leaks: Any
) -> None:
    """The same forward, opened again, refuses a machine that is another one by now."""
    first, second = embedded(), embedded()
    targets = [first]
    with Listener(fakes.relay(lambda n: (targets[0].host, targets[0].port))) as door:
        forward = through(first, port=door.port, known_hosts=door_key(first, door))
        with no_leaks(), forward:
            assert forward.state == "ready"
        targets[0] = second
        count = door.count
        with no_leaks(), pytest.raises(ChangedHostKeyError):
            forward.open()
        assert door.count == count + 1  # no second try
        assert second.server.logins == 0
        targets[0] = first
        with forward:  # the control
            assert forward.state == "ready"


# Accounts that let nobody in, or not far.


def test_forced_command_is_told_with_its_words(container: Callable[..., Any]) -> None:
    """An account with ForceCommand cannot launch: typed, with what the command said."""
    machine = container(Knobs(), directives={"ForceCommand": "echo 'only backups here' >&2; exit 7"})
    with pytest.raises(BokehSSHError) as caught:
        DirectTunnel(machine.host, machine.user, "app.py", python=machine.python, **machine.login).open()
    assert "only backups here" in str(caught.value)
    assert caught.value.stage in ("session", "launch")
    assert caught.value.host == machine.host


def test_end_right_after_the_login_is_told(container: Callable[..., Any]) -> None:
    """Where sshd gives up once we are in, the line is not blamed, nor that nothing used it."""
    machine = container(Knobs(), directives={"ChrootDirectory": "/tmp"})  # which others may write to
    for what in (through(machine), DirectTunnel(machine.host, machine.user, "app.py", **machine.login)):
        with pytest.raises(ConnectionLostError, match=r"ended right after the login.*ChrootDirectory"):
            what.open()


def test_nologin_shell_is_told_and_still_forwards(container: Callable[..., Any]) -> None:
    """With nologin as shell a launch is a typed error with its words; a forward works, as ssh -N."""
    machine = container()
    machine.set_shell("/usr/sbin/nologin")
    with pytest.raises(BokehSSHError, match="account is currently not available") as caught:
        DirectTunnel(machine.host, machine.user, "app.py", python=machine.python, **machine.login).open()
    assert caught.value.stage in ("session", "launch")
    with through(machine) as forward:
        assert forward.state == "ready"


def test_expired_account_is_told_with_the_servers_words(container: Callable[..., Any]) -> None:
    """An account that has expired is refused at the login, with what the server says about it; one whose
    password has expired may log in, and not forward."""
    machine = container(Knobs(interactive=True))  # with PAM, which has the words
    with through(machine):
        pass  # the control
    machine.execute(["chage", "-d", "0", "alice"])
    for forward in (
        through(machine),
        LocalForward(machine.host, machine.user, remote_socket="/run/x", **machine.login),
        RemoteForward(machine.host, machine.user, local_port=9, **machine.login),
    ):
        with pytest.raises(SessionError, match=r"password has to be changed.*log in with a terminal once"):
            forward.open()
    machine.execute(["chage", "-d", "-1", "alice"])
    machine.execute(["chage", "-E", "0", "alice"])
    with pytest.raises(BokehSSHError, match=r"expired.*ask the administrator") as caught:
        through(machine).open()
    assert caught.value.stage == "login"
    assert isinstance(caught.value, AuthenticationError)


# Names that want to be something else.

_HOSTILE = [
    "-oProxyCommand=touch /tmp/owned",
    "host\nProxyCommand x",
    "host;id",
    "$(id)",
    "`id`",
    "a b",
    "host\x1b[2J",
    "host\x9b2J",
    "host\0",
    "",
    "@host",
    "-l@host",
    "me;id@host",
    "host:notaport",
    "host:0",
    "host:65536",
    "[::1",
    "a\udcffb",
]


@pytest.mark.parametrize("name", _HOSTILE)
def test_hostile_host_names_are_refused_by_the_constructor(name: str) -> None:
    """A host name that cannot be one is a UsageError, printable, before anything else happens."""
    makers: list[Callable[[], object]] = [
        lambda: LocalForward(name, remote_port=1),
        lambda: LocalForward("host", remote_port=1, remote_host=name),
        lambda: RemoteForward(name),
        lambda: DirectTunnel(name),
        lambda: Host(name),
    ]
    if re.match(r"host:", name):
        del makers[1]  # a target is told apart from its port
    for make in makers:
        with pytest.raises(UsageError) as caught:
            make()
        text = str(caught.value)
        assert text.isprintable(), text
        assert caught.value.hint


@pytest.mark.parametrize("user", ["-oProxyCommand=x", "a -b", "a\nb", "a;b", "$(a)", "`a`", "a\x1bb", ""])
def test_hostile_user_names_are_refused_by_the_constructor(user: str) -> None:
    """A user name that cannot be one is a UsageError, printable."""
    for make in (lambda: Host("host", user), lambda: LocalForward("host", user, remote_port=1)):
        with pytest.raises(UsageError) as caught:
            make()
        assert str(caught.value).isprintable()


# A connection that is up.


def switches(thread: threading.Thread) -> int:
    """Return how often a thread has waited (Linux)."""
    text = proc(f"self/task/{thread.native_id}/status").read_text(encoding="ascii")
    return int(text.partition("\nvoluntary_ctxt_switches:")[2].split()[0])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts how often a thread waits")
def test_idle_connection_wakes_nothing(sshd: Callable[..., Machine], no_leaks: Any) -> None:
    """The thread that reads sleeps until something comes, and ends at once with the connection; a fork that
    closes its copy of the socket ends nothing."""
    with no_leaks(), connect(host_of(sshd())) as connection:
        assert connection.ping(10)
        reader = connection.transport
        before = switches(reader)
        reader.join(0.7)
        assert switches(reader) - before < 4  # an answer to a keepalive may have come
        child = os.fork()
        if not child:
            reader.packetizer.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert connection.ping(10)
        reader.packetizer.close()
        reader.join(5)
        assert not reader.is_alive()


def count_lines(port: int) -> int:
    """Return how many sockets of this process are connected to a port."""
    found = 0
    for number in range(3, 1024):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                with socket.socket(fileno=os.dup(number)) as sock:
                    found += sock.getpeername()[1:2] == (port,)
    return found


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_fork_during_a_login_keeps_no_line(embedded: Callable[..., Machine], tmp_path: Path) -> None:
    """A child that is forked while a person is asked has no copy of the connection."""
    machine, statuses = embedded(), list[int]()

    def answer(_: Question) -> str:
        assert count_lines(machine.port) == 1  # the control
        child = os.fork()
        if not child:
            os._exit(count_lines(machine.port))
        statuses.append(os.waitpid(child, 0)[1])
        return "yes"

    asks = host_of(machine, known_hosts=str(tmp_path / "new"), host_keys="ask", prompt=answer)
    with connect(asks) as connection:
        assert connection.ping(10)
    assert statuses == [0]


# Ways through other machines.


def host_of(machine: Machine, **changes: Any) -> Host:
    """Make the Host of a machine."""
    return Host(machine.host, machine.user, **{**machine.login, **changes})


def test_two_hops_log_in_once_each(embedded: Callable[..., Machine], no_leaks: Any) -> None:
    """``jump`` with two machines goes through both, in order, with one login each and each one's own key."""
    one, two, three = embedded(), embedded(), embedded()
    events: list[Event] = []
    with no_leaks(), through(three, jump=[host_of(one), host_of(two)], on_event=events.append) as forward:
        assert forward.state == "ready"
        assert [machine.server.connections for machine in (one, two, three)] == [1, 1, 1]
    assert [machine.server.logins for machine in (one, two, three)] == [1, 1, 1]
    assert [e.port for e in events if isinstance(e, Connecting)] == [one.port, two.port, three.port]
    assert [e.via for e in events if isinstance(e, Connecting)] == ["", "127.0.0.1", "127.0.0.1"]
    assert len([e for e in events if isinstance(e, Authenticated)]) == 3
    until(lambda: not any(m.server.connections for m in (one, two, three)), what="all to be closed")


def test_hop_that_cannot_reach_the_next_is_told(embedded: Callable[..., Machine], no_leaks: Any) -> None:
    """Where the machine in between cannot connect, the error names both; nothing stays open."""
    door, room = embedded(), embedded()
    with socket.create_server(("127.0.0.1", 0)) as gone:
        closed = gone.getsockname()[1]
    with no_leaks(), pytest.raises(RefusedError, match=f"cannot connect to 127.0.0.1 port {closed}"):
        through(room, port=closed, jump=host_of(door)).open()
    until(lambda: not door.server.connections, what="the hop to be closed")


def test_hop_that_forbids_forwarding_is_told(embedded: Callable[..., Machine], no_leaks: Any) -> None:
    """A jump host that forbids forwarding is told as that."""
    from bokeh_ssh import ForwardingRefusedError

    door, room = embedded(Knobs(local_forward=False)), embedded()
    with no_leaks(), pytest.raises(ForwardingRefusedError, match="AllowTcpForwarding"):
        through(room, jump=host_of(door)).open()


def test_host_key_behind_a_hop_is_verified(
    embedded: Callable[..., Machine], tmp_path: Path, no_leaks: Any
) -> None:
    """A machine behind a jump host is verified as any other; the jump host cannot put itself in its place."""
    door, room = embedded(), embedded()
    with no_leaks(), pytest.raises(UnknownHostKeyError):
        through(room, jump=host_of(door), known_hosts=unknown_hosts(tmp_path)).open()
    assert (door.server.logins, room.server.logins) == (1, 0)


def configure(account: Path, *blocks: str) -> None:
    """Write the ssh config of this account."""
    (account / ".ssh" / "config").write_text("".join(blocks))


def block(machine: Machine, alias: str, *lines: str) -> str:
    """Give the config block of a machine, with more lines in it."""
    return machine.ssh_config(alias) + "".join(f"  {line}\n" for line in lines)


def test_proxy_jump_of_the_ssh_config_is_followed(account: Path, embedded: Callable[..., Machine]) -> None:
    """``ProxyJump`` leads through other aliases, each with its own lines; ``jump=()`` goes directly."""
    one, two, three = embedded(), embedded(), embedded()
    configure(
        account,
        block(one, "one"),
        block(two, "two", "ProxyJump one"),
        block(three, "three", "ProxyJump two"),
    )
    with LocalForward("three", remote_port=9) as forward:
        assert forward.state == "ready"
    assert [machine.server.logins for machine in (one, two, three)] == [1, 1, 1]
    with LocalForward("three", remote_port=9, jump=()):
        pass
    assert [machine.server.logins for machine in (one, two, three)] == [1, 1, 2]
    with LocalForward("three", remote_port=9, jump="one"):
        pass
    assert [machine.server.logins for machine in (one, two, three)] == [2, 1, 3]


def test_proxy_jump_list_is_followed(account: Path, embedded: Callable[..., Machine]) -> None:
    """``ProxyJump a,b`` goes through a and then b, as with ssh."""
    one, two, three = embedded(), embedded(), embedded()
    configure(account, block(one, "one"), block(two, "two"), block(three, "three", "ProxyJump one,two"))
    events: list[Event] = []
    with LocalForward("three", remote_port=9, on_event=events.append):
        pass
    assert [event.host for event in events if isinstance(event, Connecting)] == ["one", "two", "three"]
    assert [event.via for event in events if isinstance(event, Connecting)] == ["", "one", "two"]


def test_address_means_another_machine_behind_each_jump(
    account: Path, embedded: Callable[..., Machine]
) -> None:
    """What has the address and port of its jump host is no circle, as with ssh: both may be "localhost"."""
    machine = embedded()
    lines = [block(machine, name, *jump) for name, jump in (("gate", ()), ("room", ("ProxyJump gate",)))]
    configure(account, *lines)
    with LocalForward("room", remote_port=9) as forward:
        assert forward.state == "ready"
    assert machine.server.logins == 2


def test_jump_wins_over_a_proxy_command(account: Path, embedded: Callable[..., Machine]) -> None:
    """ProxyCommand is not run where ``jump`` says how to get there, as with ``ssh -J``."""
    door, room = embedded(), embedded()
    configure(account, block(door, "door"), block(room, "room", "ProxyCommand false"))
    with pytest.raises(ConnectError, match="ProxyCommand"):
        LocalForward("room", remote_port=9).open()
    with LocalForward("room", remote_port=9, jump="door") as forward:
        assert forward.state == "ready"
    with LocalForward("room", remote_port=9, jump=()) as forward:
        assert forward.state == "ready"
    assert door.server.logins == 1


@pytest.mark.parametrize(
    "lines",
    [
        {"one": "ProxyJump two", "two": "ProxyJump one"},
        {"one": "ProxyJump one"},
        {"one": "ProxyJump two", "two": "ProxyJump three", "three": "ProxyJump two"},
    ],
)
def test_circle_is_a_config_error(account: Path, lines: dict[str, str]) -> None:
    """Jump hosts that lead to each other are told before anything is dialled."""
    text = "".join(f"Host {name}\n  HostName {name}.invalid\n  {line}\n" for name, line in lines.items())
    configure(account, text)
    events: list[Event] = []
    with pytest.raises(ConfigError, match="circle") as caught:
        LocalForward("one", "me", remote_port=9, on_event=events.append).open()
    assert caught.value.host == "one"
    assert events == []


def test_no_ssh_config_reads_none(account: Path, embedded: Callable[..., Machine]) -> None:
    """``ssh_config=None`` reads no file: an alias is only a name then."""
    machine = embedded()
    configure(account, block(machine, "room"))
    with LocalForward("room", remote_port=9):
        pass  # the control
    with pytest.raises(ResolveError):
        LocalForward("room.invalid", remote_port=9, ssh_config=None).open()
    configure(account, "Host *\n  Port 1\n  User nobody\n  ProxyJump no-such-host.invalid\n")
    with through(machine) as forward:  # its login says ssh_config=None
        assert forward.state == "ready"


def test_what_is_given_wins_over_the_ssh_config(account: Path, embedded: Callable[..., Machine]) -> None:
    """User and port that are given count before those of the config, as with ssh."""
    machine = embedded(None, user="given")
    configure(account, block(dataclasses.replace(machine, user="other", port=1), "room"))
    with pytest.raises(BokehSSHError):
        LocalForward("room", remote_port=9).open()
    with LocalForward("room", "given", port=machine.port, remote_port=9) as forward:
        assert forward.state == "ready"
    with LocalForward(f"given@room:{machine.port}", remote_port=9) as forward:
        assert forward.state == "ready"


def test_connection_is_one_for_everything(embedded: Callable[..., Machine]) -> None:
    """However many connections go through a forward, there is one login."""
    machine = embedded()
    with Listener(fakes.saying(b"hello")) as target, through(machine, remote_port=target.port) as forward:
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", forward.local_port), timeout=30) as sock:
                assert sock.recv(5) == b"hello"
        assert machine.server.logins == 1
        assert re.search(r"LocalForward \d+ -> ", repr(forward))


# From where: AddressFamily, BindAddress, BindInterface, ConnectionAttempts.


@contextmanager
def listening(address: str = "127.0.0.1") -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as server:
        server.settimeout(_SLACK)
        yield server


def config_of(tmp_path: Path, text: str) -> str:
    path = tmp_path / "ssh_config"
    path.write_text(text)
    return str(path)


@pytest.mark.skipif(sys.platform != "linux", reason="all of 127.0.0.0/8 is this machine's on Linux alone")
@pytest.mark.parametrize(
    ("line", "peer"),
    [("BindAddress 127.0.0.7", "127.0.0.7"), ("BindInterface lo", "127.0.0.1"), ("", "127.0.0.1")],
)
def test_dials_from_where_the_config_says(line: str, peer: str, tmp_path: Path, no_leaks: Any) -> None:
    """The server sees the address, or one of the interface, that the config has us dial from."""
    with no_leaks(), listening() as server:
        hop = find_hop(Host("127.0.0.1", ssh_config=config_of(tmp_path, line)))
        port = server.getsockname()[1]
        with dial("127.0.0.1", port, name="me", timeout=5, origin=hop.origin):
            connection, address = server.accept()
            connection.close()
    assert address[0] == peer


@pytest.mark.parametrize("line", ["BindAddress 192.0.2.1", "BindInterface none7", "BindAddress ::1"])
def test_address_that_cannot_be_dialled_from(line: str, tmp_path: Path, no_leaks: Any) -> None:
    """An address that this machine does not have, or of another family, is told with the lines to look at."""
    with no_leaks(), listening() as server:
        host = Host("127.0.0.1", port=server.getsockname()[1], ssh_config=config_of(tmp_path, line))
        with pytest.raises(ConnectError, match="cannot dial from") as caught:
            connect(host)
    assert "BindAddress" in str(caught.value.hint)


def test_address_family(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With AddressFamily only addresses of that family are asked for."""
    asked = []

    def getaddrinfo(host: str, port: int, family: int = 0, *_: object) -> list[Any]:
        asked.append(family)
        raise socket.gaierror(socket.EAI_NONAME, "none")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    for word in ("any", "inet", "inet6"):
        host = Host("both.example", ssh_config=config_of(tmp_path, f"AddressFamily {word}"))
        with pytest.raises(ResolveError) as caught:
            connect(host)
        assert ("AddressFamily" in str(caught.value)) == (word != "any")
    assert asked == [socket.AF_UNSPEC, socket.AF_INET, socket.AF_INET6]


def test_connection_attempts(tmp_path: Path, no_leaks: Any) -> None:
    """With ConnectionAttempts a server that comes up late is found; the last refusal is the error."""
    with listening() as server:
        port = server.getsockname()[1]
    host = Host("127.0.0.1", port=port, ssh_config=config_of(tmp_path, "ConnectionAttempts 3"))
    origin = find_hop(host).origin
    with no_leaks(), pytest.raises(RefusedError):
        dial("127.0.0.1", port, name="me", timeout=5, origin=dataclasses.replace(origin, attempts=2))
    began: list[socket.socket] = []
    late = threading.Timer(0.5, lambda: began.append(socket.create_server(("127.0.0.1", port))))
    late.start()
    dial("127.0.0.1", port, name="me", timeout=5, origin=origin).close()
    late.join()
    began[0].close()


@pytest.mark.parametrize("line", ["NoHostAuthenticationForLocalhost yes", ""])
def test_local_host_key_is_verified_all_the_same(
    line: str, embedded: Callable[..., Machine], tmp_path: Path, no_leaks: Any
) -> None:
    """NoHostAuthenticationForLocalhost is not followed, and the error for such a host names its line."""
    machine = embedded()
    path = config_of(tmp_path, line)
    login = {**machine.login, "known_hosts": str(tmp_path / "none"), "ssh_config": path}
    with no_leaks(), pytest.raises(UnknownHostKeyError) as caught:
        connect(Host("127.0.0.1", machine.user, **login))
    assert (f"NoHostAuthenticationForLocalhost is not followed ({path} line 1)" in str(caught.value)) == bool(
        line
    )
    with connect(Host("127.0.0.1", machine.user, **{**machine.login, "ssh_config": path})) as connection:
        assert connection.alive


@pytest.mark.skipif(os.name != "posix", reason="a signal of POSIX")
def test_interrupted_opener_leaves_the_socket_to_its_relay(
    embedded: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ctrl-C at the moment in which a channel opens ends the relay that it got, and nothing is said of it."""
    machine = embedded()
    caught = threading.Event()
    join = _RelayOnOpen.opened

    def opened(handler: _RelayOnOpen, channel: Channel) -> None:
        join(handler, channel)
        os.kill(os.getpid(), signal.SIGINT)
        assert caught.wait(10)

    monkeypatch.setattr(_RelayOnOpen, "opened", opened)
    with connected(machine) as connection:
        for _ in range(30):
            caught.clear()
            with pytest.raises(KeyboardInterrupt):
                connection.open_socket((machine.host, machine.port), timeout=10)
            caught.set()
        until(lambda: not connection.io_loop.open_relays)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
