"""Situation one: the Bokeh server's machine can be logged in to."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from bokeh_ssh._events import OnEvent
from bokeh_ssh._local import forwarding
from bokeh_ssh._target import Host, as_host
from bokeh_ssh._tunnel import BOKEH_PORT, Serve, Tunnel


class DirectTunnel(Tunnel):
    """Open a Bokeh server that runs on ``host`` (``bokeh serve`` there and ``ssh -L`` here).

    >>> tunnel = DirectTunnel("example.org", "me", app="dashboard.py")
    >>> tunnel.state
    'new'

    :param host: the machine the server runs on: a name, an address, ``user@host:port``, an ssh config
        alias, or a :class:`Host`
    :param user: the login name
    :param app: an app or several to serve: paths on that machine
    :param args: more options for ``bokeh serve``
    :param command: "bokeh serve", "panel serve", or a command of your own that takes Bokeh's options
    :param python: the interpreter whose Bokeh is used; None takes the first on the PATH that has it
    :param setup: shell lines to run first, such as "conda activate viz"
    :param cwd: the directory to run in
    :param env: environment variables for the server
    :param local_port: None prefers 5006 (the server's own port when attaching) and takes a free one where
        that is taken; 0 takes any free one; a number takes exactly that one or raises
    :param remote_port: None takes any free one for a server that is started; a number exactly that one
    :param launch: None attaches to a server that answers on ``remote_port`` (5006) and starts one where
        none does; True always starts one, False never; with an ``app`` one is always started
    :param grace: seconds that a server started here outlives a client that has vanished; leaving the
        ``with`` ends it at once
    :param launch_timeout: seconds for the server to become ready
    :param extra_origins: more ``host:port`` whose pages may embed the app
    :param allow_foreign: attach to a server of another user
    :param isolate: hold the SSH side in a child process, so that a program that computes cannot slow it
    :param on_event: takes the progress events
    :param login: the login keywords, see :class:`Host`
    :raises UsageError: if an argument cannot work
    """

    def __init__(
        self,
        host: str | Host,
        user: str | None = None,
        app: str | Sequence[str] | None = None,
        *,
        args: Sequence[str] = (),
        command: str | Sequence[str] = "bokeh serve",
        python: str | None = None,
        setup: str | Sequence[str] = (),
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        local_port: int | None = None,
        remote_port: int | None = None,
        launch: bool | None = None,
        grace: float = 600.0,
        launch_timeout: float = 60.0,
        extra_origins: Sequence[str] = (),
        allow_foreign: bool = False,
        isolate: bool = True,
        on_event: OnEvent | None = None,
        **login: Any,
    ) -> None:
        serve = Serve.check(
            app,
            args,
            command=command,
            python=python,
            setup=setup,
            cwd=cwd,
            env=env,
            remote_port=remote_port,
            launch=launch,
            grace=grace,
            launch_timeout=launch_timeout,
            extra_origins=extra_origins,
            allow_foreign=allow_foreign,
        )
        super().__init__(serve, local_port, on_event, isolate)
        self._host = as_host(host, user, **login)
        self._label = self._host.target.host

    def __repr__(self) -> str:
        what = ", ".join(self._serve.app) or "Bokeh"
        return f"<DirectTunnel to {what} on {self._label}, {self._state}>"

    def _start(self, stack: contextlib.ExitStack) -> None:
        if self._wanted:
            self._bind(stack, BOKEH_PORT)  # a port that is taken here is told before anything is dialled
        connection = self._connect(stack, self._host)
        address, self._remote_port = self._find_or_launch(stack, connection)
        stack.enter_context(forwarding(self._sockets, connection, address, self._remote_port))
        self._prove(connection.name)
