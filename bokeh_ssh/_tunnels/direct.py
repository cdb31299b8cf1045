"""A tunnel to a machine that can be logged in to: the Bokeh server runs there."""

from __future__ import annotations

import contextlib
import dataclasses

from bokeh_ssh._core.errors import ConnectionLostError
from bokeh_ssh._core.events import Ready
from bokeh_ssh._core.host import Host
from bokeh_ssh._core.text import app_name
from bokeh_ssh._forwarding.status import StateName
from bokeh_ssh._jobs.batch import Batch, as_batch
from bokeh_ssh._jobs.cluster_job import ClusterJob, JobRequest
from bokeh_ssh._jobs.job import Job
from bokeh_ssh._server.bootstrap import list_pythons
from bokeh_ssh._ssh.connect import OpenStream
from bokeh_ssh._ssh.connection import Connection
from bokeh_ssh._tunnels.base import Tunnel
from bokeh_ssh._tunnels.lifecycle import TunnelInfo
from bokeh_ssh._tunnels.local_session import LocalSession
from bokeh_ssh._tunnels.options import DirectOptions, arguments_of
from bokeh_ssh._tunnels.tunnel_parts import TunnelParts


class DirectTunnel(Tunnel):
    """Open a Bokeh server that runs on ``host`` (``bokeh serve`` there and ``ssh -L`` here).

    >>> tunnel = DirectTunnel("example.org", "me", app="dashboard.py")
    >>> tunnel.state
    'new'

    :param host: the machine the server runs on: a name, an address, ``user@host:port``, an ssh config
        alias, or a :class:`Host`
    :param user: the login name
    :param app: an app or several to serve: paths on that machine
    :param batch: run the server in a batch job of the cluster whose login node is ``host``: "slurm", "auto"
        for the scheduler that is found there, or a :class:`Batch`; see ``job``. The tunnel waits for the job
        (``launch_timeout`` counts from its start), and cancels it at the end; if this program is killed, the
        job ends ``grace`` seconds later
    :param queue_timeout: seconds that the job may wait in the queue; None: as long as it takes
    :param job: the number of a job of yours that runs or waits there, on Slurm also one that was not started
        with ``batch``; or the name of one that was, which is its app's, unless it was given another: the
        server is found or started in this job, which is not cancelled at the end
    :param resubmit: when the job reaches its time limit, loses its machine, or has to make room for another,
        submit a new one, and open the app in it at the same local address; pages have to be reloaded
    :param args: more options for ``bokeh serve``
    :param command: "bokeh serve", "panel serve", or a command of your own that takes Bokeh's options. With
        ``{port}`` or ``{socket}`` in it, in place of where it listens, it can be any web server:
        ``"streamlit run --server.port={port}"``; ``app`` and ``args`` are appended
    :param ready: for such a server, the path of a page that answers when it is ready; None: any answer
    :param python: the interpreter whose Bokeh is used; None uses the first on the PATH that has it
    :param setup: shell lines to run first, such as "conda activate viz"
    :param cwd: the directory to run in
    :param env: environment variables for the server
    :param upload: ``app`` names files or folders of this machine, which are uploaded, without what git
        ignores, into a private folder that is removed when the server ends; the server runs in it unless
        ``cwd`` is given
    :param bring: more files and folders to upload, beside the app; this uploads the app too
    :param dev: restart the server when the app's files change, and reload open pages; with ``upload`` the
        files are those on this machine, and each change is uploaded when it is saved
    :param local_port: None uses 5006 (the server's own port when attaching), or a free one if that is taken;
        0 uses any free one; a number uses exactly that one or raises
    :param forwards: more ports that are forwarded while the tunnel is open, as ``ssh -L`` writes them:
        ``"6006:localhost:6006"``, with ``/http`` appended if a web server is there (as ``http`` of
        :class:`LocalForward`); see the tunnel's ``forwards``
    :param remote_port: the port of a server that is started; None uses a private socket, or any free port
    :param launch: None attaches to a server that answers on ``remote_port`` (5006) and starts one if
        none does; True always starts one, False never; with an ``app`` one is always started
    :param server: take over one of your servers that runs there: its id, app or route, as ``bokeh-ssh ls``
        shows them, or "*" for the only one
    :param detach: leave the server running at the end, until ``bokeh-ssh stop``; a later tunnel takes it over
        with ``server``, and leaves it running too. With ``batch``, the job keeps running too, until its time
        limit; return to it with ``job`` and ``server``
    :param grace: seconds that the server keeps running after its client has vanished; leaving the ``with``
        ends it at once
    :param launch_timeout: seconds for the server to become ready
    :param extra_origins: more ``host:port`` whose pages may embed the app, that is, open WebSockets to it
    :param allow_foreign: attach to a server of another user
    :param allow_others: let the other users of this machine open the local port, as ``ssh -L`` does; if the
        system does not say who connects (other than Linux), ``signed=True`` keeps them out
    :param allow_any_origin: let the pages of every site open WebSockets to the server, and so use the app as
        you can; otherwise only its own pages may, and those of ``extra_origins``, for any kind of server
    :param signed: True: a server that is started accepts only sessions whose id is signed here (one that is
        attached to too, with its own ``BOKEH_SECRET_KEY`` in ``env``); None: the same if it listens on a
        port, and not on a private socket; False: it listens on a port that the other users of its machine can
        open
    :param cache: keep the static files of pages in this account's cache folder, and use them the next time;
        see ``bokeh-ssh cache``
    :param reconnect: reconnect when the connection is lost, at the same local address and to the same server
    :param isolate: run the SSH side in a child process, so that a program that computes cannot slow it down
    :param on_event: is called with each event
    :param port: this and the other keywords of a login, up to ``compression``, are those of :class:`Host`
    :raises UsageError: if an argument cannot work
    """

    @arguments_of(DirectOptions)
    def __init__(self, options: DirectOptions, host: Host) -> None:
        self._apps = options.apps
        parts = JobParts if options.batch or options.job else TunnelParts
        super().__init__(options, host, parts, options, host)

    def __repr__(self) -> str:
        what = ", ".join(self._apps) or "Bokeh"
        return f"<DirectTunnel to {what} on {self._label}, {self.state}>"

    @property
    def job(self) -> Job | None:
        """The batch job that the server runs in; None without ``batch``, and before it is submitted."""
        return self._info.job

    @property
    def state(self) -> StateName:
        """As for every tunnel; "queued" while its batch job waits to be started, or is suspended."""
        state, job = super().state, self._info.job
        waits = job is not None and job.state.waits
        return "queued" if waits and state in ("connecting", "reconnecting") else state


