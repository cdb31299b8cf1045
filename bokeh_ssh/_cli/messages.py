"""Events in words, as the command line shows them. Text only."""

from __future__ import annotations

import dataclasses
import functools
import time
from dataclasses import dataclass
from typing import Literal

from bokeh_ssh._cli.options.words import as_flag
from bokeh_ssh._cli.tunnels.registry import HeldTunnel
from bokeh_ssh._core import events
from bokeh_ssh._core.errors import BokehSSHError, PromptRequiredError, UnknownHostKeyError
from bokeh_ssh._core.settings import Wording
from bokeh_ssh._core.text import clean, describe_age, describe_bytes
from bokeh_ssh._forwarding.status import describe_traffic, describe_way
from bokeh_ssh._server.registry import RemoteServer

Kind = Literal["begin", "done", "note", "warn", "fail"]

#: Characters that are shown of a line.
LONGEST = 1000
_SHOWN = 5  # names in one line
_WAITING = "Waiting for Bokeh to answer all the way"
_ENDS = {
    "ended": "the server has ended",
    "left": "the server keeps running",
    "unreached": "the server ends by itself",
}


@dataclass(frozen=True)
class Line:
    """What an event looks like.

    :param more: what stands below it, as it was written
    :param then: what is waited for after it
    :param wait: seconds until what a line of kind "begin" says is tried
    :param total: whether it says how long all took
    :param loud: whether it is shown to those who want to hear of trouble only
    """

    kind: Kind
    text: str
    more: str = ""
    then: str = ""
    wait: float = 0.0
    total: bool = False
    loud: bool = False


#: Events that one sentence says.
_SENTENCES = {
    events.HostKeyAdded: Line("note", "Added the {0.key_type} key of {0.host} ({0.fingerprint}) to {0.path}"),
    events.HostKeyVerified: Line(
        "done", "Reached {0.host}; its host key is known ({0.key_type})", then="Logging in to {0.host}"
    ),
    events.TouchRequested: Line(
        "note", "Touch the security key, to log in to {0.host} with {0.key}", loud=True
    ),
    events.JobSubmitted: Line("done", "Submitted job {0.job} on {0.host}", then="Waiting for job {0.job}"),
    events.JobEnded: Line("note", "Job {0.job} is over: {0.why}"),
    events.Launching: Line("begin", "Launching the server on {0.host}"),
    events.Ready: Line("done", "Ready", total=True),
    events.ServerResponsive: Line("note", "The server on {0.host} responds again"),
    events.Warned: Line("warn", "{0.host}: {0.text}"),
}


@functools.singledispatch
def describe(event: events.Event) -> Line | None:
    """Say an event in words; None for those that an error or another event says better.

    >>> from bokeh_ssh import Launching
    >>> describe(Launching(host="node17", command=("python3", "-m", "bokeh"))).text
    'Launching the server on node17'
    """
    line = _SENTENCES.get(type(event))
    return line and dataclasses.replace(line, text=line.text.format(event), then=line.then.format(event))


@describe.register
def _(event: events.Connecting) -> Line:
    via = f" through {event.via}" if event.via else ""
    port = f", port {event.port}" if event.port else ""
    return Line("begin", f"Connecting to {event.host}{port}{via}")


@describe.register
def _(event: events.Authenticated) -> Line:
    return Line("done", f"Logged in to {event.host} as {event.user} ({', '.join(event.methods)})")


@describe.register
def _(event: events.JobWaiting) -> Line:
    why = f": {event.reason}" if event.reason else ""
    when = f", may start {_clock(event.estimated_start)}" if event.estimated_start else ""
    end = "leaves" if event.stays else "cancels"
    return Line("begin", f"Job {event.job} waits{why}{when} (Ctrl-C {end} it)")


@describe.register
def _(event: events.JobStarted) -> Line:
    until = f", ends {_clock(event.ends_at)}" if event.ends_at else ""
    text = f"Job {event.job} runs on {event.node}{until}"
    return Line("done", text, then=f"Connecting to {event.node}")


