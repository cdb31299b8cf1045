"""The machines that tests log in to, all with one interface: an embedded server, a real sshd, a container.

A :class:`Machine` says how to reach and enter it, and lets a test look at it from inside. What it allows is
said once, as :class:`Knobs`, and translated for each kind of server.
"""

from __future__ import annotations

import atexit
import errno
import getpass
import importlib.metadata
import itertools
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_T = TypeVar("_T")

#: The password of every account in a container, and what the embedded server takes.
PASSWORD = "correct horse battery staple"

#: How many logins may be made again: an older asyncssh may hang up, once, at what is requested with one.
MADE_ANEW = int(tuple(map(int, importlib.metadata.version("asyncssh").split(".")[:2])) < (2, 24))


def until(condition: Callable[[], _T], *, timeout: float = 30, what: str = "") -> _T:
    """Ask until the answer is true, and give it; the place of every sleep.

    :param timeout: seconds until it is an AssertionError that names ``what``; many, since what is waited for
        comes at once on a machine that does nothing else, and this one may do a lot
    """
    deadline = time.monotonic() + timeout
    pause = threading.Event()
    while True:
        asked = time.monotonic()
        if answer := condition():
            return answer
        now = time.monotonic()
        assert now < deadline, f"not within {timeout} s: {what or condition}"
        # What runs a program, maybe in a container, keeps the processors from what is waited for.
        pause.wait(min(max(0.01, 2 * (now - asked)), 0.5))


@dataclass(frozen=True)
class Key:
    """An SSH key pair: the private key as OpenSSH text, the public one as a line."""

    private: str = field(repr=False)
    public: str

    @classmethod
    def generate(cls) -> Key:
        """Make a new ed25519 key."""
        key = Ed25519PrivateKey.generate()
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        )
        public = key.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
        return cls(private.decode().strip(), public.decode())

    def write(self, path: Path) -> Path:
        """Write the private key, readable by its owner only, and the public one beside it."""
        path.touch(0o600)
        path.write_text(self.private + "\n", encoding="ascii")
        path.with_name(path.name + ".pub").write_text(self.public + "\n", encoding="ascii")
        return path


@dataclass(frozen=True)
class Knobs:
    """What a server allows, in words that every kind of server here understands.

    :param password: whether the password method is offered (with ``PASSWORD``)
    :param interactive: whether keyboard-interactive is offered (one question, answered by ``PASSWORD``)
    :param require: methods that must all succeed, in order; empty: any one
    :param gateway_ports: "no", "yes" or "clientspecified"
    :param permit_open: ``host:port`` patterns; None is all; likewise ``permit_listen``
    :param rekey: bytes after which the server asks for new keys; 0 is its own default
    """

    password: bool = False
    interactive: bool = False
    require: tuple[str, ...] = ()
    local_forward: bool = True
    remote_forward: bool = True
    streamlocal: bool = True
    gateway_ports: str = "no"
    permit_open: tuple[str, ...] | None = None
    permit_listen: tuple[str, ...] | None = None
    max_sessions: int = 10
    sftp: bool = True
    rekey: int = 0

    def directives(self) -> dict[str, str]:
        """Say it as sshd_config keywords."""
        tcp = {(True, True): "yes", (True, False): "local", (False, True): "remote", (False, False): "no"}
        return {
            "UseDNS": "no",
            "UsePAM": "yes" if self.interactive else "no",
            "PermitRootLogin": "yes",
            "PasswordAuthentication": "yes" if self.password else "no",
            "KbdInteractiveAuthentication": "yes" if self.interactive else "no",
            "AuthenticationMethods": ",".join(self.require) or "any",
            "AllowTcpForwarding": tcp[self.local_forward, self.remote_forward],
            "AllowStreamLocalForwarding": "yes" if self.streamlocal else "no",
            "GatewayPorts": self.gateway_ports,
            "PermitOpen": "any" if self.permit_open is None else " ".join(self.permit_open) or "none",
            "PermitListen": "any" if self.permit_listen is None else " ".join(self.permit_listen) or "none",
            "MaxSessions": str(self.max_sessions),
            "MaxStartups": "200",  # many tests connect at once; the default drops some by chance
        } | self._optional()

    def _optional(self) -> dict[str, str]:
        found = {"RekeyLimit": str(self.rekey)} if self.rekey else {}
        return found | ({"Subsystem": "sftp internal-sftp"} if self.sftp else {})


