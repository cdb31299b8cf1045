"""Completion in real shells: commands, flags, and the aliases of the ssh config."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bokeh_ssh._cli.completion import complete_host, find_aliases

CONFIG = """\
Include extra/*.conf
Include "extra/missing"
Host node17 node18 *.cluster !node19
  HostName 10.0.0.1
Match user me
Host=spare
Host "unclosed
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with an ssh config, and with bokeh-ssh on the PATH."""
    ssh = tmp_path / ".ssh"
    (ssh / "extra").mkdir(parents=True)
    (ssh / "config").write_text(CONFIG)
    (ssh / "extra" / "a.conf").write_text("Host gate\nInclude ~/.ssh/config\n")
    program = tmp_path / "bin" / "bokeh-ssh"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m bokeh_ssh "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    return tmp_path


def test_aliases_are_found(home: Path) -> None:
    """Names that are no patterns are found, in included files too, each once; the rest is skipped."""
    assert find_aliases() == ["node17", "node18", "spare", "gate"]
    assert complete_host("node") == ["node17", "node18"]
    assert complete_host("me@g") == ["me@gate"]
    (home / ".ssh" / "config").unlink()
    assert find_aliases() == []


BASH = """\
eval "$(bokeh-ssh --show-completion bash)"
COMP_WORDS=({words}) COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_bokeh_ssh_completion bokeh-ssh
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
FISH = """\
bokeh-ssh --show-completion fish | source
complete -C '{words}'
"""
ZSH = """\
_arguments() {{ :; }}; compdef() {{ :; }}; _describe() {{ :; }}
eval "$(bokeh-ssh --show-completion zsh)"
words=({words}) CURRENT=${{#words}}
env _TYPER_COMPLETE_ARGS="$words" _BOKEH_SSH_COMPLETE=complete_zsh bokeh-ssh
"""


@pytest.mark.parametrize(("shell", "program"), [("bash", BASH), ("fish", FISH), ("zsh", ZSH)])
@pytest.mark.parametrize(
    ("words", "found", "not_found"),
    [
        ("bokeh-ssh di", "direct", "gateway"),
        ("bokeh-ssh direct --host-k", "--host-keys", "--known-hosts"),
        ("bokeh-ssh direct node", "node18", "spare"),
        ("bokeh-ssh gateway gate --host sp", "spare", "node17"),
        ("bokeh-ssh ls me@ga", "me@gate", "spare"),
    ],
)
def test_shells_complete(
    home: Path, shell: str, program: str, words: str, found: str, not_found: str
) -> None:
    """Commands, flags and hosts are completed in bash, fish and zsh."""
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} here")
    script = program.format(words=words)
    done = subprocess.run([shell, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert found in done.stdout, done
    assert not_found not in done.stdout
    assert "Traceback" not in done.stderr


def test_a_shell_can_be_named(home: Path) -> None:
    """A shell's name after the option counts, not the current shell; an unknown one is an error."""
    from typer.testing import CliRunner

    from bokeh_ssh._cli.app import app

    for words, code, said in (
        (["--show-completion", "fish"], 0, "complete --command"),
        (["--show-completion=zsh"], 0, "compdef"),
        (["--install-completion", "fish"], 0, str(home / ".config" / "fish")),
        (["--show-completion", "nosuch"], 1, "nosuch not supported"),
    ):
        done = CliRunner().invoke(app, words, prog_name="bokeh-ssh")
        assert (done.exit_code, said in done.output) == (code, True), done.output


def test_servers_of_open_tunnels_are_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    """After ``attach HOST`` and ``stop HOST`` what open tunnels lead to is completed, without a login."""
    from typer.main import get_command

    from bokeh_ssh._cli.app import app
    from bokeh_ssh._cli.tunnels import registry
    from bokeh_ssh._cli.tunnels.registry import HeldTunnel

    held = [
        HeldTunnel(1, host="node17", apps=("a/dashboard.py", "map.py"), job="4711"),
        HeldTunnel(2, "", "other", ("data",)),
    ]
    monkeypatch.setattr(registry, "find_tunnels", lambda: held)
    for command, parameter, typed, begun, found in (
        ("stop", "name", "me@node17:22", "d", ["dashboard"]),
        ("stop", "name", "node17", "", ["dashboard", "map", "4711"]),
        ("stop", "name", "", "", []),
        ("attach", "name", "node17", "", ["dashboard", "map"]),
        ("attach", "job", "node17", "47", ["4711"]),
        ("direct", "job", "other", "", []),
    ):
        parsed = get_command(app).commands[command]  # type: ignore[attr-defined]  # it is a group
        name = next(each for each in parsed.params if each.name == parameter)
        context = parsed.make_context(command, [typed] if typed else [], resilient_parsing=True)
        assert [each.value for each in name.shell_complete(context, begun)] == found
