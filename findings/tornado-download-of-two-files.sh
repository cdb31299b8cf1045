#!/usr/bin/env bash
# Jupyter Server 2.21.1 (Tornado 6.6.1) and Chromium: a download whose line is cut once, of a file that is written anew
# meanwhile, ends as a whole one that is half the old file and half the new one. Nobody sees an error.
#
# A browser goes on by itself with a download that was cut (a tunnel that reconnects, a laptop that changes networks).
# It asks for the rest, and adds If-Range with what the first answer said about the file, so as to get all of it instead
# where it has changed (RFC 9110, section 13.1.5: otherwise "the recipient MUST ignore the Range header field").
# Tornado's StaticFileHandler, by which JupyterLab's Download and each link to /files/ are answered, and Bokeh's
# /APP/static/, reads Range and not If-Range, so it sends the rest of the new file. Results that a job writes every few
# minutes, a checkpoint, a log that is rotated are just what one downloads from there.
#
# Tornado's documentation of StaticFileHandler names Range ("supports the HTTP Accept-Ranges mechanism to return partial
# content"), and no condition of it. The control is Starlette 1.10.0's StaticFiles, which sends the new file from its
# beginning. What helps: download a copy, write new results under a new name, or compare a checksum.
#
# Seen (the cut comes after 1 MB of 3 MB; the browser reports no failure in either case):
#
#   jupyter    asked again with Range and If-Range, saved 3000000 bytes: old, then new
#   starlette  asked again with Range and If-Range, saved 3000000 bytes: new
#
# Runs on Debian with chromium (installed where it is missing, as root).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
command -v chromium > /dev/null || apt-get install -y -qq --no-install-recommends chromium > apt.log 2>&1
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check jupyter-server==2.21.1 tornado==6.6.1 starlette==1.10.0 \
    uvicorn==0.54.0 playwright==1.62.0

cat > seen.py <<'PY'
import asyncio
import os
import shutil
import socket
import sys
import time
from pathlib import Path

from playwright.async_api import async_playwright

SIZE = 3_000_000
FILE = Path("files/result.csv")
APP = "import sys, uvicorn; from starlette.staticfiles import StaticFiles\n"
APP += "uvicorn.run(StaticFiles(directory='files'), port=int(sys.argv[1]), log_level='error')"
JUPYTER = ["-m", "jupyter_server", "--allow-root", "--no-browser", "--IdentityProvider.token=word",
           "--ServerApp.root_dir=files", "--ServerApp.ip=127.0.0.1", "--ServerApp.port"]


async def download(words: list[str], path: str) -> tuple[str, str]:
    """Return what the second request asked with, and what Chromium has saved."""
    FILE.write_bytes(b"o" * SIZE)
    os.utime(FILE, (time.time() - 7200,) * 2)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    with open("server.log", "w") as log:
        server = await asyncio.create_subprocess_exec(sys.executable, *words, str(port), stdout=log, stderr=log)
    requests: list[str] = []

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, to_there = await asyncio.open_connection("127.0.0.1", port)
        first = not requests

        async def up() -> None:
            while data := await reader.read(65536):
                requests.append(data.decode("latin-1").lower())
                to_there.write(data)
            to_there.close()

        async def down() -> None:
            count = 0
            while data := await there.read(32768):
                writer.write(data)
                await writer.drain()
                count += len(data)
                if first and count > SIZE // 3:
                    await asyncio.sleep(1)  # the browser reads what is under way
                    FILE.write_bytes(b"n" * SIZE)
                    to_there.transport.abort()
                    break
            writer.transport.abort() if first else writer.close()

        await asyncio.gather(up(), down(), return_exceptions=True)

    line = await asyncio.start_server(relay, "127.0.0.1", 0)
    try:
        for _ in range(300):
            with socket.socket() as sock:
                if sock.connect_ex(("127.0.0.1", port)) == 0:
                    break
            await asyncio.sleep(0.1)
        async with async_playwright() as playwright:
            browser = await playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = await browser.new_page()
            url = f"http://127.0.0.1:{line.sockets[0].getsockname()[1]}{path}"
            await page.set_content(f'<a href="{url}" download>result.csv</a>')
            async with page.expect_download() as begun:
                await page.get_by_text("result.csv").click()
            saved = await begun.value
            assert await saved.failure() is None
            data = Path(await saved.path()).read_bytes()
            await browser.close()
    finally:
        line.close()
        server.terminate()
        await server.wait()
    asked = [name for name in ("Range", "If-Range") if f"\r\n{name.lower()}: " in requests[1]]
    old, new = data.count(b"o"), data.count(b"n")
    assert len(data) == SIZE == old + new and data == b"o" * old + b"n" * new
    return " and ".join(asked), ", then ".join(name for name, count in (("old", old), ("new", new)) if count)


async def main() -> None:
    FILE.parent.mkdir()
    seen = {
        "jupyter": await download(JUPYTER, "/files/result.csv?download=1&token=word"),
        "starlette": await download(["-c", APP], "/result.csv"),
    }
    for name, (asked, saved) in seen.items():
        print(f"{name:9}  asked again with {asked}, saved {SIZE} bytes: {saved}")
    good = seen == {"jupyter": ("Range and If-Range", "old, then new"), "starlette": ("Range and If-Range", "new")}
    sys.exit(0 if good else "it has changed")


asyncio.run(main())
PY
timeout 150 env/bin/python seen.py || { cat server.log && exit 1; }
