"""Commands of the user's own, as the ssh config has them: run through their shell, away from the terminal."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from typing import Any

_POSIX = os.name == "posix"


def start(command: str, **streams: Any) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own, as ``$SHELL -c command``; Windows has its own shell.

    :param streams: ``stdin``, ``stdout`` and ``stderr`` as :class:`subprocess.Popen` takes them
    :raises OSError: if the shell cannot be run
    :raises ValueError: if there is a null byte in it
    """
    return subprocess.Popen(
        [os.environ.get("SHELL") or "/bin/sh", "-c", command] if _POSIX else command,
        shell=not _POSIX,  # a line of the user's own config
        bufsize=0,
        start_new_session=True,
        **streams,
    )


def end(popen: subprocess.Popen[bytes], name: str) -> None:
    """Send a signal, such as ``"SIGKILL"``, to a command and all that it has started; quietly."""
    with contextlib.suppress(OSError):
        if _POSIX:
            os.killpg(popen.pid, getattr(signal, name))
        else:
            popen.terminate()
