#!/usr/bin/env bash
# Bokeh 3.9.2 (Tornado 6.6.1): `bokeh serve` whose standard output nobody reads any more does not end on SIGTERM.
#
# The handler of SIGTERM prints "Received signal SIGTERM, shutting down" before it stops the loop. Where the reader of
# that pipe has gone (`bokeh serve app.py | tee log` with the tee ended, a supervisor that was killed, an SSH session
# that was cut), print raises BrokenPipeError, so the loop is never stopped: the server goes on answering pages, and
# each further SIGTERM does the same. Only SIGKILL ends it, so `kill`, `timeout`, and a service manager's polite stop
# wait in vain. SIGINT ends it all the same, since the loop has been left by then. With an output that is read, or
# /dev/null, SIGTERM ends it: the control.
#
# Seen:
#
#   output read,     SIGTERM: ended, exit status 0
#   output not read, SIGTERM: still runs after 5 s, answers with 200
#   output not read, SIGTERM again: still runs after 5 s, answers with 200
#   output not read, SIGINT: ended
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check bokeh==3.9.2 tornado==6.6.1

cat > app.py <<'PY'
from bokeh.io import curdoc
from bokeh.models import Div

curdoc().add_root(Div(text="hello"))
PY

cat > run.py <<'PY'
"""Start servers with and without a reader of their output, send signals, and say what they do."""
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def ask(port):
    return urllib.request.urlopen(f"http://127.0.0.1:{port}/app", timeout=10).status


def start():
    port = free_port()
    words = [sys.executable, "-m", "bokeh", "serve", "--port", str(port), "app.py"]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    for _ in range(300):
        try:
            ask(port)
            return server, port
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the server did not start")


def end(server, port, number):
    server.send_signal(number)
    try:
        status = server.wait(5)
    except subprocess.TimeoutExpired:
        return f"still runs after 5 s, answers with {ask(port)}"
    return f"ended, exit status {status}" if number == signal.SIGTERM else "ended"


server, port = start()
print("output read,     SIGTERM:", end(server, port, signal.SIGTERM))
server, port = start()
server.stdout.close()
try:
    print("output not read, SIGTERM:", end(server, port, signal.SIGTERM))
    print("output not read, SIGTERM again:", end(server, port, signal.SIGTERM))
    print("output not read, SIGINT:", end(server, port, signal.SIGINT))
finally:
    if server.poll() is None:
        server.kill()
PY

env/bin/python run.py | tee seen
diff - seen <<'SEEN'
output read,     SIGTERM: ended, exit status 0
output not read, SIGTERM: still runs after 5 s, answers with 200
output not read, SIGTERM again: still runs after 5 s, answers with 200
output not read, SIGINT: ended
SEEN
echo "bokeh $(env/bin/python -c 'import bokeh, tornado; print(bokeh.__version__, "on Tornado", tornado.version)'): as stated"
