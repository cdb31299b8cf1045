"""Restarts a server whenever its files change: between it and the supervisor, with ``dev``.

The files are looked at from before the first start. A change that does not compile leaves the server as it
is, and so does one that it cannot start with, where it listens on a socket, which the next one can take over;
else it ends, and the next change is waited for. Either is written to the log as an app's error. Pages of
Bokeh's and Panel's servers are loaded again by a few lines of script.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time

from bokeh_ssh._remote import process_tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

#: Files that are an app's own text; what an app may write itself (.json, .csv) is none.
KINDS = (".py", ".ipynb", ".md", ".html", ".css", ".js", ".yaml", ".yml", ".toml")
PAUSE = 0.25  # seconds between two looks; more where a look takes long
PATIENCE = 3.0  # seconds between TERM and KILL
TAIL = 1 << 14  # bytes kept of what a server writes
#: In a page: whether another server than the one that made it answers now.
SCRIPT = (
    "<script>(function () {"
    "const url = new URL('.bokeh-ssh-reload', location.href);"
    "url.protocol = url.protocol.replace('http', 'ws');"
    "url.search = url.hash = '';"
    "function listen() {"
    "const socket = new WebSocket(url.href);"
    "socket.onmessage = (event) => { if (event.data !== '%s') location.reload() };"
    "socket.onclose = () => setTimeout(listen, 500)"
    "};"
    "listen()"
    "})()</script>"
)


def look(watched: list[str]) -> dict[str, tuple[int, int]]:
    """Return time and size of each file below these folders, and beside these scripts.

    Folders beside a script count where they are packages.
    """
    found = {}
    for top in watched:
        script = not os.path.isdir(top)
        for folder, folders, names in os.walk(os.path.dirname(top) if script else top):
            folders[:] = [
                name
                for name in folders
                if name[0] != "."
                and name not in ("__pycache__", "node_modules")
                and (not script or os.path.exists(os.path.join(folder, name, "__init__.py")))
            ]
            for path in [os.path.join(folder, name) for name in names if name.endswith(KINDS)]:
                with contextlib.suppress(OSError):
                    facts = os.stat(path)
                    found[path] = facts.st_mtime_ns, facts.st_size
    return found


def check(paths: set[str]) -> dict[str, str]:
    """Return, for each of these that does not compile, what Python says."""
    faults = {}
    for path in sorted(paths):
        if path.endswith(".py"):
            try:
                with open(path, "rb") as file:
                    compile(file.read(), path, "exec", 0, True)
            except OSError:  # it has gone
                continue
            except (SyntaxError, ValueError):
                import traceback

                faults[path] = "".join(traceback.format_exception_only(*sys.exc_info()[:2]))
    return faults


def report(what: str, text: str) -> None:
    """Write an error to the log, as Bokeh writes that of an app."""
    now = time.strftime("%Y-%m-%d %H:%M:%S,000")
    first = f"{now} Error running application handler after a change: {what}"
    record = f"{first}\n{text.rstrip()}\n{now} Waiting for a change\n"
    write(record.encode("utf-8", "replace"))


def write(data: bytes) -> None:
    """Write to the log, all of it."""
    while data:
        data = data[os.write(2, data) :]


def reload_pages() -> None:
    """Make Bokeh's pages ask which server made them, and be loaded again where it is another one now."""
    from bokeh.server.tornado import BokehTornado
    from tornado.web import OutputTransform
    from tornado.websocket import WebSocketHandler

    mine = os.urandom(8).hex()
    script = (SCRIPT % mine).encode()

    class Answer(WebSocketHandler):
        def open(self, *_: Any) -> None:
            self.write_message(mine)

    class Script(OutputTransform):
        def __init__(self, _: Any) -> None: ...

        def transform_first_chunk(self, status: int, headers: Any, chunk: bytes, finishing: bool) -> Any:
            if finishing and chunk and headers.get("Content-Type", "").startswith("text/html"):
                chunk += script
                headers["Content-Length"] = str(len(chunk))
                headers.pop("Etag", None)  # it says nothing of the script
            return status, headers, chunk

    plain = BokehTornado.__init__

    def __init__(self: Any, *args: Any, **keywords: Any) -> None:  # noqa: N807  # it becomes one
        plain(self, *args, **keywords)
        self.transforms.insert(0, Script)  # before what compresses
        self.add_handlers(".*", [(r".*/\.bokeh-ssh-reload", Answer)])

    BokehTornado.__init__ = __init__  # type: ignore[method-assign]  # as is wanted


