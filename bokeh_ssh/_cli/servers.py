"""What ``bokeh-ssh ls`` and ``stop`` do on a machine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from bokeh_ssh._cli.messages import describe_error
from bokeh_ssh._core.errors import BokehSSHError, JobError, ServerNotFoundError, SessionError, UsageError
from bokeh_ssh._core.events import OnEvent, Warned
from bokeh_ssh._core.host import as_host
from bokeh_ssh._jobs.job import ListedJob
from bokeh_ssh._jobs.job_list import JobList
from bokeh_ssh._server.local_runner import ShellRunner
from bokeh_ssh._server.registry import RemoteServer, choose, list_servers, stop_server
from bokeh_ssh._ssh.connect import connect
from bokeh_ssh._ssh.connection import Connection
from bokeh_ssh._ssh.runner import Runner

#: Where jobs cannot be listed: a machine that has the programs, and is of no cluster now, or one that takes
#: no second session so soon (MaxSessions 1).
_NO_JOBS = (JobError, SessionError)
#: How this machine is called.
HERE = "."


@contextlib.contextmanager
def _machine(host: str, on_event: OnEvent, login: dict[str, Any]) -> Iterator[Runner]:
    if host == HERE:
        yield ShellRunner()
    else:
        with connect(as_host(host, **login), on_event=on_event) as connection:
            yield connection


@contextlib.contextmanager
def _queue(connection: Runner, python: str | None) -> Iterator[JobList | None]:
    """Open the account's queue, where the machine is another one."""
    if isinstance(connection, Connection):
        with contextlib.closing(JobList(connection, python)) as queue:
            yield queue
    else:
        yield None


def find(
    host: str, python: str | None, on_event: OnEvent, login: dict[str, Any]
) -> tuple[list[RemoteServer], list[ListedJob]]:
    """List the servers of the account on a machine, and its jobs, where that is a cluster's.

    :raises BokehSSHError: if it cannot be reached or asked
    """
    with _machine(host, on_event, login) as connection:
        servers = list_servers(connection, python=python)
        try:
            with _queue(connection, python) as queue:
                return servers, queue.jobs() if queue else []
        except _NO_JOBS as exc:
            _warn_no_jobs(host, on_event, exc)
            return servers, []


def _warn_no_jobs(host: str, on_event: OnEvent, error: BokehSSHError) -> None:
    on_event(Warned(host=host, text=f"jobs cannot be listed: {describe_error(error)}"))


def end(
    host: str, name: str | None, python: str | None, on_event: OnEvent, login: dict[str, Any]
) -> RemoteServer | ListedJob:
    """End the server of that name, and all that it started, or the job of that name or number.

    :returns: what it was
    :raises ServerNotFoundError: if there is none of that name
    :raises UsageError: if there are several
    """
    with _machine(host, on_event, login) as connection:
        servers = list_servers(connection, python=python)
        fits = [each for each in servers if name is None or name in each.names]
        with contextlib.ExitStack() as stack:
            queue, jobs = None, []
            try:
                queue = stack.enter_context(_queue(connection, python))
                jobs = queue.jobs() if queue else []
            except _NO_JOBS as exc:
                if not fits:
                    _warn_no_jobs(host, on_event, exc)
            job = choose_job(jobs, fits, name, host=connection.name)
            if queue and job:
                queue.cancel(job)
                return job
        server = choose(servers, name, host=connection.name)
        stop_server(connection, server, python=python)
    return server


def choose_job(
    jobs: Sequence[ListedJob], servers: Sequence[RemoteServer], name: str | None, *, host: str
) -> ListedJob | None:
    """Choose the job of that number or name, or the only one; None where only a server can be meant.

    :param servers: those that the name fits
    :raises ServerNotFoundError: if nothing has that name
    :raises UsageError: if several have it
    """
    fits = [job for job in jobs if job.id == name] or [job for job in jobs if name in (None, job.name)]
    fits = fits or [job for job in jobs if f"{name}".startswith(f"{job.id}.")]  # as PBS has them
    if not jobs or any(server.id == name for server in servers) or (servers and not fits):
        return None
    if len(fits) == 1 and (fits[0].id == name or not servers):
        return fits[0]
    listed = ", ".join(f"job {job.id} {job.name}" for job in fits or jobs)
    if not fits:
        msg = f"there is no server or job named {name!r} of yours (there are: {listed})"
        raise ServerNotFoundError(msg, host=host, hint=f"list them: bokeh-ssh ls {host}")
    listed = ", ".join([listed, *(f"server {server.id}" for server in servers)])
    what = f"named {name!r} " if name else ""
    msg = f"there is more than one server or job {what}on {host}: {listed}"
    raise UsageError(msg, hint="give the number or the id of the one you mean")
