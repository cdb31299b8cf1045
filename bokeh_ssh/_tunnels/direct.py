"""Situation one: the Bokeh server's machine can be logged in to."""

from __future__ import annotations

import contextlib

from bokeh_ssh._core.host import Host
from bokeh_ssh._tunnels.base import Tunnel
from bokeh_ssh._tunnels.options import DirectOptions, arguments_of


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
    :param command: "bokeh serve", "panel serve", or a command of your own that takes Bokeh's options. With
        ``{port}`` or ``{socket}`` in it, for where it is to listen, it is any web server:
        ``"streamlit run --server.port={port}"``; ``app`` and ``args`` are put behind that
    :param ready: for such a server, the path of a page that it answers when it is ready; None: any answer
    :param python: the interpreter whose Bokeh is used; None takes the first on the PATH that has it
    :param setup: shell lines to run first, such as "conda activate viz"
    :param cwd: the directory to run in
    :param env: environment variables for the server
    :param upload: ``app`` names files or folders of this machine, which are brought there, without what git
        ignores, into a private folder that ends with the server; it runs in there unless ``cwd`` is given
    :param bring: more files and folders to bring along, to lie beside the app; this uploads the app too
    :param dev: the server starts anew when the app's files change (``bokeh serve --dev``, for one app); with
        ``upload`` they are those here, and a change is brought there as it is saved
    :param local_port: None prefers 5006 (the server's own port when attaching) and takes a free one where
        that is taken; 0 takes any free one; a number takes exactly that one or raises
    :param forwards: more ports that are forwarded while the tunnel is open, as ``ssh -L`` writes them:
        ``"6006:localhost:6006"``; see the tunnel's ``forwards``
    :param remote_port: None takes any free one for a server that is started; a number exactly that one
    :param launch: None attaches to a server that answers on ``remote_port`` (5006) and starts one where
        none does; True always starts one, False never; with an ``app`` one is always started
    :param server: take over one of your servers that runs there: its id, app or route, as ``bokeh-ssh ls``
        shows them, or "*" for the only one
    :param detach: leave the server running at the end, on purpose, until ``server=`` or ``bokeh-ssh stop``;
        one that was left so stays so
    :param grace: seconds that a server started here outlives a client that has vanished; leaving the
        ``with`` ends it at once
    :param launch_timeout: seconds for the server to become ready
    :param extra_origins: more ``host:port`` whose pages may embed the app: may open WebSockets to it
    :param allow_foreign: attach to a server of another user
    :param allow_others: let the other users of this machine open the local port, as ``ssh -L`` does; where
        the system does not tell who connects (other than Linux), ``signed=True`` keeps them out
    :param allow_any_origin: let the pages of every site open WebSockets to the server, and so use the app as
        you could; otherwise only its own may, and those of ``extra_origins``, whatever kind of server it is
    :param signed: True has a server that is started answer only to sessions whose id is signed here; None
        does so where it listens on a port, and not on a private socket; False leaves it open to the other
        users of its machine, on a port
    :param reconnect: make a connection that was lost again, at the same local address and to the same server
    :param isolate: hold the SSH side in a child process, so that a program that computes cannot slow it
    :param on_event: takes the progress events
    :param port: and the others of a login, up to ``compression``: as for :class:`Host`
    :raises UsageError: if an argument cannot work
    """

    @arguments_of(DirectOptions)
    def __init__(self, options: DirectOptions, host: Host) -> None:
        super().__init__(options, host)
        self._host = host

    def __repr__(self) -> str:
        what = ", ".join(self._serve.apps) or "Bokeh"
        return f"<DirectTunnel to {what} on {self._label}, {self._state}>"

    def _connect_all(self, connection_stack: contextlib.ExitStack) -> bool:
        connection = self._connect(connection_stack, self._host)
        self._start_extra_forwards(connection_stack, connection)
        target, same = self._find_or_launch(connection_stack, connection)
        self._start_forwarding(connection_stack, connection, target, connection.name)
        return same
