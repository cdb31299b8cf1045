"""A tunnel to a Bokeh server, or a forward to a web server, in a process of its own.

It reads an order, says the address, and waits to be ended. Static files are kept where the
order says, so that a version can be one that was seen before, or not.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main() -> None:
    """Do as standard input says."""
    words: dict[str, Any] = json.loads(sys.stdin.readline())
    os.environ["XDG_CACHE_HOME"] = words.pop("cache")
    import bokeh_ssh

    host, user = words.pop("host"), words.pop("user")
    login = {"ssh_config": None, "allow_agent": False, "look_for_keys": False}
    try:
        if words.pop("http", False):
            with bokeh_ssh.LocalForward(host, user, http=True, **login, **words) as forward:
                print(json.dumps({"url": f"http://127.0.0.1:{forward.local_port}"}), flush=True)
                sys.stdin.read()
            return
        with bokeh_ssh.DirectTunnel(host, user, python=sys.executable, **login, **words) as tunnel:
            print(json.dumps({"url": tunnel.url.replace("localhost", "127.0.0.1")}), flush=True)
            sys.stdin.read()
    except bokeh_ssh.BokehSSHError as exc:
        print(json.dumps({"failed": str(exc)[:200]}), flush=True)


if __name__ == "__main__":
    main()
