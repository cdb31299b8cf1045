"""The batch job of a tunnel, from the login node on: submitted, waited for, reached, cancelled at the end.

What stays while lines come and go: the login, as long as it lives, since a new one may ask a person for a
code; the warden that it carries; and the job. While the tunnel stands, the scheduler is asked only before a
warning of the time limit, which may have been raised: the end of the job is the end of the connection to it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bokeh_ssh._core.backoff import pause_before
from bokeh_ssh._core.errors import (
    BokehSSHError,
    ConnectionLostError,
    JobEndedError,
    JobError,
    JobNeverStartsError,
    LaunchError,
    QueueTimeoutError,
    SessionError,
    SubmitError,
    TunnelClosedError,
    UsageError,
)
from bokeh_ssh._core.events import (
    Event,
    JobEnded,
    JobEnding,
    JobReached,
    JobStarted,
    JobSubmitted,
    JobWaiting,
    Warned,
)
from bokeh_ssh._core.host import Host
from bokeh_ssh._core.settings import setting
from bokeh_ssh._core.waiting import wait
from bokeh_ssh._jobs import scheduler, slurm
from bokeh_ssh._jobs.batch import CHECK_HINT, Batch
from bokeh_ssh._jobs.job import Job, JobState, explain_end, read_clock
from bokeh_ssh._jobs.job_login import JobLogin
from bokeh_ssh._jobs.job_news import JobNews
from bokeh_ssh._jobs.job_stream import check_session, open_job_stream
from bokeh_ssh._jobs.script import job_script
from bokeh_ssh._jobs.warden import Warden
from bokeh_ssh._ssh.connect import OpenStream
from bokeh_ssh._ssh.connection import Connection

log = logging.getLogger("bokeh_ssh.job")

#: Logs in to a machine: what must be closed goes on the stack.
Dial = Callable[[contextlib.ExitStack, Host, OpenStream | None], Connection]

#: Seconds from submitting to the first question, between the next two, and between any two at most.
_FIRST = 1.0
_LEAST = 2.0
_MOST = 30.0
_GROWTH = 1.3
#: Questions in a row with a reason that no waiting ends, before it is believed.
_SURE = 2
#: Seconds that the scheduler may take to say how a job ended that has never run.
_VERDICT = 5.0
#: Seconds for the holder of a job that runs already to answer, once its machine is reached.
_PATIENCE = 3.0
#: Seconds between two tries to reach a job that has just started.
_PAUSE = 2.0
#: How a job may end that is submitted again, if that is wanted: of these, nobody has wanted the end.
_AGAIN = (JobState.TIMEOUT, JobState.NODE_FAIL, JobState.PREEMPTED)
#: Seconds before the time limit at which there is a warning.
_MARKS = (600.0, 120.0)
#: Seconds to its time limit at which the scheduler's warning may be due to that.
_NEAR = 180.0
#: Seconds for the accounting to say who has cancelled a job; it may be a slow machine of its own.
_ACCOUNTING = 5.0
#: Seconds of difference between two clocks that are none: a question takes as long, and a job would change.
_INEXACT = 10.0
#: Seconds for one try to find what a job has left in the home; the scheduler is asked between two.
_MEETING = 10.0
#: Where the job's script writes until its holder has begun; in the home, which a node has too.
_OUTPUT = "/.bokeh-ssh-job-%j.log"
#: Says where the home is, if it takes a file: where it does not, Slurm ends the job, and says nothing of it.
_FIND_HOME = (
    'f=$HOME/.bokeh-ssh-job-$$.log; (echo >"$f") 2>/dev/null; s=$?; rm -f -- "$f"; '
    '[ "$s" != 0 ] || printf "%s\\n" "$HOME"'
)
#: One or more jobs of an array, as Slurm (``7_1``, ``7_[1-3]``), PBS and LSF (``7[1]``) list it.
_IN_ARRAY = re.compile(r"^\d+(?:_\d|_?\[)")
_NOWHERE = "/dev/null"  # for output, where the home has a name that sbatch would take for a pattern
_LINES = 20  # of what the job wrote, in an error


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """What job is wanted, and how long to wait for it.

    :ivar batch: what to submit
    :ivar job: the number or the name of a job that is there, in place of one that is submitted; it is never
        cancelled. In one that we have not submitted, our holder runs as a step beside what runs in it
    :ivar pythons: interpreters on the login node and on the nodes; the first that runs is taken
    :ivar setup: steps that may bring one
    :ivar grace: seconds that the job outlives a client that has vanished, while it waits and while it runs
    :ivar timeout: seconds from the job's start until it must answer
    :ivar queue_timeout: seconds that it may wait; None: as long as it takes
    :ivar resubmit: whether a new job is submitted for one that has served, and reaches its time limit, loses
        its machine, or makes room for another
    :ivar reconnect: whether a login that is lost while the job waits is made again
    """

    batch: Batch
    job: str = ""
    pythons: Sequence[str]
    setup: str | Sequence[str]
    grace: float
    timeout: float
    queue_timeout: float | None
    resubmit: bool
    reconnect: bool


class _Progress:
    """How far one job has come; each has keys of its own.

    :ivar marks: warnings of the time limit that are not given yet
    :ivar output: where the scheduler puts what the job writes; empty where that is lost
    :ivar asked: when the scheduler was asked for the last answer
    :ivar silent: whether it was reported that the scheduler does not answer
    :ivar started: whether the start was reported
    :ivar reached: whether its machine was reached, so that what it wrote is of no interest
    :ivar patience: seconds for its holder to answer there
    :ivar joined: whether the job that was named is one that we have not submitted
    :ivar step: our own holder in such a job
    :ivar ahead: seconds by which the scheduler's clock is ahead of ours
    """

    def __init__(self, login: JobLogin, patience: float) -> None:
        self.login = login
        self.nonce = secrets.token_hex(8)
        self.submitted_at = 0.0
        self.marks = list(_MARKS)
        self.output = ""
        self.asked = 0.0
        self.silent = False
        self.started = False
        self.reached = False
        self.patience = patience
        self.joined = False
        self.step = ""
        self.ahead = 0.0


class ClusterJob:
    """A batch job on a cluster whose login node is reached by SSH.

    :param host: the login node
    :param dial: logs in to a machine
    :param pass_over: has it log in to another login node of that name from now on; whether that may help
    :param on_event: gets JobSubmitted, JobWaiting, JobStarted, JobEnding, JobEnded and Warned
    :param on_change: gets the record of the job, whenever something in it changes
    :ivar submitted: how many jobs were submitted
    """

    def __init__(
        self,
        request: JobRequest,
        host: Host,
        *,
        dial: Dial,
        pass_over: Callable[[Connection], bool],
        on_event: Callable[[Event], None],
        on_change: Callable[[Job], None],
    ) -> None:
        self._request = request
        self._named = request.job
        self._scheduler: scheduler.Scheduler = scheduler.KNOWN[0]
        self._way = ""  # that has led to the job last
        self._host = host
        self._label = host.target.host
        self._dial = dial
        self._pass_over = pass_over
        self._emit = on_event
        self._on_change = on_change
        self._stack = contextlib.ExitStack()
        self._login_stack = contextlib.ExitStack()
        self._warden: Warden | None = None
        self._job: Job | None = None
        self._progress = _Progress(JobLogin(self._stack, host), _PATIENCE if request.job else request.timeout)
        self.submitted = 0
        self._name = secrets.token_hex(8)  # by which the job's holder knows us from others
        self._news: JobNews | None = None
        self._kept = False  # whether the job is to stay at the end
        self._closed = threading.Event()

    # Opening, and opening again after a loss.

    def connect(self, connection_stack: contextlib.ExitStack) -> Connection:
        """Submit the job, wait for its start, and return an SSH connection to its machine.

        :raises SubmitError: if the scheduler refuses the job
        :raises JobNeverStartsError: if waiting would never start it
        :raises QueueTimeoutError: if it has waited for too long
        :raises JobEndedError: if it is over
        :raises BokehSSHError: if a machine cannot be reached
        """
        losses, renewed = 0, False
        while True:
            try:
                warden = self._reach_login()
                losses = 0
                if self._job is None:
                    check_session(warden.connection)  # before anything waits for hours
                    if self._named:
                        self._find_job(warden)
                    else:
                        self._submit(warden)
                self._await_start(warden)
                return self._reach_node(warden, connection_stack)
            except JobEndedError as exc:
                # One that nobody has reached would end in the same way again.
                if not (self._request.resubmit and self._progress.reached and exc.state in _AGAIN):
                    raise
                self._forget_job()
                self._warn(f"{exc.message}, so a new one is submitted")
            except SessionError:
                # What led to another job's machine may still have one of few sessions (MaxSessions).
                if renewed or not self._way:
                    raise
                renewed = True
                self._login_stack.close()
            except BokehSSHError as exc:
                # A job may wait for longer than any line lasts.
                job = (
                    self._job
                    if self._request.reconnect and exc.temporary and not isinstance(exc, JobError)
                    else None
                )
                if not job or not job.state.waits:
                    raise
                losses += 1
                if losses == 1:
                    self._warn(f"{exc.message}; job {job.id} waits on, and the login node is tried again")
                wait(self._closed, pause_before(losses))
                self._check_wanted()

    def _forget_job(self) -> None:
        """Start again with a new one."""
        self._progress = _Progress(JobLogin(self._stack, self._host), self._request.timeout)
        self._job = None

    def _reach_login(self) -> Warden:
        """Return the warden on the login node; log in and start one if there is none."""
        self._check_wanted()
        if self._warden and self._warden.alive:
            return self._warden
        while True:
            self._login_stack.close()
            stack = self._login_stack = contextlib.ExitStack()
            connection = self._dial(stack, self._host, None)
            try:
                programs = scheduler.programs(self._request.batch.scheduler)
                request = self._request
                warden = Warden(connection, request.pythons, request.grace, programs, setup=request.setup)
                break
            except SessionError as exc:  # such as /etc/nologin: nothing runs on this one
                if not self._pass_over(connection):
                    raise
                self._warn(f"{exc.message}; another login node is tried")
        stack.callback(warden.close)
        if self._closed.is_set():  # by another thread, just now
            stack.close()
            self._check_wanted()
        self._warden = warden
        if self._job is None:
            self._scheduler = scheduler.choose(warden, self._label)
        if self._request.batch.way == "srun" and "srun" not in self._scheduler.WAYS:
            msg = f"{self._scheduler.TITLE} has no srun"
            raise UsageError(msg, host=self._label, hint='leave out way, or give "tcp" or "back"')
        if self._job and not self._named:  # the warden before this one leaves the job to it
            job = self._job.id
            self._progress.nonce = secrets.token_hex(8)
            warden.look_after(scheduler.guard(self._scheduler, self._progress.nonce, job))
            warden.run(self._scheduler.claim_words(job, self._progress.nonce))
        return warden

    def _check_wanted(self) -> None:
        if self._closed.is_set():
            msg = "it was closed while it opened"
            raise TunnelClosedError(msg, host=self._label)

    def _submit(self, warden: Warden) -> None:
        output = self._progress.output = self._find_output(warden)
        words = self._scheduler.submit_words(self._request.batch, self._progress.nonce, output or _NOWHERE)
        guard = scheduler.guard(self._scheduler, self._progress.nonce)
        answer = warden.run(words, self._script(output), guard=guard)
        job = scheduler.read_submitted(answer.out) if answer.status == 0 else ""
        if not job and answer.status == 0:
            msg = "the scheduler took the job, and did not tell its number"
            hint = f"see {self._scheduler.QUEUE_COMMAND}, and cancel it: nobody waits for it"
            raise SubmitError(msg, host=self._label, hint=hint, said=answer.lines)
        if not job:
            msg = f"the scheduler refuses the job: {scheduler.refusal(self._scheduler, answer.lines)}"
            raise SubmitError(msg, host=self._label, hint=CHECK_HINT, said=answer.lines)
        self._progress.submitted_at = time.monotonic()
        self._progress.asked = self._progress.submitted_at - _LEAST + _FIRST
        self.submitted += 1
        self._set(Job(id=job))
        self._emit(JobSubmitted(host=self._label, job=job))
        scheduler.list_jobs(warden, self._scheduler, but=job)  # meanwhile: the job is not asked for yet

    def _script(self, output: str, *, step: bool = False) -> str:
        return job_script(
            self._request.pythons,
            self._progress.login.public_key,
            self._request.grace,
            output,
            variable=self._scheduler.JOB_VARIABLE,
            ways=self._ways,
            step=step,
            redirect=self._scheduler.SPOOLS,
            setup=self._request.setup,
        )

    def _find_job(self, warden: Warden) -> None:
        """Find the job that was named, and check that it belongs to the account.

        :raises JobEndedError: if the scheduler does not know it, or has forgotten it
        :raises JobError: if it is another user's, or several
        """
        if not self._named.isdigit():
            self._named = self._find_number(warden, self._named)
        answer = warden.run(self._scheduler.owner_words(self._named))
        found = self._scheduler.read_owners(answer.out)
        unknown = any(said in answer.err for said in self._scheduler.UNKNOWN)
        if not found and answer.status and not unknown:
            msg = f"the scheduler cannot be asked for job {self._named} ({answer.said})"
            raise JobError(msg, host=self._label, hint="try again", job=self._named)
        if not found:
            msg = f"there is no job {self._named}: it is over, or there never was one"
            hint = f"see which ones there are: {self._scheduler.QUEUE_COMMAND}"
            raise JobEndedError(msg, host=self._label, hint=hint, job=self._named, state="UNKNOWN")
        if not found[0][0].isdigit():
            raise self._is_part()
        if len(found) > 1:
            msg = f"job {self._named} is an array of {len(found)} jobs"
            raise JobError(msg, host=self._label, hint=self._scheduler.OF_ARRAY, job=self._named)
        number, owner, ours = found[0]
        if owner != warden.run(["id", "-u"]).out.strip():
            msg = f"job {self._named} is another user's"
            hint = f"name one of your own: {self._scheduler.QUEUE_COMMAND}"
            raise JobError(msg, host=self._label, hint=hint, job=self._named)
        self._progress.joined = not ours
        if self._progress.joined and "srun" not in self._scheduler.WAYS:
            msg = f"job {self._named} was not started by bokeh_ssh, and {self._scheduler.TITLE} joins no job"
            hint = (
                f"start one with {setting('batch')}; where nodes accept logins, "
                "name the node itself, and a jump host"
            )
            raise JobError(msg, host=self._label, hint=hint, job=self._named)
        self._progress.submitted_at = time.monotonic()
        self._set(Job(id=number))

    def _find_number(self, warden: Warden, name: str) -> str:
        """Find the number of the job of that name, among those that were submitted by bokeh_ssh.

        :raises JobError: if there is none, or more than one, or one of an array; or nothing answers
        """
        leader, _, part = name.partition("+")
        if leader.isdigit() and part.isdigit():
            raise self._is_part()
        if _IN_ARRAY.match(name):
            msg = f"job {name} is of an array"
            raise JobError(msg, host=self._label, hint=self._scheduler.OF_ARRAY, job=name)
        listed, answer = scheduler.list_jobs(warden, self._scheduler)
        if answer.status:
            msg = f"the scheduler cannot be asked for job {name!r} ({answer.said})"
            raise JobError(msg, host=self._label, hint="try again")
        jobs = [(each["id"], each["name"]) for each in listed]
        fits = [number for number, called in jobs if called == name]
        if len(fits) == 1:
            return fits[0]
        number, dot, _ = name.partition(".")
        if not fits and dot and number.isdigit():  # with PBS's server behind it, or a step of Slurm's
            return number
        there = ", ".join(f"{number} {called}" for number, called in jobs) or "none"
        msg = f"there is no job named {name!r} that was started with {setting('batch')} (there are: {there})"
        if fits:
            msg = f"there is more than one job named {name!r}: {', '.join(fits)}"
        hint = "give the number of the one that you mean" if fits else f"see {self._scheduler.QUEUE_COMMAND}"
        raise JobError(msg, host=self._label, hint=hint)

    def _is_part(self) -> JobError:
        msg = f"job {self._named} is of several parts (a heterogeneous job)"
        hint = f"start one with {setting('batch')}, or name another job"
        return JobError(msg, host=self._label, hint=hint, job=self._named)

    def _find_output(self, warden: Warden) -> str:
        """Return where the job's output goes; empty where the home cannot take it, or sbatch its name."""
        home = warden.run(["sh", "-c", _FIND_HOME]).out.strip()
        if not home.startswith("/"):
            self._warn("nothing can be written to the home, so what the job writes is lost")
            return ""
        return "" if set(home) & set("%$:") else home + _OUTPUT

    def _await_start(self, warden: Warden) -> None:
        """Wait until the job runs, as long as it takes."""
        pause, hopeless = _LEAST, 0
        reported: tuple[str, int] | None = None
        verdict = 0.0
        while True:
            job = self._ask(warden, pause)
            if job is None or job.state is not JobState.PENDING:
                hopeless = 0
            if job is None:
                pause = min(_MOST, pause * _GROWTH)
                continue
            if job.state is JobState.RUNNING:
                break
            if job.state is JobState.COMPLETING:
                most = self._scheduler.VERDICT if self._progress.started else _VERDICT
                verdict = verdict or time.monotonic() + most
                if time.monotonic() < verdict:
                    pause = _LEAST
                    continue
                # No accounting has one that was cancelled while it waited.
                state = JobState.UNKNOWN if self._progress.started else JobState.CANCELLED
                job = dataclasses.replace(job, state=state)
                self._set(job)
            if job.state.over:
                raise self._ended(warden, job)
            hopeless = hopeless + 1 if self._scheduler.why_never(job.reason) else 0
            if hopeless >= _SURE:
                raise self._never(job)
            reason = "suspended" if job.state is JobState.SUSPENDED else job.reason
            now = (reason, round((job.estimated_start or 0) / 60))
            if now != reported:
                reported = now
                self._emit(
                    JobWaiting(
                        host=self._label,
                        job=job.id,
                        reason=reason,
                        estimated_start=job.estimated_start,
                        stays=self.stays,
                    )
                )
            pause = _LEAST if hopeless else min(_MOST, pause * _GROWTH)
            left = self._queue_left()
            if left <= 0:
                raise self._waited(job)
            pause = min(pause, max(_LEAST, left))
            self._progress.patience = self._request.timeout  # it starts just now
        if not self._progress.started:
            self._progress.started = True
            if job.ends_at:  # what is reported now need not be reported again
                self._progress.marks = [each for each in _MARKS if each < job.ends_at - time.time()]
            self._emit(JobStarted(host=self._label, job=job.id, node=job.node, ends_at=job.ends_at))

    def check_end(self) -> None:
        """Ask, after a connection to its machine was lost, whether the job is over.

        :raises JobEndedError: if it is, with the reason
        """
        until = time.monotonic() + _VERDICT
        with contextlib.suppress(ConnectionLostError):  # the login node's, which is reported as it is
            while self._warden and self._warden.alive and self._job and time.monotonic() < until:
                job = self._ask(self._warden, _LEAST)
                if job and job.state not in (JobState.RUNNING, JobState.SUSPENDED):
                    self._await_start(self._warden)  # raises how it ended

    def _ask(self, warden: Warden, pause: float) -> Job | None:
        """Ask what the job does, ``pause`` seconds after the last answer; None if that cannot be asked."""
        assert self._job
        left = self._progress.asked + pause - time.monotonic()
        if left > 0 and wait(warden.connection.lost, left):
            raise warden.connection.lost_error()
        self._check_wanted()
        waits = self._job.state is JobState.PENDING
        answer, age = warden.ask(self._job.id, self._scheduler.ASK, pause, waits=waits)
        self._progress.asked = time.monotonic() - age
        found = self._scheduler.read_answer(self._job.id, answer.status, answer.out, answer.err)
        if found is None:
            if not self._progress.silent:
                self._progress.silent = True
                self._warn(f"the scheduler cannot be asked ({answer.said})")
            return None
        self._progress.silent = False
        found = self._by_our_clock(found, read_clock(answer.out) - (time.time() - age))
        ends = self._job.ends_at
        if found.state is JobState.UNKNOWN and ends and time.time() > ends - _LEAST:
            found = dataclasses.replace(found, state=JobState.TIMEOUT)  # no history is kept of it
        if found.estimated_start and found.estimated_start <= time.time():
            found = dataclasses.replace(found, estimated_start=None)  # worked out a while ago
        self._set(found)
        return found

    def _by_our_clock(self, job: Job, ahead: float) -> Job:
        """Translate its times, which are of a clock that is that many seconds ahead of ours, into ours."""
        if abs(ahead - self._progress.ahead) > _INEXACT:
            self._progress.ahead = ahead if abs(ahead) > _INEXACT else 0.0
        start, end = job.estimated_start, job.ends_at
        return dataclasses.replace(
            job,
            estimated_start=None if start is None else start - self._progress.ahead,
            ends_at=None if end is None else end - self._progress.ahead,
        )

    def _queue_left(self) -> float:
        """Return for how many more seconds the job may wait."""
        if self._request.queue_timeout is None or self._progress.started:
            return float("inf")
        return self._progress.submitted_at + self._request.queue_timeout - time.monotonic()

    def _waited(self, job: Job) -> QueueTimeoutError:
        """Cancel a job that has waited for too long, and make the error for it."""
        done = self._cancel("cancelled, since it has waited for too long")
        why = f" ({job.reason})" if job.reason else ""
        msg = f"job {job.id} still waited after {self._request.queue_timeout:g} s{why}{done}"
        hint = f"give a longer {setting('queue_timeout')}, or ask for less, or for another queue"
        return QueueTimeoutError(msg, host=self._label, hint=hint, job=job.id, reason=job.reason)

    def _warn(self, text: str) -> None:
        self._emit(Warned(host=self._label, text=text))

    def _set(self, job: Job) -> None:
        if job != self._job:
            self._job = job
            self._on_change(job)

    def _ended(self, warden: Warden, job: Job) -> JobEndedError:
        """Make the error for a job that is over, and report its end."""
        canceller = self._find_canceller(warden, job) if job.state is JobState.CANCELLED else ""
        why, hint = explain_end(self._scheduler.ENDS, job, self._request.batch.memory, canceller)
        # A holder whose machine has failed does not remove it.
        lines = () if self._named else self._written(warden, job)
        lines = () if self._progress.reached else lines
        if job.state is JobState.FAILED and not (self._named or self._progress.reached or lines):
            hint = f"see whether its machine can write to the home (space, quota); {hint}"
        warden.release()
        self._emit(JobEnded(host=self._label, job=job.id, state=job.state.value, why=why))
        msg = f"{why} (job {job.id}, {job.state.value})"
        return JobEndedError(msg, host=self._label, hint=hint, job=job.id, state=job.state.value, log=lines)

    def _find_canceller(self, warden: Warden, job: Job) -> str:
        """Find out who cancelled the job; empty if nobody knows."""
        try:
            answer = warden.run(self._scheduler.canceller_words(job.id), timeout=_ACCOUNTING)
            number = self._scheduler.read_canceller(answer.out) if answer.status == 0 else ""
            return (warden.run(["id", "-nu", number]).out.strip() or number) if number else ""
        except BokehSSHError:
            return ""

    def _never(self, job: Job) -> JobNeverStartsError:
        """Cancel a job that can never start, if it is ours, and make the error for it."""
        why = self._scheduler.why_never(job.reason)
        done = self._cancel(f"cancelled, since {why}")
        msg = f"job {job.id} can never start: {why} ({job.reason}){done}"
        less = ", ".join(setting(name) for name in ("time", "cpus", "memory", "gpus"))
        hint = f"ask for less ({less}), or for another {setting('queue')} or {setting('account')}"
        return JobNeverStartsError(msg, host=self._label, hint=hint, job=job.id, reason=job.reason)

    def _written(self, warden: Warden, job: Job) -> tuple[str, ...]:
        """Read what the job wrote, where the home is shared; empty elsewhere."""
        output = self._progress.output.replace("%j", job.id)
        if not output:
            return ()
        text = '[ ! -e "$2" ] || { tail -n "$1" -- "$2" && rm -f -- "$2"; }'
        try:
            return warden.run(["sh", "-c", text, "sh", str(_LINES), output]).lines[-_LINES:]
        except BokehSSHError:
            return ()

    # The way to the job's machine.

    def _reach_node(self, warden: Warden, connection_stack: contextlib.ExitStack) -> Connection:
        deadline = time.monotonic() + self._request.timeout
        if self._progress.joined:
            self._start_holder(warden)
        while True:
            try:
                return self._dial_node(warden, connection_stack, deadline)
            except LaunchError as exc:
                raise self._useless(warden, exc) from exc
            except ConnectionLostError as exc:
                if not warden.alive:
                    raise
                job = self._ask(warden, _LEAST)
                if job and job.state is not JobState.RUNNING:
                    self._await_start(warden)  # raises how it ended, unless it was suspended
                    deadline = time.monotonic() + self._request.timeout
                if time.monotonic() > deadline:
                    exc.host = exc.host or self._label
                    if self._named or self._progress.reached:
                        raise
                    raise self._useless(warden, LaunchError(exc.message, hint=exc.hint)) from exc
            wait(self._closed, _PAUSE)
            self._check_wanted()

    def _start_holder(self, warden: Warden) -> None:
        """Start a holder beside what the job runs; one that is there already stays the only one."""
        assert self._job
        self._progress.patience = self._request.timeout
        script = self._script("", step=True)
        warden.run(slurm.holder_words(self._job.id, self._job.node, script))

    def _end_holder(self) -> None:
        """End our own holder in a job that is not ours; it does so by itself after ``grace``."""
        if self._progress.step and self._job and self._warden and self._warden.alive:
            with contextlib.suppress(BokehSSHError):
                words = slurm.end_holder_words(self._job.id, self._progress.step)
                self._warden.run(words, timeout=_ACCOUNTING)

    def _dial_node(
        self, warden: Warden, connection_stack: contextlib.ExitStack, deadline: float
    ) -> Connection:
        sock, record = self._open_stream(warden, deadline)
        unused = [sock]
        try:
            assert self._job
            node = self._job.node or str(record["node"])
            self._progress.login.trust(node, str(record.get("host_key")))
            host = self._progress.login.host(node, str(record["user"]))

            def stream(timeout: float) -> socket.socket:
                if unused:
                    return unused.pop()
                return self._open_stream(warden, time.monotonic() + timeout)[0]

            connection = self._dial(connection_stack, host, stream)
            if record.get("way") != self._way or not self._progress.reached:
                self._way = str(record.get("way"))
                self._emit(JobReached(host=self._label, job=self._job.id, node=node, way=self._way))
            self._progress.reached = True
            mine = self._progress.joined and record.get("client_key") == self._progress.login.public_key
            self._progress.step = str(record.get("step", "")) if mine else ""
            self._news = connection_stack.enter_context(
                JobNews(connection, str(record.get("news", "")), self._name, self._next_mark, self._on_news)
            )
            return connection
        finally:
            for each in unused:
                each.close()

    @property
    def _ways(self) -> list[str]:
        """The ways to the job: the one that has worked last first."""
        asked = self._request.batch.way
        ways = list(self._scheduler.WAYS) if asked == "auto" else [asked]
        return sorted(ways, key=lambda way: way != self._way)

    def _open_stream(self, warden: Warden, deadline: float) -> tuple[socket.socket, dict[str, object]]:
        assert self._job
        return open_job_stream(
            warden.connection,
            slurm.stream_words(self._job.id, self._job.node) if self._ways == ["srun"] else [],
            job=self._job.id,
            path=warden.path,
            pythons=self._request.pythons,
            timeout=max(5.0, deadline - time.monotonic()),
            patience=self._progress.patience
            if self._ways == ["srun"]
            else min(self._progress.patience, _MEETING),
            ways=self._ways,
            nodes=[self._job.node] if self._job.node else [],
            client_key=self._progress.login.public_key if self._named else "",
            setup=self._request.setup,
        )

    # Warnings of the end.

    def _next_mark(self) -> float | None:
        """Return in how many seconds the next warning of the time limit is due; None: never."""
        job = self._job
        if not job or not job.ends_at or not self._progress.marks:
            return None
        return max(0.0, job.ends_at - self._progress.marks[0] - time.time())

    def _on_news(self, warned: bool) -> None:
        """Report that the job will end, after a warning of the scheduler's, or since a mark is due."""
        warden = self._warden
        if warden and warden.alive:  # the limit may have been raised
            self._ask(warden, 0.0)
        job = self._job
        left = job.ends_at - time.time() if job and job.ends_at else None
        due = [each for each in self._progress.marks if left is not None and left <= each + 1.0]
        self._progress.marks = [each for each in self._progress.marks if each not in due]
        if not job or job.state is not JobState.RUNNING:
            return
        if warned and (left is None or left > _NEAR):
            self._emit(JobEnding(host=self._label, job=job.id, seconds=None, warned=True))
        elif warned or due:
            seconds = None if left is None else max(0.0, round(left, 1))
            self._emit(JobEnding(host=self._label, job=job.id, seconds=seconds, warned=warned))

    def _useless(self, warden: Warden, error: LaunchError) -> LaunchError:
        """Cancel a job whose machine can run no SSH server; one that was named has none of ours."""
        assert self._job
        if self._named:
            error.host = error.host or self._label
            return error
        lines = self._written(warden, self._job)
        self._cancel(f"cancelled, since {error.message}")
        message, hint = error.sentences
        return LaunchError(message, host=self._label, hint=hint, log=lines)

    # The end.

    def end(self) -> None:
        """Cancel the job, and log out; idempotent, from any thread, in some seconds at most."""
        if self._closed.is_set():
            return
        self._closed.set()
        try:
            if self._kept or self._is_shared():
                if self._warden and self._warden.alive:
                    self._warden.release()
            elif self._named:
                self._end_holder()
            else:
                self._cancel("cancelled, since its tunnel was closed")
        finally:
            self._login_stack.close()
            self._stack.close()

    def keep_job(self) -> None:
        """Keep the job at the end, until its time limit.

        :raises ConnectionLostError: if its holder does not confirm that
        """
        if self._kept:
            return
        if not self._news or not self._news.keep_job():
            msg = "the job did not confirm that it stays"
            raise ConnectionLostError(msg, host=self._label, hint="try again")
        self._kept = True

    def _is_shared(self) -> bool:
        """Return whether others use the job; and say so."""
        ours = not self._named or self._progress.step
        if not ours or not self._job or self._job.state.over or not self._news or self._news.clients < 2:
            return False
        what = "what runs for us in it" if self._named else "it"
        self._warn(
            f"job {self._job.id} is used by another tunnel, and {what} ends "
            f"{self._request.grace:g} s after that"
        )
        return True

    @property
    def stays(self) -> bool:
        """Whether the job is not ended at the end."""
        return bool(self._named or self._kept)

    def _cancel(self, why: str) -> str:
        """Cancel the job, if it is ours and not over; also one that is being submitted.

        :returns: what to add to an error: whether it was done
        """
        warden, job = self._warden, self._job
        if self._named or warden is None or (job and job.state.over):
            return ""
        try:
            heard = warden.end_job() if warden.alive else False
        except BokehSSHError as exc:
            log.debug("%s: cancelling: %s", self._label, exc)
            heard = False
        if job is None:
            return ""
        if heard:
            self._set(dataclasses.replace(job, state=JobState.CANCELLED))
            self._emit(JobEnded(host=self._label, job=job.id, state=JobState.CANCELLED.value, why=why))
        else:
            self._warn(f"job {job.id} could not be told to end; it does so within {self._request.grace:g} s")
        return ", so it was cancelled" if heard else ""
