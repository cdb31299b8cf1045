"""SSH servers other than OpenSSH and asyncssh, as they are: what they send differs, within the standard."""

from __future__ import annotations

import base64
import getpass
import hashlib
import os
import pwd
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from beds import Key, Machine, free_port, has_banner, until
from bokeh_ssh._ssh.messages import string

SOURCES = Path(__file__).parent / "servers"
#: Where Debian keeps the Go packages that are built from source.
_GOPATH = "/usr/share/gocode"
#: Where it keeps Apache MINA's SSHD (libmina-sshd-java, not in Debian 12), and what that needs.
_JARS = os.environ.get("MINA_JARS", "/usr/share/java")
_JARS_NEEDED = ("sshd-common", "sshd-core", "sshd-sftp", "eddsa", "slf4j-api", "slf4j-nop")


class MissingError(Exception):
    """A server cannot be had on this machine; says why."""


def command(name: str, directory: Path) -> list[str]:
    """Return the command that runs a server, built first where it has to be; it takes its host key's path.

    :param name: "conch" (Twisted Conch), "paramiko", "ssh2" (npm's), "mina" (Apache MINA), "gliderlabs" (Go's
        gliderlabs/ssh), "erlang", or "erlang-forbid", which forwards nothing
    :param directory: where what is built goes
    :raises MissingError: if what it needs is not installed
    """
    if name == "conch":
        try:
            import twisted.conch  # noqa: F401
        except ImportError as exc:
            msg = "Twisted Conch is not installed"
            raise MissingError(msg) from exc
        return [sys.executable, str(SOURCES / "conch.py")]
    if name == "paramiko":
        return [sys.executable, str(SOURCES / "paramiko_server.py")]
    if name == "ssh2":
        node = shutil.which("node")
        places = os.environ.get("NODE_PATH", "").split(os.pathsep)
        if not node or not any(Path(place, "ssh2").is_dir() for place in places if place):
            msg = "Node with ssh2 is not installed (npm install ssh2, with its folder in NODE_PATH)"
            raise MissingError(msg)
        return [node, str(SOURCES / "ssh2.js")]
    if name.startswith("erlang"):
        if not shutil.which("escript") or not any(Path("/usr/lib/erlang/lib").glob("ssh-*")):
            msg = "Erlang with its ssh is not installed (erlang-base, erlang-ssh)"
            raise MissingError(msg)
        return ["escript", str(SOURCES / "erlang.escript"), *name.split("-")[1:]]
    if name == "mina":
        jars = [Path(_JARS, f"{each}.jar") for each in _JARS_NEEDED]
        if not shutil.which("java") or not all(jar.exists() for jar in jars):
            msg = "Java with Apache MINA's SSHD is not installed (openjdk-17-jdk-headless, libmina-sshd-java)"
            raise MissingError(msg)
        return ["java", "-XX:TieredStopAtLevel=1", "-cp", *_compiled(SOURCES / "Mina.java", jars)]
    if not shutil.which("go") or not Path(_GOPATH, "src/github.com/gliderlabs/ssh").is_dir():
        msg = "Go with gliderlabs/ssh is not installed (golang-go, golang-github-gliderlabs-ssh-dev)"
        raise MissingError(msg)
    cache = Path(tempfile.gettempdir(), "bokeh-ssh-tests-go")  # 10 s the first time, then one
    settings = {
        "GO111MODULE": "off",
        "GOPATH": _GOPATH,
        "GOCACHE": str(cache),
        "GOFLAGS": "",
        "CGO_ENABLED": "0",
    }
    built = directory / name
    subprocess.run(
        ["go", "build", "-o", str(built), str(SOURCES / f"{name}.go")],
        env={**os.environ, **settings},
        check=True,
        timeout=100,
    )
    return [str(built)]


