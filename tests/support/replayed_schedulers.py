"""PBS and LSF as their commands were recorded, on a machine that has neither; personal details are replaced.

PBS: from a real OpenPBS 23.06.06. LSF: what is in the manual and in other projects' tests, put into the
columns that are asked for; nobody has recorded it for this package.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from beds import Machine, until

_PROGRAM = Path(__file__).parent / "replayed" / "replay"

PBS_HEAD = """\
Job Id: 1234.pbs1
    Job_Name = bokeh-ssh
    Job_Owner = alice@pbs1
"""
PBS_TAIL = """\
    queue = workq
    server = pbs1
    Checkpoint = u
    ctime = Sun Nov 29 12:39:07 2026
    Error_Path = pbs1:/@MARK@
{}    Hold_Types = n
    Join_Path = oe
    Keep_Files = n
    Mail_Points = a
    mtime = Sun Nov 29 12:40:07 2026
    Output_Path = pbs1:/dev/null
    Rerunable = False
    Resource_List.ncpus = 1
    Resource_List.select = 1:ncpus=1
    Resource_List.walltime = 00:20:00
{}    Shell_Path_List = /bin/sh
    Variable_List = PBS_O_HOME=/home/alice,PBS_O_LOGNAME=alice,
\tPBS_O_PATH=/opt/openpbs/bin:/usr/bin:/bin,PBS_O_SHELL=/bin/bash,
\tPBS_O_WORKDIR=/home/alice,PBS_O_SYSTEM=Linux,PBS_O_QUEUE=workq
"""
_RUN = "    exec_host = localhost/0\n    exec_vnode = (localhost:ncpus=1)\n"
_STARTED = "    stime = @DATE@\n    session_id = 3835\n"
PBS = {
    "queues": "Queue: workq\n    queue_type = Execution\n    enabled = True\n    started = True\n",
    "submitted": "1234.pbs1\n",
    "waiting": PBS_HEAD
    + "    job_state = Q\n"
    + PBS_TAIL.format("", "    substate = 10\n")
    + "    comment = Not Running: Insufficient amount of resource: ncpus (R: 4 A: \n\t1 T: 4)\n",
    "running": PBS_HEAD
    + "    job_state = R\n"
    + PBS_TAIL.format(_RUN, _STARTED)
    + "    comment = Job run at Sun Nov 29 at 12:39 on (localhost:ncpus=1)\n",
    "over": PBS_HEAD
    + "    resources_used.walltime = 00:20:18\n    job_state = F\n"
    + PBS_TAIL.format(_RUN, _STARTED + "    substate = 93\n")
    + "    comment = Job run at Sun Nov 29 at 12:39 on (localhost:ncpus=1) and exceeded res\n"
    "\tource walltime\n    Exit_status = -29\n"
    "qstat: 1234.pbs1 Job has finished, use -x or -H to obtain historical job information\n",
}
LSF = {
    "queues": "QUEUE_NAME      PRIO STATUS          MAX JL/U JL/P JL/H NJOBS  PEND   RUN  SUSP  RSV PJOBS\n"
    "normal           30  Open:Active       -    -    -    -     0     0     0     0    0     0\n",
    "submitted": "Job <1234> is submitted to default queue <normal>.\n",
    "waiting": "1234|PEND|-|20.0|0 second(s)|-|alice|dash|@MARK@|New job is waiting for scheduling;|-\n",
    "running": "1234|RUN|4*localhost|20.0|3 second(s)|-|alice|dash|@MARK@|-|-\n",
    "over": "1234|EXIT|localhost|20.0|1205 second(s)|140|alice|dash|@MARK@|-|"
    "TERM_RUNLIMIT: job killed after reaching LSF run time limit\n",
}
_COMMANDS = {
    "pbs": ("qmgr", "qsub", "qstat", "qdel", "qalter", "qselect"),
    "lsf": ("bqueues", "bsub", "bjobs", "bkill", "bmod", "bhist", "lsid"),
}
_TEXTS = {"pbs": PBS, "lsf": LSF}


class Replayed:
    """A login node with such commands, which is the node of its one job as well.

    :param folder: where its home is; with a short name, since the name of a socket in it is limited
    """

    def __init__(self, name: str, embedded: Callable[..., Machine], folder: Path) -> None:
        self.home = folder / "home"
        self.home.mkdir(mode=0o700)
        self._state = folder / "replayed"
        (self._state / "texts").mkdir(parents=True)
        for title, text in _TEXTS[name].items():
            self.say(title, text)
        programs = folder / "programs"
        programs.mkdir()
        for command in _COMMANDS[name]:
            (programs / command).symlink_to(_PROGRAM)
        path = f"{programs}:{Path(sys.executable).parent}:/usr/bin:/bin"
        self.machine = embedded(
            home=self.home,
            env={"PATH": path, "BOKEH_SSH_DIR": os.environ["BOKEH_SSH_DIR"], "REPLAY": str(self._state)},
        )

    def say(self, title: str, text: str) -> None:
        """Have it say something else."""
        (self._state / "texts" / title).write_text(text)

    def reach_limit(self) -> None:
        """Let the job come to its time limit."""
        (self._state / "state").write_text("over\n")
        os.kill(self.pid, signal.SIGTERM)

    @property
    def calls(self) -> str:
        """What was asked."""
        return (self._state / "calls").read_text()

    @property
    def pid(self) -> int:
        """The job's process."""
        return int((self._state / "pid").read_text())

    @property
    def script(self) -> str:
        """The job's script."""
        return (self._state / "script").read_text()

    def wait_for_end(self) -> None:
        """Wait until nothing of the job runs."""

        def ended() -> bool:
            with suppress(ProcessLookupError):
                os.kill(self.pid, 0)
                return False
            return True

        until(ended, what="the job's process has ended")
