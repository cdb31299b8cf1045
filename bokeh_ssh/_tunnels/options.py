"""The keywords of tunnels and forwards, as records: signatures, type checks and flags come from these.

The records do not import paramiko, so the command line can make its flags from them quickly.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Concatenate, Literal, ParamSpec, TypeVar

from bokeh_ssh._core.errors import UsageError
from bokeh_ssh._core.events import OnEvent
from bokeh_ssh._core.host import LOGIN_KEYWORDS, Host, Login, as_host
from bokeh_ssh._core.keywords import StrPath, convert_keywords, is_time
from bokeh_ssh._core.settings import set_to, setting
from bokeh_ssh._jobs.batch import Batch, as_batch
from bokeh_ssh._server.options import BOKEH_PORT, LOOPBACK, ServerOptions

Reverse = Literal["auto", "host", "relay"]

_Keywords = ParamSpec("_Keywords")
_Record = TypeVar("_Record")
_Made = TypeVar("_Made")


@dataclass(frozen=True, kw_only=True)
class DirectOptions(Login, ServerOptions):
    """The arguments of :class:`DirectTunnel`."""

    host: str | Host = field(kw_only=False)
    user: str | None = field(default=None, kw_only=False)
    app: StrPath | Sequence[StrPath] | None = field(default=None, kw_only=False)
    batch: str | Batch | None = None
    queue_timeout: float | None = None
    resubmit: bool = False
    job: str | int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.user and self.user.endswith((".py", ".ipynb")) and not self.app:
            msg = f"{set_to('user', self.user)} is the second argument, and looks like an app"
            raise UsageError(msg, hint=f"give the app by its name: {set_to('app', self.user)}")
        object.__setattr__(self, "batch", as_batch(self.batch))
        if self.queue_timeout is not None and not is_time(self.queue_timeout, zero=False):
            msg = f"{set_to('queue_timeout', self.queue_timeout)} is no time to wait"
            raise UsageError(msg, hint="give seconds, or leave it out to wait as long as it takes")
        if self.job is not None:
            self._check_job()
        waits = self.queue_timeout is not None and self.job is None
        for name, needs_job in (("resubmit", self.resubmit), ("queue_timeout", waits)):
            if needs_job and self.batch is None:
                msg = f"{setting(name)} is for a batch job"
                raise UsageError(msg, hint=f"give {setting('batch')}, or leave that out")
        for name, given in (("server", self.server), ("launch", self.launch is False), ("job", self.job)):
            if given and self.batch is not None:
                msg = f"{setting('batch')} starts a server in a new job, but {setting(name)} was given"
                raise UsageError(msg, hint=f"leave out {setting('batch')}, or {setting(name)}")

    def _check_job(self) -> None:
        job = str(self.job)
        if isinstance(self.job, bool) or not job.strip() or not job.isprintable() or job.startswith("-"):
            msg = f"{set_to('job', self.job)} is not the number or the name of a job"
            raise UsageError(msg, hint="give one that bokeh-ssh ls lists")
        object.__setattr__(self, "job", job)


@dataclass(frozen=True, kw_only=True)
class GatewayOptions(Login, ServerOptions):
    """The arguments of :class:`GatewayTunnel`."""

    gateway: str | Host = field(kw_only=False)
    user: str | None = field(default=None, kw_only=False)
    host: str | Host | None = None
    app: StrPath | Sequence[StrPath] | None = None
    reverse: Reverse = "auto"
    name: str | None = None
    gateway_port: int | None = None
    gateway_address: str | None = None
    forward_agent: bool = False
    allow_exposed: bool = False


@dataclass(frozen=True, kw_only=True)
class LocalForwardOptions(Login):
    """The arguments of :class:`LocalForward`."""

    host: str | Host = field(kw_only=False)
    user: str | None = field(default=None, kw_only=False)
    remote_port: int | None = None
    remote_socket: StrPath | None = None
    local_port: int | None = 0
    remote_host: str = "localhost"
    bind_address: str = "localhost"
    allow_others: bool | None = None
    local_socket: StrPath | None = None
    http: bool = False
    cache: bool = True
    reconnect: bool = True
    isolate: bool = False
    on_event: OnEvent | None = None

    def __post_init__(self) -> None:
        convert_keywords(self)


@dataclass(frozen=True, kw_only=True)
class RemoteForwardOptions(Login):
    """The arguments of :class:`RemoteForward`."""

    gateway: str | Host = field(kw_only=False)
    user: str | None = field(default=None, kw_only=False)
    remote_port: int = BOKEH_PORT
    remote_socket: StrPath | None = None
    name: str | None = None
    local_port: int = BOKEH_PORT
    local_host: str = "localhost"
    local_socket: StrPath | None = None
    bind_address: str = LOOPBACK
    allow_exposed: bool = False
    reconnect: bool = True
    isolate: bool = False
    on_event: OnEvent | None = None

    def __post_init__(self) -> None:
        convert_keywords(self)


#: Keywords of a DirectTunnel alone; see DirectOptions.
_OF_JOBS = ("batch", "job", "queue_timeout", "resubmit")


def _refuse_job(keywords: Mapping[str, object]) -> None:
    for name in _OF_JOBS:
        if name in keywords:
            msg = f"{setting(name)} is for a DirectTunnel: jobs are submitted from their cluster's login node"
            hint = f"open a DirectTunnel to that, and give what is in front of it as {setting('jump')}"
            raise UsageError(msg, hint=hint)


def arguments_of(
    record: Callable[_Keywords, _Record],
) -> Callable[[Callable[[_Made, _Record, Host], None]], Callable[Concatenate[_Made, _Keywords], None]]:
    """Make a constructor have the signature of a record, for callers, type checkers and editors.

    It gets the record, checked, and the machine to log in to: the record's first argument with the login
    keywords.
    """
    parameters = list(inspect.signature(record).parameters.values())
    machine, user = (each.name for each in parameters[:2])
    own = inspect.get_annotations(record)
    parameters.sort(key=lambda each: (each.kind, each.name not in own))

    def decorate(
        init: Callable[[_Made, _Record, Host], None],
    ) -> Callable[Concatenate[_Made, _Keywords], None]:
        @functools.wraps(init)
        def __init__(  # noqa: N807  # it becomes one
            self: _Made, /, *args: _Keywords.args, **keywords: _Keywords.kwargs
        ) -> None:
            if record is GatewayOptions:
                _refuse_job(keywords)
            options = record(*args, **keywords)
            given = {name: value for name, value in keywords.items() if name in LOGIN_KEYWORDS}
            init(self, options, as_host(getattr(options, machine), getattr(options, user), **given))

        # A wrong argument is reported as one of the class.
        record.__init__.__qualname__ = init.__qualname__
        itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        __init__.__signature__ = inspect.Signature([itself, *parameters])  # type: ignore[attr-defined]
        __init__.__annotations__ = typing.get_type_hints(record)
        return __init__

    return decorate
