"""The release of OpenSSH that ``Match version`` is compared with."""

from __future__ import annotations

import functools
import shutil
import subprocess

#: Whose manual is followed; it stands in where there is no ssh.
NEWEST = "OpenSSH_10.6p1"
_PATIENCE = 5.0


def find_release() -> str:
    """Return the release of this machine's ssh (``ssh -V``), for which the config was written."""
    ssh = shutil.which("ssh")
    return (_ask(ssh) if ssh else "") or NEWEST


@functools.lru_cache(maxsize=4)
def _ask(ssh: str) -> str:
    try:
        done = subprocess.run(
            [ssh, "-V"], stdin=subprocess.DEVNULL, capture_output=True, timeout=_PATIENCE, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    release = done.stderr.decode("utf-8", "replace").partition("\n")[0].rpartition(", ")[0]
    return release if release.startswith("OpenSSH_") else ""
