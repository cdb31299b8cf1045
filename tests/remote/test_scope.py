"""What control groups do to a server: it ends with its login, or is killed for memory; both are found out."""

from __future__ import annotations

import getpass
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from beds import Machine, until
from bokeh_ssh import Event, Host, LaunchError, Warned
from bokeh_ssh._cli.doctor import examine
from bokeh_ssh._remote.control_group import MemoryGroup, doom
from bokeh_ssh._server.launch_spec import Launch
from bokeh_ssh._server.options import ServerOptions
from bokeh_ssh._server.server import Server
from bokeh_ssh._ssh.connect import connect
from local_runner import FAKE, alive
from processes import kill

SESSION = "0::/user.slice/user-1000.slice/session-3.scope\n"
OLD_SESSION = "9:name=systemd:/user.slice/user-1000.slice/session-c1.scope\n0::/\n"
ME = getpass.getuser()


@pytest.mark.parametrize(
    ("cgroup", "files", "doomed"),
    [
        (SESSION, {"etc/systemd/logind.conf": "[Login]\nKillUserProcesses=yes\n"}, True),
        (OLD_SESSION, {"etc/systemd/logind.conf": "KillUserProcesses = true"}, True),
        (SESSION, {"usr/lib/systemd/logind.conf": "#KillUserProcesses=yes\n"}, True),  # built in
        (SESSION, {"usr/lib/systemd/logind.conf.d/kill.conf": "KillUserProcesses=1"}, True),
        (SESSION, {}, False),
        (SESSION, {"etc/systemd/logind.conf": "#KillUserProcesses=no"}, False),
        (
            SESSION,
            {
                "etc/systemd/logind.conf": "KillUserProcesses=no",
                "usr/lib/systemd/logind.conf": "KillUserProcesses=yes",
            },
            False,
        ),
        (
            SESSION,
            {
                "etc/systemd/logind.conf": "KillUserProcesses=yes",
                "run/systemd/logind.conf.d/1.conf": "KillUserProcesses=no",
            },
            False,
        ),
        (SESSION, {"etc/systemd/logind.conf": f"KillUserProcesses=yes\nKillExcludeUsers=x {ME}"}, False),
        (
            SESSION,
            {
                "etc/systemd/logind.conf": f"KillUserProcesses=yes\nKillExcludeUsers={ME}",
                "etc/systemd/logind.conf.d/1.conf": "KillExcludeUsers=x",
            },
            False,
        ),
        (
            SESSION,
            {"etc/systemd/logind.conf": f"KillOnlyUsers=somebody {ME}"},
            True,
        ),  # whatever the other says
        (SESSION, {"etc/systemd/logind.conf": "KillUserProcesses=yes\nKillOnlyUsers=somebody"}, False),
        (SESSION, {"etc/systemd/logind.conf": f"KillUserProcesses=yes\nKillOnlyUsers=somebody {ME}"}, True),
        ("0::/system.slice/ssh.service\n", {"etc/systemd/logind.conf": "KillUserProcesses=yes"}, False),
        (
            "0::/user.slice/user-1000.slice/user@1000.service/app.slice/run-1.scope\n",
            {"etc/systemd/logind.conf": "KillUserProcesses=yes"},
            False,
        ),
        ("nonsense\n", {"etc/systemd/logind.conf": "KillUserProcesses=yes"}, False),
    ],
)
def test_what_logind_ends(tmp_path: Path, cgroup: str, files: dict[str, str], doomed: bool) -> None:
    """Read as logind reads it: its files in their order, its lists of users, what is built in."""
    spares_nobody = {} if ME != "root" else {"etc/systemd/logind.conf.d/0.conf": "KillExcludeUsers=nobody"}
    if any("KillExcludeUsers" in text for text in files.values()):
        spares_nobody = {}
    for name, text in {"proc/self/cgroup": cgroup, **spares_nobody, **files}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert bool(doom(str(tmp_path))) is doomed


