"""Run ``bokeh-ssh demo`` as it is installed beside this Python, open its page, and end it as a person does.

    python tests/support/try_demo.py

Needs nothing but what ``pip install 'bokeh-ssh[demo]'`` brings; ``nox -s release`` runs it on the wheel.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import threading
import urllib.request
from pathlib import Path

#: Seconds for all of it.
_PATIENCE = 120.0


def main() -> None:
    """Exit with 1, and what the demo said, if anything is not as it should be."""
    command = Path(sys.executable).with_name("bokeh-ssh")
    with tempfile.TemporaryFile("w+") as told:
        demo = subprocess.Popen(
            [str(command), "demo", "--no-show", "--local-port", "0"],
            stdout=subprocess.PIPE,
            stderr=told,
            text=True,
        )
        late = threading.Timer(_PATIENCE, demo.kill)
        late.start()
        try:
            assert demo.stdout
            url = next((line.strip() for line in demo.stdout if line.startswith("http")), "")
            status = 0
            if url:
                with urllib.request.urlopen(url, timeout=30) as page:
                    status = page.status
            demo.send_signal(signal.SIGINT)
            code = demo.wait()
        finally:
            late.cancel()
            demo.kill()
        if (status, code) != (200, 0):
            told.seek(0)
            sys.exit(f"the page: {status}, the end: {code}\n{told.read()}")


if __name__ == "__main__":
    main()
