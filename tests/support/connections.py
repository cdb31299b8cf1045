"""One SSH connection to a machine, and the servers of the account that are found over it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from beds import Machine
from bokeh_ssh import Host
from bokeh_ssh._server.registry import RemoteServer, list_servers, stop_server
from bokeh_ssh._ssh.connect import connect
from bokeh_ssh._ssh.connection import Connection


@contextmanager
def connected(machine: Machine) -> Iterator[Connection]:
    """Log in."""
    with connect(Host(machine.host, machine.user, **machine.login)) as connection:
        yield connection


def there(machine: Machine) -> list[RemoteServer]:
    """List the account's servers on the machine."""
    with connect(Host(machine.host, machine.user, **machine.login)) as connection:
        return list_servers(connection, python=machine.python)


def end(machine: Machine, name: str) -> None:
    """End one of them."""
    with connect(Host(machine.host, machine.user, **machine.login)) as connection:
        stop_server(connection, name, python=machine.python)
