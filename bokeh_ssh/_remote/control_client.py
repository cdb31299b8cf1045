"""What a later session asks for: a server for a new client, the list of servers, one's end, files of BokehJS.

Runs on the remote machine, in a session of its own: standard library only, with ``_remote.run_dir`` and
``_remote.control_socket``, which are sent along. Its one order comes as a line of JSON on standard input;
what it says are lines of JSON behind the mark, as the supervisor's are.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import select
import signal
import time
import zlib

from bokeh_ssh._remote.control_socket import MENDED, is_stale, remove_run_dir, send_request
from bokeh_ssh._remote.run_dir import CONTROL, KEEP, RunDir, identity, list_run_dirs, node

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence
    from typing import Any, NoReturn

LOST = 5  # our exit status where the supervisor went away without a word
QUICK = 2.0  # seconds for a supervisor to say what it is
ENDED = 12.0  # seconds in which one has ended that was ordered to
#: The files of BokehJS that each page of a server loads, in their order; and the most bytes of one.
STATIC = tuple("bokeh%s.min.js" % part for part in ("", "-gl", "-widgets", "-tables", "-mathjax"))
MOST_STATIC = 16 << 20


class ControlCommand:
    """One order, carried out.

    :param order: the line that came in; ``do`` says what to do
    """

    def __init__(self, order: dict[str, Any]) -> None:
        self.order = order
        self.mark = str(order["mark"]).encode()

    def send(self, event: str, **more: Any) -> None:
        """Send a message to the client."""
        data = self.mark + json.dumps(dict(more, event=event)).encode("ascii") + b"\n"
        while data:
            data = data[os.write(1, data) :]

    def find_run_dir(self) -> RunDir | None:
        """Find the place that the order is about."""
        for run_dir in list_run_dirs():
            if run_dir.id == self.order["id"]:
                return run_dir
        return None

    def wait_for_run_dir(self) -> RunDir | None:
        """Wait for a place that was removed to be there again; end a server that nobody can find any more.

        Otherwise there would be two, once the client starts another.
        """
        who = str(self.order.get("supervisor", ""))
        if not who or self.order.get("node") != node():
            return None
        pid = int(who.partition(":")[0])
        deadline = time.monotonic() + (MENDED if self.order["id"] else 0)
        while identity(pid) == who and time.monotonic() < deadline:
            run_dir = self.find_run_dir()
            if run_dir:
                return run_dir
            time.sleep(0.1)
        if identity(pid) == who:
            os.kill(pid, signal.SIGTERM)
            deadline = time.monotonic() + ENDED
            while identity(pid) == who and time.monotonic() < deadline:
                time.sleep(0.1)
        return None

    def send_request(
        self, run_dir: RunDir, request: dict[str, Any], fds: Sequence[int] = (), timeout: float = QUICK
    ) -> tuple[socket.socket, dict[str, Any]]:
        """Knock, for as long as a supervisor that runs may need to make its socket again.

        :raises OSError: if it does not answer
        """
        deadline = time.monotonic() + MENDED
        while True:
            try:
                return send_request(run_dir.at(CONTROL), request, fds, timeout)
            except (FileNotFoundError, ConnectionRefusedError):
                if not run_dir.exists() or is_stale(run_dir) or time.monotonic() > deadline:
                    raise
            time.sleep(0.1)

    def do_adopt(self) -> int:
        """Hand our standard input and output to the supervisor, and stay until it lets us go."""
        run_dir = self.find_run_dir() or self.wait_for_run_dir()
        if run_dir is None:
            wanted = self.order.get("node", "")
            self.send("refused", why="elsewhere" if wanted not in ("", node()) else "gone", node=node())
            return 1
        try:
            sock, answer = self.send_request(run_dir, self.order, (0, 1), float(self.order["timeout"]))
        except OSError as exc:
            if not run_dir.exists():  # between the two; perhaps only for a moment
                return self.do_adopt()
            if ended(run_dir, exc):
                return self.report_end(run_dir)
            self.send("refused", why="silent", text=exc.strerror or str(exc))
            return 1
        if answer.get("adopted"):
            return hold(sock)
        if "over" in answer:
            for_the_end(sock, float(self.order["timeout"]))
            return self.report_end(run_dir)
        self.send("refused", **dict(answer, why=answer.get("error", "unknown")))
        return 1

    def report_end(self, run_dir: RunDir) -> int:
        """Report what became of a server whose supervisor is no more; what was reported need not be kept."""
        record = run_dir.read()
        if "ended" not in record:
            remove_run_dir(run_dir, QUICK)
            self.send("refused", why="gone", node=node())
            return 1
        self.send("refused", **dict(record, why="exited"))
        ready, _, _ = select.select([0], [], [], 10)
        if ready and b"seen" in os.read(0, 1 << 12):
            run_dir.remove()
        return 1

    def do_list(self) -> int:
        """Report each server."""
        for run_dir in list_run_dirs():
            state = "running"
            try:
                sock, record = self.send_request(run_dir, {"do": "status"})
                sock.close()
            except OSError as exc:
                if not run_dir.exists():
                    continue
                over, record = ended(run_dir, exc), run_dir.read()
                state = "silent"
                if over:
                    if "ended" not in record:
                        remove_run_dir(run_dir, QUICK)
                        continue
                    if run_dir.age() > KEEP:
                        run_dir.remove()
                        continue
                    state = "ended"
            self.send("server", **dict(record, state=state, id=run_dir.id))
        self.send("end", node=node())
        return 0

    def do_stop(self) -> int:
        """End a server, and wait until nothing of it is left."""
        run_dir, patience = self.find_run_dir(), float(self.order["patience"])
        if run_dir is None:
            self.send("refused", why="gone", node=node())
            return 1
        try:
            sock, _ = self.send_request(run_dir, self.order)
        except OSError as exc:
            if not run_dir.exists() or ended(run_dir, exc):
                remove_run_dir(run_dir, QUICK)
                self.send("over", already=True)
                return 0
            self.send("refused", why="silent", text=exc.strerror or str(exc))
            return 1
        if not for_the_end(sock, patience + 10):
            self.send("refused", why="silent", text="it does not end")
            return 1
        self.send("over", already=False)
        return 0

    def do_static(self) -> int:
        """Send the files of BokehJS that the client lacks, compressed; first, which they are."""
        os.nice(10)  # the server starts meanwhile
        known = set(self.order["known"])
        found = []
        for name in STATIC:
            try:
                with open(os.path.join(self.order["folder"], "server", "static", "js", name), "rb") as file:
                    content = file.read(MOST_STATIC + 1)
            except OSError:  # another version has other files
                continue
            sha512 = hashlib.sha512(content).hexdigest()
            if len(content) <= MOST_STATIC and sha512 not in known:
                found.append((name, sha512, content))
        self.send("files", files=[[name, sha512] for name, sha512, _ in found])
        for _, sha512, content in found:
            data = base64.b64encode(zlib.compress(content, 6)).decode("ascii")
            self.send("file", sha512=sha512, data=data)
        self.send("end")
        return 0


def ended(run_dir: RunDir, why: OSError) -> bool:
    """Return whether a supervisor that did not answer is no more; one that hung up may be about to end."""
    deadline = time.monotonic() + QUICK
    while not is_stale(run_dir):
        if not isinstance(why, ConnectionResetError) or time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def for_the_end(sock: socket.socket, timeout: float) -> bool:
    """Wait until a supervisor has ended; False if it has not in time."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            sock.settimeout(max(0.1, deadline - time.monotonic()))
            if not sock.recv(1 << 16):
                return True
        except OSError:
            return time.monotonic() < deadline


def hold(sock: socket.socket) -> int:
    """Keep the session open; its streams are the supervisor's now."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    sock.settimeout(None)
    data = b""
    while True:
        try:
            part = sock.recv(1 << 12)
        except OSError:
            return LOST
        if not part:
            return 0 if b"bye" in data else LOST
        data = data[-8:] + part


def main() -> NoReturn:
    """Read the order, byte by byte, since what follows it is not ours; then carry it out."""
    text = b""
    while text[-1:] != b"\n":
        byte = os.read(0, 1)
        if not byte:
            os._exit(3)
        text += byte
    command = ControlCommand(json.loads(text))
    os._exit(getattr(command, "do_" + command.order["do"])())
