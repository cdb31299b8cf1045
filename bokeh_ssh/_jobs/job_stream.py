"""A byte stream to a job's SSH server, through the scheduler: no port anywhere, no forwarding needed."""

from __future__ import annotations

import contextlib
import shlex
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from bokeh_ssh._core.errors import BokehSSHError, ConnectionLostError, LaunchError, SessionError
from bokeh_ssh._core.framing import plain
from bokeh_ssh._core.settings import setting
from bokeh_ssh._core.waiting import wait
from bokeh_ssh._jobs.remote_program import RemoteProgram
from bokeh_ssh._ssh.connection import Connection
from bokeh_ssh._ssh.remote_shell import READ, encode

#: What runs on the node: a shell that reads its script from the stream, so that no command line has it.
_SHELL = ["/bin/sh", "-c", READ.replace("<&3", "")]
#: In a job step, all that it says goes by its standard error, and becomes output on the login node: where
#: nothing is to be held back (``srun -u``), the output of a step is a terminal, which carries half as much.
#: What srun itself says comes in between, and ends the connection, as does the end that it is about.
_STEP_SHELL = ["/bin/sh", "-c", f"exec >&2; {_SHELL[2]}"]

#: What people set for their own srun, such as SLURM_LABELIO, would change the bytes or where they go.
_CLEAR = (
    "for v in $(env | sed -n 's/^\\(S[LR]U[RN]M\\{0,1\\}_[A-Z0-9_]*\\)=.*/\\1/p'); do "
    '[ "$v" = SLURM_CONF ] || unset "$v"; done; '
)


def check_session(connection: Connection) -> None:
    """Check that a stream could be opened beside the session of the warden.

    :raises SessionError: if the login node has no further session for us
    """
    ended = threading.Event()
    with _explaining_sessions():
        session = connection.run(
            "true",
            on_stdout=lambda data: None,
            on_stderr=lambda data: None,
            on_exit=lambda status: ended.set(),
            timeout=connection.hop.timeout,
        )
    wait(ended, connection.hop.timeout)  # only then is it free for the stream
    session.close()


@contextlib.contextmanager
def _explaining_sessions() -> Iterator[None]:
    try:
        yield
    except SessionError as exc:
        msg = f"a job needs two sessions on one connection, and there is no second one: {exc.message}"
        hint = "ask the administrator for MaxSessions 2 or more, or name another login node"
        raise SessionError(msg, host=exc.host, hint=hint) from exc


def open_job_stream(
    connection: Connection,
    words: Sequence[str],
    *,
    job: str,
    path: str,
    pythons: Sequence[str],
    timeout: float,
    patience: float,
    ways: Sequence[str],
    nodes: Sequence[str] = (),
    client_key: str = "",
    setup: str | Sequence[str] = (),
) -> tuple[socket.socket, dict[str, Any]]:
    """Reach the SSH server of a job from the login node.

    :param words: the scheduler's command that runs another one in the job, joined to it by its streams; none
        where ours is to run on the login node itself
    :param path: the PATH for it
    :param timeout: seconds until the server must answer
    :param patience: seconds that the server may take, once its machine is reached
    :param ways: "srun" for a command in the job; on the login node "tcp" and "back", tried in this order
    :param nodes: names of the job's machine
    :param client_key: a public key that the server is to let in, if it does not yet
    :param setup: steps that may bring a Python
    :returns: a socket to it, and what the job said: ``host_key``, ``user``, ``node``, and the ``way``
    :raises ConnectionLostError: if the command fails: the job may be over, or the scheduler not there
    :raises LaunchError: if there can be no SSH server
    :raises SessionError: if the login node has no session for it
    """
    stream = _Stream(pythons, setup, shared="srun" not in ways)
    deadline = time.monotonic() + timeout
    command = shlex.join([*words, *_STEP_SHELL]) + " 2>&1 >/dev/null" if words else shlex.join(_SHELL)
    order: dict[str, Any] = {"job": job, "client_key": client_key, "ways": list(ways), "nodes": list(nodes)}
    order["timeout"] = max(1.0, min(patience, timeout - 2.0))
    try:
        with _explaining_sessions():
            lead = encode(f"PATH={shlex.quote(path)}; export PATH; {_CLEAR}exec {command}")
            stream.start(connection, order, timeout, lead)
        record = stream.expect(("connected",), deadline - time.monotonic())
    except BaseException:
        stream.drop()
        raise
    assert stream.sock
    return stream.sock, record


class _Stream(RemoteProgram):
    """The stream until the SSH server has it; ``shared``: the job is found by the home."""

    def __init__(self, pythons: Sequence[str], setup: str | Sequence[str], *, shared: bool) -> None:
        super().__init__("job_stream", pythons=pythons, setup=setup)
        self._shared = shared
        self.sock: socket.socket | None = None
        self._rest = bytearray()
        self._dropped = False

    def drop(self) -> None:
        """End its session, and close what comes of it."""
        self.close()
        with self._change:
            self._dropped = True
            if self.sock:
                self.sock.close()

    def _error(self, found: dict[str, Any] | None, timeout: float) -> BokehSSHError:
        if not found:
            msg = (
                "the scheduler did not lead to the job"
                if self.over
                else "the job's machine did not answer in time"
            )
            said = self.last_words or ("it said nothing" if self.over else "")
            return ConnectionLostError(f"{msg} ({said})" if said else msg, hint="try again")
        why = plain(str(found.get("why") or ""))
        why = "there is no Python on it" if why == "python" else why
        node = plain(str(found.get("node") or "the job's machine"))
        if not why and self._shared:
            msg = "the job has left nothing in the home that this login node has (a shared one is needed)"
            hint = f"see what the job wrote; on Slurm, leave out {setting('way')}: srun needs no shared home"
            return ConnectionLostError(msg, hint=hint)
        if found.get("lost"):
            return ConnectionLostError(f"the job on {node} is not reached: {why}", hint="try again")
        msg = f"{node} cannot be used: {why}" if why else f"the job on {node} does not answer"
        return LaunchError(msg, hint="see what the job wrote, or ask for another machine")

    def _on_stdout(self, data: bytes) -> None:
        self._rest += data
        with self._change:
            while not self.sock and (end := self._rest.find(b"\n") + 1):
                line = bytes(self._rest[:end])
                del self._rest[:end]
                super()._on_stdout(line)
                if self._messages and self._messages[-1]["event"] == "connected" and self._session:
                    self.sock = self._session.hand_over(bytes(self._rest))
                    if self._dropped:
                        self.sock.close()
