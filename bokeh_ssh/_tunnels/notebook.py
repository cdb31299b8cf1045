"""In a notebook: what a tunnel looks like, its app in the cell, and questions."""

from __future__ import annotations

import contextlib
import getpass
import importlib
import socket
import sys
import threading
from collections.abc import Callable
from html import escape
from typing import Any

from bokeh_ssh._core.dispatcher import Dispatcher
from bokeh_ssh._core.errors import BokehSSHError, UsageError
from bokeh_ssh._core.events import Question
from bokeh_ssh._forwarding.status import TunnelStatus, describe_traffic, describe_way
from bokeh_ssh._tunnels.openable import follow_state

#: Seconds that a connection to the tunnel's own port stays.
_KNOCK = 2.0
#: What shows a widget in a page: before its release 8, ipywidgets does not put it into a bundle by itself.
_VIEW = "application/vnd.jupyter.widget-view+json"
#: States in which nothing is carried.
_OVER = ("new", "closed", "failed")
#: Seconds between two updates of the figures.
_PERIOD = 3.0
_DOTS = {"ready": "#2b8a3e", "failed": "#c92a2a", "closed": "#868e96", "new": "#868e96"}


def summary(text: str, state: str, url: str, status: TunnelStatus | None = None, why: str = "") -> str:
    """Say in HTML what a tunnel is, its state, and where it leads; an empty ``url`` leads nowhere.

    :param status: what it does, shown below that while it is open
    :param why: why it has failed

    >>> print(summary("DirectTunnel to <app> on host", "closed", ""))
    <div><span style="color: #868e96">●</span> DirectTunnel to &lt;app&gt; on host: closed</div>
    """
    dot = f'<span style="color: {_DOTS.get(state, "#e67700")}">●</span>'
    link = ""
    if url:
        shown = escape(url.partition("?")[0])
        link = f', <a href="{escape(url)}" target="_blank" rel="noopener noreferrer">{shown}</a>'
    more = f"<br>{escape(why)}" if why else ""
    if status and status.uptime and state not in _OVER:
        more = f"<br>{escape(describe_way(status))}<br>{escape(describe_traffic(status))}"
    return f"<div>{dot} {escape(text)}: {escape(state)}{link}{more}</div>"


class StatusWidget:
    """A tunnel in a cell that follows its state and its figures, with buttons to stop it and to have it back.

    No thread waits for a change: each update has one of its own, and so has what a button does, since the
    kernel's runs the cells.

    :param tunnel: what it shows, see :meth:`~bokeh_ssh._tunnels.base.Tunnel._repr_html_`
    :param widgets: the module ipywidgets
    """

    def __init__(self, tunnel: Any, widgets: Any) -> None:
        self._tunnel = tunnel
        self._error = ""
        self._text = widgets.HTML()
        self.reconnect = widgets.Button(description="Reconnect", tooltip="Connect now, or open it again")
        self.stop = widgets.Button(description="Stop", tooltip="Close the tunnel, and end what it started")
        self.reconnect.on_click(lambda _: self._begin(self._reconnect, "reconnect"))
        self.stop.on_click(lambda _: self._begin(self._tunnel.close, "stop"))
        self._box = widgets.VBox([self._text, widgets.HBox([self.reconnect, self.stop])])
        self._timer = threading.Timer(_PERIOD, self.refresh)
        self._updates = Dispatcher(self._update, "bokeh-ssh widget", "the widget")
        self._updates.finish()  # its thread ends as soon as nothing waits
        follow_state(tunnel, self.refresh)
        self._update()

    @property
    def html(self) -> str:
        """What is shown above the buttons."""
        return str(self._text.value)

    @property
    def is_gone(self) -> bool:
        """Whether it was closed, as ``ipywidgets.Widget.close_all`` does, and can be shown no more."""
        return self._box.comm is None

    def mimebundle(self) -> dict[str, Any]:
        """Return what is displayed; where the page shows no widgets, it is the tunnel as text."""
        self._update()
        view = {"version_major": 2, "version_minor": 0, "model_id": self._box.model_id}
        return {_VIEW: view, "text/html": self.html, "text/plain": repr(self._tunnel)}

    def refresh(self) -> None:
        """Show the tunnel as it is now, soon; never waits."""
        self._updates.put(None)

    def _update(self, _: None = None) -> None:
        state = self._tunnel.state
        if state == "ready":
            self._error = ""
        self._timer.cancel()
        self._timer = threading.Timer(_PERIOD, self.refresh)
        self._timer.name, self._timer.daemon = "bokeh-ssh widget figures", True
        if state not in _OVER and not self.is_gone:
            self._timer.start()
        self.reconnect.disabled = state not in ("lost", *_OVER)
        self.stop.disabled = state in _OVER
        shown = self._tunnel._repr_html_()
        self._text.value = shown + (f"<div>{escape(self._error)}</div>" if self._error else "")

    def _begin(self, act: Callable[[], object], name: str) -> None:
        def work() -> None:
            self._error = ""
            try:
                act()
            except BokehSSHError as exc:
                self._error = str(exc)
            self.refresh()

        threading.Thread(target=work, name=f"bokeh-ssh widget {name}", daemon=True).start()

    def _reconnect(self) -> None:
        if self._tunnel.state != "lost":
            self._tunnel.open()
            return
        # Whoever connects has an attempt made at once; it takes a moment to find out whose connection it is.
        with contextlib.suppress(OSError):
            address = ("localhost", self._tunnel.local_port)
            with socket.create_connection(address, timeout=_KNOCK) as sock:
                sock.recv(1)