class JobParts(TunnelParts):
    """What an open :class:`DirectTunnel` consists of whose server runs in a batch job."""

    _options: DirectOptions
    _cluster_job: ClusterJob

    def __init__(self, session: LocalSession, options: DirectOptions, host: Host) -> None:
        super().__init__(session, options, host)
        self._job: Job | None = None
        self._stood = False
        self._ended = False  # whether the job was ended, as far as that could be

    @property
    def info(self) -> TunnelInfo:
        """What is known by now."""
        info = dataclasses.replace(super().info, job=self._job)
        if self._job and self._ended and not self._cluster_job.stays:
            return dataclasses.replace(info, outcome="ended" if self._job.state.over else "unreached")
        return info

    def open_local(self) -> None:
        """Listen here, and prepare the batch job."""
        super().open_local()
        self._acquisition.reports = False  # the server ends with its job, which reports that
        batch = as_batch(self._options.batch) or Batch()
        options = self._options
        request = JobRequest(
            batch=dataclasses.replace(batch, name=batch.name or self._job_name),
            job=str(options.job or ""),
            pythons=list_pythons(options.python_path),
            setup=options.setup,
            grace=options.grace,
            timeout=options.launch_timeout,
            queue_timeout=options.queue_timeout,
            resubmit=options.resubmit,
            reconnect=options.reconnect,
        )
        self._cluster_job = ClusterJob(
            request,
            self._host,
            dial=self._dial,
            pass_over=self._session.pass_over,
            on_event=self._session.life.emit,
            on_change=self._note_job,
        )
        self._session.life.stack.callback(self._end_job, self._cluster_job)

    @property
    def _job_name(self) -> str:
        """The name of the first app, or ours."""
        name = app_name(self._options.apps[0]) if self._options.apps else ""
        return name if name.isprintable() and name else "bokeh-ssh"

    def _dial(self, stack: contextlib.ExitStack, host: Host, stream: OpenStream | None) -> Connection:
        connection = self._session.connect(host, stack=stack, stream=stream, stream_by=self._host.target.host)
        if stream is None:  # to the login node, maybe once more while the job waits
            self._session.life.mend()
        return connection

    def _end_job(self, cluster_job: ClusterJob) -> None:
        cluster_job.end()
        self._ended = True

    def _note_job(self, job: Job) -> None:
        self._job = job

    def _reach(self) -> Connection:
        """Wait until the job runs, and connect to its machine."""
        before = self._cluster_job.submitted
        connection = self._cluster_job.connect(self._session.connection_stack)
        if self._cluster_job.submitted != before:
            self._acquisition.forget_server()  # it has ended with its job
        self._start_extra_forwards(connection)
        return connection

    def connect_all(self) -> tuple[Ready, bool]:
        """Connect, find a server or start one, and lead there."""
        try:
            ready = super().connect_all()
        except ConnectionLostError:
            if not self._stood:  # else the job is asked for when it is connected to again
                self._cluster_job.check_end()
            raise
        self._stood = True
        if self._options.detach:
            self._cluster_job.keep_job()
        return ready
