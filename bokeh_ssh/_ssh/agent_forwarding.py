"""Our SSH agent, lent to another machine for one login (``ssh -A``, for a moment).

Not a pipe to the agent, as ``ssh -A`` is: each question is read, and asked by us. The other side may see
which keys there are, and have a login signed for the one account that it is lent for. It cannot add or remove
keys, have anything else signed, or ask after the lending is over. Which machine the signed login goes to
cannot be seen: who runs the other machine could use it elsewhere, for an account of the same name, during
these seconds.
"""

from __future__ import annotations

import contextlib
import queue
import struct
from collections.abc import Iterator

from bokeh_ssh._core.endpoint import Origin
from bokeh_ssh._core.threads import Thread
from bokeh_ssh._ssh.auth.agent import Agent, AgentError
from bokeh_ssh._ssh.connection import Connection
from bokeh_ssh._ssh.messages import AGENT, string, strings
from bokeh_ssh._ssh.session import Session
from bokeh_ssh._ssh.transport import Channel

# draft-ietf-sshm-ssh-agent, section 3.
_FAILURE = b"\x05"
_LIST = 11
_KEYS = 12
_SIGN = 13
_SIGNATURE = 14
_ALGORITHMS = {2: "rsa-sha2-256", 4: "rsa-sha2-512"}
_LOGIN = 50  # SSH_MSG_USERAUTH_REQUEST
#: Bytes of a question; one that is signed has a session id and two names in it, and a key or a certificate.
_MOST = 64 * 1024
_MOST_STREAMS = 8
#: Questions in all: a login asks for the list, and for some signatures; more is to fill our memory.
_MOST_QUESTIONS = 200

_uint32 = struct.Struct(">I")


@contextlib.contextmanager
def lend_agent(connection: Connection, agent: Agent, user: str) -> Iterator[None]:
    """Answer the other side's questions while the context lasts.

    :param user: the account on the third machine whose logins may be signed
    """
    lending = _AgentForwarding(connection, agent, user)
    connection.transport.listen(AGENT, lending.on_open)
    try:
        yield
    finally:
        connection.transport.unlisten(AGENT)
        lending.end()


class _AgentForwarding:
    def __init__(self, connection: Connection, agent: Agent, user: str) -> None:
        self._connection = connection
        self._agent = agent
        self._user = user.encode()
        self._channels: set[_AgentChannel] = set()
        self._asked: queue.SimpleQueue[tuple[_AgentChannel, bytes] | None] = queue.SimpleQueue()
        self._over = False
        self._count = 0
        # The agent may ask a person, who takes a while; nothing else may wait for that.
        self._thread = Thread(self._answer, name=f"bokeh-ssh lends agent {connection.name}")
        self._thread.start()

    def on_open(self, channel: Channel, origin: Origin) -> None:
        """Take a channel that the other side opens, on the transport thread."""
        if self._over or len(self._channels) >= _MOST_STREAMS:
            channel.reject()
            return
        agent_channel = _AgentChannel(self)
        self._channels.add(agent_channel)

        def accept() -> None:
            channel.accept()
            agent_channel.session.opened(channel)

        agent_channel.session = Session(
            self._connection.io_loop,
            agent_channel.on_data,
            lambda _: None,
            lambda _: self._channels.discard(agent_channel),
        )
        self._connection.io_loop.post(accept)

    def queue_question(self, agent_channel: _AgentChannel, question: bytes) -> None:
        """Queue a question."""
        self._count += 1
        if self._count > _MOST_QUESTIONS:
            agent_channel.session.close()
        else:
            self._asked.put((agent_channel, question))

    def end(self) -> None:
        """Answer nothing any more, and wait for no answer that a person has yet to give."""
        self._over = True
        self._asked.put(None)
        for agent_channel in list(self._channels):
            agent_channel.session.close()
        self._thread.join(0.5)

    def _answer(self) -> None:
        try:
            while (asked := self._asked.get()) and not self._over:
                agent_channel, question = asked
                try:
                    answer = self._find_answer(question)
                except (AgentError, ValueError, struct.error):
                    answer = _FAILURE
                if not self._over:
                    agent_channel.session.write(string(answer))
        finally:
            self._agent.close()

    def _find_answer(self, question: bytes) -> bytes:
        if question[0] == _LIST:
            keys = self._agent.list_keys()
            parts = (string(key.blob) + string(key.comment) for key in keys)
            return bytes((_KEYS,)) + _uint32.pack(len(keys)) + b"".join(parts)
        if question[0] != _SIGN:
            return _FAILURE
        blob, data, rest = strings(question[1:], 2)
        if not is_login(data, blob, self._user):
            return _FAILURE
        signature = self._agent.sign(blob, data, _ALGORITHMS.get(_uint32.unpack_from(rest)[0], ""))
        return bytes((_SIGNATURE,)) + string(signature)


class _AgentChannel:
    """One channel of theirs, and the question that is coming through it."""

    session: Session

    def __init__(self, lending: _AgentForwarding) -> None:
        self._forwarding = lending
        self._buffer = bytearray()

    def on_data(self, data: bytes) -> None:
        self._buffer += data
        while len(self._buffer) >= 4:
            (size,) = _uint32.unpack_from(self._buffer)
            if not 0 < size <= _MOST:
                self._buffer.clear()
                self.session.close()
                return
            if len(self._buffer) < 4 + size:
                return
            question = bytes(self._buffer[4 : 4 + size])
            del self._buffer[: 4 + size]
            self._forwarding.queue_question(self, question)


def is_login(data: bytes, blob: bytes, user: bytes) -> bool:
    """Return whether this is what a client signs to log in as ``user`` with that key (RFC 4252, section 7).

    >>> is_login(b"anything else", b"key", b"me")
    False
    """
    try:
        _, rest = strings(data, 1)
        if rest[:1] != bytes((_LOGIN,)):
            return False
        who, service, method, rest = strings(rest[1:], 3)
        if rest[:1] != b"\x01":
            return False
        _, key, _ = strings(rest[1:], 2)
    except ValueError:
        return False
    methods = (b"publickey", b"publickey-hostbound-v00@openssh.com")
    return who == user and service == b"ssh-connection" and method in methods and key == blob
