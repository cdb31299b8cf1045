"""SSH servers other than OpenSSH and asyncssh, as they are: what they send differs, within the standard."""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from beds import Key, Machine

SOURCES = Path(__file__).parent / "servers"
#: Where Debian keeps the Go packages that are built from source.
_GOPATH = "/usr/share/gocode"


class MissingError(Exception):
    """A server cannot be had on this machine; says why."""


def command(name: str, directory: Path) -> list[str]:
    """Return the command that runs a server, built first where it has to be; it takes its host key's path.

    :param name: "conch" (Twisted Conch) or "gliderlabs" (Go's gliderlabs/ssh)
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
