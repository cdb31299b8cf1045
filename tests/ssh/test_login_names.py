"""Login names: what ssh takes, wherever it is written, and how the server gets it."""

from __future__ import annotations

import contextlib
import random
import shutil
import subprocess
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from auth_servers import Bed, Rules
from beds import Machine
from bokeh_ssh import LocalForward
from bokeh_ssh._core.errors import AuthenticationError, ConfigError, UsageError
from bokeh_ssh._core.host import Host, check_user, format_target, parse_target
from bokeh_ssh._ssh.config.lookup import load
from bokeh_ssh._ssh.connect import connect
from skips import missing

NAMES = [
    *("DOM\\joe", "joe doe", "joe$", "joe@dom", "DOM\\joe doe", "$joe", "joe%h", "joe%", "jo:e", "jo/e"),
    *(
        "joe~",
        "joe*",
        "joe!",
        "#joe",
        "joe=",
        "joe+x",
        "jöe",
        "@joe",
        "joe@",
        "x\\y\\z",
        "joe[x]",
        "JOE.Doe-1",
    ),
]
BAD = [
    *("", "-joe", "joe -x", "joe\\", "joe'x", 'joe"x', "joe;x", "joe`x", "joe|x", "joe&x", "joe<x", "joe>x"),
    *("joe(x", "joe)x", "joe{x", "joe}x", "joe\tx", "joe\nx", "joe\x7f", "joe\x01", "$(id)", "joe${HOME}"),
]


def ssh_g(*words: str) -> dict[str, str] | None:
    """Ask ``ssh -G``; None where it refuses."""
    if not shutil.which("ssh"):
        missing("there is no ssh here")
    done = subprocess.run(["ssh", "-G", "-F", "none", *words], capture_output=True, timeout=20, check=False)
    if done.returncode:
        return None
    lines = done.stdout.decode("utf-8", "surrogateescape").splitlines()
    return dict(line.partition(" ")[::2] for line in reversed(lines))


def is_refused_anew(name: str) -> bool:
    """Whether the ssh here is a later one, which takes no such name but in its config."""
    return bool(set(name) & set("\\$")) and ssh_g("-l", "DOM\\joe", "--", "host") is None


def as_uri(name: str) -> str:
    """Write a name as a web address has it."""
    return urllib.parse.quote(name, safe="")


def taken(text: str) -> tuple[str | None, str] | None:
    """What we make of a target: user and host; None where we refuse it."""
    try:
        target = parse_target(text)
    except UsageError:
        return None
    return target.user, target.host


def taken_by_ssh(text: str) -> tuple[str | None, str] | None:
    """What ssh makes of it."""
    said = ssh_g("--", text)
    return said and (said["user"], said["hostname"])


@pytest.mark.parametrize("name", [*NAMES, *BAD])
def test_same_as_ssh(name: str) -> None:
    """A name is taken where ``ssh -l`` takes it, and as the same name in ``user@host`` and ``ssh://``."""
    said = ssh_g("-l", name, "--", "host")
    if name in NAMES and is_refused_anew(name):
        assert said is None
        assert Host("host", name).target.user == name
        assert taken(f"{name}@host") == (name, "host")
        return
    if said is None or not name:
        for make in (
            lambda: check_user(name),
            lambda: Host("host", name),
            lambda: parse_target(f"{name}@host"),
        ):
            with pytest.raises(UsageError) as caught:
                make()
            assert str(caught.value).isprintable()
    else:
        assert Host("host", name).target.user == said["user"] == name
    if name and not name[0].isspace():
        assert taken(f"{name}@host") == taken_by_ssh(f"{name}@host")
        assert taken(f"ssh://{as_uri(name)}@host") == taken_by_ssh(f"ssh://{as_uri(name)}@host")
        assert taken(f"ssh://{as_uri(name)}@host:22/") == taken_by_ssh(f"ssh://{as_uri(name)}@host:22/")


