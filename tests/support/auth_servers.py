"""What the login tests log in to: OpenSSH's sshd, an asyncssh server, and SSH agents good and bad."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import inspect
import os
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asyncssh
import paramiko
import pytest
from asyncssh.packet import Boolean, NameList, String, UInt32

USER = getpass.getuser()
SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


class Client(paramiko.Transport):
    """A transport that keeps the server's last words, as the package's own does."""

    disconnect_message = ""

    def _parse_disconnect(self, message: paramiko.Message) -> None:
        message.get_int()
        self.disconnect_message = message.get_binary().decode("utf-8", "replace")


@contextlib.contextmanager
def client(port: int) -> Iterator[Client]:
    """Connect to a server on loopback and exchange keys."""
    transport = Client(socket.create_connection(("127.0.0.1", port), timeout=30))
    try:
        transport.start_client(timeout=10)
        yield transport
    finally:
        transport.close()
        transport.join(30)
        assert not transport.is_alive()


# Keys.


def make_key(
    path: Path, kind: str = "ssh-ed25519", *, passphrase: str | None = None, form: str = "openssh"
) -> Any:
    """Write a new key pair, as ssh-keygen does, and return it."""
    key = asyncssh.generate_private_key(kind, comment=path.name)
    # Four rounds of key derivation rather than half a second of it.
    cheap = {"rounds": 4, "ignore_few_rounds": True} if passphrase and form == "openssh" else {}
    path.write_bytes(key.export_private_key(form, passphrase=passphrase, **cheap))
    path.chmod(0o600)
    path.with_name(path.name + ".pub").write_bytes(key.export_public_key())
    return key


# OpenSSH's sshd.


class Sshd:
    """sshd in inetd mode: each connection has a process of its own, so that nothing needs a fixed port."""

    def __init__(self, folder: Path, authorized: list[Any], *options: str, newest: str = "") -> None:
        if SSHD is None:
            reason = "OpenSSH's sshd is not on this machine"
            (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        make_key(folder / "host_key")
        (folder / "authorized").write_bytes(b"".join(key.export_public_key() for key in authorized))
        config = [
            f"HostKey {folder}/host_key",
            f"AuthorizedKeysFile {folder}/authorized",
            *options,
            "StrictModes no",
            "UsePAM no",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "PermitRootLogin yes",
            "LogLevel VERBOSE",
            "PidFile none",
        ]
        if newest:  # it is made of several programs, looked for where the distribution puts them
            config += [
                f"SshdSessionPath {newest}/lib/openssh/sshd-session",
                f"SshdAuthPath {newest}/lib/openssh/sshd-auth",
            ]
        (folder / "sshd_config").write_text("\n".join(config) + "\n")
        program = f"{newest}/sbin/sshd" if newest else SSHD
        self._command = [program, "-i", "-e", "-f", str(folder / "sshd_config")]
        self._log = folder / "sshd.log"
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._processes: list[subprocess.Popen[bytes]] = []
        self._thread = threading.Thread(target=self._serve, name="sshd")
        self._thread.start()

    def _serve(self) -> None:
        with self._log.open("ab") as log:
            while True:
                try:
                    conn, _ = self._listener.accept()
                except OSError:
                    return
                with conn:
                    self._processes.append(
                        subprocess.Popen(self._command, stdin=conn, stdout=conn, stderr=log)
                    )

    @property
    def connections(self) -> int:
        return len(self._processes)

    def log(self) -> str:
        """Everything that was logged, once each connection has ended."""
        for process in self._processes:
            process.wait(30)
        return self._log.read_text()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(30)
        for process in self._processes:
            process.terminate()
            process.wait(30)


# asyncssh.


class Rules(asyncssh.SSHServer):
    """What the asyncssh server asks for. Each connection has its own; ``needs`` are the methods still wanted.

    :param needs: the methods in order, one after the other; or a set, any one of which is enough
    """

    def __init__(
        self,
        needs: tuple[str, ...] | set[str] = ("password",),
        *,
        keys: tuple[Any, ...] = (),
        password: str = "right",
        rounds: tuple[tuple[str, str, tuple[tuple[str, bool], ...], tuple[str, ...]], ...] = (),
        on_begin: Callable[[asyncssh.SSHServerConnection], Any] | None = None,
        on_answer: Callable[[], Any] | None = None,
    ) -> None:
        self.needs = needs
        self.keys = [key.convert_to_public().public_data for key in keys]
        self.password = password
        self.rounds = rounds
        self.on_begin = on_begin
        self.on_answer = on_answer
        self.asked: list[str] = []
        self.user = ""
        self.tried: list[str] = []
        self.offered: list[bytes] = []
        self.answers: list[tuple[str, ...]] = []
        self.passwords: list[str] = []
        self.round = 0

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self.conn: Any = conn
        success = conn.send_userauth_success

        def next_method() -> Any:
            # asyncssh's server knows no partial success (RFC 4252, section 5.1); it is made here.
            if isinstance(self.needs, tuple) and len(self.needs) > 1:
                self.needs = self.needs[1:]
                conn.send_userauth_failure(True)
                return nothing() if inspect.iscoroutinefunction(success) else None
            return success()

        async def nothing() -> None:
            """Stand in for the success that newer versions of asyncssh await."""

        self.conn.send_userauth_success = next_method

    def _now(self, method: str) -> bool:
        return method in (self.needs if isinstance(self.needs, set) else self.needs[:1])

    async def begin_auth(self, username: str) -> bool:
        self.user = username
        if self.on_begin:
            result = self.on_begin(self.conn)
            if asyncio.iscoroutine(result):
                await result
        return True

    def public_key_auth_supported(self) -> bool:
        return self._now("publickey")

    def validate_public_key(self, _username: str, key: Any) -> bool:
        self.tried.append("publickey")
        self.offered.append(key.public_data)
        return self._now("publickey") and key.public_data in self.keys

    def password_auth_supported(self) -> bool:
        return self._now("password")

    async def validate_password(self, _username: str, password: str) -> bool:
        self.tried.append("password")
        self.passwords.append(password)
        if self.on_answer:
            result = self.on_answer()
            if asyncio.iscoroutine(result):
                await result
        return self._now("password") and password == self.password

    def kbdint_auth_supported(self) -> bool:
        return self._now("keyboard-interactive")

    def get_kbdint_challenge(self, _username: str, _lang: str, _submethods: str) -> Any:
        self.tried.append("keyboard-interactive")
        self.round = 0
        return self._question()

    def _question(self) -> Any:
        name, instructions, questions, _ = self.rounds[self.round]
        return (name, instructions, "", [(text, echo) for text, echo in questions])

    def validate_kbdint_response(self, _username: str, responses: Any) -> Any:
        self.answers.append(tuple(responses))
        if tuple(responses) != self.rounds[self.round][3]:
            return False
        self.round += 1
        return True if self.round == len(self.rounds) else self._question()


class Bed:
    """An asyncssh server in a thread of this process; ``rules()`` makes the rules of each connection."""

    def __init__(self, rules: Callable[[], Rules]) -> None:
        self.seen: list[Rules] = []
        self.port = 0
        self._rules = rules
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="asyncssh")
        self._thread.start()
        assert self._ready.wait(30)

    def _factory(self) -> Rules:
        self.seen.append(self._rules())
        return self.seen[-1]

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        key = asyncssh.generate_private_key("ssh-ed25519")
        start = asyncssh.create_server(self._factory, "127.0.0.1", 0, server_host_keys=[key], login_timeout=0)
        server = self._loop.run_until_complete(start)
        self.port = server.sockets[0].getsockname()[1]
        self._loop.call_soon(self._ready.set)
        self._loop.run_forever()
        server.close()
        for rules in self.seen:
            rules.conn.abort()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        for _ in range(3):  # an aborted transport closes its socket one turn later
            self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        assert not self._thread.is_alive()


def banner(text: bytes) -> Callable[[Any], None]:
    """Make what sends a banner, as raw as it is."""
    return lambda conn: conn.send_packet(53, String(text), String(b""))


def info_request(*questions: bytes, count: int | None = None) -> Callable[[Any], None]:
    """Make what sends an info request out of turn."""
    body = b"".join(String(text) + Boolean(False) for text in questions)
    number = len(questions) if count is None else count
    return lambda conn: conn.send_packet(60, String(b""), String(b""), String(b""), UInt32(number), body)


def failure(*methods: bytes, partial: bool = False) -> Callable[[Any], None]:
    """Make what sends a refusal out of turn."""
    return lambda conn: conn.send_packet(51, NameList(methods), Boolean(partial))


# OpenSSH's ssh.

SSH = shutil.which("ssh")


class SshClient:
    """Logs in with OpenSSH's ssh as a person would; each question gets the same answer.

    :param folder: where its config, its known_hosts and what it asked are
    """

    def __init__(self, folder: Path, lines: str, *, answer: str = "", agent: str | None = None) -> None:
        if SSH is None:
            pytest.skip("OpenSSH's ssh is not on this machine")
        folder.mkdir(exist_ok=True)
        (folder / "config").write_text(lines)
        (folder / "config").chmod(0o600)
        self.config = folder / "config"
        self._questions = folder / "questions"
        askpass = folder / "askpass"
        askpass.write_text(
            f"#!/bin/sh\nprintf '%s\\n' \"$1\" >> {self._questions}\nprintf '%s\\n' '{answer}'\n"
        )
        askpass.chmod(0o700)
        self._known = folder / "known_hosts"
        self._env = {
            **os.environ,
            "SSH_ASKPASS": str(askpass),
            "SSH_ASKPASS_REQUIRE": "force",
            "LC_ALL": "C",
            **({"SSH_AUTH_SOCK": agent} if agent else {}),
        }

    def enter(self, port: int, *options: str) -> tuple[bool, str]:
        """Log in; whether that worked, and what ssh said."""
        words = [
            *(str(SSH), "-N", "-F", str(self.config), "-p", str(port), "-o", "StrictHostKeyChecking=no"),
            *("-o", f"UserKnownHostsFile={self._known}", "-o", "GlobalKnownHostsFile=none", *options),
            *("-o", "ExitOnForwardFailure=yes", "-v", "-W", "localhost:1", "--", "127.0.0.1"),
        ]
        done = subprocess.run(
            words, env=self._env, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False
        )
        said = done.stderr.decode("utf-8", "replace")
        return "Authenticated to" in said, said

    @property
    def questions(self) -> list[str]:
        """What it has asked."""
        return self._questions.read_text().splitlines() if self._questions.exists() else []


# Agents.


class SshAgent:
    """OpenSSH's ssh-agent with ``keys`` added; stopped with ``close()``."""

    def __init__(self, *keys: Path) -> None:
        self._folder = tempfile.mkdtemp(prefix="agent")  # a socket's path must be short
        self.path = f"{self._folder}/s"
        self._process = subprocess.Popen(["ssh-agent", "-D", "-a", self.path], stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        assert b"SSH_AUTH_SOCK" in self._process.stdout.readline()
        for key in keys:
            self.add(key)

    def add(self, key: Path) -> None:
        environment = {**os.environ, "SSH_AUTH_SOCK": self.path}
        subprocess.run(["ssh-add", "-q", str(key)], env=environment, check=True, timeout=30)

    def keys(self) -> list[str]:
        """What it holds: fingerprint and comment of each key."""
        environment = {**os.environ, "SSH_AUTH_SOCK": self.path}
        done = subprocess.run(
            ["ssh-add", "-l"], env=environment, capture_output=True, text=True, timeout=10, check=False
        )
        return done.stdout.splitlines() if done.returncode == 0 else []

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)
        assert self._process.stdout is not None
        self._process.stdout.close()
        shutil.rmtree(self._folder, ignore_errors=True)


class FakeAgent:
    """A listening socket that does with each connection what ``script`` says; None leaves it hanging."""

    def __init__(self, script: Callable[[socket.socket], None] | None) -> None:
        self._folder = tempfile.mkdtemp(prefix="agent")
        self.path = f"{self._folder}/s"
        self.connections = 0
        self._script = script
        self._open: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, name="fake agent")
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                conn, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._open.append(conn)
            if self._script:
                with contextlib.suppress(OSError):
                    self._script(conn)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for conn in self._open:
            with contextlib.suppress(OSError):
                conn.shutdown(socket.SHUT_RDWR)
            conn.close()
        self._thread.join(30)
        shutil.rmtree(self._folder, ignore_errors=True)