def _compiled(source: Path, jars: Sequence[Path]) -> list[str]:
    """Return Java's path and the class of a program, compiled if nobody has; else it is at each start."""
    path = os.pathsep.join(map(str, jars))
    if not shutil.which("javac"):
        return [path, str(source)]
    digest = hashlib.sha256(path.encode() + source.read_bytes()).hexdigest()[:12]
    classes = Path(tempfile.gettempdir(), f"bokeh-ssh-tests-java-{digest}")
    if not classes.is_dir():
        part = tempfile.mkdtemp(prefix="bokeh-ssh-tests-java-")
        subprocess.run(["javac", "-cp", path, "-d", part, str(source)], check=True, timeout=100)
        with suppress(OSError):  # another process was faster
            Path(part).replace(classes)
    return [os.pathsep.join((path, str(classes))), source.stem]


@contextmanager
def running(words: Sequence[str], key: Key, directory: Path) -> Iterator[Machine]:
    """Run a server of :func:`command` on loopback; any key logs in."""
    host_key = Key.generate()
    path = host_key.write(directory / f"host-{len(list(directory.iterdir()))}")
    with subprocess.Popen([*words, str(path)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            line = process.stdout.readline()
            assert line.strip().isdigit(), "the server did not start"
            port = int(line)
            known_hosts = directory / f"known_hosts-{port}"
            known_hosts.write_text(f"[127.0.0.1]:{port} {host_key.public}\n", encoding="ascii")
            yield Machine(
                kind=Path(words[-1]).stem,
                host="127.0.0.1",
                port=port,
                user=getpass.getuser(),
                key_path=key.write(directory / f"key-{port}"),
                known_hosts=known_hosts,
                python=sys.executable,
                server=process,
            )
        finally:
            process.terminate()


@contextmanager
def tinyssh(key: Key, directory: Path) -> Iterator[Machine]:
    """Run a TinySSH on loopback that the key logs in to, as this account; it forwards nothing.

    It has ChaCha20-Poly1305 and no other cipher. As Dropbear it gets a home of its own.

    :raises MissingError: if it is not installed (or named by ``TINYSSHD``), or cannot be had a home
    """
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
    program = os.environ.get("TINYSSHD") or shutil.which("tinysshd", path=path)
    if not program:
        msg = "TinySSH is not installed (tinysshd)"
        raise MissingError(msg)
    apart = _mount_apart()
    account = pwd.getpwuid(os.getuid())
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tinyssh-")))
        home = _home_for(key, place)
        keys = place / "keys"
        maker = place / "tinysshd-makekey"
        maker.symlink_to(program)  # the same program goes by several names
        subprocess.run([str(maker), "-q", str(keys)], check=True, timeout=30)
        serve = shlex.join([program, "-v", str(keys)])
        line = f"{_mount_home(home, account.pw_dir)} && exec {serve}"
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        processes: list[subprocess.Popen[bytes]] = []
        log = stack.enter_context((directory / "tinyssh.log").open("ab"))
        words = [*apart, "sh", "-c", line]
        thread = threading.Thread(target=_serve_each, args=(listener, words, log, processes), name="tinyssh")
        thread.start()
        port = listener.getsockname()[1]
        blob = b"".join(map(string, (b"ssh-ed25519", (keys / "ed25519.pk").read_bytes())))
        known_hosts = directory / f"known_hosts-{port}"
        known_hosts.write_text(f"[127.0.0.1]:{port} ssh-ed25519 {base64.b64encode(blob).decode()}\n")
        try:
            yield Machine(
                kind="tinyssh",
                host="127.0.0.1",
                port=port,
                user=account.pw_name,
                key_path=key.write(directory / f"key-{port}"),
                known_hosts=known_hosts,
                python=sys.executable,
                server=processes,
            )
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(30)
            for process in processes:
                process.terminate()
                process.wait(30)


def _serve_each(
    listener: socket.socket, words: Sequence[str], log: IO[bytes], processes: list[subprocess.Popen[bytes]]
) -> None:
    """Give each connection a process of its own, as inetd does."""
    while True:
        try:
            conn, _ = listener.accept()
        except OSError:
            return
        with conn:
            processes.append(subprocess.Popen(words, stdin=conn, stdout=conn, stderr=log))


def _mount_apart() -> list[str]:
    apart = ["unshare", "--mount", *([] if os.getuid() == 0 else ["--map-root-user"])]
    if subprocess.run([*apart, "true"], capture_output=True, check=False).returncode:
        msg = "no mount name space can be had here"
        raise MissingError(msg)
    return apart


def _mount_home(home: Path, real: str) -> str:
    """Return the shell's words that put a home in the place of the real one; a Python in there stays."""
    words = []
    python = Path(sys.base_prefix).resolve()
    if python.is_relative_to(real):
        part = python.relative_to(real).parts[0]
        (home / part).mkdir()
        words.append(["mount", "--rbind", str(Path(real, part)), str(home / part)])
    words.append(["mount", "--rbind", str(home), real])
    return " && ".join(map(shlex.join, words))


def _home_for(key: Key, place: Path) -> Path:
    """Make a home that the key logs in to; small servers are strict about its modes."""
    home = place / "home"
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    (home / ".ssh" / "authorized_keys").write_text(key.public + "\n", encoding="ascii")
    for path in (home, home / ".ssh", home / ".ssh" / "authorized_keys"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    return home


@contextmanager
def dropbear(key: Key, directory: Path, *, newest: str = "") -> Iterator[Machine]:
    """Run a Dropbear on loopback that the key logs in to, as this account.

    :param newest: a folder with another one's ``bin`` and ``sbin``

    It reads the account's own ``~/.ssh/authorized_keys`` and no other, so it gets a home of its own, in a
    mount name space of its own.

    :raises MissingError: if it is not installed, or cannot be had a home
    """
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
    if newest:
        path = os.pathsep.join([f"{newest}/bin", f"{newest}/sbin"])
    program, keys = shutil.which("dropbear", path=path), shutil.which("dropbearkey", path=path)
    if not program or not keys:
        msg = "Dropbear is not installed (dropbear-bin)"
        raise MissingError(msg)
    apart = _mount_apart()
    account = pwd.getpwuid(os.getuid())
    with tempfile.TemporaryDirectory(prefix="dropbear-") as place:  # of mode 0700, as Dropbear asks for
        home = _home_for(key, Path(place))
        host_key = Path(place, "host_key")
        made = subprocess.run(
            [keys, "-t", "ed25519", "-f", str(host_key)], capture_output=True, text=True, check=True
        )
        public = next(line for line in made.stdout.splitlines() if line.startswith("ssh-"))
        for _ in range(5):  # it cannot pick a free port itself
            port = free_port()
            serve = [program, "-F", "-E", "-s", "-r", str(host_key), "-p", f"127.0.0.1:{port}"]
            serve += ["-P", str(Path(place, "pid"))]
            line = f"{_mount_home(home, account.pw_dir)} && exec {shlex.join(serve)}"
            with (directory / "dropbear.log").open("ab") as log:
                process = subprocess.Popen([*apart, "sh", "-c", line], stdin=subprocess.DEVNULL, stderr=log)
            with process:
                try:
                    until(lambda: process.poll() is not None or has_banner("127.0.0.1", port))  # noqa: B023
                    if process.poll() is not None:
                        continue
                    known_hosts = directory / f"known_hosts-{port}"
                    known_hosts.write_text(f"[127.0.0.1]:{port} {public}\n", encoding="ascii")
                    yield Machine(
                        kind="dropbear",
                        host="127.0.0.1",
                        port=port,
                        user=account.pw_name,
                        key_path=key.write(directory / f"key-{port}"),
                        known_hosts=known_hosts,
                        python=sys.executable,
                        server=process,
                    )
                finally:
                    process.terminate()
                return
        raise AssertionError("Dropbear does not start: see its log")
