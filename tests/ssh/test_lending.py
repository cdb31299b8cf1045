"""An SSH agent that is lent for one login: what it lets be done, what it does not, and for how long."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import apps
from auth_servers import SshAgent
from bokeh_ssh import AuthenticationError, BokehSSHError, GatewayTunnel, Host, ReverseForwarded, UsageError
from bokeh_ssh._ssh.agent_forwarding import is_login, lend_agent
from bokeh_ssh._ssh.auth.agent import Agent
from bokeh_ssh._ssh.connect import connect
from bokeh_ssh._ssh.messages import string as _string
from gateways import gateway_of, host_of

pytestmark = pytest.mark.skipif(os.name != "posix", reason="an agent on a Unix socket")


@pytest.fixture
def agent(tmp_path: Path, key: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A real ssh-agent here that has the key for all machines; gives its socket."""
    with closing(SshAgent(key.write(tmp_path / "lent"))) as made:
        monkeypatch.setenv("SSH_AUTH_SOCK", made.path)
        yield made.path


def keys_here() -> int:
    """Count the keys that the agent has."""
    listed = subprocess.run(["ssh-add", "-l"], capture_output=True, text=True, timeout=20, check=False)
    return listed.stdout.count("SHA256:")


def test_host_logs_in_to_the_gateway_with_a_lent_agent(bed: Any, agent: str) -> None:
    """A Bokeh host with no key for the gateway publishes by itself, with ours, and has it no longer after
    that; the control without the agent is relayed. No key is on the host at any time."""
    shape = bed("C", own_key=False)
    app = apps.put(shape.bokehhost, "sliders.py", apps.SLIDER)
    common: dict[str, Any] = {
        "app": app, "python": shape.bokehhost.python, "gateway_address": "gateway:22",
    }  # fmt: skip
    reasons: list[str] = []

    def note(event: Any) -> None:
        if isinstance(event, ReverseForwarded):
            reasons.append(event.reason)

    with GatewayTunnel(gateway_of(shape), host=host_of(shape), on_event=note, **common) as tunnel:
        assert tunnel.reverse == "relay"
    assert "forward_agent" in reasons[0]
    with GatewayTunnel(
        gateway_of(shape), host=host_of(shape), forward_agent=True, reverse="host", **common
    ) as tunnel:
        assert tunnel.reverse == "host"
        apps.drive(tunnel.url)
        [pid] = shape.bokehhost.pids("bokeh_ssh._tunnels.publisher_main")
        find = f"tr '\\0' '\\n' < /proc/{pid}/environ | sed -n 's/^SSH_AUTH_SOCK=//p'"
        path = str(shape.bokehhost.execute(find, user="alice"))
        assert path, "the host was offered an agent"
        asked = shape.bokehhost.execute(f"SSH_AUTH_SOCK={path} ssh-add -l", user="alice")
        assert asked.status != 0, f"the agent is still lent: {asked}"
    warned: list[str] = []
    with GatewayTunnel(
        gateway_of(shape),
        host=host_of(shape),
        forward_agent=True,
        detach=True,
        on_event=lambda event: warned.append(getattr(event, "text", "")),
        **common,
    ) as tunnel:
        assert (tunnel.reverse, tunnel.name) == ("host", None)  # it could not come back by itself
    assert any("not there for another login" in text for text in warned)
    shape.bokehhost.execute(["pkill", "-f", app])
    home = shape.bokehhost.execute("ls -A ~alice/.ssh")
    assert "id_" not in str(home)
    assert keys_here() == 1


