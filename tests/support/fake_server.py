"""A stand-in for ``bokeh serve`` that starts at once: it writes Bokeh's lines, and misbehaves as FAKE says.

FAKE holds words: ``silent`` (never ready), ``deaf`` (ignores TERM), ``child`` (has a grandchild whose command
line ends in FAKE_MARK), ``flood`` (writes 8 MiB before it makes FAKE_REPORT), ``exit`` (ends with status 3
when the file FAKE_GO appears). FAKE_REPORT gets what it was started with, as JSON.
"""

# It is a small program that must start fast, on old Pythons too.
# ruff: noqa: PTH104, PTH109, PTH110, PTH123, T201, UP031

import json
import os
import signal
import socket
import subprocess
import sys
import threading


def serve(listener):
    while True:
        listener.accept()[0].close()


def main():
    mode = os.environ.get("FAKE", "").split()
    if "deaf" in mode:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "child" in mode:
        ignore = "trap '' TERM; " if "deaf" in mode else ""
        subprocess.Popen(["/bin/sh", "-c", ignore + "while :; do sleep 1; done # " + os.environ["FAKE_MARK"]])
    if "flood" in mode:
        for _ in range(8192):
            sys.stdout.write("x" * 1023 + "\n")
    report = os.environ.get("FAKE_REPORT")
    if report:
        seen = {
            "argv": [os.fsencode(word).hex() for word in sys.argv[1:]],
            "environ": {os.fsencode(k).hex(): os.fsencode(v).hex() for k, v in os.environ.items()},
            "cwd": os.getcwd(),
            "stdin": sys.stdin.read(),
            "executable": sys.executable,
        }
        with open(report + ".part", "w") as file:
            json.dump(seen, file)
        os.rename(report + ".part", report)
    if "silent" not in mode:
        ports = [sys.argv[at + 1] for at, word in enumerate(sys.argv[:-1]) if word == "--port"]
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", int(ports[-1]) if ports else 0))
        listener.listen(16)
        port = listener.getsockname()[1]
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        sys.stderr.write(
            "2026-01-01 00:00:00,000 Starting Bokeh server version 3.9.9 (running on Tornado 6.5)\n"
        )
        sys.stderr.write("2026-01-01 00:00:00,000 Bokeh app running at: http://evil.example:%d/fake\n" % port)
        sys.stderr.write("2026-01-01 00:00:00,000 Starting Bokeh server with process id: %d\n" % os.getpid())
        sys.stderr.flush()
    pause = threading.Event()
    while not pause.wait(0.02):
        if "exit" in mode and os.path.exists(os.environ["FAKE_GO"]):
            print("last words")
            sys.exit(3)


main()
