"""What the Bokeh host does where only it can reach the gateway: run the server, and publish it there."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bokeh_ssh._core.endpoint import as_name, format_endpoint, nearby
from bokeh_ssh._core.errors import ForwardError, ServerNotFoundError, UsageError
from bokeh_ssh._core.events import Attached, Ready
from bokeh_ssh._core.host import Host
from bokeh_ssh._core.settings import setting
from bokeh_ssh._core.text import app_name
from bokeh_ssh._server.launch_spec import Launch
from bokeh_ssh._server.local_runner import ShellRunner
from bokeh_ssh._server.options import BOKEH_PORT, LOOPBACK
from bokeh_ssh._server.server import Server
from bokeh_ssh._tunnels.local_session import LocalSession
from bokeh_ssh._tunnels.remote_forward import RemoteForward, RemoteForwardParts

_CONNECT_TIMEOUT = 5.0
#: Keywords of a :class:`DirectTunnel` that say how a server is started; the first only with an app.
_OF_APPS = ("args", "command", "python", "setup", "cwd", "env")
START = (*_OF_APPS, "grace", "launch_timeout")


class Publication(RemoteForward):
    """Start a Bokeh server on this machine, or take one that runs, and have a gateway serve it.

    >>> publication = Publication("gateway.example.org", "me", ["dashboard.py"])
    >>> publication.state
    'new'

    :param gateway: the machine to log in to, see :class:`RemoteForward`
    :param user: the login name
    :param app: an app or several, paths here; none publishes what listens on ``local_port``
    :param args: and ``command``, ``python``, ``setup``, ``cwd``, ``env``: as for :class:`DirectTunnel`, here
    :param grace: seconds that the server outlives this program, should that vanish
    :param launch_timeout: seconds for the server to become ready
    :param extra_origins: more ``host:port`` whose pages may embed the app
    :param remote_port: the port on the gateway, open to its other users; 0 takes any free one. None publishes
        by name, and takes 5006 where that is not possible
    :param name: see :class:`RemoteForward`; None takes the app's
    :param local_port: None is 5006 without an app, and any free one with it
    :param local_host: where the server already listens
    :param keywords: those, and all others of :class:`RemoteForward`
    :raises UsageError: if an argument cannot work
    """

    def __init__(
        self,
        gateway: str | Host,
        user: str | None = None,
        app: Sequence[str] = (),
        *,
        extra_origins: Sequence[str] = (),
        remote_port: int | None = None,
        name: str | None = None,
        local_port: int | None = None,
        local_host: str | None = None,
        **keywords: Any,
    ) -> None:
        start = {each: keywords.pop(each) for each in START if each in keywords}
        elsewhere = keywords.get("remote_socket") is not None or "bind_address" in keywords
        may_be_a_port = name is None and remote_port is None and not elsewhere
        if may_be_a_port:
            name = as_name(app_name(app[0]) if app else "bokeh")
        super().__init__(
            gateway,
            user,
            remote_port=BOKEH_PORT if remote_port is None else remote_port,
            name=name,
            local_port=local_port or BOKEH_PORT,
            local_host=local_host or "localhost",
            **keywords,
        )
        self._launch: Launch | None = None
        self._apps = tuple(app)
        if app:
            given = "local_host" if local_host is not None else "local_socket" if self.local_socket else ""
            if given:
                msg = f"{setting(given)} says where a server already listens, but an app was given"
                raise UsageError(msg, hint=f"leave out the app, or {setting(given)}")
            # The other half takes the same number on the person's machine, or one nearby.
            pages = nearby(remote_port or BOKEH_PORT)
            origins = [f"{name}:{page}" for page in pages for name in ("localhost", LOOPBACK)]
            words: dict[str, Any] = {
                "app": self._apps,
                "python": _own_python(start.get("command", Launch.command), start.get("setup", ())),
                "port": local_port or None,
                "socket": not local_port,
                "origins": (*origins, *extra_origins),
                "timeout": start.pop("launch_timeout", Launch.timeout),
                "grace": 60.0,
                **start,
            }
            as_given: dict[str, Any] = {
                each: tuple(of) if isinstance(of, list) else of for each, of in words.items()
            }
            self._launch = Launch(**as_given)
        elif any(start.get(each) not in (None, (), [], {}, Launch.command) for each in _OF_APPS):
            msg = "there is no app to start"
            raise UsageError(msg, hint="name one, or leave out what is for starting it")
        # What a RemoteForward consists of, and the server.
        more = (self._launch, may_be_a_port, *self._what.args)
        self._what = dataclasses.replace(self._what, parts=PublicationParts, args=more)
        self._reset()

    def __repr__(self) -> str:
        what = ", ".join(self._launch.app) if self._launch else format_endpoint(self._target)
        where = self.name or self.remote_socket or self.remote_port
        return f"<Publication of {what} on {self._label}:{where}, {self.state}>"

    @property
    def routes(self) -> tuple[str, ...]:
        """The paths of its apps; ``"/"`` where the server was not started here."""
        return self._info.routes


class PublicationParts(RemoteForwardParts):
    """What an open :class:`Publication` consists of.

    :param launch: the server to start; None takes one that runs
    :param may_be_a_port: whether it may be published on a port where it cannot be by name
    """

    def __init__(
        self, session: LocalSession, launch: Launch | None, may_be_a_port: bool, *forward: Any
    ) -> None:
        super().__init__(session, *forward)
        self._launch = launch
        self._may_be_a_port = may_be_a_port

    def open_local(self) -> None:
        """Start the server, or see whether it runs."""
        if self._launch is None:
            self._check_answer()
            self.info = dataclasses.replace(self.info, outcome="left")
            return
        session = self._session
        session.server = server = Server.start(
            ShellRunner(), self._launch, on_event=session.on_server_event, on_log=session.life.on_log
        )
        session.life.stack.callback(self._stop, server)
        self._target = server.socket or (LOOPBACK, server.port)
        self.info = dataclasses.replace(self.info, routes=server.routes or ("/",))
        if server.no_socket or not server.socket:
            why = f" ({server.no_socket})" if server.no_socket else ""
            text = f"other users of this machine can open the server on its port {server.port}{why}"
            session.life.warn(text, server.host)

    def connect_all(self) -> tuple[Ready, bool]:
        """Connect, and have the gateway listen: by name, or else on a port."""
        again = self._again
        try:
            connected = super().connect_all()
        except ForwardError as exc:
            if not self._may_be_a_port or again or exc.temporary:
                raise
            text = f"it cannot be published by name ({exc.message}), so it is on a port"
            self._session.life.warn(text)
            self._session.connection_stack.close()
            self.info = dataclasses.replace(self.info, name=None, remote_socket=None, remote_port=BOKEH_PORT)
            connected = super().connect_all()
        if self.info.remote_port and not again:
            self._warn_of_readers(self.info.remote_port)
        return connected

    def _warn_of_readers(self, port: int) -> None:
        """Say who can open the port; and what pages need that are opened at the gateway's own address."""
        if self._options.bind_address in (LOOPBACK, "localhost", "::1"):
            self._session.life.warn(f"port {port} is open to the other users of the gateway")
            return
        text = f"port {port} is open to the gateway's network"
        here = ("localhost:", f"{LOOPBACK}:")
        if self._launch and all(origin.startswith(here) for origin in self._launch.origins):
            origins = setting(f"extra_origins={self._session.life.label}:{port}")
            text += f"; pages that are opened there stay blank without {origins} (or as readers name it)"
        self._session.life.warn(text)

    def _stop(self, server: Server) -> None:
        if server.stop():
            self.info = dataclasses.replace(self.info, outcome="ended")

    def _check_answer(self) -> None:
        target = self._target
        host = "localhost" if isinstance(target, str) else target[0]
        try:
            if isinstance(target, str):
                with socket.socket(socket.AF_UNIX) as probe:
                    probe.settimeout(_CONNECT_TIMEOUT)
                    probe.connect(target)
            else:
                socket.create_connection(target, _CONNECT_TIMEOUT).close()
        except OSError as exc:
            where = format_endpoint(target) if isinstance(target, str) else f"port {target[1]}"
            msg = f"nothing answers on {where} ({exc.strerror or exc})"
            hint = f"name an app to start, start the server first, or give its {setting('local_port')}"
            raise ServerNotFoundError(msg, host=host, hint=hint) from exc
        if not isinstance(target, str):
            self._session.life.emit(Attached(host=host, port=target[1]))


def _own_python(command: str, setup: Sequence[str]) -> str | None:
    """Choose the Python that runs this, if it is the one the person works with and can run the server."""
    active = os.environ.get("VIRTUAL_ENV") or os.environ.get("CONDA_PREFIX")
    if setup or (active and Path(active).resolve() != Path(sys.prefix).resolve()):
        return None
    package = command.split(maxsplit=1)[0] if command.split() else ""
    try:
        found = importlib.util.find_spec(package) if package.isidentifier() else None
    except (ImportError, ValueError):
        found = None
    return sys.executable if found else None
