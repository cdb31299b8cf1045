"""Commands on this machine: what ``Server`` needs of a connection, without one."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Callable
from typing import IO

from bokeh_ssh._core.errors import SessionError

_CHUNK = 1 << 16
#: Seconds for what the command wrote last to be read once it has ended.
_LEFTOVERS = 1.0


class ShellRunner:
    """Run commands here, in the current directory and with this program's environment."""

    name = "localhost"

    def run(
        self,
        command: str,
        *,
        on_stdout: Callable[[bytes], None],
        on_stderr: Callable[[bytes], None],
        on_exit: Callable[[int | None], None],
        timeout: float,
    ) -> ShellProcess:
        """Start ``command`` in ``/bin/sh``; the callbacks come on threads of the process's own.

        :raises SessionError: if it cannot be started
        """
        try:
            popen = subprocess.Popen(
                ["/bin/sh", "-c", command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,  # Ctrl-C in the terminal is ours to handle
            )
        except OSError as exc:
            msg = f"no command can be run here ({exc.strerror or exc})"
            hint = "start the server yourself, and publish it without naming an app"
            raise SessionError(msg, host=self.name, hint=hint) from exc
        return ShellProcess(popen, on_stdout, on_stderr, on_exit)


class ShellProcess:
    """One command on this machine: its streams as callbacks. Made by :meth:`ShellRunner.run`.

    :ivar ended: set when it has ended
    """

    def __init__(
        self,
        popen: subprocess.Popen[bytes],
        on_stdout: Callable[[bytes], None],
        on_stderr: Callable[[bytes], None],
        on_exit: Callable[[int | None], None],
    ) -> None:
        self._popen = popen
        self.ended = threading.Event()
        self._input: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._on_exit = on_exit
        self._readers = [
            self._thread("stdout", self._read, popen.stdout, on_stdout),
            self._thread("stderr", self._read, popen.stderr, on_stderr),
        ]
        self._thread("stdin", self._feed, popen.stdin)
        self._thread("exit", self._wait)

    def write(self, data: bytes) -> None:
        """Queue bytes for its standard input; never blocks."""
        self._input.put(data)

    def write_eof(self) -> None:
        """End its standard input after what is queued."""
        self._input.put(None)

    close = write_eof  # as with a closed channel: the process may live on

    def signal(self, name: str) -> None:
        """Send its process group a signal, such as ``"KILL"``."""
        with contextlib.suppress(OSError):
            os.killpg(self._popen.pid, signal.Signals[f"SIG{name}"])

    def _thread(self, what: str, work: Callable[..., None], *args: object) -> threading.Thread:
        name = f"bokeh-ssh process {self._popen.pid} {what}"
        thread = threading.Thread(target=work, args=args, name=name, daemon=True)
        thread.start()
        return thread

    def _read(self, pipe: IO[bytes], on_data: Callable[[bytes], None]) -> None:
        with pipe:
            while data := pipe.read(_CHUNK):
                on_data(data)

    def _feed(self, pipe: IO[bytes]) -> None:
        with contextlib.suppress(OSError), pipe:  # it may read no more
            while (data := self._input.get()) is not None:
                view = memoryview(data)
                while view:
                    view = view[pipe.write(view) or 0 :]

    def _wait(self) -> None:
        status = self._popen.wait()
        for reader in self._readers:
            reader.join(_LEFTOVERS)  # what a daemon of the command's holds open may never end
        self._input.put(None)
        self.ended.set()
        self._on_exit(status)
