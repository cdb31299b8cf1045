"""What a tunnel offers once it is open: addresses, sessions, a cell in a notebook, the server's log."""

from __future__ import annotations

import logging
import webbrowser
from typing import Any

from bokeh_ssh._core.events import OnEvent
from bokeh_ssh._server.server import Server
from bokeh_ssh._server.session_ids import new_session_id
from bokeh_ssh._tunnels import bokeh_client, notebook
from bokeh_ssh._tunnels.connections import Link
from bokeh_ssh._tunnels.redirect_page import open_in_browser

log = logging.getLogger("bokeh_ssh")


class Offer(Link):
    """The part of a tunnel that its user sees; another part finds what there is to offer."""

    _shared: tuple[str, ...] = (
        "_local_port",
        "_remote_port",
        "_routes",
        "_key",
        "_id",
        "_stays",
        "_forwards",
    )

    def __init__(self, on_event: OnEvent | None, isolate: bool, reconnect: bool) -> None:
        super().__init__(on_event, isolate, reconnect)
        self._local_port = 0
        self._remote_port = 0
        self._key = ""  # what session ids must be signed with
        self._id = ""  # what names the server on its machine
        self._stays = False  # whether it runs on when this ends
        self._forwards: tuple[str, ...] = ()
        self._routes: tuple[str, ...] = ("/",)
        self._server: Server | None = None
        self._last_log: tuple[str, ...] = ()

    @property
    def local_port(self) -> int:
        """The port on this machine.

        :raises TunnelClosedError: if the tunnel is not open
        """
        self._check_open()
        return self._local_port

    @property
    def remote_port(self) -> int:
        """The port of the Bokeh server (of the gateway, where only the gateway is known).

        0 where it listens on a Unix socket that only your account there may use: the default for a server
        that is started.

        :raises TunnelClosedError: if the tunnel is not open
        """
        self._check_open()
        return self._remote_port

    @property
    def server(self) -> str | None:
        """What names the server among those of your account there, for ``server=`` of a later tunnel.

        None where it was only found, or where the machine has no private directory to find it by.
        """
        return self._id or None

    @property
    def detached(self) -> bool:
        """Whether the server runs on when the tunnel is closed: left on purpose, or not started here."""
        return self._stays

    @property
    def urls(self) -> tuple[str, ...]:
        """The addresses to open, one for each app.

        Where the server answers only to signed sessions, each address carries the id of a new one: it opens
        one page, for whoever has it.

        :raises TunnelClosedError: if the tunnel is not open
        """
        return tuple(f"http://localhost:{self.local_port}{route}{self._query()}" for route in self._routes)

    @property
    def forwards(self) -> tuple[str, ...]:
        """What ``forwards=`` has opened here: an address such as ``localhost:6006`` each, in their order.

        :raises TunnelClosedError: if the tunnel is not open
        """
        self._check_open()
        return self._forwards

    @property
    def url(self) -> str:
        """The address to open: that of the first app.

        :raises TunnelClosedError: if the tunnel is not open
        """
        return self.urls[0]

    @property
    def log(self) -> tuple[str, ...]:
        """The last lines of the server that this tunnel started; empty where it attached to one."""
        if self._child:
            self._last_log = self._child.get("log") or self._last_log
            return self._last_log
        return tuple(self._server.log) if self._server else ()

    def show(self, *, inline: bool | None = None, height: int | str = 600) -> bool:
        """Show the first app: in the cell of a notebook, elsewhere in the browser.

        :param inline: False opens the browser from a notebook too
        :param height: of the frame in the cell: pixels, or what CSS takes
        :returns: False if no browser was found, or it cannot be led there without telling others the address
        """
        if notebook.is_here() if inline is None else inline:
            notebook.display(notebook.frame(self.url, height))
            return True
        return self._browse()

    def _browse(self) -> bool:
        """Open the first app in the browser, whose command line every account of this machine can read."""
        url = self.url
        if "?" not in url:  # it has no session's id in it
            return webbrowser.open(url)
        try:
            page = open_in_browser(url)
        except OSError as exc:
            log.warning(
                "no browser was opened: the page that leads it to the app cannot be written (%s)", exc
            )
            return False
        if page is None:
            return False
        self._stack.callback(page.remove)
        return True

    def _repr_html_(self) -> str:
        """Be a status and a link in a notebook."""
        text, _, state = repr(self).strip("<>").rpartition(", ")
        return notebook.summary(text, state, self.url if state == "ready" else "")

    def pull_session(self, **kwargs: Any) -> Any:
        """Open a session of the first app from this program (``bokeh.client.pull_session``).

        It works in a notebook too, where Bokeh's own does not.

        :param kwargs: passed on, such as ``session_id`` or ``arguments``
        :raises UsageError: if Bokeh is not installed here
        """
        return bokeh_client.pull(self._client_url, self._key, **kwargs)

    def push_session(self, document: Any = None, **kwargs: Any) -> Any:
        """Open a session with a document of this program's (``bokeh.client.push_session``), likewise.

        :param document: None takes the current one (``curdoc()``)
        :param kwargs: passed on, such as ``session_id``
        :raises UsageError: if Bokeh is not installed here
        """
        return bokeh_client.push(self._client_url, self._key, document, **kwargs)

    @property
    def _client_url(self) -> str:
        return f"http://127.0.0.1:{self.local_port}{self._routes[0]}"

    def server_document(self, **kwargs: Any) -> str:
        """Return the ``<script>`` that embeds the first app in a page (``bokeh.embed.server_document``).

        The page's own origin must be allowed with ``extra_origins=``.

        :raises UsageError: if Bokeh is not installed here
        """
        url = f"http://localhost:{self.local_port}{self._routes[0]}"
        return bokeh_client.embed(url, self._query(), **kwargs)

    def _query(self) -> str:
        return f"?bokeh-session-id={new_session_id(self._key)}" if self._key else ""