@describe.register
def _(event: events.JobReached) -> Line:
    way = {"srun": "by srun", "tcp": "by TCP", "back": "as the job connects back"}.get(event.way, event.way)
    return Line("done", f"Reached job {event.job} on {event.node} ({way})")


@describe.register
def _(event: events.JobEnding) -> Line:
    if event.seconds is None:
        return Line("warn", f"Job {event.job} was warned by the scheduler: it may be ended soon")
    left = f"{event.seconds / 60:.0f} min" if event.seconds >= 90 else f"{event.seconds:.0f} s"
    return Line("warn", f"Job {event.job} ends in {left}, at its time limit")


@describe.register
def _(event: events.Uploading) -> Line | None:
    size, files = describe_bytes(event.size), f"{event.files} file{'s' * (event.files != 1)}"
    if event.sent == event.size:
        text = f"Uploaded {files}, {size}, to {event.host}"
        return Line("done", text, then=f"Launching the server on {event.host}")
    if event.sent == 0:
        return Line("begin", f"Uploading {files}, {size}, to {event.host}")
    return None


@describe.register
def _(event: events.Updated) -> Line:
    names = [*event.changed, *(f"{name} (removed)" for name in event.removed)]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return Line("note", f"Uploaded to {event.host}: {', '.join(names[:_SHOWN])}{more}")


@describe.register
def _(event: events.Launched) -> Line:
    where = f"port {event.port}, " if event.port else ""
    text = f"Started {event.versions or 'the server'} on {event.host}, {where}process {event.pid}"
    return Line("done", text, then=_WAITING)


@describe.register
def _(event: events.Attached) -> Line:
    if event.id:
        text = f"Took over your server {event.id} on {event.host}, process {event.pid}"
    elif event.name:
        text = f"Found {event.name}, published on {event.host}"
    else:
        text = f"Found a server on port {event.port} of {event.host}"
    return Line("done", text, then=_WAITING)


@describe.register
def _(event: events.ReverseForwarded) -> Line:
    by = "the Bokeh host" if event.by == "host" else "this machine"
    what = f"Port {event.port}" if event.port else "A private socket"
    return Line("done", f"{what} of {event.host} leads to it, opened by {by}", event.reason, _WAITING)


@describe.register
def _(event: events.Reconnecting) -> Line:
    again = f"Reconnecting to {event.host}"
    if event.attempt == 1:
        return Line("warn", f"Lost {event.host}: {event.reason}", then=again)
    return Line("begin", again, event.reason, wait=event.delay)


@describe.register
def _(event: events.Reconnected) -> Line:
    text = "Reconnected" if event.same_server else "Reconnected, with a new server: load the page again"
    return Line("done", text, loud=True)


@describe.register
def _(event: events.AppFailed) -> Line:
    text = "was changed, and cannot run as it is" if event.reload else "failed, and its page is blank"
    return Line("fail", f"The app on {event.host} {text}", event.traceback)


@describe.register
def _(event: events.ServerUnresponsive) -> Line:
    why = {"stopped": "its process is stopped", "busy": "it is busy, or hangs"}
    text = f"The server on {event.host} does not respond: {why.get(event.reason, event.reason)}"
    return Line("warn", text)


@describe.register
def _(event: events.Closed) -> Line:
    what = _ENDS.get(event.server, "")
    return Line("note", f"Closed the connection to {event.host}" + (f"; {what}" if what else ""))


def describe_end(event: events.Closed, before: events.Event | None) -> Line | None:
    """Say that it is closed, but not again what the loss before it, or the error after it, says.

    :param before: the :class:`Lost`, :class:`ServerExited` or :class:`JobEnded` since when nothing works;
        None where all works
    """
    if before is None:
        return describe(event)
    what = "" if isinstance(before, (events.ServerExited, events.JobEnded)) else _ENDS.get(event.server, "")
    return Line("note", what[0].upper() + what[1:]) if what else None


