"""A machine for ``bokeh-ssh demo``: a real SSH server on loopback, with an app on it and a key that fits."""

from __future__ import annotations

import contextlib
import getpass
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bokeh_ssh._errors import BokehSSHError
from bokeh_ssh._target import Host

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
    """Run an SSH server in this process while the context lasts; gives what logs in to it.

    Its host key, the client's key and the known_hosts file are made for it, in a private temporary directory
    that is also the home there, with :data:`APP` in it. Nothing of the person's own is read or written.

    :raises BokehSSHError: if what it needs is not installed
    """
    check_installed()
    import asyncssh

    from bokeh_ssh._embedded import EmbeddedServer, Settings

    with tempfile.TemporaryDirectory(prefix="bokeh-ssh-demo-", ignore_cleanup_errors=True) as folder:
        key = asyncssh.generate_private_key("ssh-ed25519")
        key_file = Path(folder, "key")
        key_file.touch(0o600)
        key_file.write_bytes(key.export_private_key())
        home = Path(folder, "home")
        home.mkdir()
        shutil.copyfile(Path(__file__).with_name("_demo_app.py"), home / APP)
        settings = Settings(authorized_keys=(key.export_public_key().decode(),), home=home)
        with EmbeddedServer(settings) as server:
            known_hosts = Path(folder, "known_hosts")
            server.write_known_hosts(known_hosts)
            yield Host(
                server.host,
                getpass.getuser(),
                port=server.port,
                key_filename=os.fspath(key_file),
                known_hosts=os.fspath(known_hosts),
                ssh_config=None,
                allow_agent=False,
                look_for_keys=False,
                jump=(),
            )


def demo_python() -> str:
    """Give the interpreter that runs the demo's server: this one, which is known to have Bokeh."""
    return sys.executable