def make_widget(tunnel: Any) -> StatusWidget | None:
    """Make the widget of a tunnel; None where no notebook shows it, or ipywidgets is not installed here."""
    if not is_here():
        return None
    try:
        return StatusWidget(tunnel, importlib.import_module("ipywidgets"))
    except ImportError:
        return None


def frame(url: str, height: int | str) -> str:
    """Return the HTML that shows a page in a cell.

    A frame, and not Bokeh's script: the app's page stays one of its own, with its templates and styles, its
    origin is the one that the server was told, and what is in the notebook's page cannot get in its way.

    >>> frame("http://localhost:5006/?a&b", 300).partition(" style")[0]
    '<iframe src="http://localhost:5006/?a&amp;b"'
    """
    tall = f"{height}px" if isinstance(height, int) else height
    style = f"width: 100%; height: {tall}; border: 0"
    return (
        f'<iframe src="{escape(url)}" style="{escape(style)}" allow="fullscreen; clipboard-write"></iframe>'
    )


def show(tunnel: Any, *, inline: bool | None = None, height: int | str = 600) -> bool | None:
    """Show the first app of an open tunnel, as ``tunnel.show()`` does; like Bokeh's own ``show()``.

    :param inline: False opens the browser from a notebook too
    :param height: of the frame in the cell: pixels, or what CSS takes
    :returns: whether a browser was found; None where it is in the cell
    :raises UsageError: if it is no tunnel, but a plot or the name of a machine
    """
    if not hasattr(tunnel, "show"):
        msg = f"show() takes a tunnel, and no {type(tunnel).__name__}"
        raise UsageError(msg, hint='open one first, as in DirectTunnel("host", app="app.py").open()')
    found: bool | None = tunnel.show(inline=inline, height=height)
    return found


def is_here() -> bool:
    """Return whether this program is a kernel, whose output is shown by a notebook."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module else None
    return hasattr(shell, "kernel")


def display(html: str) -> None:
    """Show HTML in the cell.

    :raises UsageError: if IPython is not installed here
    """
    try:
        ipython: Any = importlib.import_module("IPython.display")
    except ImportError as exc:
        msg = "this is no notebook, and cannot show the app in a cell"
        raise UsageError(msg, hint="leave out inline") from exc
    # Not as an HTML object, which warns of frames.
    ipython.display({"text/html": html, "text/plain": "an app in a frame"}, raw=True)


def notebook_prompt(question: Question) -> str | None:
    """Ask in the cell that runs: a ``prompt`` for notebooks, where a password is typed into a hidden field.

    Nobody is asked where no cell waits for the answer, as when a lost connection is made again in the
    background, or where nobody can type one, as when a program runs the notebook (``nbconvert``); what was
    answered before is used then, and what cannot be is an error, never a kernel that hangs.
    """
    if threading.current_thread() is not threading.main_thread():
        return None
    text = f"{question.instructions}\n{question.text}".strip()
    ask: Any = input if question.echo or question.kind == "host_key" else getpass.getpass
    try:
        return str(ask(f"{question.host}: {text} "))
    except NotImplementedError:  # IPython's StdinNotImplementedError
        return None