@pytest.mark.parametrize(
    "text",
    [
        *("ssh://joe@dom@host", "ssh://joe%4@host", "ssh://joe%00@host", "ssh://joe%zz@host", "ssh://@host"),
        *("ssh://joe+doe@host", "ssh://joe;fingerprint=x@host", "ssh://;x@host", "ssh://%2Djoe@host"),
        *("ssh://joe%3Bx@host", "ssh://joe%0a@host", "ssh://host", "ssh://host/path", "ssh://joe@host/"),
        *("ssh://j%C3%B6e@host", "ssh://joe%2Fx@host", "ssh://joe%3Ax@host:22", "ssh://%40@host"),
    ],
)
def test_addresses(text: str) -> None:
    """An ``ssh://`` address is taken apart as ssh does it."""
    ours, theirs = taken(text), taken_by_ssh(text)
    assert (ours and ours[1]) == (theirs and theirs[1])
    assert ours is None or theirs is None or ours[0] in (None, theirs[0])


def test_any_name() -> None:
    """Of random names we take what ssh takes, in each of the places."""
    chance = random.Random(5)
    for _ in range(150):
        name = "".join(chance.choices("joe\\ $@%+-~.*'\";&|é#", k=chance.randint(1, 6))).strip() or "x"
        if is_refused_anew(name):
            continue
        for text in (f"{name}@host", f"ssh://{as_uri(name)}@host", f"ssh://{name.replace('%', '')}@host"):
            assert taken(text) == taken_by_ssh(text) or "@" not in text, text


@pytest.mark.parametrize("name", NAMES)
def test_written_and_read_again(name: str) -> None:
    """A target that is written out is read as the same one."""
    for text in (f"{name}@host", f"{name}@[::1]:22", f"{name}@host:2222", f"ssh://{as_uri(name)}@host:1"):
        target = parse_target(text)
        assert target.user == name
        assert parse_target(format_target(target)) == target


# How the server gets it.


@pytest.fixture
def bed() -> Iterator[Bed]:
    """A server that lets anybody in with a password."""
    with contextlib.closing(Bed(lambda: Rules(("password",)))) as server:
        yield server


@pytest.mark.parametrize("name", NAMES)
def test_server_gets_the_name(bed: Bed, tmp_path: Path, name: str) -> None:
    """It is the name that logs in, however it was given: by itself, with the host, or in the ssh config."""
    quoted = name.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    (tmp_path / "config").write_text(f'Host alias\n  HostName 127.0.0.1\n  User "{quoted}"\n')
    login = {"password": "right", "known_hosts": tmp_path / "known", "host_keys": "accept-new"}
    hosts = [
        Host("127.0.0.1", name, port=bed.port, ssh_config=None, **login),
        Host(f"{name}@127.0.0.1:{bed.port}", ssh_config=None, **login),
        Host(f"ssh://{as_uri(name)}@127.0.0.1:{bed.port}", ssh_config=None, **login),
        Host("alias", port=bed.port, ssh_config=tmp_path / "config", **login),
    ]
    for host in hosts:
        connection = connect(host)
        assert bed.seen[-1].user == name
        connection.close()
    assert len(bed.seen) == len(hosts)


def test_password_in_the_address_is_not_shown(bed: Bed, tmp_path: Path) -> None:
    """``joe:secret@host`` logs in as that, as with ssh; no text or event shows what follows the colon."""
    shown: list[object] = []
    login = {"known_hosts": tmp_path / "known", "host_keys": "accept-new", "ssh_config": None}
    for text in (f"joe:hunter2@127.0.0.1:{bed.port}", f"ssh://joe:hunter2@127.0.0.1:{bed.port}"):
        host = Host(text, jump=(), **login)
        shown += [host, Host("h", "joe:hunter2", jump=[text]), Host("h", jump=f"{text},g")]
        with pytest.raises(AuthenticationError, match=r"joe:\*\*\* .*and no password") as caught:
            connect(host)
        shown.append(caught.value)
        connect(Host(text, password="right", **login), on_event=shown.append).close()
        assert bed.seen[-1].user == "joe:hunter2"
    for bad in ("joe:hunter2@h:x", "joe:hunter2@[h", "joe:hunter2;@h", "ssh://joe:hunter2%@h"):
        with pytest.raises(UsageError) as caught:
            Host(bad)
        shown.append(caught.value)
    (tmp_path / "config").write_text("ProxyJump joe:hunter2@gate:x\n")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "config", "h")
    texts = [f"{each} {each!r}" for each in (*shown, caught.value)]
    assert sum("joe:***" in text for text in texts) == 15
    assert "hunter2" not in "".join(texts)


