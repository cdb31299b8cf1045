"""In tmux, where people leave their terminals: what it looks like there, through a loss and to the end."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import apps
from beds import Machine, until
from programs import CLI, login
from skips import missing


class Tmux:
    """A server of its own with one pane of 100 columns, in which a command runs.

    :ivar text: what the pane shows now
    """

    def __init__(self, command: str) -> None:
        self._words = ["tmux", "-u", "-f", os.devnull, "-L", f"bokeh-ssh-{uuid.uuid4().hex[:8]}"]
        self._do("new-session", "-d", "-x", "100", "-y", "30", "-s", "it", command)

    def _do(self, *words: str) -> str:
        env = {**os.environ, "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"}
        done = subprocess.run(
            [*self._words, *words], env=env, capture_output=True, text=True, timeout=20, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    @property
    def text(self) -> str:
        return self._do("capture-pane", "-p", "-t", "it")

    def press(self, key: str) -> None:
        """Press a key, by tmux's name for it."""
        self._do("send-keys", "-t", "it", key)

    def expect(self, pattern: str) -> str:
        """Wait until the pane shows something; gives all that it shows."""
        until(lambda: re.search(pattern, self.text), timeout=60, what=f"{pattern} in the pane")
        return self.text

    def close(self) -> None:
        """End it with all that runs in it."""
        self._do("kill-server")


@pytest.fixture
def tmux() -> Iterator[Callable[[str], Tmux]]:
    """Make panes: ``tmux(command)``."""
    if shutil.which("tmux") is None:
        missing("tmux is not installed")
    made: list[Tmux] = []

    def make(command: str) -> Tmux:
        made.append(Tmux(command))
        return made[-1]

    yield make
    for pane in made:
        pane.close()


def test_tunnel_in_tmux(
    embedded: Callable[..., Machine], tmux: Callable[[str], Tmux], tmp_path: Path
) -> None:
    """Stages with their times, the address in a box, a loss and the way back as they come, and a farewell;
    what moved leaves nothing behind on the screen."""
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    machine = embedded(env={"PATH": path, "BOKEH_SSH_DIR": os.environ["BOKEH_SSH_DIR"]})
    app = tmp_path / "sliders.py"
    app.write_text(apps.SLIDER)
    words = [*CLI, "direct", machine.host, str(app), "--local-port", "0", *login(machine)]
    pane = tmux(f"{shlex.join(words)}; echo code=$?; cat")
    shown = pane.expect(r"Ctrl-C ends it\.")
    assert re.search(r"✓ Logged in to \S+ as \S+ \(publickey\) +\d\.\d s", shown)
    assert re.search(r"✓ Ready  \d+\.\d s, \d+\.\d s in all", shown)
    box = re.search(r"╭─+╮\n│  (http://localhost:\d+/sliders)  │\n╰─+╯", shown)
    assert box, shown
    apps.drive(box[1])
    machine.server.drop_connections()
    shown = pane.expect(r"✓ Reconnected")
    assert "! Lost 127.0.0.1: " in shown
    apps.drive(box[1])
    pane.press("C-c")
    shown = pane.expect(r"code=\d")
    assert "code=0" in shown
    assert "the server has ended" in shown
    lines = [line for line in shown.splitlines() if line.strip()]
    assert not [line for line in lines if re.search("[⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏]", line)], shown
