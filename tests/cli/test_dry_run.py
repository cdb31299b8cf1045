"""``--dry-run``: the commands of ``ssh`` that do the same, and that nothing is reached."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from beds import Machine, free_port, until
from bokeh_ssh._cli.tunnels.dry_run import plan
from programs import login, run_here

pytestmark = pytest.mark.skipif(os.name != "posix", reason="ssh of POSIX")


def printed(*words: str) -> list[str]:
    """Give the commands that it prints."""
    return run_here(*words, "--dry-run").stdout.splitlines()


@pytest.mark.skipif(shutil.which("ssh") is None, reason="there is no ssh here")
def test_printed_command_does_the_same(embedded: Callable[..., Machine]) -> None:
    """What ``forward --dry-run`` prints is run with the real ``ssh``, and forwards as the flags say."""
    machine, port = embedded(), free_port()
    ports = ("--local-port", str(port), "--remote-port", str(machine.port))
    [line] = printed("forward", machine.host, *ports, *login(machine))
    with subprocess.Popen(shlex.split(line), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as ssh:
        try:

            def greeting() -> bytes:
                try:
                    with socket.create_connection(("localhost", port), timeout=5) as sock:
                        return sock.recv(4)
                except OSError:
                    return b""

            until(lambda: greeting() == b"SSH-")
        finally:
            ssh.terminate()


def test_nothing_is_reached_and_no_value_is_shown(tmp_path: Path) -> None:
    """A machine that is listened at gets no connection; a variable's value is not printed, and nor is a
    tunnel left; what cannot work is an error as ever."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        words = ("me@127.0.0.1", "app.py", "-p", str(server.getsockname()[1]), "--env", "TOKEN=s3cret")
        lines = printed("direct", *words, "--setup", "conda activate viz", "-f")
        with pytest.raises(BlockingIOError):
            server.accept()
    assert "conda activate viz && TOKEN=... bokeh serve app.py --port 5006" in "\n".join(lines)
    assert "s3cret" not in "\n".join(lines)
    assert "-L 8888:localhost:8888" in printed("forward", "h", "--remote-port", "8888")[0]
    run_here("direct", "h", "no-such-app.py", "--upload", "--local-port", "70000", "--dry-run", code=2)


@pytest.mark.parametrize(
    ("command", "keywords", "lines"),
    [
        ("direct", {"local_port": 7000, "jump": ("a", "b")}, ["ssh -J a,b -N -L 7000:localhost:5006 h"]),
        (
            "gateway",
            {"host": "n1", "app": ("x.py",)},
            [
                "ssh -J h n1 'bokeh serve x.py --port 5006'",
                "ssh -N -R 5006:localhost:5006 h",
                "ssh -N -L 5006:localhost:5006 h",
            ],
        ),
        (
            "publish",
            {"app": ("x.py",), "remote_port": 5008},
            ["bokeh serve x.py --port 5006 &", "ssh -N -R 5008:localhost:5006 h"],
        ),
        (
            "direct",
            {
                "app": ("/here/x.py",),
                "upload": True,
                "port": 22,
                "command": "streamlit run --server.port={port}",
            },
            [
                "scp -P 22 -r /here/x.py h:",
                "ssh -p 22 h 'streamlit run --server.port=5006 x.py'",
                "ssh -p 22 -N -L 5006:localhost:5006 h",
            ],
        ),
        (
            "direct",
            {"app": ("~/a b.py",), "cwd": "~/x y", "python": "~/v/bin/python", "local_port": 7000},
            [
                "ssh h 'cd ~/'\"'\"'x y'\"'\"' && ~/v/bin/python -m bokeh serve ~/'\"'\"'a b.py'\"'\"'"
                " --port 5006 --allow-websocket-origin localhost:7000'",
                "ssh -N -L 7000:localhost:5006 h",
            ],
        ),
        (
            "direct",
            {"command": "python app.py", "env": {"PORT": "{port}", "KEY": "secret"}, "local_port": 7000},
            ["ssh h 'PORT=5006 KEY=... python app.py'", "ssh -N -L 7000:localhost:5006 h"],
        ),
        (
            "direct",
            {"command": "jupyter lab --ServerApp.sock={socket}"},
            ["ssh h 'jupyter lab --ServerApp.sock=SOCKET'", "ssh -N -L 5006:SOCKET h"],
        ),
    ],
)
def test_plans(command: str, keywords: dict[str, object], lines: list[str]) -> None:
    """Each command has its recipe; what ssh cannot do is in comments."""
    assert [line for line in plan(command, "h", keywords) if not line.startswith("#")] == lines


def test_plan_of_what_stays_says_so() -> None:
    """A server that is left running is not told to end, nor its files to be removed."""
    stays = plan("direct", "h", {"app": ("x.py",), "upload": True, "detach": True})
    assert "with the tunnel" not in stays[2]
    assert "removed with the server" in stays[0]
    assert "left running at the end" in stays[2]


@pytest.mark.parametrize(
    ("keywords", "begins"),
    [
        (
            {"command": "panel serve"},
            ["# attach to the server on port 5006 there; only if none", "# started"],
        ),
        ({"command": "panel serve", "launch": True}, ["# started"]),
        ({"command": "panel serve a.py"}, ["# started"]),
        ({"command": "jupyter lab --port={port}"}, ["# started"]),
        ({"command": "panel serve", "launch": False}, ["# attach to the server on port 5006 there; none is"]),
        ({"server": "dash"}, ["# bokeh-ssh ls h shows"]),
    ],
)
def test_plan_says_whether_a_server_is_looked_for_first(
    keywords: dict[str, object], begins: list[str]
) -> None:
    """Without an app, a server that answers is used: the plan says so, else it starts one."""
    lines = plan("direct", "h", keywords)
    for line, begin in zip(lines, begins, strict=False):
        assert line.startswith(begin)
    runs = any("panel" in line or "jupyter" in line for line in lines if not line.startswith("#"))
    assert runs == (begins == ["# started"])
