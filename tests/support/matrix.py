"""What of bokeh_ssh works with which SSH server: tried on each that can be had here.

    python tests/support/matrix.py           print the table, and what went wrong; with names, only their rows
    python tests/support/matrix.py --write   put it into docs/servers.md

``tests/e2e/test_matrix.py`` compares what it finds with the page.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import apps
import beds
import conformance
import other_servers
from beds import Key, Knobs, Machine, until
from bokeh_ssh import (
    AuthenticationError,
    BokehSSHError,
    DirectTunnel,
    ForwardingRefusedError,
    Host,
    LocalForward,
    RemoteForward,
)
from cable import Cable
from targets import target_here

PAGE = Path(__file__).parents[2] / "docs" / "servers.md"
YES = "yes"


@dataclass(frozen=True)
class Server:
    """An SSH server of the table.

    :param name: how the page names it
    :param command: its name for :func:`other_servers.command`; empty where it is started in another way
    :param commands: whether it runs commands for us; the table says "-" where it does not
    """

    name: str
    command: str = ""
    commands: bool = True

    @contextmanager
    def running(self, place: Path) -> Iterator[Machine]:
        """Run it on loopback.

        :raises other_servers.MissingError: if it is not installed
        """
        key = Key.generate()
        if self.command:
            with other_servers.running(other_servers.command(self.command, place), key, place) as machine:
                yield machine
        else:
            with STARTS[self.name](key, place) as machine:
                yield machine


@contextmanager
def _openssh(key: Key, place: Path) -> Iterator[Machine]:
    if beds.find_sshd() is None:
        msg = "OpenSSH's sshd is not installed"
        raise other_servers.MissingError(msg)
    with beds.local_sshd(key, place, {}) as machine:
        yield machine


@contextmanager
def _newest_openssh(key: Key, place: Path) -> Iterator[Machine]:
    newest = os.environ.get("OPENSSH_NEWEST", "")
    if not newest:
        msg = "no newer OpenSSH than the distribution's is here (OPENSSH_NEWEST)"
        raise other_servers.MissingError(msg)
    with beds.local_sshd(key, place, {}, newest=newest) as machine:
        yield machine


@contextmanager
def _newest_dropbear(key: Key, place: Path) -> Iterator[Machine]:
    newest = os.environ.get("OPENSSH_NEWEST", "")
    if not newest:
        msg = "no newer Dropbear than the distribution's is here (OPENSSH_NEWEST)"
        raise other_servers.MissingError(msg)
    with other_servers.dropbear(key, place, newest=newest) as machine:
        yield machine


@contextmanager
def _asyncssh(key: Key, place: Path) -> Iterator[Machine]:
    with beds.embedded(Knobs(), key, place) as machine:
        yield machine


STARTS = {
    "OpenSSH 9.2": _openssh,
    "OpenSSH 10.6": _newest_openssh,
    "Dropbear 2022.83": other_servers.dropbear,
    "Dropbear 2026.94": _newest_dropbear,
    "TinySSH": other_servers.tinyssh,
    "asyncssh": _asyncssh,
}
SERVERS = [
    Server("OpenSSH 9.2"),
    Server("OpenSSH 10.6"),
    Server("Dropbear 2022.83"),
    Server("Dropbear 2026.94"),
    Server("TinySSH"),
    Server("asyncssh"),
    Server("Twisted Conch", "conch"),
    Server("paramiko", "paramiko"),
    Server("npm ssh2", "ssh2"),
    Server("Go gliderlabs/ssh", "gliderlabs"),
    Server("Apache MINA", "mina"),
    Server("Erlang ssh", "erlang", commands=False),
]


def _forward(machine: Machine, port: int, **keywords: Any) -> LocalForward:
    return LocalForward(
        machine.host, machine.user, remote_port=port, remote_host="127.0.0.1", **machine.login, **keywords
    )


def _known_as(machine: Machine, port: int) -> Path:
    """Write a known_hosts file with the machine's key for loopback and that port."""
    key = machine.known_hosts.read_text(encoding="ascii").split(maxsplit=1)[1]
    path = machine.known_hosts.with_name(f"known_hosts-again-{port}")
    path.write_text(f"[127.0.0.1]:{port},[localhost]:{port} {key}", encoding="ascii")
    return path


def forward_ports(machine: Machine) -> None:
    """A local forward carries a megabyte each way."""
    with target_here() as port, _forward(machine, port) as forward:
        address = ("127.0.0.1", forward.local_port)
        with conformance.ask(address, "echo") as sock:
            for size in (1, 100_001, 1_000_003):
                sock.sendall(conformance.pattern(size))
                assert conformance.read_exactly(sock, size) == conformance.pattern(size)


def carry_many(machine: Machine) -> None:
    """Fifty connections at once each get all that their target sends."""

    def fetch(port: int) -> bytes:
        with conformance.ask(("127.0.0.1", port), "send 20000") as sock:
            return conformance.read_all(sock)

    with target_here() as port, _forward(machine, port) as forward, ThreadPoolExecutor(50) as pool:
        for got in pool.map(fetch, [forward.local_port] * 50):
            assert got == conformance.pattern(20_000)


