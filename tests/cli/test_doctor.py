"""``bokeh-ssh doctor``: what works is told, and what does not is told with what to do about it."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from beds import Key, Machine, free_port
from doctor import CHECKS, examine
from programs import ESCAPES, OnTerminal, login, run_here

pytestmark = pytest.mark.skipif(os.name != "posix", reason="programs and terminals of POSIX")


@pytest.fixture
def machine(kind: str, embedded: Callable[..., Machine], request: pytest.FixtureRequest) -> Machine:
    """Each kind of machine, with servers of this test's own: others run at the same time."""
    if kind == "docker":
        shared: Machine = request.getfixturevalue("_shared")("machine")
        return shared
    return embedded(env={"BOKEH_SSH_DIR": os.environ["BOKEH_SSH_DIR"]})


def test_machine_that_is_well(machine: Machine) -> None:
    """Each check passes, and says what it saw; no server is left there."""
    found = examine(machine)
    assert list(found) == CHECKS
    may_be_noted = ("this machine", "round trip", "server")  # a busy machine answers late
    assert [row for check, row in found.items() if check not in may_be_noted and row[0] != "good"] == []
    assert found["server"][0] in ("good", "note")  # a note where Bokeh here is another
    assert "private socket" in found["server"][1]
    assert machine.user in found["login"][1]
    assert "SHA256:" in found["host key"][1]
    assert found["your servers"][1] == "none runs there"
    assert examine(machine)["your servers"][1] == "none runs there"


def test_what_is_forbidden_is_told(machine_with: Callable[..., Machine]) -> None:
    """Forwarding that is off stops a tunnel; sockets and listening that are off do not."""
    machine = machine_with(local_forward=False, remote_forward=False, streamlocal=False, sftp=False)
    found = examine(machine, code=1)
    assert found["forwarding"][0] == "bad"
    assert "AllowTcpForwarding" in found["forwarding"][2]
    assert found["sockets"][0] == "note"
    assert "AllowStreamLocalForwarding" in found["sockets"][2]
    assert found["as a gateway"][0] == "note"
    assert found["files"][0] == "note"
    assert "no SFTP" in found["files"][1]
    assert "Subsystem" in found["files"][2]
    assert found["server"][0] in ("good", "note")
    assert "on port" in found["server"][1]


def test_server_that_does_not_start_is_told(machine: Machine) -> None:
    """An interpreter that is not there, and a setup line that fails, are bad, with the reason."""
    found = examine(machine, "--python", "/no/such/python", code=1)
    assert found["server"][0] == "bad"
    assert "/no/such/python" in found["server"][1]
    assert "--python" in found["server"][2]
    found = examine(machine, "--setup", "conda activate nowhere", code=1)
    assert found["server"][0] == "bad"
    assert "setup step 1" in found["server"][1]


@pytest.mark.parametrize(
    ("check", "text"), [("port", "refuse"), ("host key", "no known_hosts file has"), ("login", "publickey")]
)
def test_way_that_ends_early_is_told(machine: Machine, tmp_path: Path, check: str, text: str) -> None:
    """What fails on the way is the last that is told, by the name of its stage, with a next step."""
    words = {
        "port": ["--port", str(free_port())],
        "host key": ["--known-hosts", os.devnull],
        "login": ["-i", str(Key.generate().write(tmp_path / "other"))],
    }[check]
    if check == "login":
        machine = dataclasses.replace(machine, key_path=Path(words[1]))
    found = examine(machine, *words, code=1)
    assert list(found)[-1] == check, found
    verdict, said, hint = found[check]
    assert verdict == "bad"
    assert text in said.lower()
    assert hint


def test_on_a_terminal_and_as_json(embedded: Callable[..., Machine]) -> None:
    """A person sees marks, and each check as it comes; a program reads objects."""
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    machine = embedded(env={"PATH": path, "BOKEH_SSH_DIR": os.environ["BOKEH_SSH_DIR"]})
    words = ["doctor", machine.host, "--python", sys.executable, *login(machine)]
    with OnTerminal(*words) as program:
        assert program.end(timeout=60) == 0, program
    shown = ESCAPES.sub("", program.stdout)
    assert "\u2713 your servers: none runs there" in shown
    for check in CHECKS:
        assert f"{check}: " in shown
    told = [json.loads(line) for line in run_here(*words, "--json").stdout.splitlines()]
    assert [each["check"] for each in told] == CHECKS
    assert {each["event"] for each in told} == {"finding"}


def test_way_of_its_own_is_told(embedded: Callable[..., Machine], tmp_path: Path) -> None:
    """A program that makes the connection is named, and what it says where it fails."""
    machine = embedded()
    config = tmp_path / "config"
    command = "/bin/sh -c 'echo no way >&2; exit 3'"
    config.write_text(machine.ssh_config("it") + f"  ProxyCommand {command}\n  ProxyJmp gate\n")
    shown = run_here("doctor", "it", "-F", str(config), code=1).stdout
    assert "user " + machine.user + ", by its ProxyCommand" in shown
    assert "did you mean ProxyJump?" in shown  # what keeps it from being opened may be misspelt
    assert "bad\tport\t" in shown
    assert "status 3: no way" in shown


def test_name_that_means_nothing(tmp_path: Path) -> None:
    """A config that cannot be followed is told as what it is."""
    config = tmp_path / "config"
    config.write_text("Host it\n  ProxyCommand nc %h %p\n  ProxyUseFdpass yes\n")
    shown = run_here("doctor", "it", "-F", str(config), code=1).stdout
    assert "bad\tname\t" in shown
    assert "ProxyUseFdpass" in shown
