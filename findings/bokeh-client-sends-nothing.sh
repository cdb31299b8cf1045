#!/usr/bin/env bash
# Bokeh 3.9.2, bokeh.client: what a program changes in the document of pull_session() is not sent to the server until
# some other method of the session happens to run its event loop; and what the server changes meanwhile is thrown away
# by that very method. So the pattern of Bokeh's own documentation, "customize session here" in a with block,
# customizes nothing: the changes are dropped, no callback of the app has run, nothing is raised or logged.
#
# A change only queues its message on the session's Tornado loop, which runs inside pull(), push(),
# request_server_info() and force_roundtrip() alone; neither waiting nor close() helps. While one of these waits for
# its reply, each PATCH-DOC that comes before it is read and dropped: the program's document keeps the old values, for
# ever, though the session is connected. Only pull() brings them.
#
# The documentation of ClientSession: "Updates on either side of the connection will automatically propagate to the
# other side, as long as the connection is open", with this example:
#
#     with pull_session(url=app_url) as mysession:
#         # customize session here
#         script = server_session(session_id=mysession.id, url=app_url)
#         return render_template("embed.html", script=script, template="Flask")
#
# and of force_roundtrip(): "Mostly useful for testing. Outside of test suites, this method hurts performance and
# should not be needed". (Issue 10135 of Bokeh reported the first half, and was closed as not reproduced.)
#
# Seen (the slider starts at 1; its callback prints, and sets a text; the session is then looked at by another client):
#
#   with block as documented                  callbacks: []          the session has 1
#   the same, 2 s of waiting before its end   callbacks: []          the session has 1
#   the same, force_roundtrip() at its end    callbacks: ['1 -> 7']  the session has 7
#   the text here after force_roundtrip(): 'waiting', one more: 'waiting', 2 s later: 'waiting', after pull(): 'has 7'
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check bokeh==3.9.2 tornado==6.6.1

cat > app.py <<'PY'
from bokeh.io import curdoc
from bokeh.models import Div, Slider


def moved(attr, old, new):
    print(f"callback {old} -> {new}", flush=True)
    text.text = f"has {new}"


slider = Slider(start=0, end=10, value=1, name="slider")
text = Div(text="waiting", name="text")
slider.on_change("value", moved)
curdoc().add_root(slider)
curdoc().add_root(text)
PY

cat > try.py <<'PY'
import queue
import subprocess
import sys
import threading
import time

from bokeh.client import pull_session
from bokeh.embed import server_session

command = [sys.executable, "-m", "bokeh", "serve", "app.py", "--port=0", "--address=127.0.0.1"]
server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
lines = queue.Queue()
threading.Thread(target=lambda: [lines.put(line.strip()) for line in server.stdout], daemon=True).start()
while "running at: " not in (line := lines.get(timeout=60)):
    pass
url = line.partition("running at: ")[2]


def model(session, name):
    return session.document.select_one({"name": name})


def callbacks() -> list[str]:
    """Return the callbacks of the server since the last time."""
    time.sleep(1)
    return [line[9:] for line in [lines.get() for _ in range(lines.qsize())] if line.startswith("callback ")]


seen = []
try:
    for name, end in {
        "with block as documented": lambda session: None,
        "the same, 2 s of waiting before its end": lambda session: time.sleep(2),
        "the same, force_roundtrip() at its end": lambda session: session.force_roundtrip(),
    }.items():
        with pull_session(url=url) as session:
            model(session, "slider").value = 7
            script = server_session(session_id=session.id, url=url)
            end(session)
        with pull_session(session.id, url=url) as other:
            seen.append((callbacks(), model(other, "slider").value))
        print(f"{name:41} callbacks: {seen[-1][0]!s:12} the session has {seen[-1][1]}")
    with pull_session(url=url) as session:
        model(session, "slider").value = 7
        for step in (session.force_roundtrip, session.force_roundtrip, lambda: time.sleep(2), session.pull):
            step()
            seen.append(model(session, "text").text)
    first, second, later, pulled = seen[-4:]
    print(f"the text here after force_roundtrip(): {first!r}, one more: {second!r}, ", end="")
    print(f"2 s later: {later!r}, after pull(): {pulled!r}")
finally:
    server.terminate()
    server.wait(10)
expected = [([], 1), ([], 1), (["1 -> 7"], 7), "waiting", "waiting", "waiting", "has 7"]
sys.exit(0 if seen == expected else "it has changed")
PY
timeout 100 env/bin/python try.py