@dataclass(frozen=True)
class Result:
    """What a command on a machine left behind."""

    status: int
    stdout: str
    stderr: str

    def __str__(self) -> str:
        return self.stdout.strip()


class Running:
    """A command that was started on a machine and is looked at and ended by its test."""

    def __init__(self, machine: Machine, pid: int, log: str) -> None:
        self.machine = machine
        self.pid = pid
        self._log = log

    @property
    def log(self) -> str:
        """Both its streams, so far."""
        return self.machine.execute(["cat", self._log]).stdout

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        # Of a command in a container, what it wrote and its status can be missing: that says nothing.
        done = until(self._look, timeout=10, what="ps to answer")
        assert done
        return done.status == 0 and not done.stdout.strip().startswith("Z")

    def _look(self) -> Result | None:
        done = self.machine.execute(["ps", "-o", "stat=", "-p", str(self.pid)])
        return done if done.status == 1 or done.stdout.strip() else None

    def signal(self, number: int = signal.SIGTERM) -> None:
        """Send it a signal; nothing happens where it has ended."""
        self.machine.execute(["kill", f"-{int(number)}", str(self.pid)])


@dataclass(kw_only=True, eq=False)
class Machine:
    """A machine to log in to, and what a test may know about it.

    :param kind: "embedded", "sshd" (a real one, on this machine) or "docker"
    :param host: its address from here; with ``port`` 0 it cannot be reached from here
    :param key_path: a private key that may log in as ``user``
    :param known_hosts: a file with its host key
    :param python: an interpreter there that has Bokeh
    :param inside: its host name (and port 22) for the other machines of its bed; empty where there are none
    :param server: the :class:`EmbeddedServer`, the ``subprocess.Popen`` of sshd, or the docker container
    """

    kind: str
    host: str
    port: int
    user: str
    key_path: Path
    known_hosts: Path
    python: str
    inside: str = ""
    server: Any = None

    @property
    def login(self) -> dict[str, Any]:
        """The login keywords of bokeh_ssh for it."""
        return {
            "port": self.port,
            "key_filename": str(self.key_path),
            "known_hosts": str(self.known_hosts),
            "ssh_config": None,
            "allow_agent": False,
            "look_for_keys": False,
        }

    def ssh_config(self, alias: str) -> str:
        """Give an ssh config block under which it can be reached from here."""
        return (
            f"Host {alias}\n  HostName {self.host}\n  Port {self.port}\n  User {self.user}\n"
            f"  IdentityFile {self.key_path}\n  IdentitiesOnly yes\n"
            f"  UserKnownHostsFile {self.known_hosts}\n  GlobalKnownHostsFile none\n"
        )

    def ssh(self, *args: str, user: str | None = None) -> list[str]:
        """Give the command line of stock ``ssh`` to it, with ``args`` after the host."""
        options = {
            "IdentityFile": str(self.key_path),
            "IdentitiesOnly": "yes",
            "UserKnownHostsFile": str(self.known_hosts),
            "StrictHostKeyChecking": "yes",
            "BatchMode": "yes",
            "ConnectTimeout": "30",
            "ExitOnForwardFailure": "yes",
        }
        said = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
        flags = ["-F", "none", "-p", str(self.port), "-l", user or self.user]
        return ["ssh", *flags, *said, *args[:-1], self.host, *args[-1:]]

    def execute(
        self, command: str | Sequence[str], *, user: str | None = None, data: bytes = b"", timeout: float = 30
    ) -> Result:
        """Run a command there, not through its SSH server, and wait for its end.

        :param command: a line for ``sh``, or the words of a command
        :param user: who runs it; None is root in a container, and this account elsewhere
        """
        words = ["sh", "-c", command] if isinstance(command, str) else list(command)
        done = subprocess.run(words, input=data, capture_output=True, timeout=timeout, check=False)
        return Result(
            done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        )

    @contextmanager
    def spawn(self, command: Sequence[str], *, user: str | None = None) -> Iterator[Running]:
        """Start a command there, not through its SSH server; its ``with`` block ends it (TERM, then KILL)."""
        base = str(self.execute("mktemp", user=user))
        line = f"echo $$ > {base}.pid; exec {shlex.join(command)} > {base} 2>&1 < /dev/null"
        with self._detached(line, user):
            pid = until(lambda: str(self.execute(f"cat {base}.pid")), what=f"{command[0]} to start")
            running = Running(self, int(pid), base)
            try:
                yield running
            finally:
                running.signal(signal.SIGTERM)
                try:
                    until(lambda: not running.running, timeout=5, what="the command to end")
                except AssertionError:
                    running.signal(signal.SIGKILL)
        self.execute(["rm", "-f", base, f"{base}.pid"])

    @contextmanager
    def _detached(self, line: str, user: str | None) -> Iterator[None]:
        with subprocess.Popen(["sh", "-c", line], start_new_session=True):
            yield

    def pids(self, marker: str) -> list[int]:
        """Find the processes whose command line contains ``marker``."""
        rows = self.execute(["ps", "-ww", "-eo", "pid=,stat=,args="]).stdout.splitlines()
        found = (row.split(None, 2) for row in rows if marker in row)
        return [int(pid) for pid, state, *_ in found if not state.startswith("Z")]

    def listening(self) -> set[tuple[str, int]]:
        """Tell the TCP listeners there, as (address, port)."""
        table = self.execute("cat /proc/net/tcp; cat /proc/net/tcp6 2>/dev/null").stdout
        return parse_listeners(table)


