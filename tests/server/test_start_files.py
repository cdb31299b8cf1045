"""What people have in their shells' start files, and what that does to a start: nothing, or it is blamed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

import apps
from beds import Machine
from bokeh_ssh import BokehSSHError, LaunchError, LaunchTimeoutError, SessionError
from bokeh_ssh._core.events import Event, Warned
from connections import there
from direct_tunnels import tunnel_to

if TYPE_CHECKING:
    from docker_bed import Container, Docker

#: A guard such as Debian's, and functions below it, which need variables that are not exported.
GUARDED = """
case $- in *i*) ;; *) return ;; esac
exec 2>/dev/null
cd /usr/lib
echo "a greeting"
TOOL_ROOT=/opt
declare -A PLACES=([tools]=tools)
workon() { export CHOSEN="$TOOL_ROOT/${PLACES[tools]}/$1"; }
alias viz='workon viz'
"""

#: Functions and aliases such as people have them in the place of commands.
OWN_COMMANDS = """
shopt -s expand_aliases
cd() { builtin cd "$@"; [ -f .env ] && . ./.env; }
python3() { echo no; }
test() { return 3; }
alias python='python3 -i' rm='rm -i' sh=zsh
exec 2>&-
"""

REPORT = """
import os
from bokeh.io import curdoc
curdoc().title = os.environ.get("CHOSEN", "") + os.getcwd()
"""


@pytest.fixture(scope="module")
def shared(docker_engine: Docker) -> Iterator[Container]:
    """The machine of all tests here; its account has an app in its home, which is kept as it is now."""
    with docker_engine.machine() as made:
        path = apps.put(made, "report.py", REPORT)
        made.execute(["sh", "-c", 'cp "$0" ~/report.py', path], user=made.user)
        made.execute(f"cp -a /home/{made.user} /home/as-it-was")
        yield made


@pytest.fixture
def machine(shared: Container) -> Iterator[Container]:
    """That machine, with the home and the login as they were before each test."""
    yield shared
    home = f"/home/{shared.user}"
    shared.set_shell("/bin/bash")
    shared.execute(f"find {home} -mindepth 1 -delete; cp -a /home/as-it-was/. {home}; chmod 666 /dev/null")


def write(machine: Machine, name: str, text: str) -> None:
    """Write a start file."""
    code = 'printf "%s" "$0" > ~/"$1"'
    done = machine.execute(["sh", "-c", code, text, name], user=machine.user)
    assert done.status == 0, done.stderr


def report(machine: Machine, app: str = "report.py", **keywords: Any) -> str:
    """Open the app; gives what it says."""
    with tunnel_to(machine, app, launch_timeout=120, **keywords) as tunnel:
        return apps.get(tunnel.url).partition("<title>")[2].partition("</title>")[0]


def failure(machine: Machine, kind: type[BokehSSHError], **keywords: Any) -> str:
    """Open it where that fails; gives the error's text."""
    keywords = {"launch_timeout": 60, **keywords}
    with pytest.raises(kind) as caught, tunnel_to(machine, "report.py", **keywords):
        pass
    return str(caught.value)


def test_start_files_that_change_nothing(machine: Container) -> None:
    """Paths are the home's though a start file goes elsewhere; failures, and what it writes, end nothing."""
    write(machine, ".bashrc", "cd /tmp; set -eu; yes a long line of nothing | head -c 3000000 || true\n")
    write(machine, ".bash_profile", "cd /tmp; CDPATH=/tmp; set -eu\n")
    assert report(machine) == "/home/alice"
    assert report(machine, "~/report.py", setup="false || cd /; export CHOSEN=in:", cwd="/usr") == "in:/usr"
    for name in (".bashrc", ".bash_profile"):
        write(machine, name, OWN_COMMANDS)
    assert report(machine) == "/home/alice"
    assert report(machine, "~/report.py", setup="export CHOSEN=in:", cwd="/usr") == "in:/usr"


def test_functions_of_interactive_shells(machine: Container) -> None:
    """What ~/.bashrc defines below its guard can be used in ``setup``; what nobody defines is told."""
    write(machine, ".bashrc", GUARDED)
    write(machine, ".bash_profile", ". ~/.bashrc\n")
    assert report(machine, "~/report.py", setup=["cd /tmp && workon viz"], cwd="/usr") == "/opt/tools/viz/usr"
    setup = ["cd /tmp", "viz", 'CHOSEN="$CHOSEN:$PWD"']
    assert report(machine, "~/report.py", setup=setup) == "/opt/tools/viz:/tmp/tmp"
    setup = "if [ -d /tmp ]; then cd /tmp; PURPOSE=test workon viz; fi"
    assert report(machine, "~/report.py", setup=setup) == "/opt/tools/viz/tmp"
    assert "source the file" in failure(machine, LaunchError, setup="no-such-tool activate viz")


