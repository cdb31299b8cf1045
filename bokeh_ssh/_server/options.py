"""The keywords that both tunnels share, checked: what runs on the Bokeh host, and how it is found."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from bokeh_ssh._core.endpoint import Endpoint, nearby
from bokeh_ssh._core.errors import UsageError
from bokeh_ssh._core.events import OnEvent
from bokeh_ssh._core.forward_spec import Listen, check_http, parse_forward, split_http
from bokeh_ssh._core.host import as_paths, check_port
from bokeh_ssh._core.keywords import StrPath, Word, convert_keywords
from bokeh_ssh._core.settings import set_to, setting
from bokeh_ssh._core.this_machine.jupyter_hub import HubProxy, find_hub
from bokeh_ssh._server.launch_spec import (
    Launch,
    is_option,
    is_packaged,
    is_plain,
    own_options,
    place_texts,
    split,
)
from bokeh_ssh._server.upload_set import Bundle

BOKEH_PORT = 5006
#: For ``server=``: the only one there is.
ANY = "*"
LOOPBACK = "127.0.0.1"


def _is_true(value: str) -> bool:
    """Read a variable as Bokeh does."""
    return value.lower() in ("1", "on", "t", "true", "y", "yes")


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """The keywords that both tunnels share; :class:`DirectTunnel` explains each.

    Creating it checks them. Lists become tuples, and a single text becomes a tuple if several are allowed.

    :raises UsageError: if something cannot work
    """

    #: A keyword of those below; no field here, as its place among their arguments differs.
    app = cast("StrPath | Sequence[StrPath] | None", None)

    args: Sequence[Word] = field(default=(), repr=False)
    command: str | Sequence[Word] = field(default="bokeh serve", repr=False)
    python: StrPath | None = None
    setup: str | Sequence[str] = field(default=(), repr=False)
    cwd: StrPath | None = None
    env: Mapping[str, Word] | None = field(default=None, repr=False)
    local_port: int | None = None
    forwards: str | Sequence[str] = ()
    remote_port: int | None = None
    upload: bool = False
    bring: StrPath | Sequence[StrPath] = ()
    dev: bool = False
    ready: str | None = None
    launch: bool | None = None
    server: str | None = None
    detach: bool = False
    grace: float = 600.0
    launch_timeout: float = 60.0
    extra_origins: Sequence[str] = ()
    allow_foreign: bool = False
    allow_others: bool = False
    allow_any_origin: bool = False
    signed: bool | None = None
    cache: bool = True
    reconnect: bool = True
    isolate: bool = True
    on_event: OnEvent | None = None

    def __post_init__(self) -> None:
        for name in ("args", "extra_origins"):
            if isinstance(getattr(self, name), str):
                msg = f"{setting(name)} is one string"
                raise UsageError(msg, hint=f'give a list: {setting(name + "=")}["--option", "value"]')
        convert_keywords(self)
        for name in ("local_port", "remote_port"):
            if getattr(self, name) is not None:
                check_port(getattr(self, name), name)
        for name in ("app", "args", "command", "setup", "forwards", "bring", "extra_origins"):
            value = getattr(self, name)
            if not isinstance(value, str):
                object.__setattr__(self, name, () if value is None else tuple(value))
            elif name not in ("command", "setup"):  # those are taken apart there
                object.__setattr__(self, name, (value,))
        self.parsed_forwards  # noqa: B018 - raises if one cannot be read
        if self.app and self.launch is False:
            msg = f"{setting('launch=False')} attaches to a server that is there, but an app was given"
            raise UsageError(msg, hint=f"leave out the app, or {setting('launch=False')}")
        if self.server is not None:
            self._check_server()
        if self.detach and self.launch is False:
            attaches = setting("launch=False")
            msg = f"{setting('detach')} leaves a server that was started here, but {attaches} starts none"
            raise UsageError(
                msg, hint="leave out one of the two: a server that was not started here keeps running anyway"
            )
        if self.signed not in (None, True, False):
            msg = f"{set_to('signed', self.signed)} is not known"
            raise UsageError(msg, hint="use True, False, or None for where it is needed")
        self._check_plain()
        self._check_session_ids()
        if (self.upload or self.bring or self.dev) and not self.app:
            msg = "there is no app to upload or to watch"
            raise UsageError(
                msg,
                hint=f"name one, or leave out {setting('upload')}, {setting('bring')} and {setting('dev')}",
            )
        self.bundle  # noqa: B018 - raises if something is not there
        self.launch_spec(BOKEH_PORT)  # refuses now what it would refuse later

    def _check_plain(self) -> None:
        """Refuse settings that do not fit the kind of server.

        :raises UsageError: if there is something
        """
        if self.ready is not None and not (
            isinstance(self.ready, str) and re.fullmatch(r"/[!-~]*", self.ready)
        ):
            msg = f"{set_to('ready', self.ready)} is not the path of a page"
            raise UsageError(msg, hint='give one such as "/healthz"')
        if self.ready is not None and not self.plain:
            msg = f"{setting('ready')} is for a server of your own: it is known when Bokeh is ready"
            raise UsageError(
                msg, hint=f"write {{port}} into {setting('command')}, where its port goes, or leave that out"
            )
        if self.plain and (self.signed or (self.dev and not (self.upload or self.bring))):
            msg = f"only Bokeh's own servers sign sessions, and restart by {setting('dev')}"
            raise UsageError(
                msg, hint=f"leave out {setting('signed')}, and {setting('dev')} without {setting('upload')}"
            )

    def _check_session_ids(self) -> None:
        """Refuse options with which every page would get a 403.

        :raises UsageError: if it does
        """
        words = () if self.plain else (*self.words, *self._own_args, "")
        for word, following in itertools.pairwise(words):
            value = word.partition("=")[2] if "=" in word else following
            if is_option(word, "--session-ids") and value == "external-signed":
                msg = "with --session-ids external-signed every page opens at a 403, as nobody signs its id"
                hint = (
                    f"leave it out, and give {setting('signed=True')}, which signs them "
                    "here (with BOKEH_SECRET_KEY of the server's environment, if it is there)"
                )
                raise UsageError(msg, hint=hint)

    def _check_server(self) -> None:
        """Refuse settings for starting or finding a server if one is named.

        :raises UsageError: if there is something
        """
        if not isinstance(self.server, str) or not self.server:
            msg = f"{set_to('server', self.server)} names none"
            raise UsageError(msg, hint=f'give an id, an app or a route, or "{ANY}" for the only one there')
        more = ("app", "args", "launch", "remote_port", "upload", "bring", "dev", "signed")
        given = next((name for name in more if getattr(self, name)), None)
        if given:
            msg = f"{setting('server')} takes over one that runs, and does not go with {setting(given)}"
            raise UsageError(msg, hint=f"leave out {setting(given)}, or {setting('server')}")

    @functools.cached_property
    def parsed_forwards(self) -> tuple[tuple[Listen, Endpoint, bool], ...]:
        """``forwards``, read: where each listens here, where it leads, and whether to a web server."""
        read = []
        for given in self.forwards:
            spec, http = split_http(given)
            listen, target = parse_forward(spec)
            if http:
                check_http(listen)
            read.append((listen, target, http))
        return tuple(read)

    @functools.cached_property
    def bundle(self) -> Bundle | None:
        """The files to upload; None if there are none."""
        if not (self.upload or self.bring):
            return None
        return Bundle(as_paths(self.app), as_paths(self.bring))

    @functools.cached_property
    def apps(self) -> tuple[str, ...]:
        """The apps as they are named on the other machine."""
        return self.bundle.names if self.bundle else as_paths(self.app)

    @functools.cached_property
    def words(self) -> tuple[str, ...]:
        """``command``, split into words.

        :raises UsageError: if it is empty or has unbalanced quotes
        """
        return split(self.command if isinstance(self.command, str) else tuple(map(str, self.command)))

    @functools.cached_property
    def _own_args(self) -> Sequence[str]:
        """``args`` without what is the app's own."""
        return own_options([*map(str, self.args)])

    @functools.cached_property
    def python_path(self) -> str | None:
        """``python`` as a text."""
        return None if self.python is None else str(self.python)

    @functools.cached_property
    def variables(self) -> dict[str, str]:
        """``env`` as texts."""
        return {name: str(value) for name, value in (self.env or {}).items()}

    @functools.cached_property
    def plain(self) -> bool:
        """Whether it is not a Bokeh server."""
        return is_plain(place_texts(self.words, self.variables))

    @functools.cached_property
    def page_origins(self) -> tuple[str, ...]:
        """The pages that may open WebSockets, beside the tunnel's own, as Bokeh writes them."""
        return (*self.extra_origins, "*") if self.allow_any_origin else tuple(self.extra_origins)

    @property
    def must_launch(self) -> bool:
        """Whether to start a server without looking for one: there is an app, or one in the command."""
        if self.apps or self.launch is not None:
            return bool(self.apps or self.launch)
        return self._has_own_command

    @property
    def names_app_in_command(self) -> bool:
        """Whether only the command says which apps a Bokeh server has."""
        return not self.apps and not self.plain and self._has_own_command

    @property
    def _has_own_command(self) -> bool:
        return len(self.words) > 2 or not is_packaged(self.words)

    @property
    def attach_port(self) -> int:
        """The port to look for a server on."""
        return self.remote_port or BOKEH_PORT

    @property
    def attach_key(self) -> str:
        """What signs the sessions of a server that is there; empty if they are not to be signed."""
        return self.variables.get("BOKEH_SECRET_KEY", "") if self.signed else ""

    @functools.cached_property
    def hub(self) -> HubProxy | None:
        """The JupyterHub through which pages are opened, if this program runs on one."""
        return find_hub()

    def launch_spec(
        self,
        local_port: int,
        *,
        compresses: Callable[[], bool] = lambda: False,
        packs: bool = False,
        sockets: bool = True,
        must_sign: bool = False,
    ) -> Launch:
        """Return what to start for pages at ``local_port`` of this machine.

        :param compresses: see :class:`Launch`, as for ``packs``
        :param sockets: whether the SSH server connects to them
        :param must_sign: whether others can get to the server, wherever it listens itself
        """
        common: dict[str, Any] = {
            "app": self.apps,
            "args": self.args,
            "command": self.command,
            "python": self.python_path,
            "setup": self.setup,
            "cwd": self.cwd,
            "env": self.variables,
            "port": self.remote_port or None,
            "grace": self.grace,
            "timeout": self.launch_timeout,
            "brings": self.bundle is not None,
            "compresses": compresses,
            "packs": packs,
        }
        if self.plain:
            return Launch(
                **common,
                socket=sockets
                and any("{socket}" in text for text in place_texts(self.words, self.variables)),
            )
        # Who opens a server again that was left running may find that port taken.
        pages = nearby(local_port) if self.detach else [local_port]
        ours = [f"{name}:{page}" for page in pages for name in ("localhost", LOOPBACK)]
        hub = self.hub
        origins = (*ours, *self.page_origins, *((hub.origin,) if hub else ()))
        private = self.signed is not False
        own_ids = any(is_option(arg, "--session-ids") for arg in self._own_args)
        sign: bool | Literal["port"] = "port" if self.signed is None and not own_ids else bool(self.signed)
        if sign == "port" and _is_true(self.variables.get("BOKEH_SIGN_SESSIONS", "")):
            sign = True  # the same, but with a key that is known here too
        return Launch(
            **common,
            origins=origins,
            socket=private and sockets and not self.remote_port,
            sign=bool(sign) if must_sign else sign,
            dev=self.dev,
            prefix=hub.root(local_port) if hub else "",
        )
