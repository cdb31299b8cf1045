"""What users read and call of both tunnels."""

from __future__ import annotations

import logging
import webbrowser
from typing import Any

from bokeh_ssh._core.this_machine.jupyter_hub import find_hub
from bokeh_ssh._tunnels import bokeh_client, notebook
from bokeh_ssh._tunnels.openable import Openable
from bokeh_ssh._tunnels.redirect_page import open_in_browser
from bokeh_ssh._tunnels.tunnel_parts import page_address, session_query

log = logging.getLogger("bokeh_ssh")


class Tunnel(Openable):
    """What users read and call of both tunnels."""

    _widget: notebook.StatusWidget | None = None

    @property
    def local_port(self) -> int:
        """The port on this machine.

        :raises TunnelClosedError: if the tunnel is not open
        """
        return self._open_info.local_port

    @property
    def remote_port(self) -> int:
        """The port of the Bokeh server, or of the gateway if only that is known.

        0 if it listens on a private Unix socket, as a server does by default that was started here.

        :raises TunnelClosedError: if the tunnel is not open
        """
        return self._open_info.remote_port

    @property
    def server(self) -> str | None:
        """The id of the server among those of your account there, for ``server=`` of a later tunnel.

        None if the tunnel attached to it, or if that machine has no private directory.
        """
        return self._info.server or None

    @property
    def detached(self) -> bool:
        """Whether the server keeps running when the tunnel is closed: detached, or not started here."""
        return self._info.detached

    @property
    def urls(self) -> tuple[str, ...]:
        """The addresses to open, one for each app.

        On a JupyterHub they lead through jupyter-server-proxy, and are only paths if the hub's name is not
        known.

        If the server accepts only signed sessions, each address contains the id of a new one: it opens one
        page, for anybody who has it.

        :raises TunnelClosedError: if the tunnel is not open
        """
        port, info, hub = self.local_port, self._info, find_hub()
        return tuple(page_address(port, route, info.key, hub, tls=info.tls) for route in info.routes)

    @property
    def forwards(self) -> tuple[str, ...]:
        """The local addresses that ``forwards=`` has opened, such as ``localhost:6006``, in their order.

        :raises TunnelClosedError: if the tunnel is not open
        """
        return tuple(name for name, _ in self._open_info.forwards)

    @property
    def url(self) -> str:
        """The address to open: that of the first app.

        :raises TunnelClosedError: if the tunnel is not open
        """
        return self.urls[0]

    @property
    def log(self) -> tuple[str, ...]:
        """The last lines of the server that this tunnel started; empty if it attached to one."""
        return self._lifecycle.session.log

    def show(self, *, inline: bool | None = None, height: int | str = 600) -> bool | None:
        """Show the first app: in the cell of a notebook, or else in the browser.

        :param inline: False opens the browser from a notebook too
        :param height: the height of the frame in the cell: pixels, or a length of CSS
        :returns: None in a cell; else whether a browser was opened
        """
        if notebook.is_here() if inline is None else inline:
            notebook.display(notebook.frame(self.url, height))
            return None  # or the cell would show it
        return self._browse()

    def _browse(self) -> bool:
        """Open the first app in the browser, whose command line every account of this machine can read.

        :returns: whether a browser was found that can open the address without showing it to others
        """
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
        self._lifecycle.stack.callback(page.remove)
        return True

    def _repr_html_(self) -> str:
        """Be a link in a notebook, with the machines on the way and what went over it."""
        text, _, state = repr(self).strip("<>").rpartition(", ")
        why = str(self._lifecycle.error) if state == "failed" and self._lifecycle.error else ""
        return notebook.summary(text, state, self.url if state == "ready" else "", self.status(), why)

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        """Be that with buttons beside it, and kept up to date, where the kernel has ipywidgets."""
        if self._widget is None or self._widget.is_gone:
            self._widget = notebook.make_widget(self)
        return self._widget.mimebundle() if self._widget else {}

    def pull_session(self, **kwargs: Any) -> Any:
        """Open a session of the first app from this program (``bokeh.client.pull_session``).

        It works in a notebook too, where Bokeh's own does not.

        :param kwargs: arguments of Bokeh's function, such as ``session_id`` or ``arguments``
        :raises UsageError: if Bokeh is not installed here, or its version is too far from the server's
        """
        return bokeh_client.pull(self._address("127.0.0.1"), self._info.key, **kwargs)

    def push_session(self, document: Any = None, **kwargs: Any) -> Any:
        """Open a session with a document of this program (``bokeh.client.push_session``).

        :param document: None uses the current one (``curdoc()``)
        :param kwargs: arguments of Bokeh's function, such as ``session_id``
        :raises UsageError: as :meth:`pull_session`
        """
        return bokeh_client.push(self._address("127.0.0.1"), self._info.key, document, **kwargs)

    def _address(self, name: str) -> str:
        """Return the first app's, without a session."""
        return page_address(self.local_port, self._info.routes[0], tls=self._info.tls, name=name)

    def server_document(self, **kwargs: Any) -> str:
        """Return the ``<script>`` that embeds the first app in a page (``bokeh.embed.server_document``).

        Allow the page's origin with ``extra_origins=``.

        :raises UsageError: if Bokeh is not installed here
        """
        return bokeh_client.embed(self._address("localhost"), session_query(self._info.key), **kwargs)
