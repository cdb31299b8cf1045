"""What is to run on the Bokeh host, and how it is found: the keywords that both tunnels share, checked."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bokeh_ssh._core.endpoint import Endpoint, nearby
from bokeh_ssh._core.errors import UsageError
from bokeh_ssh._core.forward_spec import Listen, parse_forward
from bokeh_ssh._core.host import check_port
from bokeh_ssh._server.file_sync import check_watching
from bokeh_ssh._server.launch_spec import Launch, is_option, is_plain, own_options, split
from bokeh_ssh._server.upload_set import Bundle

BOKEH_PORT = 5006
#: For ``server=``: the only one there is.
ANY = "*"
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Serve:
    """What is to run on the Bokeh host, and how it is found: the keywords that both tunnels share."""

    app: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    command: str | tuple[str, ...] = "bokeh serve"
    python: str | None = None
    setup: str | tuple[str, ...] = ()
    cwd: str | None = None
    env: Mapping[str, str] | None = None
    remote_port: int | None = None
    launch: bool | None = None
    grace: float = 600.0
    launch_timeout: float = 60.0
    extra_origins: tuple[str, ...] = ()
    allow_foreign: bool = False
    allow_others: bool = False
    allow_any_origin: bool = False
    ready: str | None = None
    forwards: tuple[tuple[Listen, Endpoint], ...] = ()
    signed: bool | None = None
    dev: bool = False
    bundle: Bundle | None = None
    server: str | None = None
    detach: bool = False

    @classmethod
    def check(
        cls,
        app: str | Sequence[str] | None,
        args: Sequence[str] = (),
        *,
        upload: bool = False,
        bring: str | Sequence[str] = (),
        **others: Any,
    ) -> Serve:
        """Make it of what the caller gave; what was not given is as in the fields above.

        :raises UsageError: if something cannot work
        """
        defaults = {each.name: each.default for each in dataclasses.fields(cls)}
        for name in ("app", "args", "bundle"):
            del defaults[name]
        others = defaults | others
        for name in ("args", "extra_origins"):
            if isinstance(others.get(name, args), str):
                msg = f"{name} is one string"
                raise UsageError(msg, hint=f'give a list: {name}=["--option", "value"]')
        if others.get("remote_port") is not None:
            check_port(others["remote_port"], "remote_port")
        others["extra_origins"] = tuple(others["extra_origins"])
        for name in ("command", "setup"):
            if not isinstance(others[name], str):
                others[name] = tuple(others[name])
        forwards = others["forwards"]
        others["forwards"] = tuple(map(parse_forward, (forwards,) if isinstance(forwards, str) else forwards))
        apps = (app,) if isinstance(app, str) else tuple(app or ())
        if apps and others.get("launch") is False:
            msg = "launch=False attaches to a server that is there, but an app was given"
            raise UsageError(msg, hint="leave out app, or launch")
        if others["server"] is not None:
            cls._check_server(apps, upload=upload, bring=bring, **others)
        if others["detach"] and others.get("launch") is False:
            msg = "detach leaves a server that was started here, but launch=False starts none"
            raise UsageError(msg, hint="leave out one of the two: what was there already stays anyway")
        if others.get("signed") not in (None, True, False):
            msg = f"signed={others['signed']!r} is not known"
            raise UsageError(msg, hint="use True, False, or None for where it is needed")
        cls._check_plain(upload=bool(upload or bring), **others)
        more = (bring,) if isinstance(bring, str) else tuple(bring)
        if (upload or more or others["dev"]) and not apps:
            msg = "there is no app to be brought there, or to be developed"
            raise UsageError(msg, hint="name one, or leave out upload, bring and dev")
        bundle = Bundle(apps, more) if upload or more else None
        if bundle:
            apps = bundle.names
            if others["dev"]:
                check_watching()
        made = cls(app=apps, args=tuple(args), bundle=bundle, **others)
        made.launch_spec(BOKEH_PORT)  # refuses now what it would refuse later
        return made

    @staticmethod
    def _check_plain(*, upload: bool, **others: Any) -> None:
        """Refuse what does not go with the kind of server.

        :raises UsageError: if there is something
        """
        plain, ready = is_plain(split(others["command"])), others["ready"]
        if ready is not None and not (isinstance(ready, str) and re.fullmatch(r"/[!-~]*", ready)):
            msg = f"ready={ready!r} is not the path of a page"
            raise UsageError(msg, hint='give one such as "/healthz"')
        if ready is not None and not plain:
            msg = "ready is for a server of your own: it is known when Bokeh is ready"
            raise UsageError(msg, hint="write {port} into command, where its port goes, or leave out ready")
        if plain and (others["signed"] or (others["dev"] and not upload)):
            msg = "only Bokeh's own servers sign sessions, and start anew by themselves (dev)"
            raise UsageError(msg, hint="leave out signed, and dev without upload")

    @staticmethod
    def _check_server(apps: Sequence[str], **others: Any) -> None:
        """Refuse what says how to start or find a server beside one that is named.

        :raises UsageError: if there is something
        """
        if not isinstance(others["server"], str) or not others["server"]:
            msg = f"server={others['server']!r} names none"
            raise UsageError(msg, hint=f'give an id, an app or a route, or "{ANY}" for the only one there')
        more = ("args", "launch", "remote_port", "upload", "bring", "dev", "signed")
        given = ["app"] * bool(apps) + [name for name in more if others.get(name)]
        if given:
            msg = f"server takes one that runs, but {given[0]} was given"
            raise UsageError(msg, hint=f"leave out {given[0]}, or server")

    @property
    def plain(self) -> bool:
        """Whether it is a web server of another kind than Bokeh's."""
        return is_plain(split(self.command))

    @property
    def page_origins(self) -> tuple[str, ...]:
        """The pages that may open WebSockets, beside the tunnel's own, as Bokeh writes them."""
        return (*self.extra_origins, "*") if self.allow_any_origin else self.extra_origins

    @property
    def must_launch(self) -> bool:
        """Whether to start a server without looking for one."""
        return bool(self.app or self.launch or (self.plain and self.launch is None))

    @property
    def attach_port(self) -> int:
        """The port to look for a server on."""
        return self.remote_port or BOKEH_PORT

    def launch_spec(self, local_port: int) -> Launch:
        """Say what to start for a page that will be opened at ``local_port`` here."""
        common: dict[str, Any] = {
            "app": self.app,
            "args": self.args,
            "command": self.command,
            "python": self.python,
            "setup": self.setup,
            "cwd": self.cwd,
            "env": dict(self.env or {}),
            "port": self.remote_port or None,
            "grace": self.grace,
            "timeout": self.launch_timeout,
            "brings": self.bundle is not None,
        }
        if self.plain:
            return Launch(**common, socket=any("{socket}" in word for word in split(self.command)))
        # Who opens a server again that was left running may find that port taken.
        pages = nearby(local_port) if self.detach else [local_port]
        ours = [f"{name}:{page}" for page in pages for name in ("localhost", LOOPBACK)]
        origins = (*ours, *self.page_origins)
        private = self.signed is not False
        own_ids = any(is_option(arg, "--session-ids") for arg in own_options(self.args))
        sign: bool | Literal["port"] = "port" if self.signed is None and not own_ids else bool(self.signed)
        return Launch(
            **common, origins=origins, socket=private and not self.remote_port, sign=sign, dev=self.dev
        )
