#!/usr/bin/env bash
# Bokeh 3.9.2: a server that ends in good order, on SIGTERM or Ctrl-C, does not run on_session_destroyed for a session
# that it has: not the function of app_hooks.py, not a Document's callbacks. What an app does there (save what somebody
# has worked out, end a subprocess, give a licence or a GPU back) is done each time that somebody closes a page, and
# never for the people who are at work when the server is restarted, or a batch job's time is over.
#
# on_server_unloaded does run then, with all sessions still in server_context.sessions. The documentation warns of that
# one alone: "In practice this code may not run, since servers are often killed by a signal"; of on_session_destroyed it
# says "Execute ... when a new session is destroyed", of the Document's "Provide callbacks to invoke when the session
# serving the Document is destroyed".
# What helps: do it in on_server_unloaded too, for each of server_context.sessions; their documents are in .document.
#
# Seen, one page that has been worked with:
#
#   closed, then SIGTERM      on_session_destroyed, the document's callback, on_server_unloaded with []
#   still open, SIGTERM       on_server_unloaded with ['worked out']
#   still open, Ctrl-C        on_server_unloaded with ['worked out']
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check bokeh==3.9.2 tornado==6.6.1
mkdir app
cat > app/main.py <<'PY'
from bokeh.io import curdoc
from bokeh.models import Div

curdoc().add_root(Div(text="worked out"))
curdoc().on_session_destroyed(lambda session_context: print("SEEN the document's callback", flush=True))
PY
cat > app/app_hooks.py <<'PY'
def on_session_destroyed(session_context):
    print("SEEN on_session_destroyed", flush=True)


def on_server_unloaded(server_context):
    texts = [session.document.roots[0].text for session in server_context.sessions]
    print("SEEN on_server_unloaded with", texts, flush=True)
PY

cat > seen.py <<'PY'
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from bokeh.client import pull_session

LOG = Path("bokeh.log")


def until(text: str) -> None:
    end = time.monotonic() + 60
    while text not in LOG.read_text():
        if time.monotonic() > end:
            sys.exit(f"no {text!r} in 60 s: {LOG.read_text()}")
        time.sleep(0.1)


def serve(sign: int, close: bool) -> list[str]:
    """Return which hooks have run when the server has ended."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    words = [sys.executable, "-m", "bokeh", "serve", "app", "--port", str(port)]
    words += ["--unused-session-lifetime", "100", "--check-unused-sessions", "100"]
    with LOG.open("w") as log:
        server = subprocess.Popen(words, stdout=log, stderr=log)
    try:
        until("running at")
        session = pull_session(url=f"http://localhost:{port}/app")
        if close:
            session.close()
            until("SEEN the document's callback")
        server.send_signal(sign)
        assert server.wait(60) == 0
    finally:
        server.kill()
    session.close()
    return [line.removeprefix("SEEN ") for line in LOG.read_text().splitlines() if line.startswith("SEEN ")]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would leave it ignored
    seen = {
        "closed, then SIGTERM": serve(signal.SIGTERM, close=True),
        "still open, SIGTERM": serve(signal.SIGTERM, close=False),
        "still open, Ctrl-C": serve(signal.SIGINT, close=False),
    }
    for name, hooks in seen.items():
        print(f"{name:24}  {', '.join(hooks)}")
    end = ["on_server_unloaded with ['worked out']"]
    expected = [["on_session_destroyed", "the document's callback", "on_server_unloaded with []"], end, end]
    sys.exit(0 if list(seen.values()) == expected else "it has changed")
PY
timeout 200 env/bin/python seen.py