@pytest.mark.parametrize(
    ("line", "kind", "says"),
    [
        ("exit", SessionError, "start file"),
        ("exit 1", SessionError, "start file"),
        ("exec tmux", SessionError, "start file"),  # which is not there
        ("exec </dev/null", LaunchError, "taken its input"),
        ("echo open terminal failed: not a terminal >&2; exit 1", SessionError, "start file"),
        ("echo Password change required but no TTY available. >&2; exit 1", SessionError, "terminal once"),
        ("echo User joe not allowed because /etc/nologin exists; exit 254", SessionError, "maintenance"),
        ("echo There were too many logins for alice.; exit 254", SessionError, "opens no session"),
        ("echo This account is currently not available.; exit 1", SessionError, "does not run commands"),
        ("exec fish", LaunchError, "runs another shell"),
        ("exec >/dev/null", LaunchError, "sends its output elsewhere"),
        ("read -p 'which environment? ' answer", LaunchError, "waits for input"),
    ],
)
def test_start_file_is_blamed(machine: Container, line: str, kind: type[BokehSSHError], says: str) -> None:
    """What keeps our command from being run is named at once, not after ``launch_timeout``."""
    write(machine, ".bashrc", f"{line}\n")
    began = time.monotonic()
    text = failure(machine, kind)
    assert time.monotonic() - began < 7
    assert says in text
    assert "within" not in text
    if "Password" in line:  # the list of servers says the same
        with pytest.raises(kind, match=says):
            there(machine)


def test_login_that_cannot_run_our_command(machine: Container) -> None:
    """A command of the login that takes ours apart, and a restricted shell, are named, and what to do."""
    keys = "/home/alice/.ssh/authorized_keys"
    for command in ("exec $SSH_ORIGINAL_COMMAND", "$SSH_ORIGINAL_COMMAND"):
        machine.execute(["sed", "-i", f's/^.*ssh-/command="{command}" ssh-/', keys])
        text = failure(machine, SessionError)
        assert "takes no quotes" in text
        assert 'exec sh -c "$SSH_ORIGINAL_COMMAND"' in text
    machine.execute(f"sed -i 's/^.*ssh-/ssh-/' {keys}; ln -s bash /bin/rbash")
    machine.set_shell("/bin/rbash")
    assert "a restricted one" in failure(machine, SessionError)


def test_missing_device_is_told(machine: Container) -> None:
    """Where /dev/null cannot be used, as in a bare ChrootDirectory, that is said, and nothing of Python."""
    machine.execute(["chmod", "600", "/dev/null"])
    text = failure(machine, SessionError)
    assert "cannot use /dev/null" in text
    assert "Python" not in text


@pytest.mark.parametrize("line", ["exit", "exit 1", "set -e; false", "exec fish"])
def test_start_file_of_setup_is_blamed(machine: Container, line: str) -> None:
    """So is one that only the login shell of ``setup`` reads."""
    write(machine, ".bash_profile", f"{line}\n")
    text = failure(machine, LaunchError, setup="true")
    assert "start file" in text
    assert ".bash_profile" in text


HANGS = [
    ("/bin/bash", ".bashrc", {}, "/home/alice/.bashrc: line 2"),
    ("/bin/bash", ".bash_profile", {"setup": "true"}, "/home/alice/.bash_profile: line 2"),
    ("/bin/bash", ".ssh/rc", {}, "~/.ssh/rc"),
]


@pytest.mark.parametrize(("shell", "file", "keywords", "says"), HANGS)
def test_file_that_holds_up_a_login_is_named(
    machine: Container, shell: str, file: str, keywords: dict[str, Any], says: str
) -> None:
    """What is slow, and perhaps without end, is named long before the time is up, and fails nothing."""
    machine.set_shell(shell)
    write(machine, file, ":\nsleep 1000\n")
    said: list[str] = []

    def note(event: Event) -> None:
        if isinstance(event, Warned):
            said.append(event.text)
            machine.execute("pkill sleep")

    assert report(machine, on_event=note, **keywords) == "/home/alice"
    assert says in said[0]
    assert says in failure(machine, LaunchTimeoutError, **{"launch_timeout": 10, **keywords})


@pytest.mark.parametrize("shell", ["/bin/tcsh", "/bin/zsh", "/usr/bin/fish"])
def test_slow_start_file_fails_nothing(machine: Container, shell: str) -> None:
    """A login that takes long, once, is waited for, also where another one does not take long."""
    machine.set_shell(shell)
    name = {"tcsh": ".tcshrc", "zsh": ".zshenv", "fish": ".config/fish/config.fish"}[shell.rpartition("/")[2]]
    machine.execute("mkdir -p ~/.config/fish", user=machine.user)
    write(machine, name, "sh -c 'mkdir ~/cache && sleep 8; true'\n")
    assert report(machine) == "/home/alice"


def test_bash_that_is_slow_once_fails_nothing(machine: Container) -> None:
    """So it is with bash, which would say where a program was ended."""
    write(machine, ".bashrc", "mkdir ~/cache && sleep 8\n")
    assert report(machine) == "/home/alice"


def test_step_of_setup_that_hangs_is_blamed(machine: Container) -> None:
    """It is named by its number, and Python is not called slow."""
    text = failure(machine, LaunchTimeoutError, setup=["true", "sleep 1000"], launch_timeout=5)
    assert "setup step 2 did not end" in text


def test_python_without_its_input_is_blamed(machine: Container) -> None:
    """A script in the place of Python that passes no input on is told what it has to do."""
    write(machine, "py", f'#!/bin/sh\nexec {machine.python} "$@" </dev/null\n')
    machine.execute("chmod 755 /home/alice/py")
    text = failure(machine, LaunchError, python="~/py")
    assert "found nothing to read" in text
    assert "pass on" in text
