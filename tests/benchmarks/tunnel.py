"""A tunnel to a Bokeh server, in a process of its own: reads an order, says the address, waits to be ended.

Files of BokehJS are kept where the order says, so that a version can be one that was seen before, or not.
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
        with bokeh_ssh.DirectTunnel(host, user, python=sys.executable, **login, **words) as tunnel:
            print(json.dumps({"url": tunnel.url.replace("localhost", "127.0.0.1")}), flush=True)
            sys.stdin.read()
    except bokeh_ssh.BokehSSHError as exc:
        print(json.dumps({"failed": str(exc)[:200]}), flush=True)


if __name__ == "__main__":
    main()
