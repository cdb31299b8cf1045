"""Apps for the machines under test, and what drives them from outside."""

from __future__ import annotations

import base64
import json
import re
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from websockets.sync.client import connect

from beds import Machine

#: A slider, and a text that a Python callback sets.
SLIDER = """
from bokeh.io import curdoc
from bokeh.models import Div, Slider

slider = Slider(start=0, end=10, value=1, name="slider")
text = Div(text="1", name="text")


def moved(attr, old, new):
    text.text = f"answer {new * 2}"


slider.on_change("value", moved)
curdoc().add_root(slider)
curdoc().add_root(text)
"""

#: Its own code raises: Bokeh answers 200 with a blank page.
BROKEN = "raise RuntimeError('the app is broken')\n"


def put(machine: Machine, name: str, text: str) -> str:
    """Write a file into a new directory of the machine's user; gives its path there."""
    # By the shell: a Python would take as long as all else of it.
    line = 'd=$(mktemp -d) && printf %s "$2" | base64 -d > "$d/$1" && printf %s "$d/$1"'
    words = ["sh", "-c", line, "sh", name, base64.b64encode(text.encode()).decode()]
    done = machine.execute(words, user=machine.user if machine.kind == "docker" else None)
    assert done.status == 0, done.stderr
    return str(done)


def get(url: str) -> str:
    """Open a page as a browser would ask for it."""
    with urllib.request.urlopen(url, timeout=20) as answer:
        assert answer.status == 200
        return str(answer.read().decode())


def open_websocket(url: str, page: str) -> dict[str, object]:
    """Open a page's websocket with its own origin, as BokehJS does; gives the server's first message."""
    return exchange(url, page)[0]


def exchange(
    url: str, page: str, on_answer: Callable[[], object] = lambda: None
) -> tuple[dict[str, object], str]:
    """Open a page's websocket; gives the server's first message, and what extensions it has agreed to.

    :param on_answer: called when that message has come; ending the websocket takes a round trip more
    """
    found = re.search(r'"token":"([^"]+)"', page)
    assert found, page[:500]
    origin = re.match(r"https?://[^/]+", url)
    assert origin
    address = url.replace("http", "ws", 1).rstrip("/") + "/ws"
    with connect(
        address, origin=origin.group(), subprotocols=["bokeh", found.group(1)], open_timeout=20
    ) as ws:
        assert ws.response
        agreed = ws.response.headers.get("Sec-WebSocket-Extensions", "")
        answer = ws.recv(timeout=20)
        on_answer()
        return dict(json.loads(answer)), agreed


def drive(url: str) -> None:
    """See that the app answers: a page, a websocket, and a Python callback, to Bokeh's own client."""
    page = get(url)
    assert "Bokeh" in page
    assert open_websocket(url, page)["msgtype"] == "ACK"
    with ThreadPoolExecutor(1) as pool:  # has an event loop of its own
        assert pool.submit(_move_slider, url).result(60) == "answer 8"


def _move_slider(url: str) -> str:
    from bokeh.client import pull_session
    from tornado.ioloop import IOLoop

    loop = IOLoop()
    try:
        with pull_session(url=url, io_loop=loop) as session:
            session.document.select_one({"name": "slider"}).value = 4
            session.force_roundtrip()
            session.pull()
            return str(session.document.select_one({"name": "text"}).text)
    finally:
        loop.close(all_fds=True)  # the client's own connection would wait for its end