def _clock(when: float) -> str:
    """Say a time as people do: today's without the day."""
    at = time.localtime(when)
    today = at[:3] == time.localtime()[:3]
    return time.strftime("%H:%M" if today else "%a %d %b %H:%M", at)


def describe_error(error: BokehSSHError, wording: Wording = as_flag) -> str:
    """Return the one line of an error that says what failed; where it did is ``error.host``.

    :param wording: words the settings that it names
    """
    return clean(error.in_words(wording)[0], LONGEST)


def next_step(error: BokehSSHError, wording: Wording = as_flag) -> str:
    """Return the one line of an error that says what to do; empty where there is nothing to do."""
    if isinstance(error, PromptRequiredError):
        return "run it on a terminal, where it can ask, or name a key with --key-filename"
    if isinstance(error, UnknownHostKeyError) and "prompt=" in (error.hint or ""):
        how = "or use --host-keys accept-new after comparing the fingerprint"
        return f"run it on a terminal, where it can ask, {how}"
    return clean(error.in_words(wording)[1], LONGEST)


#: What stands over the rows of :func:`row`.
HEAD = ("ID", "STATE", "AGE", "LISTENS ON", "APP")


def row(server: RemoteServer, now: float | None = None) -> tuple[str, ...]:
    """Say what a server is, in a row under :data:`HEAD`.

    >>> row(RemoteServer(host="h", node="n", id="1a", state="running", born=40.0, apps=("a.py",)), now=100.0)
    ('1a', 'waiting', '1 min', '-', 'a.py')
    """
    state = server.state
    if state == "running":
        state = "in use" if server.attached else "left" if server.detached else "waiting"
    where = "private socket" if server.socket else f"port {server.port}" if server.port else "-"
    where += f", {server.published}" if server.published else ""
    apps = " ".join(server.apps) or " ".join(server.command) or "-"
    return (server.id, state, describe_age((time.time() if now is None else now) - server.born), where, apps)


#: What stands over the rows of :func:`tunnel_row`.
TUNNEL_HEAD = ("PROCESS", "STATE", "AGE", "ADDRESS", "HOST", "APP")


def tunnel_row(tunnel: HeldTunnel, now: float | None = None) -> tuple[str, ...]:
    """Say what a tunnel of this machine is, in a row under :data:`TUNNEL_HEAD`."""
    age = describe_age((time.time() if now is None else now) - tunnel.began) if tunnel.began else "-"
    addresses = " ".join(tunnel.addresses) or "-"
    return str(tunnel.pid), tunnel.state, age, addresses, tunnel.host or "-", " ".join(tunnel.apps) or "-"


def tunnel_way(tunnel: HeldTunnel) -> str:
    """Say by which machines a tunnel goes, and how each is."""
    way = describe_way(tunnel.status) if tunnel.status else f"here -- {tunnel.host or '?'}"
    return " -- ".join((way, *filter(None, [" ".join(tunnel.apps)])))


def tunnel_traffic(tunnel: HeldTunnel) -> str:
    """Say what a tunnel has carried, and what it has survived."""
    return describe_traffic(tunnel.status) if tunnel.status else f"process {tunnel.pid} does not answer"


def status_row(tunnel: HeldTunnel) -> tuple[str, ...]:
    """Say all of that in columns for other programs: bytes and seconds, as numbers."""
    status = tunnel.status
    figures: tuple[str, ...] = ()
    if status:
        rate = f"{status.rate:.0f}"
        counts = (status.received, status.sent, rate, status.sessions, f"{status.uptime:.0f}", status.losses)
        figures = tuple(map(str, counts))
    return str(tunnel.pid), tunnel.state, " ".join(tunnel.addresses) or "-", tunnel_way(tunnel), *figures
