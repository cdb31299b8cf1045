"""Logging in with a Kerberos ticket: against a real KDC and a real sshd."""

from __future__ import annotations

import getpass
import importlib.util
import itertools
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kerberos_realm
from beds import Machine, until
from bokeh_ssh import LocalForward
from bokeh_ssh._cli.doctor import Finding, examine
from bokeh_ssh._core.errors import AuthenticationError, KDCUnreachableError, UnknownHostKeyError
from bokeh_ssh._core.events import Event, Reconnected, Warned
from bokeh_ssh._core.host import Host
from bokeh_ssh._server.options import ServerOptions
from bokeh_ssh._ssh.auth import kerberos
from bokeh_ssh._ssh.connect import connect
from events import kinds
from kerberos_realm import Realm

USER = getpass.getuser()


@pytest.fixture(scope="module")
def realm() -> Iterator[Realm]:
    """A realm with this account, another person, and two keytabs: the server's, and another machine's."""
    with kerberos_realm.realm() as made:
        made.add(USER)
        made.add("joe")
        made.add("host/localhost", keytab=made.place / "keytab")
        made.add("host/other.example.test", keytab=made.place / "of another")
        made.kinit(USER, made.place / "tickets", "-f")
        made.kinit("joe", made.place / "joe's")
        yield made


#: The package is there only where somebody has built it.
BACKENDS = ["library", *(["package"] if importlib.util.find_spec("gssapi") else [])]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What speaks GSS-API: the system's library, and the ``gssapi`` package."""
    if request.param == "library":
        monkeypatch.setitem(sys.modules, "gssapi", None)
    return str(request.param)


