"""The private directory of a batch job on its node, where the job's steps find each other.

Runs on the node: standard library only, Python 3.8 or newer.

::

    /tmp/bokeh-ssh-job-UID-JOB/     ours, 0700; ~/.bokeh-ssh-job-JOB-NODE where that cannot be had
        door                        the holder's socket: an SSH server answers on each connection
        news                        likewise: says on each connection that the job will end
        authorized_keys             the public keys of its clients
        record                      as JSON: the server's public host key, or why there is none
        host_key, ...               what that server needs; the private half of its key never leaves
"""

from __future__ import annotations

import json
import os

from bokeh_ssh._remote.run_dir import node, usable

TYPE_CHECKING = False  # typing costs milliseconds of a start and is not needed to run
if TYPE_CHECKING:
    from typing import Any

DOOR = "door"
NEWS = "news"
KEYS = "authorized_keys"
RECORD = "record"


def job_places(job: str) -> list[str]:
    """List the directories that a job may use, the preferred one first."""
    home = os.path.expanduser("~")
    places = [f"/tmp/bokeh-ssh-job-{os.getuid()}-{job}"]  # noqa: S108 - what is found there is looked at
    if home[:1] == "/":
        places.append(os.path.join(os.path.realpath(home), f".bokeh-ssh-job-{job}-{node()[:32]}"))
    return places


def make_job_place(job: str) -> str:
    """Make the directory of a job; what a job of that number left behind is not taken over.

    :raises OSError: if none can be made
    """
    why: OSError | None = None
    for path in job_places(job):
        try:
            os.mkdir(path, 0o700)
        except OSError as exc:
            why = exc
            continue
        os.chmod(path, 0o700)  # whatever the umask takes away
        if not usable(path):
            return path
        os.rmdir(path)
    raise why or OSError("no directory for the job can be used")


def find_job_place(job: str) -> str:
    """Find the directory that a job has made; empty where there is none that is ours alone."""
    for path in job_places(job):
        if not usable(path) and os.path.exists(os.path.join(path, RECORD)):
            return path
    return ""


def write_record(place: str, record: dict[str, Any]) -> None:
    """Write the record; whoever reads meanwhile finds none, or the whole."""
    new = os.path.join(place, RECORD + ".new")
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="ascii") as file:
        json.dump(record, file)
    os.replace(new, os.path.join(place, RECORD))


def allow_key(place: str, key: str) -> None:
    """Let a public key in, once.

    :raises OSError: if that cannot be written
    """
    with open(os.path.join(place, KEYS), "a+", encoding="ascii") as file:
        file.seek(0)
        if key not in file.read().splitlines():
            file.write(key + "\n")


def read_record(place: str) -> dict[str, Any]:
    """Read the record; empty where it cannot be read."""
    try:
        with open(os.path.join(place, RECORD), encoding="ascii") as file:
            record = json.load(file)
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
