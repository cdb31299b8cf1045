"""Servers with a login of their own: ready as soon as they answer, and opened by who logs in."""

from __future__ import annotations

import gc
import http.cookiejar
import re
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from websockets.sync.client import connect

import apps
from beds import Machine
from bokeh_ssh import AppAccessError, Attached, DirectTunnel, Event, LaunchError, UsageError
from direct_tunnels import port_of, serve_on, tunnel_to

#: A login by name, as in Bokeh's documentation; it leads back by an address with a host and a port.
AUTH = """
from tornado.web import RequestHandler

def get_user(handler):
    return handler.get_cookie("user")

login_url = "/login"

class LoginHandler(RequestHandler):
    def get(self):
        self.write("who are you?")

    def post(self):
        self.set_cookie("user", self.get_argument("name"))
        host = self.request.host
        self.redirect("http://" + host + self.get_argument("next", "/"))
"""

#: An app that moves the clock of its server.
AN_HOUR_AHEAD = """
import calendar, time
timegm, now = calendar.timegm, time.time
calendar.timegm = lambda *args: timegm(*args) + 3600
time.time = lambda: now() + 3600
"""


class Visitor:
    """Somebody with a browser's cookies."""

    def __init__(self) -> None:
        self.jar = http.cookiejar.CookieJar(http.cookiejar.DefaultCookiePolicy(rfc2965=True))
        self._opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(self.jar))

    def open(self, url: str, **form: str) -> tuple[str, str]:
        """Open a page, with a form where there is one; gives where that has led, and the page."""
        data = urllib.parse.urlencode(form).encode() if form else None
        with self._opener.open(url, data, timeout=20) as answer:
            return answer.geturl(), answer.read().decode()

    def open_websocket(self, url: str, page: str) -> str:
        """Open the page's WebSocket, with its cookies; gives the first message."""
        found = re.search(r'"token":"([^"]+)"', page)
        assert found, page[:500]
        origin = "/".join(url.split("/")[:3])
        cookies = "; ".join(f"{cookie.name}={cookie.value}" for cookie in self.jar)
        with connect(
            origin.replace("http", "ws") + urllib.parse.urlsplit(url).path + "/ws",
            origin=origin,  # type: ignore[arg-type]  # a plain text will do
            subprotocols=["bokeh", found.group(1)],  # type: ignore[list-item]  # likewise
            additional_headers={"Cookie": cookies},
            open_timeout=20,
        ) as ws:
            return str(ws.recv(timeout=20))


@pytest.mark.parametrize("said", ["argument", "environment"])
def test_app_behind_a_login_opens_to_it(machine: Machine, said: str) -> None:
    """A server that sends everybody to its login is ready; who logs in there, through the tunnel, is led back
    to the app; a script is told that it has to."""
    app = apps.put(machine, "sliders.py", apps.SLIDER)
    auth = apps.put(machine, "auth.py", AUTH)
    words: dict[str, Any] = {"args": ["--auth-module", auth]}
    if said == "environment":
        words = {"env": {"BOKEH_AUTH_MODULE": auth}}
    with tunnel_to(machine, app, launch_timeout=60, **words) as tunnel:
        visitor = Visitor()
        where, page = visitor.open(tunnel.url)
        assert where == f"http://localhost:{tunnel.local_port}/login?next=%2Fsliders"
        assert page == "who are you?"
        where, page = visitor.open(where, name="joe")
        assert where == tunnel.url
        assert '"ACK"' in visitor.open_websocket(tunnel.url, page)
        with pytest.raises(AppAccessError, match="login") as caught:
            tunnel.pull_session()
        assert caught.value.hint


def test_attaching_to_a_server_with_a_login(embedded: Callable[..., Machine]) -> None:
    """One that was there is opened at its root, which leads to the login, and from there to its app."""
    machine = embedded()
    app = apps.put(machine, "sliders.py", apps.SLIDER)
    auth = apps.put(machine, "auth.py", AUTH)
    events: list[Event] = []
    with serve_on(machine, app, "--auth-module", auth) as running:
        port = port_of(running)
        with tunnel_to(machine, remote_port=port, launch=False, on_event=events.append) as tunnel:
            assert any(isinstance(event, Attached) for event in events)
            assert tunnel.url == f"http://localhost:{tunnel.local_port}/"
            visitor = Visitor()
            where, _ = visitor.open(tunnel.url)
            where, page = visitor.open(where, name="joe", next="/sliders")
            assert where == f"{tunnel.url}sliders"
            assert "Bokeh" in page
            with pytest.raises(AppAccessError):
                tunnel.pull_session()


@pytest.mark.parametrize("kind", ["basic", "oauth"])
def test_panel_behind_a_login(embedded: Callable[..., Machine], kind: str) -> None:
    """Panel's own logins: by password, and by somebody else's service, to which the page leads on."""
    pytest.importorskip("panel")
    machine = embedded()
    app = apps.put(machine, "pane.py", "import panel as pn\npn.panel('hello from panel').servable()\n")
    args = ["--basic-auth", "secret"]
    if kind == "oauth":
        args = ["--oauth-provider", "github", "--oauth-key", "k", "--oauth-secret", "s"]
    args += ["--cookie-secret", "cookies"]
    with tunnel_to(machine, app, command="panel serve", args=args, launch_timeout=60) as tunnel:
        if kind == "oauth":
            assert _location(tunnel.url) == "./login?next=%2Fpane"
            leads = urllib.parse.urlsplit(_location(f"{tunnel.url.rpartition('/')[0]}/login?next=%2Fpane"))
            assert leads.hostname == "github.com"
            back = urllib.parse.parse_qs(leads.query)["redirect_uri"]
            assert back == [f"http://localhost:{tunnel.local_port}"]
            return
        visitor = Visitor()
        where, page = visitor.open(tunnel.url)
        assert where.startswith(f"http://localhost:{tunnel.local_port}/login")
        where, page = visitor.open(where, username="joe", password="secret")
        assert where == tunnel.url
        assert '"ACK"' in visitor.open_websocket(tunnel.url, page)


