#!/usr/bin/env bash
# Bokeh 3.9.2, BokehJS with `bokeh serve`: what a person does right after a page's WebSocket is back reaches Python,
# and is then undone on the page, so that the two disagree until the next change but one.
#
# Upon the server's ACK the page asks for the whole document, and is in use meanwhile. A change that is made between
# that request and its answer goes to the server and runs its callbacks; the answer, which is older, then replaces the
# models of the page. The slider springs back while Python has the new value, and moving it there again is no change
# for Python: no callback runs. The window is one round trip, and longer with a large document; the page that was just
# cut off is the one on a line with long round trips.
#
# Seen, a line of 0.3 s each way, Chromium, a slider that is at 2 when the line is cut, and whose text is set by Python:
#
#   moved to 3 0.2 s after the new connection is open:
#       the page shows [2, 'Python has 3']
#       moved once more, [3, 'Python has 3']
#   moved to 3 2 s after:
#       the page shows [3, 'Python has 3']
#       moved once more, [4, 'Python has 4']
#
# Runs on Debian with chromium (installed where it is missing, as root).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
command -v chromium > /dev/null || apt-get install -y -qq --no-install-recommends chromium > apt.log 2>&1
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check bokeh==3.9.2 tornado==6.6.1 playwright==1.62.0

cat > app.py <<'PY'
from bokeh.io import curdoc
from bokeh.models import Div, Slider

slider = Slider(start=0, end=100, value=1)
text = Div(text="waiting")


def moved(attr, old, new):
    text.text = f"Python has {new}"


slider.on_change("value", moved)
curdoc().add_root(slider)
curdoc().add_root(text)
PY

cat > seen.py <<'PY'
"""An app behind a line of 0.3 s each way, which is cut once; a slider that is moved after that."""

import asyncio
import shutil
import sys

from playwright.async_api import async_playwright

DELAY = 0.3
lines = []


async def carry(reader, writer):
    loop, queue = asyncio.get_running_loop(), asyncio.Queue()

    async def write():
        while (item := await queue.get()) is not None:
            due, data = item
            await asyncio.sleep(max(0, due - loop.time()))
            writer.write(data)
        writer.close()

    task = asyncio.create_task(write())
    try:
        while data := await reader.read(65536):
            queue.put_nowait((loop.time() + DELAY, data))
    except ConnectionError:
        pass
    queue.put_nowait(None)
    await task


async def relay(reader, writer):
    there, to_there = await asyncio.open_connection("127.0.0.1", int(sys.argv[1]))
    lines.append((writer, to_there))
    await asyncio.gather(carry(reader, to_there), carry(there, writer), return_exceptions=True)


async def state(page):
    return await page.evaluate("Bokeh.documents[0].roots().map(root => root.value ?? root.text)")


async def main():
    line = await asyncio.start_server(relay, "127.0.0.1", 0)
    port = line.sockets[0].getsockname()[1]
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for moment, wait in (("0.2 s after the new connection is open", 0.2), ("2 s after", 2)):
            page = await browser.new_page()
            opened = asyncio.Queue()
            page.on("console", lambda message: opened.put_nowait(1) if "is now open" in message.text else None)
            await page.goto(f"http://127.0.0.1:{port}/app")
            handle = page.locator(".noUi-handle")
            await page.get_by_text("waiting").wait_for()
            await opened.get()
            await handle.press("ArrowRight")
            await page.get_by_text("Python has 2").wait_for()
            for pair in lines:
                for writer in pair:
                    writer.transport.abort()
            lines.clear()
            await asyncio.wait_for(opened.get(), 30)
            await asyncio.sleep(wait)
            print(f"moved to 3 {moment}:")
            await handle.press("ArrowRight")
            await asyncio.sleep(3)
            print("    the page shows", await state(page))
            await handle.press("ArrowRight")
            await asyncio.sleep(3)
            print("    moved once more,", await state(page))
            await page.close()


asyncio.run(main())
PY
port=$(env/bin/python -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')
env/bin/bokeh serve app.py --port "$port" --allow-websocket-origin '*' > bokeh.log 2>&1 &
bokeh=$!
trap 'kill "$bokeh"; rm -rf "$work"' EXIT
for _ in $(seq 100); do ! grep -q "Bokeh app running" bokeh.log || break; sleep 0.1; done
env/bin/python seen.py "$port" > seen || { cat seen bokeh.log; exit 1; }
cat seen
diff - seen << 'EXPECTED'
moved to 3 0.2 s after the new connection is open:
    the page shows [2, 'Python has 3']
    moved once more, [3, 'Python has 3']
moved to 3 2 s after:
    the page shows [3, 'Python has 3']
    moved once more, [4, 'Python has 4']
EXPECTED
