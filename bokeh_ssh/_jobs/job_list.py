"""The jobs of an account that were submitted by bokeh_ssh: listed and cancelled, whoever uses them."""

from __future__ import annotations

from bokeh_ssh._core.errors import JobError
from bokeh_ssh._jobs import scheduler
from bokeh_ssh._jobs.job import ListedJob
from bokeh_ssh._jobs.warden import Answer, Warden
from bokeh_ssh._server.bootstrap import list_pythons
from bokeh_ssh._ssh.connection import Connection


class JobList:
    """An account's jobs in the queue, on a machine that may have no scheduler.

    :param python: an interpreter there; None takes the first that runs
    """

    def __init__(self, connection: Connection, python: str | None) -> None:
        self._host = connection.name
        self._scheduler = scheduler.KNOWN[0]
        self._warden = Warden(connection, [python] if python else list_pythons(), 0.0, scheduler.programs())

    def jobs(self) -> list[ListedJob]:
        """List the jobs that bokeh_ssh submitted; none if there is no scheduler.

        :raises JobError: if the scheduler does not answer
        """
        if not self._warden.found:
            return []
        self._scheduler = scheduler.choose(self._warden, self._host)
        listed, answer = scheduler.list_jobs(self._warden, self._scheduler)
        self._check(answer)
        return [ListedJob(host=self._host, **fields) for fields in listed]

    def cancel(self, job: ListedJob) -> None:
        """Cancel one of :meth:`jobs`.

        :raises JobError: if the scheduler does not do it
        """
        self._check(self._warden.run(self._scheduler.cancel_words(job.id)))

    def close(self) -> None:
        """End its session."""
        self._warden.close()

    def _check(self, answer: Answer) -> None:
        if answer.status:
            msg = f"the scheduler does not answer ({answer.said})"
            raise JobError(msg, host=self._host, hint="try again")
