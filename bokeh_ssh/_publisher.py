"""What the Bokeh host runs when it dials the gateway itself: one ``RemoteForward``, told over its pipes.

Started by ``_reverse`` as ``python -m bokeh_ssh._publisher``. Standard input brings one line of JSON, and
its end is the order to stop: when the connection that started this is gone, so is the forward. Standard
output says, each line behind the mark of this start, the event ``port`` or ``error``.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, TextIO

from bokeh_ssh._errors import BokehSSHError
from bokeh_ssh._remote import RemoteForward
from bokeh_ssh._target import Host


def main(stdin: TextIO = sys.stdin, stdout: TextIO = sys.stdout) -> int:
    """Publish as the specification on standard input says, until that ends or the line goes down."""
    spec: dict[str, Any] = json.loads(stdin.readline())

    def tell(**message: object) -> None:
        try:
            stdout.write(f"{spec['mark']}{json.dumps(message)}\n")
            stdout.flush()
        except OSError:  # the one who asked is gone, which the end of standard input tells too
            pass

    with tempfile.TemporaryDirectory(prefix="bokeh-ssh-") as folder:
        # The gateway's key as the one who asked has verified it: no file here needs to have it.
        pinned = spec["known_hosts"]
        known_hosts = Path(folder, "known_hosts")
        known_hosts.write_text(pinned or "", encoding="utf-8")
        gateway = Host(
            spec["gateway"],
            spec["user"],
            port=spec["port"],
            known_hosts=os.fspath(known_hosts) if pinned else None,
            timeout=spec["timeout"],
        )
        forward = RemoteForward(gateway, **spec["forward"])
        orders = (stdin, forward)
        threading.Thread(target=_close_at_eof, args=orders, name="bokeh-ssh orders", daemon=True).start()
        try:
            with forward:
                tell(event="port", port=forward.remote_port)
                forward.wait()
        except BokehSSHError as exc:
            tell(event="error", message=exc.message, host=exc.host, hint=exc.hint)
            return 1
    return 0


def _close_at_eof(stdin: TextIO, forward: RemoteForward) -> None:
    while stdin.read(4096):
        pass
    forward.close()


if __name__ == "__main__":
    sys.exit(main())
