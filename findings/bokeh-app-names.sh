#!/usr/bin/env bash
# Bokeh 3.9.2 and Panel 1.9.4 (Tornado 6.6.1): an app whose file name has a space, an umlaut, a + or brackets in it
# is started and listed, and each of its pages is a 404.
#
# The app's route is handed to Tornado as it is. Tornado takes it for a regular expression, and matches it with the path
# as the browser sends it: percent-encoded. So "my app.py" waits for a space that no browser sends, "a+b.py" for "ab" or
# "aab", "a(b).py" for "ab". The log ("Bokeh app running at: http://localhost:5006/my app") and the links of the index
# page lead to the 404, and with that app alone "/" redirects there. Nothing is logged but the 404.
#
# Seen:
#
#   bokeh serve "my app.py"   GET /my%20app   404
#   bokeh serve "käse.py"     GET /k%C3%A4se  404
#   bokeh serve "a+b.py"      GET /a+b 404, GET /a%2Bb 404, GET /aab 200
#   bokeh serve "a(b).py"     GET /a(b) 404, GET /ab 200
#   bokeh serve "plain.py"    GET /plain 200
#   the same with panel serve
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check bokeh==3.9.2 panel==1.9.4 tornado==6.6.1

cat > try.py <<'PY'
import http.client
import socket
import subprocess
import sys
import time
from pathlib import Path

NAMES = ("my app", "käse", "a+b", "a(b)", "plain")
EXPECTED = {
    "/my%20app": 404, "/k%C3%A4se": 404, "/a+b": 404, "/a%2Bb": 404, "/aab": 200, "/a(b)": 404, "/ab": 200,
    "/plain": 200,
}
for name in NAMES:
    text = "from bokeh.io import curdoc\nfrom bokeh.models import Div\ncurdoc().add_root(Div())\n"
    Path(f"{name}.py").write_text(text)


def ask(port, path):
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    client.request("GET", path)
    status = client.getresponse().status
    client.close()
    return status


same = True
for program in ("bokeh", "panel"):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    words = [sys.executable, "-m", program, "serve", "--port", str(port), *(f"{name}.py" for name in NAMES)]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                ask(port, "/plain")
                break
            except OSError:
                time.sleep(0.1)
        seen = {path: ask(port, path) for path in EXPECTED}
        print(program, seen)
        same = same and seen == EXPECTED
    finally:
        server.terminate()
        server.wait(30)
sys.exit(0 if same else "it has changed")
PY
env/bin/python try.py
