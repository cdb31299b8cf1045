"""The embedded server keeps what sshd promises; its client here is asyncssh's own, not ours."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import os
import socket
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from beds import PASSWORD, Key, Machine, until
from bokeh_ssh._demo.ssh_server import Challenge, EmbeddedServer, Settings

Maker = Callable[..., Machine]
pytestmark = [
    pytest.mark.every_python,
    pytest.mark.skipif(sys.platform == "win32", reason="the commands are for a POSIX shell"),
]


def connect(machine: Machine, **options: Any) -> Any:
    """Log in with asyncssh; by key unless told otherwise."""
    given = {"username": machine.user, "known_hosts": str(machine.known_hosts), "config": None}
    given |= {"client_keys": [str(machine.key_path)], "agent_path": None}
    return asyncssh.connect(machine.host, machine.port, **given | options)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer everything once the other side has said all: half-close or nothing."""
    data = await reader.read()
    writer.write(data)
    writer.write_eof()
    await writer.drain()
    writer.close()


def test_a_command_runs_and_its_streams_and_status_come_back(embedded: Maker) -> None:
    """A command is a real process of this account; both its streams and its exit status reach the client."""

    async def use() -> None:
        async with connect(embedded()) as connection:
            done = await connection.run("cat; echo out; echo err >&2; exit 3", input="in\n")
            assert (done.stdout, done.stderr, done.exit_status) == ("in\nout\n", "err\n", 3)
            killed = await connection.run("kill -9 $$")
            assert killed.exit_signal[0] == "KILL"

    asyncio.run(use())


def test_a_command_that_ends_with_its_input_open_leaves_no_error(
    embedded: Maker, caplog: pytest.LogCaptureFixture
) -> None:
    """A command that ends before its client has ended its input ends well; asyncio logs no error."""

    async def use() -> None:
        async with connect(embedded()) as connection:
            for command in ("exit 3", "exec 0<&-; sleep 0.1; exit 3"):
                done = await connection.run(command, stdin=asyncssh.PIPE)
                assert done.exit_status == 3

    asyncio.run(use())
    gc.collect()  # that is when a task's error that nobody asked for is logged
    assert not [record for record in caplog.records if record.name == "asyncio" and record.levelno > 20]


def test_bytes_pass_unchanged_in_both_directions(embedded: Maker) -> None:
    """Megabytes of any bytes pass a command's streams unchanged, faster than one side reads."""
    sent = os.urandom(8_000_000)

    async def use() -> bytes:
        async with connect(embedded()) as connection:
            done = await connection.run("cat", input=sent, encoding=None)
        assert isinstance(done.stdout, bytes)
        return done.stdout

    assert hashlib.sha256(asyncio.run(use())).digest() == hashlib.sha256(sent).digest()


def test_a_command_outlives_its_channel_and_sees_end_of_input(embedded: Maker, tmp_path: Path) -> None:
    """When the client goes, the process gets end of input and no signal, as with sshd without a terminal."""
    machine, told = embedded(), tmp_path / "told"

    async def use() -> None:
        async with connect(machine) as connection:
            process = await connection.create_process(f"echo ready; cat > /dev/null; echo alive > {told}")
            assert await process.stdout.readline() == "ready\n"
            assert len(machine.server.processes) == 1
            machine.server.drop_connections()
            await connection.wait_closed()

    asyncio.run(use())
    until(told.exists, what="the process to go on")
    until(lambda: not machine.server.processes, what="the process to end")


def test_input_sent_before_a_close_is_delivered(embedded: Maker, tmp_path: Path) -> None:
    """What a client sends before it closes the channel reaches the process (a stop message, say)."""
    machine, told = embedded(), tmp_path / "told"

    async def use() -> None:
        async with connect(machine) as connection:
            process = await connection.create_process(f"sleep 0.2; cat > {told}.part; mv {told}.part {told}")
            process.stdin.write("stop\n")
            process.close()
            await process.wait_closed()
            await asyncio.to_thread(until, told.exists, what="the input")

    asyncio.run(use())
    assert told.read_text() == "stop\n"