def half_close(machine: Machine) -> None:
    """A client that has sent its end still gets the answer."""
    with target_here() as port, _forward(machine, port) as forward:
        with conformance.ask(("127.0.0.1", forward.local_port), "hash") as sock:
            sock.settimeout(5)  # some never answer
            sock.sendall(b"x" * 100_000)
            sock.shutdown(socket.SHUT_WR)
            assert len(conformance.read_all(sock)) == 32


def come_back(machine: Machine) -> None:
    """A forward whose connection is lost is back by itself."""
    with Cable(machine.host, machine.port) as cable, target_here() as port:
        there = replace(machine, port=cable.port, known_hosts=_known_as(machine, cable.port))
        with _forward(there, port) as forward:
            cable.pull()
            until(lambda: cable.made == 2 and forward.state == "ready", what="the forward to be back")
            conformance.check_echo(("127.0.0.1", forward.local_port))


def publish_ports(machine: Machine) -> None:
    """A remote forward listens there, on a port that the server chooses, and carries what comes."""
    with target_here() as port:
        with RemoteForward(
            machine.host,
            machine.user,
            remote_port=0,
            local_port=port,
            local_host="127.0.0.1",
            **machine.login,
        ) as forward:
            conformance.check_echo(("127.0.0.1", forward.remote_port))


def launch(machine: Machine) -> None:
    """A Bokeh server is launched there, its page is seen here, and it is gone afterwards."""
    app = apps.put(machine, "matrix_app.py", apps.SLIDER)
    keywords = {"python": machine.python, "isolate": False, **machine.login}
    with DirectTunnel(machine.host, machine.user, app, **keywords) as tunnel:  # type: ignore[arg-type]
        assert "Bokeh" in apps.get(tunnel.url)
    until(lambda: not machine.pids(app), what="the server to be gone")


def launch_uploaded(machine: Machine) -> None:
    """An app that is only here is uploaded, and served there."""
    with tempfile.TemporaryDirectory() as folder:
        app = Path(folder, "uploaded_app.py")
        app.write_text(apps.SLIDER, encoding="utf-8")
        keywords = {"python": machine.python, "upload": True, "isolate": False, **machine.login}
        with DirectTunnel(machine.host, machine.user, str(app), **keywords) as tunnel:  # type: ignore[arg-type]
            assert "Bokeh" in apps.get(tunnel.url)


def jump(machine: Machine) -> None:
    """It is a jump host on the way to another (here: to itself)."""
    with target_here() as port:
        gate = Host(machine.host, machine.user, **machine.login)
        there = replace(machine, host="localhost", known_hosts=_known_as(machine, machine.port))
        with _forward(there, port, jump=gate) as forward:
            conformance.check_echo(("127.0.0.1", forward.local_port))


#: The columns: what each is called, and whether it needs commands.
FEATURES: dict[str, tuple[Callable[[Machine], None], bool]] = {
    "forward": (forward_ports, False),
    "50 at once": (carry_many, False),
    "half-close": (half_close, False),
    "back after a loss": (come_back, False),
    "jump host": (jump, False),
    "publish": (publish_ports, False),
    "launch": (launch, True),
    "upload": (launch_uploaded, True),
}


def try_feature(server: Server, machine: Machine, feature: str) -> tuple[str, str]:
    """Try one feature on a running server.

    :return: the table's word, and what went wrong
    """
    run, needs_commands = FEATURES[feature]
    if needs_commands and not server.commands:
        return "-", ""
    try:
        run(machine)
    except ForwardingRefusedError as exc:
        return "refused", str(exc)
    except AuthenticationError as exc:
        return "no login", str(exc)
    except (BokehSSHError, OSError, AssertionError) as exc:
        return "no", f"{type(exc).__name__}: {exc}"
    return YES, ""


def read_page() -> dict[str, dict[str, str]]:
    """Return the page's table: the word for each server and feature."""
    table = PAGE.read_text(encoding="utf-8").partition("\n| server |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (.+) \|$", f"| server |{table}", re.MULTILINE)
    head, *body = [row.split(" | ") for row in rows if not row.startswith("---")]
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in body}


def main() -> None:
    """Try everything, and print or write the table."""
    lines = ["| server | " + " | ".join(FEATURES) + " |", "|---" * (len(FEATURES) + 1) + "|"]
    only = [word for word in sys.argv[1:] if not word.startswith("-")]
    for server in SERVERS:
        if only and server.name not in only:
            continue
        with tempfile.TemporaryDirectory() as place:
            try:
                with server.running(Path(place)) as machine:
                    words = []
                    for feature in FEATURES:
                        word, why = try_feature(server, machine, feature)
                        words.append(word)
                        if why:
                            sys.stderr.write(f"{server.name}: {feature}: {word}: {why}\n")
            except other_servers.MissingError as exc:
                sys.stderr.write(f"{server.name}: {exc}\n")
                known = read_page().get(server.name, {}) if PAGE.exists() else {}
                words = [known.get(feature, "?") for feature in FEATURES]
        lines.append(f"| {server.name} | {' | '.join(words)} |")
        sys.stderr.write(lines[-1] + "\n")
    table = "\n".join(lines) + "\n"
    if "--write" not in sys.argv:
        sys.stdout.write(table)
        return
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(re.sub(r"(?m)^\| server \|.*\n(\|.*\n)+", lambda _: table, text), encoding="utf-8")


if __name__ == "__main__":
    main()
