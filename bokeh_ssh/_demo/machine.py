"""A machine to log in to, on loopback: an embedded SSH server with keys made for it, and a home of its own.

For the demo, and for the tests of those who build on this package (``bokeh_ssh.testing``).
"""

from __future__ import annotations

import contextlib
import getpass
import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncssh

from bokeh_ssh._core.host import Host
from bokeh_ssh._demo.ssh_server import Challenge, EmbeddedServer, Settings

__all__ = ["Challenge", "SSHMachine", "Settings", "machine"]

#: A server's own socket has some 45 characters behind that, and 100 at most in all.
_LONGEST_PARENT = 50


@dataclass(frozen=True)
class SSHMachine:
    """A machine that is this one, seen through SSH. Made by ``machine()``, or the fixture ``ssh_machine``.

    :ivar host: logs in there, wherever a host is asked for
    :ivar home: where its commands start, and paths begin; empty, and removed at the end
    :ivar server: its SSH server; ``drop_connections()`` cuts every line, ``close()`` switches it off and
        ``open()`` on again, on another port; ``connections``, ``sessions`` and ``processes`` say what is on
    """

    host: Host
    home: Path
    server: EmbeddedServer


def _parent() -> str | None:
    """Choose where the directory is: TMPDIR, unless its name leaves no room for a socket's."""
    too_long = len(tempfile.gettempdir()) > _LONGEST_PARENT
    return "/tmp" if too_long and Path("/tmp").is_dir() else None  # noqa: S108


#: Waits until this process says that it tidies up by itself; or, where it cannot any more, for the servers
#: that still have their grace time, and removes what is left.
_REMOVE = """\
trap '' HUP INT TERM
x=; IFS= read -r x
if [ -n "$x" ]; then exit; fi
n=0
while [ -e "$1/servers" ] && [ $n -lt 700 ]; do sleep 1; n=$((n+1)); done
rm -rf -- "$1"
"""


@contextlib.contextmanager
def _removed_at_last(folder: str) -> Iterator[None]:
    """Remove a directory even if this process is killed."""
    if os.name != "posix":
        yield
        return
    with subprocess.Popen(
        ["/bin/sh", "-c", _REMOVE, "sh", folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,  # Ctrl-C is not for it
    ) as waits:
        try:
            yield
        finally:
            assert waits.stdin
            with contextlib.suppress(OSError):
                waits.stdin.write(b"done\n")
                waits.stdin.flush()


@contextlib.contextmanager
def _cache_in(folder: Path) -> Iterator[None]:
    """Keep what lasts from one tunnel to the next in that folder, also by child processes."""
    name = "LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME"
    before = os.environ.get(name)
    os.environ[name] = os.fspath(folder)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


@contextlib.contextmanager
def machine(**settings: Any) -> Iterator[SSHMachine]:
    """Run an SSH server in this process, on 127.0.0.1 and any free port, while the context lasts.

    Its host key, the client's key and the known_hosts file are made for it, in a private temporary directory.
    Nothing of the person's own is read or written: not their ssh config, keys, agent or known_hosts. While
    the context lasts, what this process keeps in the account's cache goes to the temporary directory.

    >>> with machine(max_sessions=1) as made:
    ...     made.host.name
    '127.0.0.1'

    :param settings: as for ``Settings``, named after sshd_config's: ``password``, ``challenges``,
        ``local_forward``, ``remote_forward``, ``streamlocal``, ``max_sessions``, ``shell``, ``env``, ...
    """
    with (
        tempfile.TemporaryDirectory(prefix="bokeh-ssh-", dir=_parent(), ignore_cleanup_errors=True) as folder,
        _removed_at_last(folder),
        _cache_in(Path(folder, "cache")),
    ):
        key = asyncssh.generate_private_key("ssh-ed25519")
        key_file = Path(folder, "key")
        key_file.touch(0o600)
        key_file.write_bytes(key.export_private_key())
        home = Path(folder, "home")
        home.mkdir()
        keys = (key.export_public_key().decode(), *settings.pop("authorized_keys", ()))
        # Servers that it holds are found by nobody who looks for the person's own.
        env = {"BOKEH_SSH_DIR": os.fspath(Path(folder, "servers")), **settings.pop("env", {})}
        made = Settings(authorized_keys=keys, **{"home": home, **settings}, env=env)
        with EmbeddedServer(made) as server:
            known_hosts = Path(folder, "known_hosts")
            server.write_known_hosts(known_hosts)
            host = Host(
                server.host,
                made.user or getpass.getuser(),
                port=server.port,
                key_filename=os.fspath(key_file),
                known_hosts=os.fspath(known_hosts),
                ssh_config=None,
                allow_agent=False,
                look_for_keys=False,
                jump=(),
            )
            yield SSHMachine(host, home, server)
