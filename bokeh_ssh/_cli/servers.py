"""What ``bokeh-ssh ls`` and ``stop`` do on a machine, and what leaves something running on this one."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from bokeh_ssh._core import python_path
from bokeh_ssh._core.events import OnEvent
from bokeh_ssh._core.host import as_host
from bokeh_ssh._server.local_runner import ShellRunner
from bokeh_ssh._server.registry import RemoteServer, choose, list_servers, stop_server
from bokeh_ssh._server.server import Launch, Server
from bokeh_ssh._server.server_ref import ServerRef
from bokeh_ssh._ssh.connect import connect
from bokeh_ssh._ssh.runner import Runner

#: How this machine is called.
HERE = "."
#: Seconds to log in to a gateway, besides what the server takes to start.
_LOGIN = 60.0


@contextlib.contextmanager
def _machine(host: str, on_event: OnEvent, login: dict[str, Any]) -> Iterator[Runner]:
    if host == HERE:
        yield ShellRunner()
    else:
        with connect(as_host(host, **login), on_event=on_event) as connection:
            yield connection


def find(host: str, python: str | None, on_event: OnEvent, login: dict[str, Any]) -> list[RemoteServer]:
    """List the servers of the account on a machine.

    :raises BokehSSHError: if it cannot be reached or asked
    """
    with _machine(host, on_event, login) as connection:
        return list_servers(connection, python=python)


def end(
    host: str, name: str | None, python: str | None, on_event: OnEvent, login: dict[str, Any]
) -> RemoteServer:
    """End the server of that name, and all that it started; return what it was.

    :raises ServerNotFoundError: if there is none of that name
    :raises UsageError: if there are several
    """
    with _machine(host, on_event, login) as connection:
        server = choose(list_servers(connection, python=python), name, host=connection.name)
        stop_server(connection, server, python=python)
    return server


def leave(words: Sequence[str], *, timeout: float) -> ServerRef:
    """Run ``bokeh-ssh`` with these words, and leave it running once it says that it is ready.

    It has no terminal, so nobody can be asked for a password.

    :param timeout: seconds for its server to start
    :raises LaunchError: if it ends before that; has what it wrote
    """
    launch = Launch(
        command=(*python_path.command("from bokeh_ssh._cli.app import main; main()"), *words),
        env=python_path.environment(),
        python=sys.executable,
        verbatim=True,
        timeout=timeout + _LOGIN,
    )
    return Server.start(ShellRunner(), launch).detach()