@pytest.fixture
def ticket(realm: Realm, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The account's ticket: a copy, which a test may change."""
    monkeypatch.setenv("KRB5_CONFIG", str(realm.config))
    path = Path(os.environ["HOME"], "tickets")
    path.write_bytes((realm.place / "tickets").read_bytes())
    monkeypatch.setenv("KRB5CCNAME", f"FILE:{path}")
    return path


class Door:
    """An sshd that takes tickets, and keys, and what logs in to it.

    :ivar machine: with a key that may log in
    """

    def __init__(self, machine: Machine, folder: Path) -> None:
        self.machine = machine
        self._folder = folder

    def host(self, *lines: str, name: str = "localhost", key: bool = False, **keywords: Any) -> Host:
        config = self._folder / "ssh_config"
        keys = f"IdentityFile {self.machine.key_path if key else 'none'}"
        known = f"UserKnownHostsFile {self.machine.known_hosts}"
        config.write_text("\n".join([*lines, f"HostName {name}", f"Port {self.machine.port}", keys, known]))
        config.chmod(0o600)
        return Host("box", USER, ssh_config=config, **keywords)

    def methods(
        self, *lines: str, on_event: Callable[[Event], None] = lambda _: None, **keywords: Any
    ) -> Any:
        """Log in, and return by what."""
        with connect(self.host(*lines, **keywords), on_event=on_event) as connection:
            return connection.methods


@pytest.fixture
def door(
    realm: Realm, ticket: Path, sshd: Callable[..., Machine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Door]:
    """Make such servers: ``door(keytab="of another", MaxAuthTries="1")``."""

    def make(keytab: str = "keytab", **directives: str) -> Door:
        monkeypatch.setenv("KRB5_KTNAME", f"FILE:{realm.place / keytab}")
        usual = {"GSSAPIAuthentication": "yes", "GSSAPIStrictAcceptorCheck": "no"}
        return Door(sshd(**usual | directives), tmp_path)

    return make


ON = "GSSAPIAuthentication yes"


@pytest.mark.parametrize(
    ("lines", "keywords", "methods"),
    [
        ((ON,), {}, ("gssapi-with-mic",)),
        ((ON,), {"key": True}, ("gssapi-with-mic",)),
        ((ON, "BatchMode yes"), {}, ("gssapi-with-mic",)),
        ((ON, "PreferredAuthentications publickey,gssapi-with-mic"), {"key": True}, ("publickey",)),
        ((ON, f"GSSAPIClientIdentity {USER}"), {}, ("gssapi-with-mic",)),
        ((ON, "GSSAPIServerIdentity localhost"), {"name": "127.0.0.1"}, ("gssapi-with-mic",)),
        ((), {"key": True}, ("publickey",)),
        ((), {"key": True, "gss_auth": True}, ("gssapi-with-mic",)),
        ((), {"key": True, "gss_deleg_creds": True}, ("gssapi-with-mic",)),
        ((ON,), {"key": True, "gss_auth": False}, ("publickey",)),
        ((ON, "PreferredAuthentications publickey"), {"key": True, "gss_auth": True}, ("publickey",)),
    ],
)
def test_methods(
    lines: tuple[str, ...], keywords: dict[str, Any], methods: Any, door: Callable[..., Door]
) -> None:
    """The lines of the config and the keywords say whether the ticket is used, and when, as with ``ssh``."""
    assert door().methods(*lines, **keywords) == methods


def test_backends(backend: str, door: Callable[..., Door]) -> None:
    """Each of the two libraries logs in, delegates, and tells the ticket."""
    with connect(door().host(gss_deleg_creds=True)) as connection:
        assert connection.methods == ("gssapi-with-mic",)
        assert "FILE:" in said_by(connection, "echo $KRB5CCNAME")
    found = kerberos.find_ticket(timeout=10)
    assert found.principal == f"{USER}@EXAMPLE.TEST"
    assert 0 < found.seconds <= 86400


def said_by(connection: Any, command: str) -> str:
    said: list[bytes] = []
    session = connection.run(
        command, on_stdout=said.append, on_stderr=said.append, on_exit=lambda _: None, timeout=30
    )
    assert session.ended.wait(30)
    return b"".join(said).decode()


def test_with_a_key_as_well(door: Callable[..., Door]) -> None:
    """Where the server wants a ticket and a key, both are shown."""
    both = door(AuthenticationMethods="gssapi-with-mic,publickey")
    assert both.methods(ON, key=True) == ("gssapi-with-mic", "publickey")


def none(realm: Realm, ticket: Path) -> None:
    ticket.unlink()


def run_out(realm: Realm, ticket: Path) -> None:
    realm.kinit(USER, ticket, "-l", "1s")
    until(lambda: not _works())


def _works() -> bool:
    try:
        kerberos.begin_context("localhost", client=None, delegate=False, timeout=10)
    except kerberos.KerberosError:
        return False
    return True


def of_another(realm: Realm, ticket: Path) -> None:
    ticket.write_bytes((realm.place / "joe's").read_bytes())


def right(realm: Realm, ticket: Path) -> None:
    pass


def no_kdc(realm: Realm, ticket: Path) -> None:
    os.environ["KRB5_CONFIG"] = str(realm.write_config(1))


NOBODY = "GSSAPIServerIdentity nobody.example.test"
OTHER = "GSSAPIServerIdentity other.example.test"
WRONG: dict[str, tuple[Callable[..., None], str, dict[str, str], str]] = {
    "no ticket": (none, ON, {}, r"there is no ticket .*; run kinit, or"),
    "run out": (run_out, ON, {}, r"Kerberos: the ticket has run out; run kinit, or"),
    "another's": (right, f"{ON}\nGSSAPIClientIdentity eve", {}, r"there is no ticket .*eve@EXAMPLE.TEST"),
    "unknown name": (right, f"{ON}\n{NOBODY}", {}, r"knows no machine of the name nobody.*; check HostName"),
    "another machine": (right, f"{ON}\n{OTHER}", {}, r"refused the ticket for host/other.example.test: .+"),
    "no keytab": (right, ON, {"keytab": "none"}, r"the server has no key \(keytab\) for host/localhost"),
    "its own name": (right, ON, {"GSSAPIStrictAcceptorCheck": "yes"}, r"no key \(keytab\) for the name that"),
    "not that user": (of_another, ON, {}, rf"joe@EXAMPLE.TEST may not log in as {USER}"),
    "no KDC": (no_kdc, ON, {}, r"Cannot contact any KDC .*; check the network"),
    "no library": (right, ON, {}, r"there is no Kerberos library; install "),
    "turned off": (
        right,
        "GSSAPIAuthentication no",
        {},
        r"was not tried: GSSAPIAuthentication no \(.*line 1",
    ),
    "not turned on": (
        right,
        "",
        {},
        r"was not tried: GSSAPIAuthentication no; .* a Kerberos ticket \(kinit, gss",
    ),
}
#: Those that are found here, and cost no try.
LOCAL = ("no ticket", "run out", "another's", "unknown name", "no KDC", "no library")


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong(
    name: str, realm: Realm, ticket: Path, door: Callable[..., Door], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong is told apart, with the next step; what is found here costs no try of the server's."""
    if name == "no library":
        monkeypatch.setattr(kerberos, "_LIBRARIES", ())
        monkeypatch.setitem(sys.modules, "gssapi", None)
    arrange, lines, directives, text = WRONG[name]
    server = door(**{"MaxAuthTries": "1" if name in LOCAL else "6"} | directives)
    arrange(realm, ticket)
    with pytest.raises(AuthenticationError, match=text) as caught:
        server.methods(lines)
    assert isinstance(caught.value, KDCUnreachableError) == (name == "no KDC")
    if name in LOCAL:
        assert caught.value.tried == ()
        assert server.methods(lines, key=True) == ("publickey",)


@pytest.fixture
def silent_kdc() -> Iterator[int]:
    """A port of a KDC that takes what it is asked, and does not answer."""
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
    ):
        udp.bind(tcp.getsockname())
        yield tcp.getsockname()[1]


def test_silent_kdc(realm: Realm, door: Callable[..., Door], silent_kdc: int) -> None:
    """A KDC that does not answer holds a login up for no longer than the timeout; the next method follows."""
    server = door()
    os.environ["KRB5_CONFIG"] = str(realm.write_config(silent_kdc))
    began = time.monotonic()
    assert server.methods(ON, key=True, timeout=3) == ("publickey",)
    assert time.monotonic() - began < 25
    with pytest.raises(KDCUnreachableError, match=r"no KDC answered within 3 s; check the network"):
        server.methods(ON, timeout=3)


@pytest.mark.parametrize("asked", [False, True])
def test_delegation(asked: bool, door: Callable[..., Door]) -> None:
    """A ticket is delegated only when that is asked for."""
    line = f"GSSAPIDelegateCredentials {'yes' if asked else 'no'}"
    with connect(door().host(ON, line)) as connection:
        assert said_by(connection, "echo ${KRB5CCNAME:-none}").startswith("FILE:" if asked else "none")


def test_ticket_that_cannot_be_delegated(realm: Realm, ticket: Path, door: Callable[..., Door]) -> None:
    """A ticket that may not be forwarded logs in, and it is told that it was not delegated."""
    realm.kinit(USER, ticket, "-F")
    events: list[Event] = []
    assert door().methods(gss_deleg_creds=True, on_event=events.append) == ("gssapi-with-mic",)
    assert ["kinit -f" in event.text for event in events if isinstance(event, Warned)] == [True]


def test_key_exchange_is_told(door: Callable[..., Door], tmp_path: Path) -> None:
    """Where GSSAPIKeyExchange would have stood in for a host key, the error names the line."""
    (tmp_path / "nothing").touch()
    host = door().host(ON, "GSSAPIKeyExchange yes", known_hosts=tmp_path / "nothing")
    with pytest.raises(UnknownHostKeyError, match=r"GSSAPIKeyExchange is not followed \(.*line 2\)"):
        connect(host)


def test_doctor(realm: Realm, ticket: Path, door: Callable[..., Door]) -> None:
    """``bokeh-ssh doctor`` says what ticket there is; who has not asked for Kerberos hears nothing of it."""

    def found(*lines: str, **keywords: Any) -> Finding | None:
        host = door().host(*lines, **keywords)
        names = itertools.islice(examine(host, ServerOptions(), lambda _: None), 3)
        return next((each for each in names if each.check == "ticket"), None)

    good = found(ON)
    assert good is not None
    assert re.fullmatch(rf"a Kerberos ticket of {USER}@EXAMPLE.TEST is good for 2\d\.\d hours", good.text)
    assert found("GSSAPIAuthentication no") is None
    run_out(realm, ticket)
    assert found(ON) == Finding("ticket", "note", "the ticket has run out", "run kinit")
    ticket.unlink()
    missing = found(gss_auth=True)
    assert missing is not None
    assert missing.text.startswith("there is no ticket")


def cut(machine: Machine) -> None:
    """End all connections of an sshd."""
    subprocess.run(["pkill", "-P", str(machine.server.pid)], check=True)


@pytest.mark.parametrize("isolate", [False, True])
def test_reconnect(isolate: bool, realm: Realm, ticket: Path, door: Callable[..., Door]) -> None:
    """After a loss the ticket of that moment is used: a renewed one logs in; if there is none, it says so."""
    server, events = door(), []
    host = server.host(ON)
    with LocalForward(host, remote_port=1, isolate=isolate, on_event=events.append) as forward:
        ticket.unlink()
        realm.kinit(USER, ticket)
        cut(server.machine)
        until(lambda: Reconnected in kinds(events))
        ticket.unlink()
        cut(server.machine)
        with pytest.raises(AuthenticationError, match=r"there is no ticket .*; run kinit"):
            forward.wait(30)
