"""``isolate=True``: the SSH side in a child process, with the same interface."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import paramiko
import pytest

import apps
import conformance
import light_bokeh
from beds import PASSWORD, Knobs, Machine, until
from bokeh_ssh import (
    Connecting,
    ConnectionLostError,
    DirectTunnel,
    Event,
    GatewayTunnel,
    Host,
    HostKeyVerified,
    LocalForward,
    PortInUseError,
    Question,
    RefusedError,
    RemoteForward,
    UsageError,
)
from bokeh_ssh._tunnels import child_protocol
from processes import children, proc
from targets import target_on


@pytest.mark.every_python
def test_tunnels_are_isolated_unless_told_otherwise_and_forwards_are_not(machine: Machine) -> None:
    """The default is a child process for the two tunnels and none for the two forwards."""
    app = apps.put(machine, "sliders.py", apps.SLIDER)
    with DirectTunnel(machine.host, machine.user, app, python=machine.python, **machine.login) as tunnel:
        [child] = children()
        assert not [t for t in threading.enumerate() if "io loop" in t.name]
        apps.drive(tunnel.url)
        until(lambda: any("Starting Bokeh server" in line for line in tunnel.log), what="its lines")
    until(lambda: child not in children(), what="the child to end")
    assert any("Starting Bokeh server" in line for line in tunnel.log)
    with LocalForward(machine.host, machine.user, remote_port=1, **machine.login):
        assert not children()


@pytest.mark.parametrize(
    "name",
    [
        "echo",
        "download",
        "upload_half_close",
        "both_full",
        pytest.param("many", marks=pytest.mark.every_python),
    ],
)
def test_isolated_forwards_conform(machine: Machine, name: str) -> None:
    """A forward in a child keeps the promises of the suite."""
    with (
        target_on(machine) as port,
        LocalForward(
            machine.host,
            machine.user,
            remote_port=port,
            remote_host="127.0.0.1",
            isolate=True,
            **machine.login,
        ) as forward,
    ):
        assert children()
        conformance.CHECKS[name](("127.0.0.1", forward.local_port))


@pytest.mark.every_python
def test_class_of_the_programs_own_is_isolated_too(machine: Machine) -> None:
    """A class that a program derives from ours opens in a child process, which does not know that class."""

    class Mine(LocalForward):
        pass

    with target_on(machine) as port:
        words = {"remote_port": port, "remote_host": "127.0.0.1", **machine.login}
        with Mine(machine.host, machine.user, isolate=True, **words) as forward:
            assert children()
            conformance.CHECKS["echo"](("127.0.0.1", forward.local_port))


def test_remote_port_is_told(machine: Machine) -> None:
    """The real port of a remote forward in a child is known here."""
    with RemoteForward(machine.host, machine.user, remote_port=0, isolate=True, **machine.login) as forward:
        assert forward.remote_port in {port for _, port in machine.listening()}


def test_gateway_tunnel_tells_who_dialled(shape_c: Any) -> None:
    """What only the child found out, such as ``reverse``, is known here."""
    bed = shape_c
    app = apps.put(bed.bokehhost, "sliders.py", apps.SLIDER)
    host = Host(bed.bokehhost.inside, bed.bokehhost.user, **{**bed.bokehhost.login, "port": 22})
    with GatewayTunnel(
        Host(bed.gateway.host, bed.gateway.user, **bed.gateway.login),
        host=host,
        app=app,
        python=bed.bokehhost.python,
        reverse="relay",
    ) as tunnel:
        assert children()
        assert tunnel.reverse == "relay"
        apps.drive(tunnel.url)


@pytest.mark.every_python
def test_errors_come_out_as_they_are(machine: Machine, no_leaks: Any) -> None:
    """An error in the child is raised here with its type, its data and where it came from."""
    with no_leaks():
        with conformance.listen() as taken:
            port = taken.getsockname()[1]
            forward = LocalForward(
                machine.host, machine.user, remote_port=1, local_port=port, isolate=True, **machine.login
            )
            with pytest.raises(PortInUseError) as caught:
                forward.open()
        assert (caught.value.port, caught.value.side) == (port, "local")
        assert "local_forward.py" in str(caught.value.__cause__)
        login = {**machine.login, "port": port}
        with pytest.raises(RefusedError):
            LocalForward(machine.host, machine.user, remote_port=1, isolate=True, **login).open()
    assert not children()


@pytest.mark.every_python
def test_prompts_are_asked_here_on_the_callers_thread(embedded: Callable[..., Machine]) -> None:
    """A question from the child is asked in this process, by the thread that opens."""
    machine = embedded(Knobs(password=True, require=("password",)))
    asked: list[tuple[Question, threading.Thread]] = []

    def prompt(question: Question) -> str:
        asked.append((question, threading.current_thread()))
        return PASSWORD

    events: list[Event] = []
    login = {**machine.login, "prompt": prompt}
    with LocalForward(
        machine.host, machine.user, remote_port=1, isolate=True, on_event=events.append, **login
    ):
        pass
    [(question, thread)] = asked
    assert question.kind == "password"
    assert thread is threading.current_thread()
    assert [type(event) for event in events][:2] == [Connecting, HostKeyVerified]


@pytest.mark.parametrize("kind", [paramiko.Ed25519Key, paramiko.RSAKey, paramiko.ECDSAKey])
def test_ready_key_stays_here_and_signs_for_the_child(
    sshd: Callable[..., Machine], tmp_path: Path, kind: Any
) -> None:
    """A ``pkey`` works from the child, of every kind; its private half never goes there."""
    path = tmp_path / "key"
    names = {paramiko.Ed25519Key: "ed25519", paramiko.RSAKey: "rsa", paramiko.ECDSAKey: "ecdsa"}
    subprocess.run(["ssh-keygen", "-q", "-t", names[kind], "-N", "", "-f", str(path)], check=True)
    machine = sshd(AuthorizedKeysFile=f"{path}.pub")
    key = kind.from_private_key_file(str(path))
    login = {**machine.login, "key_filename": None, "pkey": key}
    with LocalForward(machine.host, machine.user, remote_port=1, isolate=True, **login) as forward:
        assert forward.state == "ready"


def test_secrets_are_nowhere_to_be_seen(embedded: Callable[..., Machine]) -> None:
    """The password is in no argument and no environment of the child."""
    machine = embedded(Knobs(password=True, require=("password",)))
    with LocalForward(
        machine.host, machine.user, remote_port=1, isolate=True, **{**machine.login, "password": PASSWORD}
    ):
        [child] = children()
        for name in ("cmdline", "environ"):
            assert PASSWORD.encode() not in proc(f"{child}/{name}").read_bytes()


def test_question_before_the_child_knows_what_to_open(
    embedded: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks for the status at any moment, as a notebook's widget does on a thread of its own, does not
    get between the child and what it is to open."""
    machine = embedded()
    forward = LocalForward(machine.host, machine.user, remote_port=1, isolate=True, **machine.login)
    pack, asked = child_protocol.Marshaller.pack, []

    def ask(*args: Any) -> Any:
        asked.append(forward.status())
        return pack(*args)

    monkeypatch.setattr(child_protocol.Marshaller, "pack", ask)
    with forward:
        assert asked
        assert forward.status().hops


