"""The private directory of a batch job on its node, where the job's steps find each other.

Runs on the node: standard library only, Python 3.8 or newer.

::

    /tmp/bokeh-ssh-job-UID-JOB/     ours, 0700; ~/.bokeh-ssh-job-JOB-NODE where that is not possible
        door                        the holder's socket: an SSH server answers on each connection
        news                        likewise: says on each connection that the job will end
        authorized_keys             the public keys of its clients
        record                      as JSON: the server's public host key, or why there is none
        host_key, ...               what that server needs; the private half of its key never leaves
    ~/.bokeh-ssh-job-JOB/           ours, 0700, in a home that the login node has too: where the two ends of a
                                    TCP connection between them meet
        record                      the same, with the port and what is to be said on it
        authorized_keys             where the holder's own leads to
        dial-...                    where a login node waits for the holder to connect to it
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import select
import socket
import time

from bokeh_ssh._remote.run_dir import node, remove_tree, unsafe, usable

TYPE_CHECKING = False  # typing costs milliseconds of a start and is not needed to run
if TYPE_CHECKING:
    from typing import Any

DOOR = "door"
NEWS = "news"
KEYS = "authorized_keys"
RECORD = "record"
DIAL = "dial-"  # what the names of files begin with that say where to connect to

_WORD = 32  # hexadecimal digits that a connection begins with, before a newline
_PATIENCE = 10.0  # seconds for them
_YOUNG = 10.0  # seconds for a holder to listen, once it has a directory
_REACH = 3.0  # seconds for it to be connected to
_STRANGERS = 20  # connections at once that have not said them


def job_places(job: str) -> list[str]:
    """List the directories that a job may use, the preferred one first."""
    home = os.path.expanduser("~")
    places = [f"/tmp/bokeh-ssh-job-{os.getuid()}-{job}"]  # noqa: S108 - what is found there is looked at
    if home[:1] == "/":
        places.append(os.path.join(os.path.realpath(home), f".bokeh-ssh-job-{job}-{node()[:32]}"))
    return places


def meeting_place(job: str) -> str:
    """Return the directory in the home where a job's node and the login nodes meet."""
    return os.path.join(os.path.realpath(os.path.expanduser("~")), f".bokeh-ssh-job-{job}")


def make_meeting_place(job: str, place: str) -> str:
    """Make the directory in the home, whose keys are those that get in; what is there is of no job now.

    :raises OSError: if it cannot be made
    """
    path = meeting_place(job)  # there are no sockets in it, so the home's name may be long
    if not unsafe(path):
        remove_tree(path)
    os.mkdir(path, 0o700)
    os.chmod(path, 0o700)
    os.symlink(os.path.join(path, KEYS), os.path.join(place, KEYS))
    return path


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


def answers(job: str) -> bool:
    """Return whether a holder of ours has the job."""
    for path in job_places(job):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
            if not usable(path):
                sock.connect(os.path.join(path, NEWS))
                return True
    return False


def clear_job_places(job: str) -> None:
    """Remove what holders on this machine have left that were killed: of this job, and of any other."""
    for path in job_places(job):
        if not unsafe(path):
            remove_tree(path)
    for pattern in job_places("*"):
        folder, _, name = pattern.rpartition("/")
        before, _, after = name.partition("*")
        with contextlib.suppress(OSError):
            for each in os.listdir(folder):
                path = os.path.join(folder, each)
                number = each[len(before) : len(each) - len(after)]
                if each == before + number + after and number.isdigit() and is_left(path):
                    remove_tree(path)


def is_left(path: str) -> bool:
    """Return whether a directory is ours alone, and its holder has been killed.

    :raises OSError: if it cannot be looked at
    """
    if unsafe(path) or time.time() - os.lstat(path).st_ctime < _YOUNG:
        return False
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(_REACH)
        try:
            sock.connect(os.path.join(path, NEWS))
        except (ConnectionRefusedError, FileNotFoundError):
            return True
    return False


def find_job_place(job: str) -> str:
    """Find the directory that a job has made; empty where there is none that is ours alone."""
    for path in job_places(job):
        if not usable(path) and os.path.exists(os.path.join(path, RECORD)):
            return path
    return ""


def write_record(place: str, record: dict[str, Any], name: str = RECORD) -> None:
    """Write a record; whoever reads meanwhile finds none, or the whole."""
    new = os.path.join(place, f".{name}.new")
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="ascii") as file:
        json.dump(record, file)
    os.replace(new, os.path.join(place, name))


def allow_key(place: str, key: str) -> None:
    """Let a public key in, once.

    :raises OSError: if that cannot be written
    """
    with open(os.path.join(place, KEYS), "a+", encoding="ascii") as file:
        file.seek(0)
        if key not in file.read().splitlines():
            file.write(key + "\n")


def read_record(place: str, name: str = RECORD) -> dict[str, Any]:
    """Read a record; empty where it cannot be read."""
    try:
        with open(os.path.join(place, name), encoding="ascii") as file:
            record = json.load(file)
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


class TokenListener:
    """Listens on a TCP port of the machine, and passes on the connections that begin with a secret word.

    Whoever else is on the cluster can connect, and say nothing to what is behind it.

    :ivar port: the port
    :ivar word: the word, for :func:`connect`
    """

    def __init__(self) -> None:
        self.word = secrets.token_hex(_WORD // 2)
        try:
            self._sock = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        except (OSError, ValueError):  # no IPv6 here
            self._sock = socket.create_server(("", 0))
        self._sock.setblocking(False)
        self.port = self._sock.getsockname()[1]
        self._waiting: dict[socket.socket, tuple[bytes, float]] = {}

    def sources(self) -> list[socket.socket]:
        """List what is to be watched for reading."""
        return [self._sock, *self._waiting]

    def take(self, ready: list[Any]) -> list[socket.socket]:
        """Return the connections that have said the word; call it often, with what can be read."""
        now = time.monotonic()
        if self._sock in ready and len(self._waiting) < _STRANGERS:
            with contextlib.suppress(OSError):
                self._waiting[self._sock.accept()[0]] = (b"", now + _PATIENCE)
        taken = []
        for sock, (said, until) in list(self._waiting.items()):
            if sock in ready:
                sock.setblocking(False)
                try:
                    data = sock.recv(_WORD + 1 - len(said))
                except BlockingIOError:
                    continue
                except OSError:
                    data = b""
                until = until if data else now
                said += data
                if hmac.compare_digest(said, self.word.encode("ascii") + b"\n"):
                    del self._waiting[sock]
                    sock.setblocking(True)
                    taken.append(sock)
                    continue
                self._waiting[sock] = (said, until)
            if now >= until or len(said) > _WORD:
                del self._waiting[sock]
                sock.close()
        return taken

    def wait(self, seconds: float) -> socket.socket | None:
        """Return the first connection that says the word; None where none does in time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            ready = select.select(self.sources(), [], [], min(1.0, max(0.0, deadline - time.monotonic())))[0]
            taken = self.take(ready)
            if taken:
                return taken[0]
        return None

    def close(self) -> None:
        """Listen no more; what was passed on stays open."""
        for sock in self.sources():
            sock.close()


def connect(hosts: list[str], port: int, word: str, timeout: float) -> socket.socket | None:
    """Connect to a :class:`TokenListener` on the first of the hosts that is reached; None where none is."""
    for host in dict.fromkeys(hosts):
        try:
            sock = socket.create_connection((host, port), timeout)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.sendall(word.encode("ascii") + b"\n")
        except (OSError, UnicodeError):
            continue
        sock.settimeout(None)
        return sock
    return None