def test_unit_of_one_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit that ends with its connection ends all in it, unless its KillMode says otherwise."""
    (tmp_path / "proc/self").mkdir(parents=True)
    unit = "sshd@7-10.0.0.1:22-10.0.0.2:999.service"
    (tmp_path / "proc/self/cgroup").write_text(f"0::/system.slice/system-sshd.slice/{unit}\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    for mode, doomed in (("control-group", True), ("mixed", True), ("process", False), ("", False)):
        program = tmp_path / "systemctl"
        program.write_text(f"#!/bin/sh\necho {mode}\n")
        program.chmod(0o755)
        assert bool(doom(str(tmp_path))) is doomed
    (tmp_path / "systemctl").unlink()
    assert doom(str(tmp_path)) == ""


def test_this_machine_spares_what_stays() -> None:
    """The control: where the tests run, nothing is said."""
    assert doom() == ""


def write_tree(top: Path, files: dict[str, str]) -> None:
    """Write files below a folder."""
    for name, text in files.items():
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


FIRST = {
    "proc/self/cgroup": "9:name=systemd:/\n4:hugetlb,memory:/slurm/job_7/step_batch\n0::/\n",
    "proc/self/mountinfo": "31 25 0:27 / /sys/fs/cgroup/cpu rw shared:9 - cgroup cgroup rw,cpu\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:10 - cgroup cgroup rw,memory\n",
}
SECOND = {
    "proc/self/cgroup": "0::/slurm/job_7/step_batch\n",
    "proc/self/mountinfo": "31 25 0:27 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n",
}
#: Only a part of the tree is seen, as in a container; what is mounted there last counts.
PART = {
    "proc/self/cgroup": "0::/node/slurm/job_7/step_batch\n",
    "proc/self/mountinfo": SECOND["proc/self/mountinfo"]
    + "32 31 0:27 /node /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
}


@pytest.mark.parametrize("named", [FIRST, SECOND, PART], ids=["first", "second", "part"])
def test_kills_for_memory_are_counted(tmp_path: Path, named: dict[str, str]) -> None:
    """The group's own count, and the least limit of those above it, in both versions of control groups."""
    first = named is FIRST
    top = "sys/fs/cgroup/memory/slurm" if first else "sys/fs/cgroup/slurm"
    events, limit = (
        ("memory.oom_control", "memory.limit_in_bytes") if first else ("memory.events", "memory.max")
    )
    write_tree(tmp_path, named)
    (tmp_path / top / "job_7/step_batch").mkdir(parents=True)
    group = MemoryGroup(str(tmp_path))
    assert (group.kills(), group.limit()) == (0, 0), "the control: files that cannot be read say nothing"
    counts = "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n" if first else "max 9\noom 3\noom_kill 2\n"
    none = "9223372036854771712\n" if first else "max\n"
    write_tree(
        tmp_path / top,
        {
            f"job_7/step_batch/{events}": counts,
            f"job_7/{events}": "oom_kill 5\n",
            f"job_7/step_batch/{limit}": none,
            f"job_7/{limit}": "314572800\n",
            limit: "4194304000\n",
        },
    )
    assert (group.kills(), group.limit()) == (2, 314572800)


@pytest.mark.parametrize("text", ["", "nonsense\n", "4:memory\n", "0::/gone\n"])
def test_unknown_control_groups_count_nothing(tmp_path: Path, text: str) -> None:
    """Where no group can be found, nothing is known of kills, and nothing fails."""
    write_tree(tmp_path, {**SECOND, "proc/self/cgroup": text})
    group = MemoryGroup(str(tmp_path))
    assert (group.kills(), group.limit()) == (0, 0)


_HIERARCHIES = [Path("/sys/fs/cgroup/systemd"), Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup")]


@pytest.fixture
def logind(tmp_path: Path, embedded: Callable[..., Machine]) -> Iterator[Machine]:
    """A machine whose logins are in a session's control group, and logind set to end those whole."""
    found = [path for path in _HIERARCHIES if (path / "cgroup.procs").exists() and os.access(path, os.W_OK)]
    if os.geteuid() != 0 or not found or not Path("/etc/systemd").is_dir():
        pytest.skip("control groups can be made by root only, where they can be written")
    top = found[0] / f"bokeh-ssh-test-{uuid.uuid4().hex[:8]}"
    group = top / "session-c1.scope"
    settings = tmp_path / "systemd"
    settings.mkdir()
    (settings / "logind.conf").write_text("[Login]\nKillUserProcesses=yes\nKillExcludeUsers=nobody\n")
    shell = tmp_path / "shell"
    shell.write_text(
        f"#!/bin/sh\necho $$ > {group}/cgroup.procs || exit\n"
        f"exec unshare --mount /bin/sh -c 'mount --bind {settings} /etc/systemd"
        ' && exec /bin/sh "$@"\' sh "$@"\n'
    )
    shell.chmod(0o755)

    def members() -> list[int]:
        return [int(pid) for pid in (group / "cgroup.procs").read_text().split()]

    def end() -> bool:
        kill(members())
        return not members()

    try:
        group.mkdir(parents=True)
        machine = embedded(shell=str(shell), env={"BOKEH_SSH_DIR": os.environ["BOKEH_SSH_DIR"]})
        yield machine
    finally:
        until(end, what="the control group to be empty")
        group.rmdir()
        top.rmdir()


def test_session_that_is_ended_whole_is_told(logind: Machine, mark: str) -> None:
    """At once, as a warning; ``keep`` refuses, and doctor says so; the server itself runs as ever."""
    events: list[Event] = []
    with connect(Host(logind.host, logind.user, **logind.login)) as connection:
        launch = Launch(command=FAKE, python=logind.python, env={"FAKE_MARK": mark})
        server = Server.start(connection, launch, on_event=events.append)
        [warned] = [event.text for event in events if isinstance(event, Warned)]
        assert "KillUserProcesses" in warned
        assert "loss" in warned
        with pytest.raises(LaunchError, match=r"cannot be left running.*KillUserProcesses"):
            server.keep()
        assert not server.detached
        assert alive(server.pid)
        assert server.stop()
    host = Host(logind.host, logind.user, **logind.login)
    found = {each.check: each for each in examine(host, ServerOptions(python=logind.python), print)}
    assert found["server"].verdict != "bad"
    assert found["after a loss"].verdict == "note"
    assert "KillUserProcesses" in found["after a loss"].text


def test_machine_that_spares_what_stays_is_well(here: Machine) -> None:
    """The control: doctor sees a server outlive its session; nothing is left of it."""
    host = Host(here.host, here.user, **here.login)
    found = {each.check: each for each in examine(host, ServerOptions(python=here.python), print)}
    assert found["after a loss"].verdict == "good"
    assert found["your servers"].text == "none runs there"