@pytest.mark.every_python
def test_child_that_dies_is_noticed(machine: Machine) -> None:
    """When the child is killed, the state and ``wait`` tell."""
    with LocalForward(machine.host, machine.user, remote_port=1, isolate=True, **machine.login) as forward:
        [child] = children()
        os.kill(child, signal.SIGKILL)
        with pytest.raises(ConnectionLostError):
            forward.wait(20)
        assert forward.state == "failed"
    assert forward.state == "closed"


_PROGRAM = """
import sys
from bokeh_ssh import DirectTunnel
# no __main__ guard, and a main module that must not be run twice
print("imported", flush=True)
tunnel = DirectTunnel(sys.argv[1], sys.argv[2], sys.argv[5], port=int(sys.argv[3]), key_filename=sys.argv[4],
                      known_hosts=sys.argv[6], ssh_config=None, python=sys.argv[7], grace=3).open()
try:
    print(tunnel.url, flush=True)
    tunnel.wait()
except KeyboardInterrupt:  # it came before the wait began
    tunnel.close()
print(tunnel.state, flush=True)
"""


def run_program(machine: Machine, app: str, tmp_path: Path) -> subprocess.Popen[str]:
    """Start a script that opens an isolated tunnel, in a session of its own."""
    script = tmp_path / "program.py"
    script.write_text(_PROGRAM, encoding="utf-8")
    words = [machine.host, machine.user, str(machine.port), str(machine.key_path), app]
    return subprocess.Popen(
        [sys.executable, str(script), *words, str(machine.known_hosts), machine.python],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_kill_minus_9_of_the_parent_ends_everything_at_once(
    light: Callable[..., Machine], tmp_path: Path
) -> None:
    """Parent gone = child closes everything: the remote server ends long before any grace is over."""
    machine = light()
    app = apps.put(machine, "app.py", light_bokeh.APP)
    with run_program(machine, app, tmp_path) as program:
        assert program.stdout
        assert program.stdout.readline() == "imported\n"
        assert "http" in program.stdout.readline()
        assert machine.pids(app)
        program.kill()
        until(lambda: not machine.pids(f"{app}") or not [p for p in machine.pids(app) if p != program.pid],
              timeout=20, what="the remote server to end")  # fmt: skip


@pytest.mark.every_python
def test_ctrl_c_is_the_parents_alone(light: Callable[..., Machine], tmp_path: Path) -> None:
    """Ctrl-C goes to the whole group and ends the wait cleanly; the child is told, not hit."""
    machine = light()
    app = apps.put(machine, "app.py", light_bokeh.APP)
    with run_program(machine, app, tmp_path) as program:
        assert program.stdout
        assert program.stdout.readline() == "imported\n"
        assert "http" in program.stdout.readline()
        os.killpg(program.pid, signal.SIGINT)
        assert program.stdout.readline() == "closed\n"
        assert program.wait(20) == 0
    until(lambda: not machine.pids(app), what="the remote server to end")


@pytest.mark.every_python
def test_log_records_come_back(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    """What the child logs is logged here, by the logger of the same name."""
    with caplog.at_level(logging.DEBUG, logger="bokeh_ssh"):
        with LocalForward(machine.host, machine.user, remote_port=1, isolate=True, **machine.login):
            pass
        assert any(record.process != os.getpid() for record in caplog.records)


@pytest.mark.every_python
def test_a_fork_does_not_keep_the_child_alive(machine: Machine, no_leaks: Any) -> None:
    """A forked copy of this program has no part in the tunnel: the child ends when the parent says so."""
    with no_leaks():
        forward = LocalForward(
            machine.host, machine.user, remote_port=1, isolate=True, **machine.login
        ).open()
        ear, mouth = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(mouth)
            os.read(ear, 1)
            os._exit(0)
        os.close(ear)
        try:
            forward.close()
            assert not children()
        finally:
            os.close(mouth)
            os.waitpid(pid, 0)


@pytest.mark.parametrize("isolate", [True, False])
def test_answer_that_is_no_text_is_told(isolate: bool, embedded: Callable[..., Machine]) -> None:
    """Whatever a prompt gives, nobody waits for what the other process cannot read."""
    machine = embedded(Knobs(password=True))

    class Secret:
        def __repr__(self) -> str:
            return "canary"

    def prompt(question: Question) -> Any:
        return Secret()

    login = machine.login | {"key_filename": None, "prompt": prompt}
    with pytest.raises(UsageError, match="answered with a Secret") as caught:
        DirectTunnel(machine.host, machine.user, launch=True, isolate=isolate, **login).open()
    assert "canary" not in str(caught.value)
