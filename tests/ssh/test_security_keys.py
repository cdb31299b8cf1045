"""Keys in a security key, from their files: logins to a real sshd with a device in software.

``security_keys/`` was made by OpenSSH 9.2's ssh-keygen with the device of OpenSSH's own tests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from auth_servers import SshAgent
from beds import Machine, until
from bokeh_ssh import (
    AuthenticationError,
    Host,
    LocalForward,
    PromptRequiredError,
    Reconnected,
    Reconnecting,
    SecurityKeyAbsentError,
    TouchRequested,
)
from bokeh_ssh._core.events import Event, Prompt, Question
from bokeh_ssh._ssh.auth.private_keys import inspect_key
from bokeh_ssh._ssh.connect import connect
from bokeh_ssh._ssh.crypto import security_key
from counting import cabled
from soft_token import SoftToken

FILES = Path(__file__).with_name("security_keys")
PASSPHRASE = "open sesame"
PIN = "1234"


@pytest.fixture
def machine(sshd: Callable[..., Any], tmp_path: Path) -> Machine:
    """A server that knows all of them, and wants the PIN for one."""
    lines = [FILES.joinpath(f"{name}.pub").read_text(encoding="ascii") for name in ("ed25519", "ecdsa")]
    lines.append("verify-required " + FILES.joinpath("verified.pub").read_text(encoding="ascii"))
    path = tmp_path / "authorized"
    path.write_text("".join(lines), encoding="ascii")
    made: Machine = sshd(AuthorizedKeysFile=str(path))
    return made


@pytest.fixture
def plug_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Plug devices in."""

    def plug(*devices: SoftToken) -> None:
        monkeypatch.setattr("fido2.hid.CtapHidDevice.list_devices", lambda: iter(devices))

    return plug


def host_for(machine: Machine, name: str, tmp_path: Path, **keywords: Any) -> Host:
    """The server, to be logged in to with that file."""
    path = tmp_path / f"id_{name}"
    shutil.copy(FILES / name, path)
    path.chmod(0o600)
    login = {"port": machine.port, "known_hosts": machine.known_hosts, "ssh_config": None}
    login |= {"allow_agent": False, "look_for_keys": False, "key_filename": path}
    return Host(machine.host, machine.user, **login | keywords)


def log_in(host: Host) -> list[Event]:
    """Log in; return what was told."""
    events: list[Event] = []
    connect(host, on_event=events.append).close()
    return events


def answers(*texts: str) -> tuple[Prompt, list[Question]]:
    """A person who answers so, and what was asked."""
    asked: list[Question] = []

    def prompt(question: Question) -> str:
        asked.append(question)
        return texts[len(asked) - 1]

    return prompt, asked


@pytest.mark.parametrize("name", ["ed25519", "ecdsa"])
def test_login_with_a_touch(
    machine: Machine, plug_in: Callable[..., None], tmp_path: Path, name: str
) -> None:
    """The device is asked once, after the server has taken the key, and the touch is announced."""
    device = SoftToken()
    plug_in(device)
    events = log_in(host_for(machine, name, tmp_path))
    touches = [event.key for event in events if isinstance(event, TouchRequested)]
    assert touches == [f"id_{name}"]
    assert (device.signed, device.closed) == (1, True)


def test_login_with_an_old_device(machine: Machine, plug_in: Callable[..., None], tmp_path: Path) -> None:
    """One that only speaks U2F is asked until it is touched."""
    touched = iter([False, False, True])
    device = SoftToken(u2f=True, touch=lambda: next(touched))
    plug_in(SoftToken(u2f=True, foreign=True), device)
    events = log_in(host_for(machine, "ecdsa", tmp_path))
    assert sum(isinstance(event, TouchRequested) for event in events) == 1
    assert device.signed == 1


def test_of_several_devices_the_right_one_signs(
    machine: Machine, plug_in: Callable[..., None], tmp_path: Path
) -> None:
    """Nobody has to touch a device that has not made the key."""
    other = SoftToken(foreign=True, touch=lambda: pytest.fail("it was to be touched"))
    plug_in(other, SoftToken(), SoftToken(foreign=True))
    log_in(host_for(machine, "ed25519", tmp_path))
    assert other.closed


def test_file_with_a_passphrase(machine: Machine, plug_in: Callable[..., None], tmp_path: Path) -> None:
    """The passphrase opens the file, as with every other key."""
    plug_in(SoftToken())
    log_in(host_for(machine, "locked", tmp_path, passphrase=PASSPHRASE))


def test_certificate_of_such_a_key(
    sshd: Callable[..., Machine], plug_in: Callable[..., None], tmp_path: Path
) -> None:
    """A certificate beside the file is offered too, and the device signs for it."""
    for command in (
        ["-t", "ed25519", "-N", "", "-f", "ca"],
        ["-s", "ca", "-I", "me", "-n", getpass.getuser(), "id_ed25519.pub"],
    ):
        shutil.copy(FILES / "ed25519.pub", tmp_path / "id_ed25519.pub")
        subprocess.run(["ssh-keygen", "-q", *command], cwd=tmp_path, check=True, timeout=60)
    machine = sshd(TrustedUserCAKeys=str(tmp_path / "ca.pub"), AuthorizedKeysFile="none")
    plug_in(SoftToken())
    events = log_in(host_for(machine, "ed25519", tmp_path))
    assert [event.key for event in events if isinstance(event, TouchRequested)] == ["id_ed25519"]