def parse_listeners(table: str) -> set[tuple[str, int]]:
    """Read the listeners out of ``/proc/net/tcp`` and ``tcp6``."""
    found = set()
    for row in table.splitlines():
        match = re.match(r"\s*\d+: ([0-9A-F]+):([0-9A-F]{4}) \S+ 0A ", row)
        if match:
            raw = bytes.fromhex(match[1])
            words = b"".join(raw[at : at + 4][::-1] for at in range(0, len(raw), 4))  # little-endian words
            family = socket.AF_INET if len(raw) == 4 else socket.AF_INET6
            found.add((socket.inet_ntop(family, words), int(match[2], 16)))
    return found


def _own_ports() -> Iterator[int]:
    # Below those that the system gives to outgoing connections, and other ones for each process, also of a
    # run beside this one: one that is let go of is still free when a server that cannot pick one itself binds
    # it a moment later, and nobody connects to it by mistake. Who has bound the first of them has them all.
    for first in range(12_000, 31_200, 600):
        mark = socket.socket()
        try:
            mark.bind(("127.0.0.1", first))
        except OSError:
            mark.close()
        else:
            atexit.register(mark.close)
            break
    return (first + 1 + (os.getpid() + number) % 599 for number in itertools.count())


_PORTS = _own_ports()


def free_port() -> int:
    """Find a TCP port that is free on loopback, and stays so; for servers that cannot pick one themselves."""
    for port in itertools.islice(_PORTS, 599):
        if all(_can_bind(family, address, port) for family, address in _LOOPBACKS):
            return port
    msg = "no port is free"
    raise RuntimeError(msg)


_LOOPBACKS = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))


def _can_bind(family: int, address: str, port: int) -> bool:
    with closing(socket.socket(family)) as sock:
        try:
            sock.bind((address, port))
        except OSError as exc:
            return exc.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # a machine without IPv6
    return True


def has_banner(host: str, port: int) -> bool:
    """Tell whether an SSH server greets there."""
    try:
        with socket.create_connection((host, port), timeout=2) as sock:
            return sock.recv(4) == b"SSH-"
    except OSError:
        return False