def _location(url: str) -> str:
    """Tell where a page leads, at once."""

    class NoRedirect(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *_: Any) -> None:
            return None

    try:
        urllib.request.build_opener(NoRedirect).open(url, timeout=20)
    except urllib.error.HTTPError as exc:
        with exc:
            return str(exc.headers["Location"])
    raise AssertionError(f"{url} leads nowhere")


@pytest.mark.parametrize("words", [["--session-ids", "external-signed"], ["--session-id=external-signed"]])
def test_pages_that_nobody_could_open_are_refused(words: list[str]) -> None:
    """External signing without us would have every page open at a 403: said before anything is dialled."""
    for keywords in ({"args": words}, {"command": ["panel", "serve", *words]}):
        with pytest.raises(UsageError, match="signed=True"):
            DirectTunnel("host", app="app.py", **keywords)  # type: ignore[arg-type]  # one of several
    DirectTunnel("host", app="app.py", args=["--args", *words])  # the app's own


@pytest.mark.filterwarnings("ignore:There is no current event loop")  # Bokeh's own client
def test_variables_that_sign_sessions(embedded: Callable[..., Machine]) -> None:
    """Signing that ``env`` asks for is done here too, with its key or a new one; what the machine alone
    asks for is told to who cannot do it."""
    here = embedded()
    app = apps.put(here, "sliders.py", apps.SLIDER)
    with tunnel_to(here, app, env={"BOKEH_SIGN_SESSIONS": "yes"}) as tunnel:
        assert "Bokeh" in apps.get(tunnel.url)
        tunnel.pull_session().close()
    with (
        pytest.raises(LaunchError, match="give signed=True"),
        tunnel_to(here, app, args=["--session-ids", "signed"]),
    ):
        pass
    there = embedded(env={"BOKEH_SIGN_SESSIONS": "yes", "BOKEH_SECRET_KEY": "k" * 40})
    with tunnel_to(there, app) as tunnel:
        assert "Bokeh" in apps.get(tunnel.url)
        with pytest.raises(AppAccessError, match="signed=True"):
            tunnel.pull_session()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # tornado leaves what was refused unclosed
        gc.collect()


@pytest.mark.filterwarnings("ignore:There is no current event loop")  # Bokeh's own client
def test_attaching_to_a_server_that_has_sessions_signed(
    embedded: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its key in ``env``, its page opens, and a script has a session; ``signed`` alone gives no key."""
    machine, key = embedded(), "k" * 40
    app = apps.put(machine, "sliders.py", apps.SLIDER)
    monkeypatch.setenv("BOKEH_SECRET_KEY", key)
    with serve_on(machine, app, "--session-ids", "external-signed") as running:
        monkeypatch.delenv("BOKEH_SECRET_KEY")
        there: dict[str, Any] = {"remote_port": port_of(running), "launch": False, "signed": True}
        with tunnel_to(machine, **there, env={"BOKEH_SECRET_KEY": key}) as tunnel:
            assert "Bokeh" in apps.get(tunnel.url)
            tunnel.pull_session().close()
        with tunnel_to(machine, **there) as tunnel, pytest.raises(AppAccessError, match="BOKEH_SECRET_KEY"):
            tunnel.pull_session()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # tornado leaves what was refused unclosed
        gc.collect()


@pytest.mark.filterwarnings("ignore:There is no current event loop")  # Bokeh's own client
def test_clock_that_is_wrong_is_named(embedded: Callable[..., Machine]) -> None:
    """A server whose clock is an hour ahead opens no session for a script: told as that, not as a login."""
    machine = embedded()
    app = apps.put(machine, "sliders.py", AN_HOUR_AHEAD + apps.SLIDER)
    with tunnel_to(machine, app) as tunnel:
        apps.get(tunnel.url)  # runs it
        with pytest.raises(AppAccessError, match="60 minutes ahead"):
            tunnel.pull_session()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # tornado leaves what was refused unclosed
        gc.collect()


def test_several_processes_end_together(machine: Machine) -> None:
    """``--num-procs`` has workers that outlive a TERM to their parent, with Bokeh 3.9; all of ours end. They
    send a page of 50 MB whole."""
    app = apps.put(machine, "sliders.py", f"{apps.SLIDER}\ncurdoc().title = 'x' * 50_000_000\n")
    with tunnel_to(machine, app, args=["--num-procs", "3"]) as tunnel:
        assert len(machine.pids(app)) >= 3
        page = apps.get(tunnel.url)
        assert len(page) > 50_000_000
        assert apps.open_websocket(tunnel.url, page)["msgtype"] == "ACK"
        assert machine.pids(app)
    assert not machine.pids(app)
