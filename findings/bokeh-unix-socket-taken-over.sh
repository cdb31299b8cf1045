#!/usr/bin/env bash
# Bokeh 3.9.2 (Tornado 6.6.1): `bokeh serve --unix-socket PATH` at the path of a server that runs takes the path away
# from it. Both go on, neither says a word; the first can no longer be reached by anybody, with its sessions and what
# they hold in memory. When the second ends, PATH stays and leads nowhere (connection refused), though the first still
# runs. A supervisor that starts the next copy before the last has ended, or two scripts with one path, lose a server
# that way. With --port the second one ends with "Cannot start Bokeh server, port 5006 is already in use".
#
# Tornado's bind_unix_socket() deletes a socket that it finds, used or not, as its own reference says ("If a socket with
# the given name already exists, it will be deleted"). Bokeh's documentation of --unix-socket does not ("Unix socket to
# bind. Network options such as port, address, ssl options are incompatible with unix socket"), and nothing asks first
# whether anybody listens there. What helps: a path of its own for each start, or a connect() to it before the start.
#
# Seen:
#
#   --port         the second: exit status 1, the first is reached: True
#   --unix-socket  the second: runs, the first is reached: False, and after the second's end: False
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check bokeh==3.9.2 tornado==6.6.1
: > app.py

cat > try.py <<'PY'
import os
import socket
import subprocess
import sys
import time


def holder(address) -> int | None:
    """Return the process that accepts connections there."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family) as sock:
        try:
            sock.connect(address)
        except OSError:
            return None
        if family == socket.AF_UNIX:
            return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 4), sys.byteorder)
        return first.pid


def wait(process, address, earlier) -> None:
    """Wait until the process has ended, or has the address."""
    deadline = time.monotonic() + 40
    while process.poll() is None and time.monotonic() < deadline:
        if earlier is None and holder(address):
            return
        if earlier is not None and isinstance(address, str) and holder(address) not in (earlier.pid, None):
            return
        time.sleep(0.1)


def run(*words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "bokeh", "serve", "app.py", *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


port = socket.create_server(("127.0.0.1", 0)).getsockname()[1]
WAYS = {
    "--port": (["--address=127.0.0.1", f"--port={port}"], ("127.0.0.1", port)),
    "--unix-socket": (["--unix-socket", "b.sock"], "b.sock"),
}
seen = []
for name, (words, address) in WAYS.items():
    first = run(*words)
    wait(first, address, None)
    second = run(*words)
    try:
        wait(second, address, first)
        status = second.poll()
        reached = [holder(address) == first.pid]
        if status is None:
            second.terminate()
            second.wait(20)
            reached.append(holder(address) == first.pid)
        alive = first.poll() is None
    finally:
        for process in (first, second):
            process.kill()
            process.wait()
    seen.append((status, reached, alive))
    what = "runs" if status is None else f"exit status {status}"
    after = f", and after the second's end: {reached[1]}" if status is None else ""
    print(f"{name:14} the second: {what}, the first is reached: {reached[0]}{after}")
refused, taken = (1, [True], True), (None, [False, False], True)
sys.exit(0 if seen == [refused, taken] else f"it has changed: {seen}")
PY
timeout 100 env/bin/python try.py
