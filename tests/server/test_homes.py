"""Accounts whose home or /tmp is missing, full, or may not be used: a server starts all the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import apps
import light_bokeh
from bokeh_ssh import LaunchError, UploadError
from direct_tunnels import tunnel_to
from docker_bed import Container

REPORT = "import os\nfrom bokeh.io import curdoc\ncurdoc().title = os.getcwd()\n"
FILL = "dd if=/dev/zero of={0}/fill bs=1k 2>/dev/null; chown alice {0}/fill"
SMALL = "size=64k,mode=1777"

#: What is done to a machine, file systems of its own that it has, where apps start, and what cannot be done
#: there: bringing files, leaving a server.
STATES: dict[str, tuple[str, dict[str, str], str, str, str]] = {
    "home is missing, /tmp is of others": (
        "mv /home/alice /srv; chmod 755 /tmp",
        {},
        "/",
        "",
        "BOKEH_SSH_DIR",
    ),
    "home is read-only, /tmp runs nothing": (
        "chown -R root:root /home/alice",
        {"/tmp": "noexec,nosuid,nodev,mode=1777"},
        "/home/alice",
        "",
        "",
    ),
    "/tmp has room for a part of what is needed, and the home for nothing": (
        "chown -R root:root /home/alice",
        {"/tmp": "nr_inodes=4,mode=1777"},
        "/home/alice",
        "",
        "No space left on device",
    ),
    "both are full": (
        f"{FILL.format('/home/alice')}; {FILL.format('/tmp')}",
        {"/home/alice": SMALL, "/tmp": SMALL},
        "/home/alice",
        "in /tmp/bokeh-ssh",
        "",
    ),
}


@pytest.mark.parametrize("state", STATES)
def test_state_of_home_and_tmp(state: str, container: Callable[..., Container], tmp_path: Path) -> None:
    """An app starts; its files are brought, and a server is left, wherever there is any room for them; where
    there is none, the error names the place."""
    prepare, tmpfs, place, upload, leave = STATES[state]
    keys = {"AuthorizedKeysFile": "/etc/ssh/keys", "StrictModes": "no"}
    machine = container(directives=keys, tmpfs=tmpfs)
    machine.execute(["sh", "-c", 'printf %s "$0" > /srv/report.py; chmod 644 /srv/report.py', REPORT])
    machine.execute(f"cp /root/.ssh/authorized_keys /etc/ssh/keys; chmod 644 /etc/ssh/keys; {prepare}; true")
    (tmp_path / "report.py").write_text(REPORT)
    brought = tunnel_to(machine, str(tmp_path / "report.py"), upload=True, setup="true")
    left = tunnel_to(machine, "/srv/report.py", detach=True)
    for tunnel, kind, says in ((brought, UploadError, upload), (left, LaunchError, leave)):
        if says:
            with pytest.raises(kind, match=says):
                tunnel.open()
        else:
            with tunnel:
                assert f"<title>{place}</title>" in apps.get(tunnel.url) or tunnel is brought


#: What is wrong with one of them, and the file system of its own that it has.
HOMES = {
    "is its own": ("true", ""),
    "is missing": ("mv /home/alice /srv", ""),
    "is read-only": ("chown -R root:root /home/alice", ""),
    "is full": (FILL.format("/home/alice"), SMALL),
    "is of an account of another machine": ("chown -R 4711:4711 /home/alice; chmod 700 /home/alice", ""),
}
TEMPS = {
    "runs nothing": ("true", "noexec,nosuid,nodev,mode=1777"),
    "is full": (FILL.format("/tmp"), SMALL),
    "is private to others": ("chmod 700 /tmp", ""),
    "is missing": ("mv /tmp /srv/tmp", ""),
}


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("temp", TEMPS)
def test_server_starts_whatever_home_and_tmp_are_like(
    home: str, temp: str, container: Callable[..., Container]
) -> None:
    """Each of the twenty states keeps nobody from a server that answers."""
    parts = {"/home/alice": HOMES[home], "/tmp": TEMPS[temp]}
    keys = {"AuthorizedKeysFile": "/etc/ssh/keys", "StrictModes": "no"}
    mounts = {place: mount for place, (_, mount) in parts.items() if mount}
    machine = container(directives=keys, tmpfs=mounts)
    machine.execute("cp /root/.ssh/authorized_keys /etc/ssh/keys; chmod 644 /etc/ssh/keys; touch /srv/app.py")
    for prepare, _ in parts.values():
        machine.execute(f"{prepare}; true")
    with tunnel_to(machine, "/srv/app.py", python=light_bokeh.PYTHON) as tunnel:
        assert "Bokeh" in apps.get(tunnel.url)
