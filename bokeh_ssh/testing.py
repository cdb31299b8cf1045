"""For the tests of what is built on bokeh_ssh: an SSH server in the test's own process, as a pytest fixture.

No sshd, no Docker, no keys of one's own; it needs ``pip install 'bokeh-ssh[demo]'``. In a ``conftest.py``::

    pytest_plugins = ["bokeh_ssh.testing"]

and in a test::

    def test_my_tool_shows_the_app(ssh_machine):
        (ssh_machine.home / "app.py").write_text("...")
        with DirectTunnel(ssh_machine.host, app="app.py", python=sys.executable) as tunnel:
            ...

A machine that behaves in another way is made with the function: ``with testing.machine(password="x") as m``.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bokeh_ssh._demo.machine import Challenge, SSHMachine, machine

__all__ = ["Challenge", "SSHMachine", "machine", "ssh_machine"]


@pytest.fixture(name="ssh_machine")
def ssh_machine() -> Iterator[SSHMachine]:
    """Yield a machine to log in to, with an empty home, for one test; see :class:`SSHMachine`."""
    with machine() as made:
        yield made
