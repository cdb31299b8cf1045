#!/usr/bin/env bash
# Streamlit 1.67.0 and Chromium: a line that is cut for a moment ends the work that a button has begun, and the page
# comes back as if the button had never been pressed. Nothing is said, neither on the page nor in the server's log.
#
# The page reconnects by itself, to the same session: session_state and what was typed are kept, so whoever looks sees
# the app well and "no result yet". The script that was at work was told to stop when the WebSocket ended, and does so
# in its next call of st (a progress bar, a st.write); what stood after that is not done: the second of two rows that
# belong together, the message to those who wait. On the reconnect the script is run once more, with the button up. So
# a blip of the Wi-Fi, a tunnel that reconnects or a proxy that is restarted costs an hour's computation at its end.
# try/finally is run; `except Exception` sees nothing of it, since what stops the script is a BaseException.
#
# Streamlit's documentation of st.button: "True if the button was clicked on the last run of the app, False otherwise".
# Its pull request 6204 brought the stop, for scripts that never end by themselves; 5856 the reconnect.
# What helps: a thread or process of one's own that does the work and keeps its result; the script only starts it, and
# looks at it.
#
# Seen, a button whose script writes "begun", works for 3 s with a progress bar, and writes "done":
#
#   not cut               begun done    runs 2, typed 'mine', result: there
#   cut once, after 1 s   begun         runs 3, typed 'mine', result: none
#
# Runs on Debian with chromium (installed where it is missing, as root).
set -euo pipefail
work=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server"; rm -rf "$work"' EXIT
cd "$work"
command -v chromium > /dev/null || apt-get install -y -qq --no-install-recommends chromium > apt.log 2>&1
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check streamlit==1.67.0 playwright==1.62.0

cat > app.py <<'PY'
import time

import streamlit as st

st.session_state.runs = st.session_state.get("runs", 0) + 1
typed = st.text_input("name")
if st.button("Start"):
    with open("log", "a") as log:
        print("begun", file=log, flush=True)
        bar = st.progress(0.0)
        for step in range(10):
            time.sleep(0.3)
            bar.progress((step + 1) / 10)
        print("done", file=log, flush=True)
    st.session_state.result = "there"
st.text(f"runs {st.session_state.runs}, typed {typed!r}, result: {st.session_state.get('result', 'none')}")
PY

cat > seen.py <<'PY'
import asyncio
import shutil
import sys
from pathlib import Path

from playwright.async_api import async_playwright

lines = []
LOG = Path("log")


async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
    except ConnectionError:
        pass
    writer.close()


async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    there, to_there = await asyncio.open_connection("127.0.0.1", int(sys.argv[1]))
    lines.append((writer, to_there))
    await asyncio.gather(carry(reader, to_there), carry(there, writer), return_exceptions=True)


async def main() -> None:
    line = await asyncio.start_server(relay, "127.0.0.1", 0)
    port = line.sockets[0].getsockname()[1]
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for cut in (False, True):
            LOG.write_text("")
            page = await browser.new_page()
            page.set_default_timeout(60_000)
            await page.goto(f"http://127.0.0.1:{port}/")
            await page.get_by_text("runs 1, typed").wait_for()
            await page.get_by_label("name").fill("mine")
            await page.get_by_role("button", name="Start").focus()
            # Leaving the field sends what was typed, which is one run: the count starts there.
            await page.get_by_text("typed 'mine', result: none").wait_for()
            text = await page.get_by_text("typed 'mine'").inner_text()
            before = int(text.split(",")[0].removeprefix("runs ")) - 1
            await page.get_by_role("button", name="Start").click()
            for _ in range(600):
                if LOG.read_text():
                    break
                await asyncio.sleep(0.05)
            await asyncio.sleep(1)
            if cut:
                for writer in (writer for pair in lines for writer in pair):
                    writer.transport.abort()
                lines.clear()
            runs = before + (3 if cut else 2)
            end = page.get_by_text(f"runs {runs}, typed")
            await end.wait_for()
            await asyncio.sleep(5)  # what was at work would have been done by now
            shown = (await end.inner_text()).replace(f"runs {runs}", f"runs {runs - before}")
            print(f"{'cut once, after 1 s' if cut else 'not cut':19}  {' '.join(LOG.read_text().split()):10}  {shown}")
            await page.close()


asyncio.run(main())
PY
port=$(python3 -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')
HOME=$work env/bin/streamlit run app.py --server.address 127.0.0.1 --server.port "$port" --server.headless true \
    --browser.gatherUsageStats false > server.log 2>&1 < /dev/null &
server=$!
for _ in $(seq 300); do ! grep -q "URL:" server.log || break; sleep 0.1; done
timeout 200 env/bin/python seen.py "$port" > seen || { cat seen server.log; exit 1; }
cat seen
! grep -i 'error\|exception\|stop' server.log
diff - seen <<'EXPECTED' || { echo "it has changed"; exit 1; }
not cut              begun done  runs 2, typed 'mine', result: there
cut once, after 1 s  begun       runs 3, typed 'mine', result: none
EXPECTED