def test_lent_agent_signs_that_login_alone(container: Callable[..., Any], agent: str) -> None:
    """Its keys can be listed and log in to the account that it is lent for; nothing else is signed, no key is
    removed or added, and no other account is logged in to. The control is ``ssh -A``, with which that side
    takes the keys away."""
    machine = container()
    said: list[bytes] = []
    there = " ".join(
        f"{name} 2>&1; echo {mark}=$?;"
        for mark, name in {
            "listed": "ssh-add -l",
            "removed": "ssh-add -D",
            "locked": "echo x | SSH_ASKPASS=/bin/true ssh-add -x",
            "signed": "ssh-add -L > k.pub; echo it | ssh-keygen -q -Y sign -n file -f k.pub",
            "alice": "ssh -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o BatchMode=yes "
            "-o IdentityFile=none alice@localhost true",
            "root": "ssh -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o BatchMode=yes "
            "-o IdentityFile=none root@localhost true",
        }.items()
    )
    with connect(Host(machine.host, machine.user, **machine.login)) as connection:
        with lend_agent(connection, Agent(agent), "alice"):
            session = connection.run(
                there, on_stdout=said.append, on_stderr=said.append, on_exit=lambda _: None, timeout=10,
                agent=True,
            )  # fmt: skip
            assert session.ended.wait(60)
        text = b"".join(said).decode()
        for mark, fine in {
            "listed": True, "removed": False, "locked": False, "signed": False, "alice": True, "root": False,
        }.items():  # fmt: skip
            assert (f"{mark}=0" in text) == fine, text
        said.clear()
        session = connection.run(
            "ssh-add -l; echo after=$?", on_stdout=said.append, on_stderr=said.append,
            on_exit=lambda _: None, timeout=10, agent=True,
        )  # fmt: skip
        assert session.ended.wait(30)
        assert b"after=0" not in b"".join(said)
        assert b"after=" in b"".join(said)
    assert keys_here() == 1
    plain = machine.ssh("-A", "ssh-add -D")  # the control: what stock ssh lends
    subprocess.run(plain, check=True, timeout=30, capture_output=True)
    assert keys_here() == 0


def test_questions_are_counted(container: Callable[..., Any], agent: str) -> None:
    """A machine that asks without end, and reads no answer, is hung up on; the connection goes on."""
    machine = container()
    said: list[bytes] = []
    code = (
        "import os, socket, struct\n"
        "sock = socket.socket(socket.AF_UNIX)\n"
        "sock.connect(os.environ['SSH_AUTH_SOCK'])\n"
        "try:\n"
        "    while True:\n"
        "        sock.sendall(struct.pack('>IB', 1, 11) * 100)\n"
        "except OSError:\n"
        "    print('hung up')\n"
    )
    with (
        connect(Host(machine.host, machine.user, **machine.login)) as connection,
        lend_agent(connection, Agent(agent), "alice"),
    ):
        session = connection.run(
            shlex.join([machine.python, "-c", code]),
            on_stdout=said.append,
            on_stderr=said.append,
            on_exit=lambda _: None,
            timeout=10,
            agent=True,
        )
        assert session.ended.wait(60)
        assert b"hung up" in b"".join(said)
        assert connection.ping(10)


def test_no_agent_to_lend_is_told(bed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no agent runs here, a host that was to have it is an error that says what to do."""
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    shape = bed("C", own_key=False)
    app = apps.put(shape.bokehhost, "sliders.py", apps.SLIDER)
    with pytest.raises(BokehSSHError, match="no SSH agent here") as caught:
        GatewayTunnel(
            gateway_of(shape),
            host=host_of(shape),
            app=app,
            python=shape.bokehhost.python,
            forward_agent=True,
            reverse="host",
        ).open()
    assert not isinstance(caught.value, AuthenticationError)
    assert "ssh-add" in caught.value.hint


@pytest.mark.parametrize("keywords", [{}, {"host": "node", "reverse": "relay"}])
def test_agent_for_nobody_is_refused(keywords: dict[str, Any]) -> None:
    """There has to be a host that logs in."""
    with pytest.raises(UsageError, match="forward_agent"):
        GatewayTunnel("gateway", "me", forward_agent=True, **keywords)


_LOGIN = (
    _string(b"id") + b"\x32" + _string(b"me") + _string(b"ssh-connection") + _string(b"publickey")
    + b"\x01" + _string(b"ssh-ed25519") + _string(b"blob")
)  # fmt: skip


@given(st.integers(0, len(_LOGIN) - 1), st.integers(0, 255))
def test_login_is_told_from_all_else(place: int, byte: int) -> None:
    """One byte that is another makes it no login of that account with that key, but for the id of the session
    and the name of the algorithm, which may be any; what is cut short is none."""
    assert is_login(_LOGIN, b"blob", b"me")
    changed = bytearray(_LOGIN)
    changed[place] = byte
    free = set(range(4, 6)) | set(range(_LOGIN.index(b"ssh-ed"), _LOGIN.index(b"ssh-ed") + 11))
    if byte != _LOGIN[place] and place not in free:
        assert not is_login(bytes(changed), b"blob", b"me")
    assert not is_login(_LOGIN[:place], b"blob", b"me")


@given(st.binary(max_size=200))
def test_anything_is_judged(data: bytes) -> None:
    """No bytes are too strange for it."""
    assert not is_login(data, b"blob", b"me")