def test_pin_is_asked_for(machine: Machine, plug_in: Callable[..., None], tmp_path: Path) -> None:
    """A key made with verify-required wants the device's PIN, and after that a touch, as with ssh."""
    plug_in(SoftToken(pin=PIN))
    prompt, asked = answers("0000", PIN)
    host = host_for(machine, "verified", tmp_path, prompt=prompt)
    asked_before_touch = []

    def note(event: Event) -> None:
        if isinstance(event, TouchRequested):
            asked_before_touch.append(len(asked))

    connect(host, on_event=note).close()
    assert asked_before_touch == [2]
    assert [question.kind for question in asked] == ["passphrase"] * 2
    assert asked[0].text == f"Enter PIN for key '{tmp_path}/id_verified': "


@pytest.mark.parametrize(
    ("devices", "why"),
    [
        ((), "no security key is plugged in"),
        ((SoftToken(foreign=True),), "it was made with another security key"),
        (
            (SoftToken(foreign=True), SoftToken(foreign=True, u2f=True)),
            "it was made with another security key",
        ),
    ],
    ids=["none", "another", "two others"],
)
def test_no_device_of_that_key(
    machine: Machine, plug_in: Callable[..., None], tmp_path: Path, devices: tuple[SoftToken, ...], why: str
) -> None:
    """The error says what is wrong with the device, by the name of the file."""
    plug_in(*devices)
    with pytest.raises(SecurityKeyAbsentError, match=why) as raised:
        log_in(host_for(machine, "ecdsa", tmp_path))
    assert "id_ecdsa" in str(raised.value)


def test_no_touch_in_time(
    machine: Machine, plug_in: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever does not come is not waited for."""
    monkeypatch.setattr(security_key, "_PATIENCE", 0.2)
    plug_in(SoftToken(touch=lambda: False))
    with pytest.raises(SecurityKeyAbsentError, match="nobody touched the security key in time"):
        log_in(host_for(machine, "ed25519", tmp_path))


def test_pin_without_a_person(machine: Machine, plug_in: Callable[..., None], tmp_path: Path) -> None:
    """A PIN that nobody can be asked for is an error, as with a passphrase; so is a device without one."""
    plug_in(SoftToken(pin=PIN))
    with pytest.raises(PromptRequiredError, match="its PIN was not given"):
        log_in(host_for(machine, "verified", tmp_path))
    plug_in(SoftToken())
    with pytest.raises(AuthenticationError, match="the security key has none yet"):
        log_in(host_for(machine, "verified", tmp_path, prompt=answers(PIN)[0]))


def test_lost_connection_ends_the_wait(
    sshd: Callable[..., Machine], plug_in: Callable[..., None], tmp_path: Path
) -> None:
    """Nobody is asked to touch for a connection that the server has given up."""
    machine = sshd(AuthorizedKeysFile=str(FILES / "ed25519.pub"), LoginGraceTime="4")
    plug_in(SoftToken(touch=lambda: False))
    began = time.monotonic()
    with pytest.raises(SecurityKeyAbsentError, match="nobody touched the security key in time"):
        log_in(host_for(machine, "ed25519", tmp_path))
    assert time.monotonic() - began < security_key._PATIENCE / 2


def test_device_that_does_not_answer_as_it_should(
    machine: Machine, plug_in: Callable[..., None], tmp_path: Path
) -> None:
    """Whatever is wrong with it, the error is of the login, names the key, and leaves it closed."""
    for faults in ({"info": b"\x7f"}, {"info": b"\0"}, {"pins": ()}):
        device = SoftToken(pin=PIN, **faults)
        plug_in(device)
        with pytest.raises(AuthenticationError, match="id_verified was not used: the security key cannot be"):
            log_in(host_for(machine, "verified", tmp_path, prompt=answers(PIN)[0]))
        assert device.closed


def test_tunnel_asks_again_until_somebody_is_back(
    machine: Machine, plug_in: Callable[..., None], tmp_path: Path
) -> None:
    """After a loss with the device unplugged, the attempts go on; plugged in again, the forward is back."""
    events: list[Event] = []
    plug_in(SoftToken())
    host = host_for(machine, "ed25519", tmp_path)
    with cabled(machine, tmp_path) as (cable, there):
        host = dataclasses.replace(host, port=there.port, known_hosts=there.known_hosts)
        with LocalForward(
            host, remote_port=machine.port, local_port=0, isolate=False, on_event=events.append
        ):
            plug_in()
            cable.pull()
            absent = "no security key is plugged in"
            until(lambda: any(absent in e.reason for e in events if isinstance(e, Reconnecting)), what="told")
            plug_in(SoftToken())
            until(lambda: any(isinstance(e, Reconnected) for e in events), what="the forward is back")


def test_agent_takes_it(tmp_path: Path, machine: Machine, plug_in: Callable[..., None]) -> None:
    """With AddKeysToAgent the agent has it afterwards, and talks to the device by itself from then on."""
    config = tmp_path / "config"
    with contextlib.closing(SshAgent()) as agent:
        config.write_text(f"AddKeysToAgent yes\nIdentityAgent {agent.path}\n", encoding="ascii")
        plug_in(SoftToken())
        log_in(host_for(machine, "ed25519", tmp_path, ssh_config=config, allow_agent=True))
        until(lambda: agent.keys(), what="the agent has it")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can talk to devices, the key is left to the agent."""
    text = FILES.joinpath("ed25519").read_bytes()
    assert not inspect_key(text)[2]
    monkeypatch.setattr(security_key, "is_available", lambda: False)
    assert inspect_key(text)[2]