@pytest.mark.parametrize("name", ["DOM\\joe", "joe doe", "joe$", "joe@dom", "$HOME", "joe*"])
def test_jump_host_gets_the_name(embedded: Callable[..., Machine], account: Path, name: str) -> None:
    """So does a machine on the way, with ``jump`` and with ProxyJump and ``ssh -W`` of the ssh config."""
    gate, far = embedded(user=name), embedded(user=f"{name}.far")
    known = account / ".ssh" / "known_hosts"
    known.write_text("".join(Path(machine.known_hosts).read_text() for machine in (gate, far)))
    where = f"127.0.0.1:{gate.port}"
    uri = f"ssh://{as_uri(name)}@{where}"
    jumps = [f"ProxyJump {uri}\n"]
    if " " not in name:
        jumps.append(f"ProxyJump {name}@{where}\n")
    if not set(name) & set("$*"):  # else it is for a shell, and ssh is run
        jumps.append(f"ProxyCommand ssh -W %h:%p -p {gate.port} '{name}@127.0.0.1'\n")
    config = account / ".ssh" / "config"
    keys = {"key_filename": gate.key_path, "look_for_keys": False, "allow_agent": False}
    logins = gate.server.logins

    def check(**way: object) -> None:
        nonlocal logins
        with LocalForward(f"{name}.far@127.0.0.1", port=far.port, remote_port=9, **keys, **way) as forward:
            assert forward.state == "ready"
        logins += 1
        assert gate.server.logins == logins

    gate_login = f"Host 127.0.0.1\n  IdentityFile {gate.key_path}\n"
    config.write_text(gate_login)
    check(jump=f"{name}@{where}")
    check(jump=uri)
    check(jump=Host("127.0.0.1", name, port=gate.port, key_filename=gate.key_path))
    for line in jumps:
        match = f"Match originalhost 127.0.0.1 user {name.replace(' ', '?')}.far"
        config.write_text(f"{match}\n {line}{gate_login}")
        check()


@pytest.mark.parametrize(
    "line",
    [
        *("DOM\\joe@gate", "joe$@gate", "joe@dom@gate", "ssh://joe%40dom@gate", "ssh://DOM%5cjoe@gate:99/"),
        *("b,ssh://joe%40dom@gate", "ssh://joe;x=y@gate", "ssh://joe+doe@gate", "joe%h@gate", "ssh://gate"),
    ],
)
def test_proxy_jump_same_as_ssh(tmp_path: Path, line: str) -> None:
    """A ProxyJump line is read as ``ssh -G`` reads it, but that %h is put in."""
    config = tmp_path / "config"
    config.write_text(f"ProxyJump {line}\n")
    said = ssh_g("-F", str(config), "--", "host")
    assert said is not None
    assert ",".join(load(config, "host").proxy_jump or ()) == said["proxyjump"].replace("%h", "host")


@pytest.mark.parametrize(
    "line", ["ssh://joe%4@gate", "ssh://joe%00@gate", "ssh://@gate", "ssh://joe@dom@gate"]
)
def test_bad_proxy_jump(tmp_path: Path, line: str) -> None:
    """What ssh refuses in an address is a ConfigError that names the line."""
    config = tmp_path / "config"
    config.write_text(f"\nProxyJump {line}\n")
    assert ssh_g("-F", str(config), "--", "host") is None
    with pytest.raises(ConfigError, match="line 2: ProxyJump"):
        load(config, "host")