def test_a_command_sees_sshds_environment_only(embedded: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of this process's environment leaks into commands; they start in the home of the account."""
    monkeypatch.setenv("BOKEH_SSH_CANARY", "leaked")
    machine = embedded(env={"GIVEN": "yes"})

    async def use() -> str:
        async with connect(machine) as connection:
            return str((await connection.run("env; pwd", env={"LC_ALL": "C", "HOME": "/x"})).stdout)

    said = asyncio.run(use())
    assert "BOKEH_SSH_CANARY" not in said
    assert "GIVEN=yes\n" in said
    assert "LC_ALL=C\n" in said
    assert f"HOME={machine.server.settings.home}\n" in said
    assert said.endswith(f"{machine.server.settings.home}\n")


def test_signals_reach_the_command(embedded: Maker) -> None:
    """A signal request is passed on to the command's process group."""

    async def use() -> None:
        async with connect(embedded()) as connection:
            process = await connection.create_process("echo ready; exec sleep 60")
            await process.stdout.readline()
            process.send_signal("TERM")
            await process.wait_closed()
            assert process.exit_signal[0] == "TERM"

    asyncio.run(use())


@pytest.mark.parametrize("refused", [{"user": "nobody-else"}, {"authorized_keys": (Key.generate().public,)}])
def test_strangers_are_refused(embedded: Maker, refused: dict[str, Any]) -> None:
    """Another user name or another key does not log in; the same with the right ones does."""

    async def use(machine: Machine) -> None:
        async with connect(machine):
            assert machine.server.connections == 1

    asyncio.run(use(embedded()))
    with pytest.raises(asyncssh.PermissionDenied):
        asyncio.run(use(embedded(**refused)))


def test_two_factors_are_asked_for_in_order(embedded: Maker) -> None:
    """Where two methods are required, the first alone is a partial success and logs nobody in."""
    code = Challenge({"Code: ": "123456"}, instruction="Look at your phone")
    machine = embedded(challenges=(code,), require=("publickey", "keyboard-interactive"))
    asked = []

    class Client(asyncssh.SSHClient):
        answer = "123456"

        def kbdint_auth_requested(self) -> str:
            return ""

        def kbdint_challenge_received(
            self, name: str, instructions: str, lang: str, prompts: Any
        ) -> list[str]:
            asked.append((instructions, *(text for text, _ in prompts)))
            return [self.answer]

    class WrongClient(Client):
        answer = "000000"

    async def use(client: type[Client]) -> None:
        async with connect(machine, client_factory=client):
            assert machine.server.logins == 1

    asyncio.run(use(Client))
    assert asked == [("Look at your phone", "Code: ")]
    for options in ({"client_factory": WrongClient}, {"client_factory": Client, "client_keys": None}):
        with pytest.raises(asyncssh.DisconnectError):
            asyncio.run(_login(machine, **options))
    assert machine.server.logins == 1


def test_too_many_tries_end_the_connection(embedded: Maker) -> None:
    """After max_auth_tries refusals the server hangs up, before a right key's turn, as sshd does."""
    machine = embedded(max_auth_tries=2)
    wrong = [asyncssh.generate_private_key("ssh-ed25519") for _ in range(2)]
    asyncio.run(_login(machine, client_keys=[wrong[0], str(machine.key_path)]))
    with pytest.raises(asyncssh.ProtocolError, match="Too many"):
        asyncio.run(_login(machine, client_keys=[*wrong, str(machine.key_path)]))


async def _login(machine: Machine, **options: Any) -> None:
    async with connect(machine, **options):
        pass


@pytest.mark.parametrize("password", [PASSWORD, "wrong"])
def test_a_password_opens_only_if_it_is_right(embedded: Maker, password: str) -> None:
    """The password method takes the one password, and is not there unless it was set."""
    machine = embedded(password=PASSWORD)
    login = _login(machine, client_keys=None, password=password)
    if password == PASSWORD:
        asyncio.run(login)
    else:
        with pytest.raises(asyncssh.PermissionDenied):
            asyncio.run(login)


def test_local_forwarding_carries_half_closes(embedded: Maker) -> None:
    """A direct-tcpip channel reaches a server of this machine, and end-of-file passes each way alone."""

    async def use() -> None:
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, connect(embedded()) as connection:
            reader, writer = await connection.open_connection("127.0.0.1", port)
            writer.write(b"hello")
            writer.write_eof()
            assert await reader.read() == b"hello"

    asyncio.run(use())


def test_remote_forwarding_binds_loopback_only(embedded: Maker) -> None:
    """A remote forward listens on loopback, even where all addresses are asked for (GatewayPorts no)."""
    machine = embedded()

    async def use() -> None:
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, connect(machine) as connection:
            listener = await connection.forward_remote_port("", 0, "127.0.0.1", port)
            found = {address for address, number in machine.listening() if number == listener.get_port()}
            assert found <= {"127.0.0.1", "::1"}
            assert "127.0.0.1" in found
            reader, writer = await asyncio.open_connection("127.0.0.1", listener.get_port())
            writer.write(b"hello")
            writer.write_eof()
            assert await reader.read() == b"hello"
            writer.close()
            listener.close()
            await listener.wait_closed()
            await asyncio.to_thread(
                until, lambda: not _listens(machine, listener.get_port()), what="the cancel"
            )

    asyncio.run(use())


def _listens(machine: Machine, port: int) -> bool:
    return any(number == port for _, number in machine.listening())


def test_gateway_ports_can_open_every_address(embedded: Maker) -> None:
    """With gateway_ports="yes" the server opens every address though loopback was asked for, as sshd does."""
    machine = embedded(gateway_ports="yes")

    async def use() -> None:
        async with connect(machine) as connection:
            listener = await connection.forward_remote_port("localhost", 0, "127.0.0.1", 1)
            assert ("0.0.0.0", listener.get_port()) in machine.listening()

    asyncio.run(use())


def test_what_is_forbidden_is_refused(embedded: Maker) -> None:
    """Forbidden forwards and one session too many are refused, and the connection goes on."""
    machine = embedded(local_forward=False, remote_forward=False, streamlocal=False, max_sessions=1)

    async def use() -> None:
        async with connect(machine) as connection:
            with pytest.raises(asyncssh.ChannelOpenError) as local:
                await connection.open_connection("127.0.0.1", machine.port)
            assert local.value.code == asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED
            with pytest.raises(asyncssh.ChannelOpenError):
                await connection.open_unix_connection("/nowhere")
            with pytest.raises(asyncssh.ChannelListenError):
                await connection.forward_remote_port("localhost", 0, "127.0.0.1", 1)
            first = await connection.create_process("cat")
            with pytest.raises(asyncssh.ChannelOpenError):
                await connection.create_process("cat")
            first.stdin.write_eof()
            assert (await first.wait()).exit_status == 0
            await asyncio.to_thread(until, lambda: not machine.server.sessions, what="the session to end")
            assert (await connection.run("echo again")).stdout == "again\n"

    asyncio.run(use())


def test_permit_lists_name_what_is_allowed(embedded: Maker) -> None:
    """permit_open lets its own targets through and nothing else."""
    allowed = embedded()
    machine = embedded(permit_open=(f"127.0.0.1:{allowed.port}",), permit_listen=("localhost:1",))

    async def use() -> None:
        async with connect(machine) as connection:
            reader, writer = await connection.open_connection("127.0.0.1", allowed.port)
            assert (await reader.read(4)) == b"SSH-"
            writer.close()
            with pytest.raises(asyncssh.ChannelOpenError):
                await connection.open_connection("127.0.0.1", machine.port)
            with pytest.raises(asyncssh.ChannelListenError):
                await connection.forward_remote_port("localhost", 0, "127.0.0.1", 1)

    asyncio.run(use())


def test_unix_sockets_are_forwarded_both_ways(embedded: Maker) -> None:
    """Unix sockets can be reached and listened on; the listener is private to its owner."""
    machine = embedded()
    place = Path(os.environ["BOKEH_SSH_DIR"])  # a short one; it is removed at the end
    place.mkdir(mode=0o700)

    async def use() -> None:
        target, listen = str(place / "target"), str(place / "listen")
        server = await asyncio.start_unix_server(echo, target)
        async with server, connect(machine) as connection:
            await connection.forward_remote_path(listen, target)
            assert (place / "listen").stat().st_mode & 0o777 == 0o600
            reader, writer = await connection.open_unix_connection(listen)
            writer.write(b"around")
            writer.write_eof()
            assert await reader.read() == b"around"
            with pytest.raises(asyncssh.ChannelListenError):
                await connection.forward_remote_path(target, target)
            assert Path(target).exists()

    asyncio.run(use())


def test_an_address_in_use_is_refused(embedded: Maker) -> None:
    """A remote forward to a port that is taken is refused."""
    machine = embedded()
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:

        async def use() -> None:
            async with connect(machine) as connection:
                with pytest.raises(asyncssh.ChannelListenError):
                    await connection.forward_remote_port("localhost", taken.getsockname()[1], "127.0.0.1", 1)

        asyncio.run(use())


def test_keys_are_exchanged_anew_on_request(embedded: Maker) -> None:
    """With a small rekey limit, bytes still pass unchanged through many key exchanges."""
    machine, sent = embedded(options={"rekey_bytes": 50_000}), os.urandom(500_000)

    async def use() -> None:
        async with connect(machine) as connection:
            done = await connection.run("cat", input=sent, encoding=None)
            assert done.stdout == sent

    asyncio.run(use())


def test_closing_leaves_nothing_behind(
    no_leaks: Callable[..., AbstractContextManager[None]], key: Key
) -> None:
    """After close, no thread, descriptor or listener is left, though clients and commands were there."""

    async def use(server: EmbeddedServer) -> None:
        connection = await asyncssh.connect(
            server.host, server.port, username="me", known_hosts=None, config=None, agent_path=None,
            client_keys=[asyncssh.import_private_key(key.private)],
        )  # fmt: skip
        process = await connection.create_process("echo ready; cat")
        await process.stdout.readline()
        await connection.forward_remote_port("localhost", 0, "127.0.0.1", 1)
        await asyncio.to_thread(server.close)
        await connection.wait_closed()

    with no_leaks():
        server = EmbeddedServer(Settings(authorized_keys=(key.public,)))
        server.open()
        server.open()  # nothing happens
        asyncio.run(use(server))
        server.close()
        assert server.processes == ()
    with EmbeddedServer() as again:
        assert again.connections == 0


def test_it_opens_again_after_a_close(key: Key) -> None:
    """A closed server can be opened again and keeps its host key."""
    server = EmbeddedServer()
    with server:
        line = server.known_hosts_line("name")
    with server:
        assert server.known_hosts_line("name") == line
        assert server.port > 0
    with pytest.raises(RuntimeError):
        server.drop_connections()
