"""A stand-in for the package ``bokeh`` on a machine, where any server will do: ten times as quick.

``python -m bokeh serve`` finds it there as the package, so that the command, its options, the socket, the
log and the signals are those of a launch. It writes Bokeh's lines, answers with a page that has the word, and
runs the app's text for each page; of Bokeh, an app for it has ``curdoc().title`` alone. It has no websocket
and no sessions.
"""

# What follows runs as a program of its own, which is to start fast.
# ruff: noqa: PTH100, PTH101, PTH108, PTH110, PTH119, PTH123, T201

from __future__ import annotations

import importlib
import os
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path

#: An app for it.
APP = "print('a page')\n"

#: The Python of a container that finds it; the container's own finds Bokeh.
PYTHON = "/opt/light/python"

#: What an app for it has of Bokeh.
_IO = """
import threading, types

_here = threading.local()

def curdoc():
    return _here.document

def begin():
    _here.document = types.SimpleNamespace(title="Bokeh Application")
"""


def path_with_it(place: Path) -> str:
    """Put the package into a new folder of ``place``; gives what PYTHONPATH is to be."""
    root = place / "light"
    for name in ("bokeh", "tornado"):
        (root / name).mkdir(parents=True)
        (root / name / "__init__.py").touch()
    # What starts Bokeh asks Tornado to start it again in the same way.
    (root / "tornado" / "autoreload.py").write_text("def add_reload_hook(hook): pass\n")
    (root / "bokeh" / "io.py").write_text(_IO)
    shutil.copy(__file__, root / "bokeh" / "__main__.py")
    return str(root)


class Server:
    """The server: one thread for each connection."""

    def __init__(self, words: list[str]) -> None:
        self.options: dict[str, str] = {}
        self.apps: dict[str, str] = {}  # paths by route
        words = words[:]
        while words:
            word = words.pop(0)
            if word.startswith("--"):
                self.options[word] = words.pop(0)
                continue
            if not os.path.exists(word):
                sys.exit(f"ERROR: Path for Bokeh server application does not exist: {os.path.abspath(word)}")
            self.apps["/" + os.path.basename(word).removesuffix(".py")] = word

    def run(self) -> None:
        """Listen, say so, and serve until a signal comes."""
        log("Starting Bokeh server version 3.9.9 (running on Tornado 6.5)")
        path = self.options.get("--unix-socket")
        if path:
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(path)
            os.chmod(path, 0o600)
            listener.listen(64)
            where = "unix:" + path
        else:
            listener = socket.create_server(("127.0.0.1", int(self.options.get("--port", "5006"))))
            where = f"http://localhost:{listener.getsockname()[1]}"
        for route in self.apps or ["/"]:
            log(f"Bokeh app running at: {where}{route}")
        log(f"Starting Bokeh server with process id: {os.getpid()}")
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._end)
        while True:
            threading.Thread(target=self._serve, args=(listener.accept()[0],), daemon=True).start()

    def _end(self, number: int, _: object) -> None:
        print(f"Received signal {signal.Signals(number).name}, shutting down", flush=True)
        path = self.options.get("--unix-socket")
        if path:
            os.unlink(path)
        os._exit(0)

    def _serve(self, sock: socket.socket) -> None:
        with sock, sock.makefile("rb") as requests:
            try:
                while line := requests.readline():
                    while requests.readline() not in (b"\r\n", b"\n", b""):
                        pass
                    sock.sendall(self._answer(line.split()[1].decode().partition("?")[0]))
            except OSError:
                return

    def _answer(self, path: str) -> bytes:
        status, more, body = "404 Not Found", "", ""
        if path in self.apps:
            io = importlib.import_module("bokeh.io")  # the stand-in's own
            io.begin()
            with open(self.apps[path], encoding="utf-8") as file:
                exec(compile(file.read(), self.apps[path], "exec"), {"__file__": self.apps[path]})
            status, body = "200 OK", f"<title>{io.curdoc().title}</title>"
        elif path.rpartition("/")[2] == "metadata":
            status, body = "200 OK", "{}"
        elif path == "/" and len(self.apps) == 1:
            status, more = "302 Found", f"Location: {next(iter(self.apps))}\r\n"
        elif path == "/":
            status, body = "200 OK", "<title>Bokeh Application</title>"
        head = f"HTTP/1.1 {status}\r\nServer: TornadoServer/6.5\r\nContent-Type: text/html\r\n{more}"
        return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


def log(text: str) -> None:
    """Write a line as Bokeh does."""
    print(time.strftime("%Y-%m-%d %H:%M:%S,000"), text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    Server(sys.argv[2:]).run()