@contextmanager
def embedded(knobs: Knobs, key: Key, directory: Path, **settings: Any) -> Iterator[Machine]:
    """Run the embedded server; ``settings`` are more of its own."""
    from bokeh_ssh._demo.ssh_server import Challenge, EmbeddedServer, Settings

    challenge = Challenge({"Password: ": PASSWORD})
    options = {"rekey_bytes": knobs.rekey} if knobs.rekey else {}
    home = directory / "remote-home"
    home.mkdir(exist_ok=True)
    values: dict[str, Any] = {
        "authorized_keys": (key.public,),
        "password": PASSWORD if knobs.password else None,
        "challenges": (challenge,) if knobs.interactive else (),
        "require": knobs.require,
        "local_forward": knobs.local_forward,
        "remote_forward": knobs.remote_forward,
        "streamlocal": knobs.streamlocal,
        "gateway_ports": knobs.gateway_ports,
        "permit_open": knobs.permit_open,
        "permit_listen": knobs.permit_listen,
        "max_sessions": knobs.max_sessions,
        "sftp": knobs.sftp,
        "home": home,
        "options": options,
    }
    with EmbeddedServer(Settings(**values | settings)) as server:
        known_hosts = directory / f"known_hosts-{server.port}"
        server.write_known_hosts(known_hosts)
        yield Machine(
            kind="embedded",
            host=server.host,
            port=server.port,
            user=getpass.getuser(),
            key_path=key.write(directory / f"key-{server.port}"),
            known_hosts=known_hosts,
            python=sys.executable,
            server=server,
        )


def find_sshd() -> str | None:
    """Find OpenSSH's server on this machine."""
    return shutil.which(
        "sshd", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    )


@contextmanager
def local_sshd(
    key: Key, directory: Path, directives: Mapping[str, str], *, newest: str = ""
) -> Iterator[Machine]:
    """Run a real sshd on this machine, as this account, on loopback; its log is ``directory/sshd.log``.

    :param newest: the folder of a newer OpenSSH than the machine's, that of ``OPENSSH_NEWEST``
    """
    program = f"{newest}/sbin/sshd" if newest else find_sshd()
    assert program, "sshd is not installed"
    if hasattr(os, "getuid") and os.getuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where it drops its privileges
    # Not under a test's own directory: sshd refuses keys below a directory that others may write.
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sshd-")))
        host_key = Key.generate()
        host_key.write(place / "host_key")
        (place / "authorized_keys").write_text(key.public + "\n", encoding="ascii")
        base = {
            "HostKey": str(place / "host_key"),
            "AuthorizedKeysFile": str(place / "authorized_keys"),
            "PidFile": "none",
            "StrictModes": "no",
        }
        version = _version(f"{newest}/bin/ssh" if newest else "ssh")
        if version >= (9, 8):
            base["PerSourcePenalties"] = "no"  # refused logins are what some tests are about
        if newest:  # it is made of several programs, looked for where the distribution puts them
            base["SshdSessionPath"] = f"{newest}/lib/openssh/sshd-session"
            base["SshdAuthPath"] = f"{newest}/lib/openssh/sshd-auth"
        with (directory / "sshd.log").open("ab") as log:
            process, port = _start_sshd(program, place, Knobs().directives() | base | dict(directives), log)
        stack.callback(_end, process)
        known_hosts = directory / f"known_hosts-{port}"
        known_hosts.write_text(f"[127.0.0.1]:{port},[localhost]:{port} {host_key.public}\n", encoding="ascii")
        yield Machine(
            kind="sshd",
            host="127.0.0.1",
            port=port,
            user=getpass.getuser(),
            key_path=key.write(directory / f"key-{port}"),
            known_hosts=known_hosts,
            python=sys.executable,
            server=process,
        )


def _start_sshd(
    program: str, place: Path, directives: Mapping[str, str], log: Any
) -> tuple[subprocess.Popen[bytes], int]:
    """Start sshd; it cannot pick a free port itself, so another program may be faster: then try again."""
    for _ in range(5):
        port = free_port()
        lines = [f"{key} {value}\n" for key, value in directives.items()]
        config = place / "sshd_config"
        config.write_text(f"ListenAddress 127.0.0.1:{port}\n{''.join(lines)}", encoding="utf-8")
        process = subprocess.Popen(
            [program, "-D", "-e", "-f", str(config)], stdin=subprocess.DEVNULL, stderr=log
        )
        until(lambda: process.poll() is not None or has_banner("127.0.0.1", port), what="sshd to answer")  # noqa: B023
        if process.poll() is None:
            return process, port
    raise AssertionError("sshd does not start: see its log")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait(30)


def _version(ssh: str) -> tuple[int, ...]:
    """Return an OpenSSH's version, as (9, 2)."""
    said = subprocess.run([ssh, "-V"], capture_output=True, check=False).stderr.decode()
    match = re.search(r"OpenSSH_\D*(\d+)\.(\d+)", said)
    return tuple(map(int, match.groups())) if match else (0, 0)
