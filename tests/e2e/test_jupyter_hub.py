"""On a JupyterHub: pages of a tunnel are reached by way of its jupyter-server-proxy, in a real browser."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import apps
import browser
from beds import Machine, until
from bokeh_ssh import Event, Warned
from bokeh_ssh._core.this_machine.jupyter_hub import find_hub
from direct_tunnels import tunnel_to
from skips import missing


@contextmanager
def user_server(folder: Path) -> Iterator[str]:
    """Run a Jupyter server with its proxy at the path where a hub has it; gives its site."""
    log = folder / "jupyter.log"
    words = ["--ServerApp.base_url=/user/me@x/", "--ServerApp.token=", "--ServerApp.password=", "--port=0"]
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyter_server", "--no-browser", "--allow-root", *words],
            cwd=folder, stdout=file, stderr=file, env={**os.environ, "JUPYTER_PLATFORM_DIRS": "1"},
        )  # fmt: skip
        try:
            found = until(
                lambda: (
                    re.search(r"http://localhost:\d+(?=/user/me@x/)", log.read_text())
                    or process.poll() is not None
                ),
                timeout=60,
                what="the server to listen",
            )
            assert found is not True, log.read_text()
            yield found[0]
        finally:
            process.terminate()
            process.wait(20)


@pytest.mark.once
def test_pages_are_opened_by_way_of_the_hub(
    here: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tunnel's address on a hub is the one of its proxy, and the app there loads and answers, also where it
    is not known where the hub is, and the address is a path; pages that lead here past the hub get a 403."""
    for module in ("jupyter_server_proxy", "playwright"):
        if not importlib.util.find_spec(module):
            missing(f"{module} is not installed")
    if browser.find() is None:
        missing("no Chromium is installed")
    app = tmp_path / "app.py"
    app.write_text(browser.APP)
    with user_server(tmp_path) as site, browser.chromium() as make:
        monkeypatch.setenv("JUPYTERHUB_SERVICE_PREFIX", "/user/me@x/")
        for known in (f"{site}/user/me@x/", ""):
            monkeypatch.setenv("JUPYTERHUB_PUBLIC_URL", known)
            with tunnel_to(here, str(app), isolate=True) as tunnel:
                path = f"/user/me@x/proxy/absolute/{tunnel.local_port}/app"
                assert tunnel.url == (site + path if known else path)
                make().open(site + path).move()
                check_filter(tunnel.local_port, path)


def test_path_that_the_proxy_alters_is_told(here: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the user's name has to be quoted, the app answers at the hub's path, which the proxy does not ask
    for: that is said, and nothing of the app's name."""
    monkeypatch.setenv("JUPYTERHUB_SERVICE_PREFIX", "/user/joe%20doe/")
    app, events = apps.put(here, "app.py", browser.APP), list[Event]()
    with tunnel_to(here, app, on_event=events.append) as tunnel:
        assert "Bokeh" in apps.get(f"http://localhost:{tunnel.local_port}{tunnel.url}")
    (warned,) = (event.text for event in events if isinstance(event, Warned))
    assert "quotes the %" in warned


def check_filter(port: int, path: str) -> None:
    """Programs here get in; pages that lead here past the hub, or are no page of the hub's, do not."""
    local = f"http://localhost:{port}{path}"
    with urllib.request.urlopen(local, timeout=20) as answer:
        assert answer.status == 200
    upgrade = {"Upgrade": "websocket", "Connection": "Upgrade"}
    for headers in (
        {"Host": f"evil.example:{port}"},
        {"Host": "hub.example", "Origin": "https://evil.example", **upgrade},
    ):
        with pytest.raises(urllib.error.HTTPError, match="403") as caught:
            urllib.request.urlopen(urllib.request.Request(local, headers=headers), timeout=20)
        caught.value.close()


@pytest.mark.parametrize(
    ("environ", "address"),
    [
        ({}, None),
        ({"JUPYTERHUB_SERVICE_PREFIX": "elsewhere"}, None),
        ({"JUPYTERHUB_SERVICE_PREFIX": "/hub/user/a%40b/"}, "/hub/user/a%40b/proxy/1/x"),
        (
            {"JUPYTERHUB_SERVICE_PREFIX": "/u/", "JUPYTER_BOKEH_EXTERNAL_URL": "https://our-hub.edu:8443"},
            "https://our-hub.edu:8443/u/proxy/1/x",
        ),
        (
            {"JUPYTERHUB_SERVICE_PREFIX": "/u/", "JUPYTERHUB_HOST": "https://me.hub.org"},
            "https://me.hub.org/u/proxy/1/x",
        ),
        ({"JUPYTERHUB_SERVICE_PREFIX": "/u/", "JUPYTERHUB_HOST": "javascript:x"}, "/u/proxy/1/x"),
    ],
)
def test_hub_is_found_by_its_variables(environ: dict[str, str], address: str | None) -> None:
    """JupyterHub's own variables, and the one that Bokeh reads, say where its pages are; no others do."""
    hub = find_hub(environ)
    assert (hub.address(1, "/x") if hub else None) == address
