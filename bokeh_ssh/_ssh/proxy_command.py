"""A program that makes the connection (``ProxyCommand``): its standard input and output are the line.

Not paramiko's ProxyCommand, which has no socket to select on and spins at the end of the program's output.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import threading
from collections.abc import Callable
from typing import IO

from bokeh_ssh._core.errors import ConnectError
from bokeh_ssh._core.framing import Tail
from bokeh_ssh._core.this_machine import user_shell
from bokeh_ssh._core.threads import Thread

log = logging.getLogger("bokeh_ssh.connection")

#: Seconds that a program has to end once it is asked to, and that its last words may take.
_PATIENCE = 2.0
#: Seconds that it has before that to notice the end of its input.
_MOMENT = 0.2
_CHUNK = 65536


class ProxySocket(socket.socket):
    """Our end of the line; closing it ends the program and what it has started (SIGHUP, as ``ssh``; KILL)."""

    _program: _Program | None = None

    @classmethod
    def start(cls, command: str, *, name: str, direct: bool = os.name == "posix") -> ProxySocket:
        """Run a command through the user's shell; it goes on in the background.

        Not in the terminal's foreground: Ctrl-C is for us, who still have something to say on that line. So
        it cannot ask for anything there either.

        :param name: the host as the user named it, for messages
        :param direct: whether it may have an end of a socket for its streams; else pipes, and two threads
        :raises ConnectError: if it cannot be started
        """
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                program = _Program(command, name, theirs if direct else None)
            except (OSError, ValueError) as exc:  # ValueError: a null byte
                ours.close()
                msg = f"its ProxyCommand cannot be run ({getattr(exc, 'strerror', None) or exc})"
                raise ConnectError(
                    msg, host=name, hint="check SHELL, and the line in your ssh config"
                ) from exc
            if not direct:
                program.copy(theirs.dup())
        made = cls(fileno=ours.detach())
        made._program = program
        return made

    def ended(self) -> tuple[int | None, str]:
        """Return the program's status once it has ended, else None; and what is to be said of its end."""
        return self._program.ended() if self._program else (None, "")

    def close(self) -> None:
        super().close()
        if self._program:
            self._program.end()


class _Program:
    def __init__(self, command: str, name: str, end: socket.socket | None) -> None:
        self._name = name
        self._owner = os.getpid()
        self._said = Tail(20)
        self._lock = threading.RLock()
        self._ending = False
        self._popen = user_shell.start(
            f"exec {command}" if os.name == "posix" else command,
            stdin=end.fileno() if end else subprocess.PIPE,
            stdout=end.fileno() if end else subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._listener = self._thread(self._listen, self._popen.stderr)

    def _thread(self, work: Callable[..., object], *args: object) -> Thread:
        thread = Thread(work, *args, name=f"bokeh-ssh proxy {self._name}")
        thread.start()
        return thread

    def _listen(self, stderr: IO[bytes]) -> None:
        with stderr:
            while data := stderr.read(_CHUNK):
                self._said.feed(data)
                log.debug("ProxyCommand of %s: %r", self._name, data)

    def copy(self, sock: socket.socket) -> None:
        """Copy between its pipes and a socket, both ways."""
        self._thread(self._copy_in, sock)
        self._thread(self._copy_out, sock)

    def _copy_in(self, sock: socket.socket) -> None:
        stdin = self._popen.stdin
        assert stdin
        with stdin, contextlib.suppress(OSError):
            while data := sock.recv(_CHUNK):
                view = memoryview(data)
                while view:
                    view = view[stdin.write(view) or 0 :]

    def _copy_out(self, sock: socket.socket) -> None:
        stdout = self._popen.stdout
        assert stdout
        with stdout, sock, contextlib.suppress(OSError):
            while data := stdout.read(_CHUNK):
                sock.sendall(data)
            sock.shutdown(socket.SHUT_RDWR)

    def ended(self) -> tuple[int | None, str]:
        try:
            status = self._popen.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            return None, ""
        self._listener.join(_PATIENCE)
        said = " / ".join(self._said.lines[-2:])
        return status, f"status {status}" + (f": {said}" if said else "")

    def end(self) -> None:
        if os.getpid() != self._owner:
            return  # a forked child closes its copy of the socket; the program is not its own
        with self._lock:
            first, self._ending = not self._ending, True
        if first and self._popen.poll() is None:
            self._thread(self._see_to_it)

    def _see_to_it(self) -> None:
        for patience, signal in ((_MOMENT, "SIGHUP"), (_PATIENCE, "SIGKILL")):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(patience)
            user_shell.end(self._popen, signal)  # also where it has ended: what it has started may be left
        self._popen.wait()
