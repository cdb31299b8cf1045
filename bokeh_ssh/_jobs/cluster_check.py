"""What ``bokeh-ssh doctor --batch`` checks on a login node. Nothing is submitted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from bokeh_ssh._core.errors import SessionError
from bokeh_ssh._jobs import grid_engine, scheduler, slurm
from bokeh_ssh._jobs.batch import CHECK_HINT, Batch
from bokeh_ssh._jobs.job_stream import check_session
from bokeh_ssh._jobs.warden import Warden
from bokeh_ssh._ssh.connection import Connection


class ClusterFact(NamedTuple):
    """One result of a check; ``hint`` says how to fix it if it is not good."""

    good: bool
    text: str
    hint: str = ""


class ClusterCheck:
    """Looks at a cluster from its login node, with one warden for all checks.

    :param pythons: interpreters to try
    :param setup: steps that may bring one
    :ivar missing: whether no scheduler was found
    """

    def __init__(self, batch: Batch, pythons: Sequence[str], setup: str | Sequence[str]) -> None:
        self._batch = batch
        self._pythons = pythons
        self._setup = setup
        self._warden: Warden | None = None
        self._found: scheduler.Scheduler | None = None
        self.missing = False

    @property
    def checks(self) -> dict[str, Callable[[Connection], ClusterFact]]:
        """The checks, in this order."""
        return {"scheduler": self._scheduler, "way": self._way, "queue": self._queue, "job": self._job}

    def close(self) -> None:
        """End its session."""
        if self._warden:
            self._warden.close()

    def _reach(self, connection: Connection) -> Warden:
        if not self._warden or not self._warden.alive:
            programs = scheduler.programs(self._batch.scheduler)
            self._warden = Warden(connection, self._pythons, 0.0, programs, setup=self._setup)
        self.missing = not self._warden.found
        if self.missing:
            raise scheduler.no_scheduler(connection.name)
        return self._warden

    def _choose(self, connection: Connection) -> tuple[Warden, scheduler.Scheduler]:
        warden = self._reach(connection)
        self._found = self._found or scheduler.choose(warden, connection.name)
        return warden, self._found

    def _scheduler(self, connection: Connection) -> ClusterFact:
        warden, queue = self._choose(connection)
        said = warden.run(queue.VERSION)
        version = queue.read_version(said.out or said.err)
        answer = warden.run(slurm.CONTROLLER if queue.NAME == slurm.NAME else queue.QUEUES)
        master = {slurm.NAME: "controller", grid_engine.NAME: "master"}.get(queue.NAME, "server")
        if answer.status:
            return ClusterFact(
                False, f"{version}, whose {master} does not answer: {answer.said}", "try again"
            )
        return ClusterFact(True, f"{version}; its {master} answers")

    def _way(self, connection: Connection) -> ClusterFact:
        warden, queue = self._choose(connection)
        try:
            check_session(connection)
        except SessionError as exc:
            return ClusterFact(False, exc.message, exc.hint or "")
        if "srun" not in queue.WAYS or self._batch.way in ("tcp", "back"):
            text = "by TCP between login node and node, in one direction or the other; their home must be one"
            return ClusterFact(True, text)
        version = warden.run(["srun", "--version"])
        if version.status:
            return ClusterFact(
                False, f"srun cannot be run ({version.said})", "ask your cluster's administrators"
            )
        if not slurm.overlaps(version.out):
            text = f"srun cannot join a job that runs ({version.out.strip()})"
            return ClusterFact(False, text, "Slurm 20.11 or newer is needed")
        return ClusterFact(
            True, "by srun --overlap to an sshd in the job: no port is opened, nothing is forwarded"
        )

    def _queue(self, connection: Connection) -> ClusterFact:
        warden, scheduler_there = self._choose(connection)
        answer = warden.run(scheduler_there.QUEUES)
        if answer.status:
            return ClusterFact(False, f"the queues cannot be listed ({answer.said})", "try again")
        known = scheduler_there.read_queues(answer.out)
        names = ", ".join(list(known)[:20]) or "none that you may see"
        if scheduler_there.NAME != slurm.NAME:
            wanted = (self._batch.queue or "").partition("@")[0]
            if wanted and wanted not in known:
                text = f"there is no queue {wanted!r} (there are {names})"
                return ClusterFact(False, text, "name another one with --queue")
            if wanted and known[wanted]:
                return ClusterFact(False, f"{wanted} {known[wanted]}", "name another one with --queue")
            return ClusterFact(True, f"there is {wanted}" if wanted else "any that takes the job")
        queue = slurm.read_queue(answer.out, self._batch.queue)
        if queue is None:
            what = f"no queue {self._batch.queue!r}" if self._batch.queue else "no default queue"
            return ClusterFact(False, f"there is {what} (there are {names})", "name another one with --queue")
        limit = queue.limit or "no limit"
        if not queue.up:
            return ClusterFact(False, f"{queue.name} is {queue.state}: jobs would wait", "name another one")
        if slurm.is_longer(self._batch.time, queue.limit):
            text = f"{queue.name} takes jobs of {limit} at most, and {self._batch.time} is longer"
            return ClusterFact(False, text, "ask for less time, or name another queue")
        return ClusterFact(True, f"{queue.name} takes jobs, for {limit} at most")

    def _job(self, connection: Connection) -> ClusterFact:
        # What it accepts may still wait for ever, which is why the queue is looked at by itself.
        warden, queue = self._choose(connection)
        words = queue.submit_words(self._batch, "doctor", "/dev/null")  # its errors are those of a tunnel
        if not queue.TRIAL:
            return ClusterFact(True, f"{queue.TITLE} says what it takes only when a job is submitted")
        answer = warden.run([*words, *queue.TRIAL], "#!/bin/sh\ntrue\n")
        if answer.status:
            never = ", or never start it" if queue.NAME == slurm.NAME else ""
            text = f"{queue.TITLE} would refuse the job{never}: {scheduler.refusal(queue, answer.lines)}"
            return ClusterFact(False, text, CHECK_HINT)
        start = slurm.read_test(answer.lines) if queue.NAME == slurm.NAME else ""
        return ClusterFact(True, f"{queue.TITLE} would take it (nothing was submitted){start}")
