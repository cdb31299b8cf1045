"""An SSH server inside this process, on loopback: for the demo, and for tests.

It is built on asyncssh and shares no code with the client side, so that neither can hide the other's
mistakes. Commands run as real processes of this account; forwarding works in both directions. It behaves like
OpenSSH's sshd without a terminal, with one difference: the exit status is sent when the command's output has
ended, not already when the process has.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import asyncssh

from bokeh_ssh._demo.ssh_command import Command

_T = TypeVar("_T")

#: Seconds for the server's own steps: to listen, to answer a question of ours, to say goodbye.
_PATIENCE = 10.0
#: Turns of the loop after which what was accepted last is served.
_TURNS = 5


@dataclass(frozen=True)
class Challenge:
    """One round of keyboard-interactive questions.

    :param answers: what to ask, and the answer that is right
    :param echo: whether the answers may be shown
    """

    answers: Mapping[str, str]
    echo: bool = False
    name: str = ""
    instruction: str = ""


@dataclass(frozen=True)
class Settings:
    """How the embedded server behaves; settings are named after sshd_config's where there is one.

    :param user: the only user name that may log in; None takes any (all become this account)
    :param authorized_keys: public keys as lines of an ``authorized_keys`` file
    :param password: accepted by the password method; None offers no such method
    :param challenges: the rounds of the keyboard-interactive method; none offers no such method
    :param require: methods that must all succeed, in this order, such as ``("publickey",
        "keyboard-interactive")`` (AuthenticationMethods); empty: any one will do
    :param max_auth_tries: failed tries after which the server hangs up
    :param shell: the login shell, run as ``shell -c command``
    :param home: where commands start; None is this account's home
    :param env: set for every command, on top of what sshd sets
    :param local_forward: whether ``direct-tcpip`` is allowed
    :param remote_forward: whether ``tcpip-forward`` is allowed
    :param streamlocal: whether Unix sockets may be forwarded, both ways
    :param permit_open: ``host:port`` patterns (``*`` for any) that local forwards may reach; None is all
    :param permit_listen: ``host:port`` patterns that remote forwards may listen on; None is all
    :param gateway_ports: "no" binds loopback whatever was asked for, "yes" every address,
        "clientspecified" what was asked for
    :param sftp: whether there is an ``sftp`` subsystem, which sees what this account sees
    :param max_sessions: open sessions on one connection
    :param hangup: signals that a command gets when its channel ends, one after the other, such as ("TERM",)
        (Apache MINA's way) or ("HUP",) (Twisted Conch's); none leaves it alone, as sshd does
    :param hangup_reach: who gets them: the command's "process", its "group", or its "tree" (all descendants)
    :param host_key: None makes a new ed25519 key
    :param options: more keywords for :func:`asyncssh.listen`, such as ``rekey_bytes``
    """

    user: str | None = None
    authorized_keys: tuple[str, ...] = ()
    password: str | None = field(default=None, repr=False)
    challenges: tuple[Challenge, ...] = field(default=(), repr=False)
    require: tuple[str, ...] = ()
    max_auth_tries: int = 6
    shell: str = "/bin/sh" if os.name == "posix" else "cmd.exe"
    home: str | os.PathLike[str] | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    local_forward: bool = True
    remote_forward: bool = True
    streamlocal: bool = True
    permit_open: tuple[str, ...] | None = None
    permit_listen: tuple[str, ...] | None = None
    gateway_ports: Literal["no", "yes", "clientspecified"] = "no"
    sftp: bool = True
    max_sessions: int = 10
    hangup: tuple[str, ...] = ()
    hangup_reach: Literal["process", "group", "tree"] = "process"
    host_key: asyncssh.SSHKey | None = field(default=None, repr=False)
    options: Mapping[str, Any] = field(default_factory=dict)


class EmbeddedServer:
    """Serve SSH on 127.0.0.1, on any free port, from a thread of its own; a context manager.

    :param settings: who may log in and what is allowed; by default nobody may log in

    What its commands left running stays, as with sshd; ``processes`` has their ids.
    """

    host = "127.0.0.1"

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.host_key = self.settings.host_key or asyncssh.generate_private_key("ssh-ed25519")
        self.port = 0
        self.logins = 0
        self._clients: set[_Client] = set()
        self._running: dict[int, threading.Thread] = {}
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None

    def __repr__(self) -> str:
        state = f"on {self.host}:{self.port}" if self._thread else "closed"
        return f"<{type(self).__name__} {state}>"

    def __enter__(self) -> EmbeddedServer:
        self.open()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def open(self) -> None:
        """Start to listen; nothing happens where it does already.

        :raises OSError: if no port can be had
        """
        if self._thread:
            return
        ready: list[BaseException | None] = []
        started = threading.Event()

        def report(problem: BaseException | None) -> None:
            ready.append(problem)
            started.set()

        self._thread = threading.Thread(target=self._run, args=(report,), name="embedded-sshd", daemon=True)
        self._thread.start()
        started.wait(_PATIENCE)
        if not ready or ready[0]:
            self.close()
            raise OSError("the embedded SSH server did not start") from (ready[0] if ready else None)

    def close(self) -> None:
        """End all connections and stop listening; nothing happens where that was done before."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        if self._loop is not None and self._stop is not None and thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
        thread.join(_PATIENCE)
        for reaper in tuple(self._running.values()):  # most end by themselves when their pipes close
            reaper.join(1)

    @property
    def connections(self) -> int:
        """How many clients are logged in now."""
        return sum(client.user is not None for client in tuple(self._clients))

    @property
    def sessions(self) -> int:
        """How many sessions are open, on all connections."""
        return sum(len(client.sessions) for client in tuple(self._clients))

    @property
    def processes(self) -> tuple[int, ...]:
        """The ids of the commands that still run."""
        return tuple(self._running)

    def drop_connections(self) -> int:
        """Cut every connection, without goodbye; return how many there were."""

        async def drop() -> int:
            clients = tuple(self._clients)
            for client in clients:
                client.conn.abort()
            return len(clients)

        return self._call(drop())

    def known_hosts_line(self, *names: str) -> str:
        """Return the server's line for a known_hosts file, under ``names`` or its addresses."""
        addresses = names or (f"[{self.host}]:{self.port}", f"[localhost]:{self.port}")
        return f"{','.join(addresses)} {self.host_key.export_public_key().decode().strip()}\n"

    def write_known_hosts(self, path: str | os.PathLike[str], *names: str) -> None:
        """Append the server's line to a known_hosts file."""
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(self.known_hosts_line(*names))

    def _call(self, work: Coroutine[Any, Any, _T]) -> _T:
        if self._loop is None or self._thread is None:
            work.close()
            raise RuntimeError("the embedded SSH server is not open")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_PATIENCE)

    def _run(self, report: Callable[[BaseException | None], None]) -> None:
        try:
            asyncio.run(self._serve(report))
        except BaseException as exc:  # noqa: BLE001 - handed to the thread that waits in open()
            report(exc)

    async def _serve(self, report: Callable[[BaseException | None], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        acceptor = await asyncssh.listen(
            self.host,
            0,
            server_factory=lambda: _Client(self),
            server_host_keys=[self.host_key],
            config=None,
            encoding=None,
            allow_pty=False,
            agent_forwarding=False,
            **self.settings.options,
        )
        self.port = acceptor.get_port()
        report(None)
        await self._stop.wait()
        _stop_accepting(acceptor.sockets)
        await _pass_turns()
        acceptor.close()
        clients = tuple(self._clients)
        for client in clients:
            client.conn.close()
        goodbyes = [asyncio.ensure_future(client.conn.wait_closed()) for client in clients]
        if goodbyes:
            await asyncio.wait(goodbyes, timeout=2)
        for client in tuple(self._clients):
            client.conn.abort()
        await _pass_turns()


def _stop_accepting(sockets: Iterable[socket.socket]) -> None:
    """Accept no more: what was accepted and is not served yet when asyncio closes, it drops as it is."""
    with contextlib.suppress(NotImplementedError):  # Windows
        for sock in sockets:
            asyncio.get_running_loop().remove_reader(sock.fileno())


async def _pass_turns() -> None:
    """Wait until what was accepted is served, and what was to close has closed."""
    for _ in range(_TURNS + 1):
        await asyncio.sleep(0)


def _close_in_time(listener: asyncssh.SSHListener) -> asyncssh.SSHListener:
    """Make a listener close only once it serves what it has accepted."""
    close, loop = listener.close, asyncio.get_running_loop()
    servers: Sequence[asyncio.Server] = listener._servers  # type: ignore[attr-defined]  # it has no public name

    def after(turns: int) -> None:
        if turns:
            loop.call_soon(after, turns - 1)
        else:
            close()

    def stop() -> None:
        _stop_accepting(sock for server in servers for sock in server.sockets)
        after(_TURNS)

    listener.close = stop  # type: ignore[method-assign]  # there is no hook for it
    return listener


class _Client(asyncssh.SSHServer):
    """One connection: who may log in, and what may be opened."""

    conn: asyncssh.SSHServerConnection

    def __init__(self, server: EmbeddedServer) -> None:
        self.server = server
        self.settings = server.settings
        self.user: str | None = None
        self.sessions: set[Command] = set()
        self._name = ""
        self._required = list(self.settings.require)
        self._round = 0
        self._failures = 0

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self.conn = conn
        self.server._clients.add(self)
        succeed = conn.send_userauth_success

        async def next_factor() -> None:
            # asyncssh accepts after the first method; RFC 4252 section 5.1 has "partial success" for more.
            if self._required:
                self._required.pop(0)
            if self._required:
                conn.send_userauth_failure(True)
                return
            self.user = self._name
            self.server.logins += 1
            await succeed()

        conn.send_userauth_success = next_factor  # type: ignore[method-assign]  # there is no hook for it

    def connection_lost(self, exc: Exception | None) -> None:
        self.server._clients.discard(self)

    def begin_auth(self, username: str) -> bool:
        self._name = username
        return True

    def _offers(self, method: str, have: object) -> bool:
        return bool(have) and (not self._required or self._required[0] == method)

    def _judge(self, username: str, right: bool) -> bool:
        if right and self.settings.user in (None, username):
            return True
        self._failures += 1
        if self._failures >= self.settings.max_auth_tries:
            self.conn.disconnect(asyncssh.DISC_PROTOCOL_ERROR, "Too many authentication failures")
        return False

    def public_key_auth_supported(self) -> bool:
        return self._offers("publickey", self.settings.authorized_keys)

    def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        allowed = [asyncssh.import_public_key(line) for line in self.settings.authorized_keys]
        return self._judge(username, key in allowed)

    def password_auth_supported(self) -> bool:
        return self._offers("password", self.settings.password is not None)

    def validate_password(self, username: str, password: str) -> bool:
        return self._judge(username, password == self.settings.password)

    def kbdint_auth_supported(self) -> bool:
        return self._offers("keyboard-interactive", self.settings.challenges)

    def get_kbdint_challenge(self, username: str, lang: str, submethods: str) -> Any:
        self._round = 0
        return self._ask()

    def validate_kbdint_response(self, username: str, responses: Any) -> Any:
        right = list(self.settings.challenges[self._round].answers.values())
        if not self._judge(username, list(responses) == right):
            return False
        self._round += 1
        return True if self._round == len(self.settings.challenges) else self._ask()

    def _ask(self) -> Any:
        challenge = self.settings.challenges[self._round]
        prompts = [(prompt, challenge.echo) for prompt in challenge.answers]
        return challenge.name, challenge.instruction, "", prompts

    def session_requested(self) -> Command:
        if len(self.sessions) >= self.settings.max_sessions:
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_CONNECT_FAILED, "open failed")
        return Command(self.settings, self.server._running, self.sessions)

    def connection_requested(
        self, dest_host: str, dest_port: int, orig_host: str, orig_port: int
    ) -> Awaitable[Any]:
        if not self.settings.local_forward or not _permits(self.settings.permit_open, dest_host, dest_port):
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED, "open failed")
        return self._forward(self.conn.forward_connection(dest_host, dest_port))

    def unix_connection_requested(self, dest_path: str) -> Awaitable[Any]:
        if not self.settings.streamlocal:
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED, "open failed")
        return self._forward(self.conn.forward_unix_connection(dest_path))

    async def _forward(self, connecting: Awaitable[asyncssh.SSHForwarder]) -> asyncssh.SSHForwarder:
        """Close what was reached for a client that has gone meanwhile: asyncssh drops it as it is."""
        forwarder = await connecting
        if self not in self.server._clients:
            forwarder.close()
        return forwarder

    def server_requested(self, listen_host: str, listen_port: int) -> Awaitable[asyncssh.SSHListener] | bool:
        allowed = _permits(self.settings.permit_listen, listen_host or "localhost", listen_port)
        return self._listen(listen_host, listen_port) if self.settings.remote_forward and allowed else False

    async def _listen(self, host: str, port: int) -> asyncssh.SSHListener:
        ways = {"no": "localhost", "yes": "", "clientspecified": "" if host == "*" else host}
        bind = ways[self.settings.gateway_ports]
        await _pass_turns()  # the same port may be about to close
        try:
            listener = await self.conn.forward_local_port(bind, port, host, port)
        except OSError:
            if bind != "localhost":
                raise
            # "localhost" may have an IPv6 address that cannot be bound here; sshd too makes do with one.
            listener = await self.conn.forward_local_port(self.server.host, port, host, port)
        if self not in self.server._clients:  # gone meanwhile: asyncssh closes only those that it had then
            listener.close()
            raise ConnectionAbortedError
        return _close_in_time(listener)

    def unix_server_requested(self, listen_path: str) -> Awaitable[asyncssh.SSHListener] | bool:
        return self._listen_unix(listen_path) if self.settings.streamlocal else False

    async def _listen_unix(self, path: str) -> asyncssh.SSHListener:
        await _pass_turns()  # the same path may be about to close
        if Path(path).exists():  # asyncio would remove it; sshd does not (StreamLocalBindUnlink no)
            raise FileExistsError(path)
        listener = await self.conn.forward_local_path(path, path)
        Path(path).chmod(stat.S_IRUSR | stat.S_IWUSR)  # StreamLocalBindMask 0177
        return _close_in_time(listener)


def _permits(patterns: tuple[str, ...] | None, host: str, port: int) -> bool:
    """Match ``host:port`` against patterns as PermitOpen and PermitListen do (``*`` for any)."""
    if patterns is None:
        return True
    pairs = [pattern.rpartition(":") for pattern in patterns]
    return any(name in ("*", "", host) and digits in ("*", str(port)) for name, _, digits in pairs)
