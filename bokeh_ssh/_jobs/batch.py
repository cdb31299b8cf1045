"""What a user asks of a scheduler, as a record. No sockets, and no scheduler's own options."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_type_hints

from bokeh_ssh._core.errors import UsageError
from bokeh_ssh._core.settings import set_to, setting

#: What ``batch=`` can name: "auto" is the scheduler that the login node has.
SCHEDULERS = ("auto", "slurm", "sge", "pbs", "lsf")
#: What to look at where a scheduler refuses a job.
CHECK_HINT = "check " + ", ".join(map(setting, ("queue", "account", "time", "memory", "gpus", "extra")))
#: A kind of GPUs, and a number of them.
_KIND = re.compile(r"[\w.-]{1,64}", re.ASCII)
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")
#: How the bytes get from the login node to the job.
WAYS = ("auto", "srun", "tcp", "back")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The batch job that a server runs in; the cluster's defaults apply to what is left out.

    :param scheduler: "slurm", "sge" (Grid Engine), "pbs" (OpenPBS, PBS Professional, Torque), "lsf", or
        "auto" for the one that the login node has
    :param time: the job's time limit as the scheduler writes it, such as "2:00:00" (LSF: "2:00")
    :param queue: the queue (Slurm: partition)
    :param account: the account or project that pays
    :param cpus: CPUs of the server's one task
    :param memory: memory of the node, such as "32G"
    :param gpus: GPUs; with their kind before them as "a100:2" (Slurm and LSF alone)
    :param name: the job's name in the queue; None: that of its first app
    :param extra: more arguments for the scheduler's submit command, such as ``["--constraint=a100"]``
    :param way: how the login node gets to the job: "srun" (Slurm alone: no port anywhere), "tcp" (to a port
        of the job's machine), "back" (the job connects to a port of the login node); "auto": "srun" on Slurm,
        elsewhere "tcp", or "back" if that is refused. "tcp" and "back" need a home that both machines share
    :raises UsageError: if a value is not valid
    """

    scheduler: str = "auto"
    time: str | None = None
    queue: str | None = None
    account: str | None = None
    cpus: int | None = None
    memory: str | None = None
    gpus: int | str | None = None
    name: str | None = None
    extra: Sequence[str] = ()
    way: str = "auto"

    def __post_init__(self) -> None:
        if self.scheduler not in SCHEDULERS:
            msg = f"{set_to('scheduler', self.scheduler)} is not known"
            raise UsageError(msg, hint='use "slurm", "sge", "pbs", "lsf", or "auto"')
        if self.way not in WAYS:
            msg = f"{set_to('way', self.way)} is not known"
            raise UsageError(msg, hint='use "srun", "tcp", "back", or "auto"')
        if isinstance(self.extra, str):
            msg = f"{setting('extra')} is one string"
            raise UsageError(msg, hint='give a list: ["--constraint=a100"]')
        object.__setattr__(self, "extra", tuple(self.extra))
        for name in ("time", "queue", "account", "memory", "name"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value and value.isprintable()):
                what = f"the job's name {value!r}" if name == "name" else set_to(name, value)
                msg = f"{what} is not a word for a scheduler"
                raise UsageError(msg, hint="give a string without control characters, or leave it out")
        kind, colon, number = str(self.gpus).rpartition(":")
        gpus = isinstance(self.gpus, str) and bool(_NUMBER.fullmatch(number))
        if gpus and not colon:
            object.__setattr__(self, "gpus", int(number))
        gpus = gpus and bool(_KIND.fullmatch(kind))
        for name in ("cpus", "gpus"):
            value = getattr(self, name)
            good = (type(value) is int and value > 0) or (name == "gpus" and gpus)
            if value is not None and not good:
                msg = f"{set_to(name, value)} is not a number of them"
                kind = "" if name == "cpus" else ', or their kind and a number ("a100:2")'
                raise UsageError(msg, hint=f"give a number from 1{kind}, or leave it out")
        for word in self.extra:
            if not isinstance(word, str) or not word.startswith("-") or "\0" in word:
                msg = f"{word!r} in {setting('extra')} is not an option of the submit command"
                raise UsageError(msg, hint='write each option with its value: "--constraint=a100"')


def count_gpus(batch: Batch) -> int | None:
    """Return how many GPUs are wanted, for a scheduler that has no common option for their kind.

    :raises UsageError: if a kind is wanted
    """
    if isinstance(batch.gpus, str):
        msg = f"{set_to('gpus', batch.gpus)} names a kind, and each site has an option of its own for that"
        raise UsageError(msg, hint=f"give their number alone, and that option in {setting('extra')}")
    return batch.gpus


def check_extra(extra: Sequence[str], refused: Mapping[str, str]) -> None:
    """Refuse options that would turn the job into something that a tunnel cannot wait for.

    :param refused: why, by option; a short one may have its value behind it, a long one may be cut short
    :raises UsageError: if there is one of them
    """
    for word in extra:
        name = re.split(r"[=\s]", word, maxsplit=1)[0]
        for option, why in refused.items():
            same = option.startswith(name) and len(name) > 3 if option.startswith("--") else name == option
            attached = len(option) == 2 and word.startswith(option)
            if same or attached:
                msg = f"{word!r} in {setting('extra')} cannot work: {why}"
                raise UsageError(msg, hint="leave it out; submit such a job by yourself")


#: The types of its fields, read before the class says that it is the package's own.
TYPES = get_type_hints(Batch)


def as_batch(value: object) -> Batch | None:
    """Make a record of what the caller gave for ``batch``.

    :raises UsageError: if it is neither a scheduler's name nor a record
    """
    if value is None or isinstance(value, Batch):
        return value
    if isinstance(value, str):
        return Batch(scheduler=value)
    msg = f"{set_to('batch', value)} is neither a scheduler's name nor a Batch"
    raise UsageError(msg, hint=f"give {setting('batch=auto')}, or Batch(...)")
