"""The person's SSH agent, asked with deadlines (draft-miller-ssh-agent)."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from paramiko.agent import (
    ALGORITHM_FLAG_MAP,
    SSH2_AGENT_IDENTITIES_ANSWER,
    SSH2_AGENT_SIGN_RESPONSE,
    cSSH2_AGENTC_REQUEST_IDENTITIES,
    cSSH2_AGENTC_SIGN_REQUEST,
    get_agent_connection,
)
from paramiko.message import Message
from paramiko.ssh_exception import SSHException

from bokeh_ssh._core.this_machine.scarcity import is_scarce
from bokeh_ssh._core.waiting import SLICE
from bokeh_ssh._ssh.messages import string, strings

#: Seconds for an agent to say which keys it has: it needs nobody's help for that.
LIST_TIMEOUT = 3.0
#: Seconds for a signature: the agent may ask for a confirmation, a PIN or a touch.
SIGN_TIMEOUT = 60.0
# As OpenSSH's MAX_AGENT_REPLY_LEN and MAX_AGENT_IDENTITIES (authfd.c).
_MOST_BYTES = 256 * 1024
# draft-ietf-sshm-ssh-agent, sections 3.2.1 and 3.2.7
_ADD_IDENTITY = b"\x11"
_ADD_ID_CONSTRAINED = b"\x19"
_SUCCESS = 6
_LIFETIME = b"\x01"
_CONFIRM = b"\x02"
#: A security key's: the agent's own library talks to the device (OpenSSH's PROTOCOL.agent, section 6).
_DEVICE = b"\xff" + string("sk-provider@openssh.com") + string("internal")
_MOST_KEYS = 2048


class AgentError(Exception):
    """The agent cannot be used; the text says why. Never leaves the package."""


@dataclass(frozen=True)
class AgentKey:
    """A key, or a certificate, that the agent can sign with."""

    blob: bytes
    comment: bytes


def agent_address(setting: str | None) -> str | None:
    """Find the agent's socket.

    :param setting: ``identity_agent`` of the config: a path, ``"none"``, or None where it says nothing
    :return: a path, or None where no agent is to be used
    """
    if setting is None:
        return os.environ.get("SSH_AUTH_SOCK") or ("" if sys.platform == "win32" else None)
    return None if setting == "none" else setting or None


class Agent:
    """A connection to the agent, opened when it is first needed; ``close()`` ends it.

    :param address: its socket, from :func:`agent_address`; None is an agent without keys
    :ivar trouble: why it cannot be used; empty as long as nothing is wrong

    Once it has failed it is not asked again: each question would cost another deadline.
    """

    def __init__(self, address: str | None) -> None:
        self.trouble = ""
        self._address = address
        self._connection: _AgentConnection | None = None
        self._keys: tuple[AgentKey, ...] | None = None if address is not None else ()

    def __repr__(self) -> str:
        return f"<Agent {self._address or 'none'}>"

    @property
    def present(self) -> bool:
        """Whether there is one, and nothing has been wrong with it."""
        return self._address is not None and not self.trouble

    def list_keys(self) -> tuple[AgentKey, ...]:
        """Return the keys that it holds, in its order; none if it does not answer in ``LIST_TIMEOUT``."""
        if self._keys is None:
            self._keys = ()
            with contextlib.suppress(AgentError):
                self._keys = self._fetch()
        return self._keys

    def _fetch(self) -> tuple[AgentKey, ...]:
        kind, reply = self._request(cSSH2_AGENTC_REQUEST_IDENTITIES, LIST_TIMEOUT)
        if kind != SSH2_AGENT_IDENTITIES_ANSWER:
            self.trouble = "the SSH agent does not tell its keys"
            return ()
        count = min(reply.get_int(), _MOST_KEYS)
        # Comments are bytes: those of other programs are not always UTF-8.
        found = (AgentKey(reply.get_binary(), reply.get_binary()) for _ in range(count))
        return tuple(key for key in found if key.blob)

    def sign(self, blob: bytes, data: bytes, algorithm: str) -> bytes:
        """Sign ``data`` with the key ``blob``; waits up to ``SIGN_TIMEOUT`` for a person to confirm.

        :raises AgentError: if it refuses, or does not answer
        """
        request = Message()
        request.add_byte(cSSH2_AGENTC_SIGN_REQUEST)
        request.add_string(blob)
        request.add_string(data)
        request.add_int(ALGORITHM_FLAG_MAP.get(algorithm, 0))
        kind, reply = self._request(request.asbytes(), SIGN_TIMEOUT)
        if kind != SSH2_AGENT_SIGN_RESPONSE:
            msg = "the SSH agent refused to sign"
            raise AgentError(msg)
        return reply.get_binary()

    def add(self, private: bytes, comment: str, *, lifetime: float = 0, confirm: bool = False) -> None:
        """Add a key to the agent (``ssh-add``).

        :param private: type and numbers of the key, as the agent and key files have them; with one of a
            security key, the agent talks to the device by itself
        :param lifetime: seconds after which the agent forgets it; 0 has no end
        :param confirm: whether it asks before each use
        :raises AgentError: if it does not take the key, or does not answer
        """
        limits = _LIFETIME + int(lifetime).to_bytes(4, "big") if lifetime else b""
        limits += _CONFIRM if confirm else b""
        limits += _DEVICE if strings(private, 1)[0].startswith(b"sk-") else b""
        head = _ADD_ID_CONSTRAINED if limits else _ADD_IDENTITY
        named = string(comment.encode("utf-8", "surrogateescape"))
        kind, _ = self._request(head + private + named + limits, LIST_TIMEOUT)
        if kind != _SUCCESS:
            msg = "the SSH agent did not take the key"
            raise AgentError(msg)

    def _request(self, request: bytes, timeout: float) -> tuple[int, Message]:
        deadline = time.monotonic() + timeout
        try:
            if self._connection is None:
                self._connection = _connect(self._address or "", deadline)
            reply = self._connection.exchange(string(request), deadline)
        except TimeoutError as exc:
            self.close()
            self.trouble = f"the SSH agent did not answer within {timeout:g} s"
            raise AgentError(self.trouble) from exc
        except (OSError, EOFError, ValueError, SSHException) as exc:
            self.close()
            if is_scarce(exc):
                raise
            self.trouble = f"the SSH agent cannot be used ({getattr(exc, 'strerror', None) or exc})"
            raise AgentError(self.trouble) from exc
        return reply[0], Message(reply[1:])

    def close(self) -> None:
        """Hang up; idempotent."""
        self._keys = ()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


class _AgentConnection(Protocol):
    def exchange(self, request: bytes, deadline: float) -> bytes: ...

    def close(self) -> None: ...


def _connect(address: str, deadline: float) -> _AgentConnection:
    if hasattr(socket, "AF_UNIX"):
        return AgentSocket(address, deadline)
    if sys.platform == "win32":
        return AgentPipe(get_agent_connection)
    msg = "this Python has no Unix sockets"
    raise OSError(msg)


def _read_answer(receive: Callable[[int], bytes]) -> bytes:
    def read(size: int) -> bytes:
        data = b""
        while len(data) < size:
            chunk = receive(size - len(data))
            if not chunk:
                msg = "it hung up"
                raise EOFError(msg)
            data += chunk
        return data

    size = int.from_bytes(read(4), "big")
    if not 0 < size <= _MOST_BYTES:
        msg = f"it sent a message of {size} bytes"
        raise ValueError(msg)
    return read(size)


class AgentSocket:
    """A Unix socket on which every step shares one deadline."""

    def __init__(self, path: str, deadline: float) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._step(deadline)
            self._sock.connect(path)
        except BaseException:
            self._sock.close()
            raise

    def _step(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left)

    def exchange(self, request: bytes, deadline: float) -> bytes:
        def receive(size: int) -> bytes:
            self._step(deadline)
            return self._sock.recv(size)

        self._step(deadline)
        self._sock.sendall(request)
        return _read_answer(receive)

    def close(self) -> None:
        self._sock.close()


class AgentPipe:
    """An agent on Windows, whose reads know no deadline: each question is asked on a thread of its own.

    The thread of a question that is never answered cannot be joined; it is a daemon and holds nothing but
    the agent's handle.

    :param connect: opens paramiko's connection to Pageant or to the OpenSSH agent; None if there is neither
    """

    def __init__(self, connect: Callable[[], Any]) -> None:
        self._connect = connect
        self._conn: Any = None
        self._stuck = False

    def exchange(self, request: bytes, deadline: float) -> bytes:
        answer: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()

        def work() -> None:
            try:
                answer.put(self._exchange_blocking(request))
            except Exception as exc:  # noqa: BLE001  # whatever ctypes or the pipe raise must reach the caller's thread
                answer.put(exc)

        thread = threading.Thread(target=work, name="bokeh-ssh agent", daemon=True)
        thread.start()
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                self._stuck = True
                raise TimeoutError
            with contextlib.suppress(queue.Empty):
                result = answer.get(timeout=min(left, SLICE))
                break
        thread.join()
        if isinstance(result, Exception):
            raise OSError(str(result)) from result
        return result

    def _exchange_blocking(self, request: bytes) -> bytes:
        if self._conn is None:
            self._conn = self._connect()
            if self._conn is None:
                msg = "none is running"
                raise OSError(msg)
        self._conn.send(request)
        return _read_answer(self._conn.recv)

    def close(self) -> None:
        # Closing a pipe handle that a thread reads from would block on Windows as long as the read does.
        if self._conn is not None and not self._stuck:
            with contextlib.suppress(OSError):
                self._conn.close()
