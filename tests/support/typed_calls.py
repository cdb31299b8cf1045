"""Calls that a type checker takes, and calls that it refuses: read by mypy (``nox -s types``), never run.

An ignored error that is none any more is an error itself, so each of these says that it is still refused.
"""

from __future__ import annotations

from typing import Any

from bokeh_ssh import DirectTunnel, GatewayTunnel, Host, LocalForward, RemoteForward


def taken(host: Host, login: dict[str, Any]) -> None:
    """Make each object with keywords of each kind."""
    DirectTunnel("h", "me", "app.py", grace=60, env={"A": "b"}, signed=None, port=22, host_keys="ask")
    DirectTunnel(host, app=["a.py", "b.py"], command=["panel", "serve"], on_event=print, **login)
    GatewayTunnel("g", "me", host=host, app="app.py", reverse="relay", detach=True, jump=["a", host])
    LocalForward("h", remote_port=1, local_socket="/run/x", key_filename=["id"], timeout=5)
    RemoteForward("g", name="app", prompt=lambda question: question.text, compression=True)
    Host("h", "me", port=22, password="x", jump=())
    DirectTunnel("h", app="app.py").open().close()


def refused(host: Host) -> None:
    """Make each with a wrong name, a wrong type, a wrong word, or too much."""
    DirectTunnel("h", grace="x")  # type: ignore[arg-type]
    DirectTunnel("h", gracs=1.0)  # type: ignore[call-arg]
    DirectTunnel("h", port="22")  # type: ignore[arg-type]
    DirectTunnel("h", host_keys="never")  # type: ignore[arg-type]
    DirectTunnel(app="app.py")  # type: ignore[call-arg]
    DirectTunnel("h", reverse="relay")  # type: ignore[call-arg]
    GatewayTunnel("g", host=host, reverse="sideways")  # type: ignore[arg-type]
    GatewayTunnel("g", "me", host)  # type: ignore[call-arg, arg-type]
    LocalForward("h", remote_port=1, pasword="x")  # type: ignore[call-arg]
    RemoteForward("g", remote_port=None)  # type: ignore[arg-type]
    Host("h", port="22")  # type: ignore[arg-type]
    Host("h", pasword="x")  # type: ignore[call-arg]
