"""The way of a call through the package: which modules it passes, in which order, on which thread.

    python tests/support/way.py        open() and the first connection, through a local sshd

What is counted is a call from one module of the package into another ("crossing"); a way that is straight has
few. The picture in docs/architecture.md is made from this, and `tests/tunnels/test_way.py` bounds it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import bokeh_ssh

#: How the name of the loop's thread begins.
_LOOP = "bokeh-ssh io loop"
_ROOT = str(Path(bokeh_ssh.__file__).parent) + "/"


@dataclass(frozen=True)
class Call:
    """A call of a function of the package.

    :ivar thread: the thread's name
    :ivar caller: the module that called, as ``_ssh.connect``; empty where that is none of ours
    :ivar module: the module of the function
    """

    thread: str
    caller: str
    module: str
    function: str


@dataclass
class Way:
    """What was called, in order, by all threads."""

    calls: list[Call] = field(default_factory=list)

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        """Take a call, as ``sys.setprofile`` wants it."""
        module = _module(frame)
        if event == "call" and module and frame.f_code.co_name != "<module>":
            back = frame.f_back
            while back is not None and not _module(back):
                back = back.f_back
            caller = _module(back) if back else ""
            self.calls.append(Call(threading.current_thread().name, caller, module, frame.f_code.co_name))

    def of(self, thread: str) -> list[Call]:
        """Return the calls of the thread of that name."""
        return [call for call in self.calls if call.thread == thread]


def crossings(calls: list[Call]) -> list[Call]:
    """Return those that lead from one module of the package into another."""
    return [call for call in calls if call.caller and call.caller != call.module]


def modules(calls: list[Call]) -> list[str]:
    """Return the modules that are passed, each once, in the order in which they are first entered."""
    return list(dict.fromkeys(call.module for call in calls))


def _module(frame: FrameType) -> str:
    path = frame.f_code.co_filename
    return path[len(_ROOT) : -3].replace("/", ".") if path.startswith(_ROOT) else ""


@contextmanager
def traced(*, threads: bool = False) -> Iterator[Way]:
    """Trace this thread while the context lasts; with ``threads``, also those that start meanwhile."""
    way = Way()
    if threads:
        threading.setprofile(way)
    sys.setprofile(way)
    try:
        yield way
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]  # what typeshed leaves out


def first_connection(calls: list[Call]) -> list[Call]:
    """Return the calls from where a local connection is accepted to where its CHANNEL_OPEN goes out.

    They are those of the thread that accepts it and of the loop, which sends; what other threads do
    meanwhile, such as reading the answer to a keepalive, is not on the way.
    """
    begin = next(at for at, call in enumerate(calls) if call.module == "_forwarding.listener")
    accepts = calls[begin].thread
    on_way = [call for call in calls[begin:] if call.thread == accepts or call.thread.startswith(_LOOP)]
    end = next(at for at, call in enumerate(on_way) if call.module == "_ssh.packetizer")
    return on_way[: end + 1]


def main() -> None:
    """Print the ways of the two things that people open most, through a local sshd."""
    import socket
    import tempfile

    import apps
    import beds
    from bokeh_ssh import DirectTunnel, LocalForward

    with (
        tempfile.TemporaryDirectory() as folder,
        beds.local_sshd(beds.Key.generate(), Path(folder), {}) as machine,
    ):
        app = apps.put(machine, "app.py", apps.SLIDER)
        forward = LocalForward(machine.host, machine.user, remote_port=machine.port, **machine.login)
        keywords: dict[str, Any] = {"app": app, "python": sys.executable, "isolate": False}
        for thing in (forward, DirectTunnel(machine.host, machine.user, **keywords, **machine.login)):
            with traced(threads=True) as way:
                thing.open()
                opened = len(way.calls)
                sys.setprofile(None)
                with socket.create_connection(("127.0.0.1", thing.local_port)) as sock:
                    sock.sendall(b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")
                    sock.recv(1)
            thing.close()
            own = [call for call in way.calls[:opened] if call.thread == threading.main_thread().name]
            passed = modules(first_connection(way.calls[opened:]))
            sys.stdout.write(
                f"{type(thing).__name__}.open(): {len(own)} calls, {len(modules(own))} modules, "
                f"{len(crossings(own))} crossings at {len(set(crossings(own)))} different places:\n"
                f"  {' > '.join(modules(own))}\n"
                f"from accept to CHANNEL_OPEN: {len(passed)} modules: {' > '.join(passed)}\n"
            )


if __name__ == "__main__":
    main()
