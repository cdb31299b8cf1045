"""A machine for ``bokeh-ssh demo``: a real SSH server on loopback, with an app on it and a key that fits."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

from bokeh_ssh._core.errors import BokehSSHError
from bokeh_ssh._core.host import Host

#: Its path on the demo's machine, relative to the home there.
APP = "demo.py"


def check_installed() -> None:
    """Refuse to start without what the demo needs besides bokeh_ssh.

    :raises BokehSSHError: if something is missing
    """
    missing = [name for name in ("asyncssh", "bokeh") if importlib.util.find_spec(name) is None]
    if missing:
        msg = f"the demo needs {' and '.join(missing)}, not installed here"
        raise BokehSSHError(msg, hint="install what it needs with: pip install 'bokeh-ssh[demo]'")


@contextlib.contextmanager
def demo_machine() -> Iterator[Host]:
    """Run an SSH server in this process while the context lasts; return what logs in to it.

    Its host key, the client's key and the known_hosts file are made for it, in a private temporary directory
    that is also the home there, with :data:`APP` in it. Nothing of the person's own is read or written.

    :raises BokehSSHError: if what it needs is not installed
    """
    check_installed()
    from bokeh_ssh._demo.machine import machine

    with machine() as made:
        shutil.copyfile(Path(__file__).with_name("demo_app.py"), made.home / APP)
        yield made.host
