"""A command that a client of the embedded server runs: a real process, its streams wired to the channel."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncssh

if TYPE_CHECKING:
    from bokeh_ssh._demo.ssh_server import Settings

#: Bytes read from a pipe or a channel at once.
_CHUNK = 65536

#: What sshd gives a command; nothing of the environment that this process happens to have.
_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"

#: What a client may set (Debian's AcceptEnv).
_ACCEPT_ENV = ("LANG", "LC_")

if sys.platform == "win32":  # pipes that asyncio can wait for
    from asyncio.windows_utils import Popen as _Popen
else:
    _Popen = subprocess.Popen


class Command(asyncssh.SSHServerProcess[bytes]):
    """One session of a client; it counts itself in ``sessions`` while its channel is open.

    :param running: the processes that have not ended, each with the thread that waits for it
    """

    def __init__(
        self, settings: Settings, running: dict[int, threading.Thread], sessions: set[Command]
    ) -> None:
        sftp: Any = asyncssh.SFTPServer if settings.sftp else None
        super().__init__(self._serve, sftp, 3, False)
        self._settings = settings
        self._running = running
        self._sessions = sessions
        self._popen: subprocess.Popen[bytes] | None = None
        self._pumps: list[asyncio.Task[None]] = []
        sessions.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        # Close our end of the pipes and leave the process alone, as sshd does where there is no terminal.
        # What came before the close still goes to its standard input.
        for pump in self._pumps[1:]:
            pump.cancel()
        for name in self._settings.hangup:
            self._signal(name, self._settings.hangup_reach)
        self._sessions.discard(self)
        super().connection_lost(exc)

    def exception_received(self, exc: Exception) -> None:
        self._signal(str(getattr(exc, "signal", "")), "group")

    def _signal(self, name: str, reach: str) -> None:
        number = getattr(signal, f"SIG{name}", None)
        if number is None or self._popen is None or self._popen.poll() is not None:
            return
        if sys.platform == "win32":
            self._popen.terminate()
            return
        pid = self._popen.pid
        for each in _tree(pid) if reach == "tree" else [pid]:
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if reach == "group" else os.kill)(each, number)

    async def _serve(self, process: asyncssh.SSHServerProcess[bytes]) -> None:
        if process.subsystem:
            process.exit(1)
            return
        self._popen = popen = self._start(process.command)
        ended = self._reap(popen)
        down = [self._download(popen.stdout, process.stdout), self._download(popen.stderr, process.stderr)]
        self._pumps = [
            asyncio.ensure_future(pump) for pump in (self._upload(popen.stdin, process.stdin), *down)
        ]
        try:
            if process.is_closing():  # before there was anything to cancel
                for pump in self._pumps[1:]:
                    pump.cancel()
            await asyncio.wait(self._pumps[1:])
            for pipe in (popen.stdout, popen.stderr):
                if pipe:
                    pipe.close()  # a pump that was cancelled before its first step has not
            status = await ended
        finally:  # also where the server ends
            for pump in self._pumps:
                pump.cancel()
            await asyncio.wait(self._pumps)
            for pipe in (popen.stdin, popen.stdout, popen.stderr):
                if pipe:
                    with contextlib.suppress(OSError):  # nobody reads it
                        pipe.close()
        if process.is_closing():
            return  # the client has gone; nobody wants the status
        self.channel.write_eof()
        if status < 0:
            process.exit_with_signal(signal.Signals(-status).name.removeprefix("SIG"))
        else:
            process.exit(status)

    async def _upload(self, pipe: Any, source: asyncssh.SSHReader[bytes]) -> None:
        loop = asyncio.get_running_loop()
        transport, protocol = await loop.connect_write_pipe(
            lambda: asyncio.StreamReaderProtocol(asyncio.StreamReader()), pipe
        )
        sink = asyncio.StreamWriter(transport, protocol, None, loop)
        try:
            # It ends where the process reads no more, or the client has gone.
            with contextlib.suppress(OSError, asyncssh.Error):
                while data := await source.read(_CHUNK):
                    sink.write(data)
                    await sink.drain()
            sink.close()
            with contextlib.suppress(OSError):
                await sink.wait_closed()
        except asyncio.CancelledError:  # the process or the server has ended; sshd drops the rest, too
            if transport.get_write_buffer_size():
                transport.abort()
            raise
        finally:
            transport.close()

    async def _download(self, pipe: Any, sink: asyncssh.SSHWriter[bytes]) -> None:
        source = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(source), pipe
        )
        try:
            while data := await source.read(_CHUNK):
                sink.write(data)
                await sink.drain()
        except OSError:
            pass  # the client has gone
        finally:
            transport.close()

    def _start(self, command: str | None) -> subprocess.Popen[bytes]:
        settings, name = self._settings, getpass.getuser()
        shell, home = settings.shell, os.fspath(settings.home or Path.home())
        env = {"HOME": home, "USER": name, "LOGNAME": name, "PATH": _PATH, "SHELL": shell}
        if os.name != "posix":  # without SYSTEMROOT and the like, nothing starts
            env = dict(os.environ)
        asked = self.channel.get_environment()
        env |= {key: value for key, value in asked.items() if key.startswith(_ACCEPT_ENV)}
        env |= settings.env
        here, there = (self.get_extra_info(key) for key in ("sockname", "peername"))
        if here and there:
            env["SSH_CONNECTION"] = f"{there[0]} {there[1]} {here[0]} {here[1]}"
        run = "-c" if os.name == "posix" else "/c"
        return _Popen(
            [shell] if command is None else [shell, run, command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            cwd=home,
            start_new_session=True,
        )

    def _reap(self, process: subprocess.Popen[bytes]) -> asyncio.Future[int]:
        """Wait for a process in a thread: asyncio's own ways differ by platform, and may kill it."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[int] = loop.create_future()

        def report(status: int) -> None:
            if not ended.done():
                ended.set_result(status)

        def wait() -> None:
            status = process.wait()
            self._running.pop(process.pid, None)
            with contextlib.suppress(RuntimeError):  # the server has closed meanwhile
                loop.call_soon_threadsafe(report, status)

        thread = threading.Thread(target=wait, name="embedded-sshd-wait", daemon=True)
        self._running[process.pid] = thread
        thread.start()
        return ended


def _tree(top: int) -> list[int]:
    """List a process and all that descend from it."""
    ps = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], stdout=subprocess.PIPE, check=True)  # noqa: S607
    rows = [tuple(map(int, row.split())) for row in ps.stdout.splitlines()]
    found = [top]
    for pid in found:  # it grows meanwhile
        found += [child for child, parent in rows if parent == pid]
    return found