class Child:
    """The server, as a child of this process.

    :param argv: its command line
    :param bokeh: whether that runs a module of this Python, with Bokeh in it
    """

    def __init__(self, argv: list[str], bokeh: bool) -> None:
        self.last = b""
        self.status: int | None = None  # as waitpid() gives it, once it has ended
        self._errors, theirs = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(theirs)
            return
        os.close(self._errors)
        os.dup2(theirs, 2)
        os.close(theirs)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            if not bokeh:
                os.execvp(argv[0], argv)  # noqa: S606  # no shell is wanted
            import runpy

            reload_pages()
            sys.argv = argv[2:]
            runpy.run_module(argv[2], run_name="__main__", alter_sys=True)
            code: Any = 0
        except SystemExit as exc:
            code = exc.code
        except BaseException:  # noqa: BLE001 - nothing of the child is to run on in our own code
            sys.excepthook(*sys.exc_info())
            code = 1
        if isinstance(code, str):
            print(code, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else bool(code))

    def follow(self, seconds: float) -> None:
        """Pass on what it writes for so long, and see whether it has ended."""
        deadline = time.monotonic() + seconds
        while self.status is None:
            left = max(0.0, deadline - time.monotonic())
            data = self._pass_on(left)
            if data == b"":
                time.sleep(min(left, 0.05))  # it has closed it, and may run on
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = status
                for _ in range(64):  # what it started may write on
                    if not self._pass_on(0.0):
                        break
                os.close(self._errors)
            elif left <= 0:
                return

    def _pass_on(self, seconds: float) -> bytes | None:
        if not select.select([self._errors], [], [], seconds)[0]:
            return None
        data = os.read(self._errors, 1 << 16)
        write(data)
        self.last = (self.last + data)[-TAIL:]
        return data

    def end(self) -> None:
        """End it, in time, and what it has started: workers (``--num-procs``) outlive their parent."""
        before = process_tree.table()
        started = {pid: before[pid] for pid in process_tree.below(self.pid, before)}
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.status is None:
                os.kill(self.pid, number)
                self.follow(PATIENCE)
        process_tree.end(
            lambda rows: [pid for pid, row in started.items() if pid in rows and rows[pid][3] == row[3]],
            PATIENCE,
        )

    def end_likewise(self) -> NoReturn:
        """End this process as it has ended."""
        status = self.status or 0
        if os.WIFSIGNALED(status):
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
            os.kill(os.getpid(), os.WTERMSIG(status))
        os._exit(os.WEXITSTATUS(status))


def socket_at(path: str) -> tuple[int, int] | None:
    """Return what distinguishes the socket at a path from another one there."""
    with contextlib.suppress(OSError):
        found = os.lstat(path)
        return found.st_ino, found.st_ctime_ns
    return None


class Reloader:
    """The server that runs, and its files.

    :param argv: its command line
    :param watched: folders and scripts
    :param bokeh: as for :class:`Child`
    """

    def __init__(self, argv: list[str], watched: list[str], bokeh: bool) -> None:
        self.argv, self.watched, self.bokeh = argv, watched, bokeh
        at = argv.index("--unix-socket") + 1 if "--unix-socket" in argv else 0
        self.path = argv[at] if at else ""
        self.ending = False
        signal.signal(signal.SIGTERM, self.on_term)
        self.seen = self.before = look(watched)
        self.faults: dict[str, str] = {}
        self.reloaded = self.reported = False
        self.child = Child(argv, bokeh)

    def on_term(self, *_: object) -> None:
        self.ending = True

    def run(self) -> NoReturn:
        """Hold the server until it is to end, or ends before any change."""
        pause = PAUSE
        while True:
            if self.child.status is None:
                self.child.follow(pause)
            else:
                time.sleep(pause)
            if self.ending:
                self.child.end()
            if self.child.status is not None:
                if self.ending or not self.reloaded:
                    self.child.end_likewise()
                if not self.reported:
                    self.reported = True
                    self.report_end(self.child, "the server ended, and the next change starts it")
            began = time.monotonic()
            changed = self.have_changed()
            pause = max(PAUSE, 10 * (time.monotonic() - began))
            if changed:
                self.reload()

    def report_end(self, child: Child, what: str) -> None:
        """Write why it ended."""
        text = child.last.decode("utf-8", "replace")
        report(what, text[max(text.find("Traceback (most recent call last)"), 0) :])

    def have_changed(self) -> bool:
        """Look whether the files have changed, and changed no more since the look before."""
        now = look(self.watched)
        settled, self.before = now == self.before, now  # editors, and uploads, write in several steps
        return settled and now != self.seen

    def reload(self) -> None:
        """Start the server again, unless a file does not compile."""
        changed = {path for path in self.before if self.before[path] != self.seen.get(path)}
        self.faults = check(changed | set(self.faults))
        self.seen = self.before
        if self.faults:
            report(
                "a file does not compile, so the server runs on as it was", "\n".join(self.faults.values())
            )
            return
        self.reported, self.reloaded = False, True
        if self.child.status is None and self.path:
            self.replace()
        else:
            self.child.end()
            self.child = Child(self.argv, self.bokeh)

    def replace(self) -> None:
        """Let another one take over the socket before this one ends: pages opened meanwhile are served."""
        former = socket_at(self.path)
        other = Child(self.argv, self.bokeh)
        while other.status is None and not self.ending and not self.have_changed():
            if socket_at(self.path) not in (former, None):
                self.child.end()
                self.child = other
                return
            other.follow(0.1)
            self.child.follow(0.0)
        if other.status is not None:
            self.report_end(other, "the server cannot start with it, and runs on as it was")
        other.end()


def main() -> None:
    """Run the server, and watch its files."""
    what = json.loads(sys.argv[2])
    Reloader(sys.argv[3:], what["watched"], what["bokeh"]).run()
