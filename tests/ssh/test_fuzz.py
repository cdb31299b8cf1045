"""What the far side or an agent says, in any bytes: read or skipped, never an error.

The parsers of host keys, ssh configs, the supervisor's messages and lists of servers have theirs beside their
other tests: ``test_hostkeys``, ``test_sshconfig``, ``test_command``, ``test_servers``.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bokeh_ssh._core.framing import Reader, Tail, plain
from bokeh_ssh._core.this_machine.proc_net import find_peer, listeners
from bokeh_ssh._server.log_parsing import AppErrors, is_windows, port_in_use, reason
from bokeh_ssh._ssh.auth.agent import Agent, AgentError
from bokeh_ssh._ssh.connection import bound_port
from bokeh_ssh._ssh.messages import AGENT
from bokeh_ssh._ssh.transport import forwarded

#: Lines as Bokeh writes them, and what an app can print between them.
LINES = st.lists(
    st.one_of(
        st.text(max_size=80),
        st.sampled_from(
            [
                "2026-01-01 10:00:00,123 Error running application handler <x>: no",
                "Traceback (most recent call last):",
                "  File 'x.py', line 1",
                "ERROR: Cannot start Bokeh server, port 5006 is already in use:",
                "\x1b]0;title\x07\x1b[31mred\x1b[0m",
                "GET /x?bokeh-session-id=abc.def-_",
            ]
        ),
    ),
    max_size=30,
)


@given(LINES)
def test_any_log_is_read(lines: list[str]) -> None:
    """What a server writes is shown without what acts on a terminal, and searched for what is known."""
    errors = AppErrors()
    for text in errors.feed(lines):
        assert isinstance(text, str)
    shown = [plain(line) for line in lines]
    assert not [line for line in shown if "\x1b" in line or "\x07" in line or "abc.def" in line]
    assert isinstance(reason(shown), str)
    assert port_in_use(shown) in (True, False)
    assert is_windows(shown) in (True, False)


@given(st.binary(max_size=3000), st.integers(1, 700))
def test_any_stream_is_read(data: bytes, size: int) -> None:
    """Noise of any kind, in pieces of any size, makes messages or none, and stays bounded."""
    reader, tail = Reader("mark"), Tail()
    for start in range(0, len(data), size):
        for message in reader.feed(data[start : start + size]):
            assert isinstance(message["event"], str)
        tail.feed(data[start : start + size])


@given(st.text(max_size=400), st.integers(1, 65535))
@example("0: 0:ZZ 0:0 0A 0 0 0 7 0 7", 5006)
@example("0: 0:1 0:0 0A 0 0 0 \u00b2 0 \u00b2", 1)
@example("0: 0100007F:D431 0100007F:138E 01 0 0 0 \u00b2 0 x", 1)
def test_any_table_of_listeners_is_read(text: str, port: int) -> None:
    """A table of sockets that is none says nothing about who owns a port."""
    assert all(isinstance(number, int) for each in listeners(text, port) for number in each)
    found = find_peer(text, "0100007F:D431", "0100007F:138E")
    assert found is None or len(found) == 2


@given(
    st.sampled_from([b"forwarded-tcpip", b"forwarded-streamlocal@openssh.com", AGENT.encode(), b"x11", b""]),
    st.binary(max_size=100),
)
def test_any_channel_open_is_read(kind: bytes, rest: bytes) -> None:
    """A channel that the server opens is for a listener, or for nobody."""
    found = forwarded(kind, rest)
    assert found is None or len(found) == 2
    port = bound_port(rest)
    assert port is None or 0 < port < 65536


@pytest.mark.skipif(os.name != "posix", reason="an agent on a Unix socket")
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200), st.booleans())
@example(b"\x0c\xff\xff\xff\xff", True)
@example(b"\x0c" + struct.pack(">II", 2, 0xFFFFFFFF), True)
def test_any_agent_is_survived(tmp_path: Path, answer: bytes, framed: bool) -> None:
    """An agent that answers nonsense has no keys, signs nothing, and takes no time."""
    path = Path(os.environ["BOKEH_SSH_DIR"]).with_suffix(".sock")
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            for _ in range(2):
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                with sock:
                    sock.recv(4096)
                    sock.sendall(struct.pack(">I", len(answer)) + answer if framed else answer)

        thread = threading.Thread(target=serve)
        thread.start()
        agent = Agent(str(path))
        keys = agent.list_keys()
        assert all(key.blob for key in keys)
        try:
            assert isinstance(agent.sign(b"key", b"data", "rsa-sha2-512"), bytes)
        except AgentError:
            pass
        agent.close()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(30)
        assert not thread.is_alive()
    path.unlink(missing_ok=True)
