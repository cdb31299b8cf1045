"""Whether a command of the user's own says yes (``Match exec``)."""

from __future__ import annotations

import subprocess
import threading

from bokeh_ssh._core.this_machine import user_shell
from bokeh_ssh._core.waiting import wait

#: Seconds after which a command is taken not to answer at all; ssh would wait for ever.
PATIENCE = 30.0


def holds(command: str, patience: float = PATIENCE) -> bool:
    """Run a command through the user's shell, with nothing to read and nobody to hear it.

    :returns: whether its status is 0
    :raises ValueError: if it cannot be run, was killed, or has not ended in time
    """
    null = subprocess.DEVNULL
    try:
        popen = user_shell.start(command, stdin=null, stdout=null, stderr=null)
    except (OSError, ValueError) as exc:  # ValueError: a null byte
        msg = f"{command!r} cannot be run ({getattr(exc, 'strerror', None) or exc})"
        raise ValueError(msg) from exc
    ended = threading.Event()

    def reap() -> None:
        popen.wait()
        ended.set()

    waiter = threading.Thread(target=reap, name="bokeh-ssh condition", daemon=True)
    waiter.start()
    try:
        in_time = wait(ended, patience)
    finally:
        if not ended.is_set():
            user_shell.end(popen, "SIGKILL")
        waiter.join(2)
    if not in_time:
        msg = f"{command!r} did not end within {patience:g} s"
        raise ValueError(msg)
    if popen.returncode < 0:
        msg = f"{command!r} was killed (signal {-popen.returncode})"
        raise ValueError(msg)
    return popen.returncode == 0
