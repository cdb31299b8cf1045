"""What the Bokeh host runs when it dials the gateway itself: one ``RemoteForward``, from a line of JSON.

Started by ``_tunnels.host_publisher``, in one of two ways:

- in a session: the line comes on standard input, and the end of that is the order to stop. When the
  connection that started this is gone, so is the forward;
- beside a server that is left running: the line is in the environment. The forward is made again where it is
  lost, and lives as long as the server; TERM is the order to stop.

Standard output says, a line each behind the mark of this start, the event ``port`` or ``error``.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from bokeh_ssh._core.errors import BokehSSHError, SocketInUseError
from bokeh_ssh._core.host import Host
from bokeh_ssh._tunnels.host_publisher import SPECIFICATION
from bokeh_ssh._tunnels.remote_forward import RemoteForward


def main(stdin: TextIO = sys.stdin, stdout: TextIO = sys.stdout) -> int:
    """Publish as the specification says, until that ends or the line goes down for good."""
    stays = os.environ.pop(SPECIFICATION, "")
    spec: dict[str, Any] = json.loads(stays or stdin.readline())

    def send(**message: object) -> None:
        try:
            stdout.write(f"{spec['mark']}{json.dumps(message)}\n")
            stdout.flush()
        except OSError:  # the one who asked is gone, as the end of standard input says too
            pass

    # The gateway's key as the one who asked has verified it: no file here needs to have it.
    with _file_of(spec["known_hosts"]) as known_hosts:
        gateway = Host(
            spec["gateway"],
            spec["user"],
            port=spec["port"],
            known_hosts=known_hosts,
            timeout=spec["timeout"],
        )
        forwards = [RemoteForward(gateway, **spec["forward"], **place) for place in spec["places"]]

        def close_all(*_: object) -> None:
            for forward in forwards:
                forward.close()

        def close_at_eof() -> None:
            while stdin.read(4096):
                pass
            close_all()

        if stays:
            signal.signal(signal.SIGTERM, close_all)
        else:
            threading.Thread(target=close_at_eof, name="bokeh-ssh orders", daemon=True).start()
        try:
            with _open_first(forwards) as forward:
                socket, at = forward.remote_socket, f"{spec['gateway']}:{spec['port']}"
                send(event="port", port=forward.remote_port, socket=socket, name=forward.name, gateway=at)
                forward.wait()
        except BokehSSHError as exc:
            send(event="error", message=exc.message, host=exc.host, hint=exc.hint)
            return 1
    return 0


@contextlib.contextmanager
def _file_of(text: str | None) -> Iterator[str | None]:
    """Return the path of a file with this text; where possible, one that ends with us, however we end."""
    if text is None:
        yield None
    elif hasattr(os, "memfd_create") and Path("/proc/self/fd").is_dir():
        with os.fdopen(os.memfd_create("known_hosts"), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            yield f"/proc/self/fd/{file.fileno()}"
    else:
        with tempfile.TemporaryDirectory(prefix="bokeh-ssh-") as folder:
            path = Path(folder, "known_hosts")
            path.write_text(text, encoding="utf-8")
            yield os.fspath(path)


def _open_first(forwards: Sequence[RemoteForward]) -> RemoteForward:
    """Open the first whose place is not taken."""
    for forward in forwards[:-1]:
        try:
            return forward.open()
        except SocketInUseError:
            continue
    return forwards[-1].open()
