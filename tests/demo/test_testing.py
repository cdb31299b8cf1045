"""``bokeh_ssh.testing``, as a tool of somebody else's uses it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

#: The tests of a tool that knows nothing of ours but the public names.
_THEIRS = '''
import sys
import pytest
from bokeh_ssh import AuthenticationError, DirectTunnel, Host, LocalForward, Question
from bokeh_ssh import testing

APP = """
from bokeh.io import curdoc
from bokeh.models import Div
curdoc().add_root(Div(text='hello', name='it'))
"""


def test_app_through_a_tunnel(ssh_machine):
    (ssh_machine.home / "app.py").write_text(APP)
    with DirectTunnel(ssh_machine.host, app="app.py", python=sys.executable) as tunnel:
        with tunnel.pull_session() as session:
            assert session.document.select_one({"name": "it"}).text == "hello"
        assert ssh_machine.server.connections == 1


def test_machines_share_nothing(ssh_machine):
    assert list(ssh_machine.home.iterdir()) == []


def test_line_that_goes_down(ssh_machine):
    with LocalForward(ssh_machine.host, remote_port=ssh_machine.server.port, reconnect=False) as forward:
        ssh_machine.server.drop_connections()
        with pytest.raises(Exception, match="reset|ended|closed|lost"):
            forward.wait(20)


def test_second_factor():
    rounds = (testing.Challenge({"Code: ": "123456"}),)
    with testing.machine(challenges=rounds, require=("publickey", "keyboard-interactive")) as machine:
        asked = []

        def prompt(question: Question) -> str:
            asked.append(question.text)
            return "123456"

        import dataclasses
        host = dataclasses.replace(machine.host, prompt=prompt)
        with LocalForward(host, remote_port=machine.server.port):
            assert asked == ["Code: "]
        with pytest.raises(AuthenticationError):
            LocalForward(machine.host, remote_port=machine.server.port).open()
'''


def test_tool_tests_without_sshd(tmp_path: Path) -> None:
    """With one line in its conftest, a tool has a machine to log in to in each test, or makes one."""
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["bokeh_ssh.testing"]\n', encoding="utf-8")
    (tmp_path / "test_theirs.py").write_text(_THEIRS, encoding="utf-8")
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(tmp_path)]
    root = os.fspath(Path(__file__).resolve().parents[2])
    env = {**os.environ, "PYTHONPATH": root, "HOME": str(tmp_path / "nobody")}
    done = subprocess.run(
        words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100, check=False
    )
    assert "4 passed" in done.stdout, done.stdout + done.stderr
    assert not (tmp_path / "nobody").exists()


def test_library_does_not_need_pytest() -> None:
    """The package and the demo run where pytest is not installed; the fixture's module says what it needs."""
    code = "import sys; sys.modules['pytest'] = None; import bokeh_ssh._demo.demo, bokeh_ssh"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    words = [sys.executable, "-c", f"{code}.testing"]
    done = subprocess.run(words, timeout=60, capture_output=True, text=True, check=False)
    assert "pytest" in done.stderr.splitlines()[-1]
