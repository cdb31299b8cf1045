"""The process that is watched: one local and one remote forward, and nothing else.

It reads where to log in, as JSON, tells both ports, answers each line ``keys`` with how often the keys of its
connections were changed, and ends with its standard input.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from bokeh_ssh import LocalForward, RemoteForward
from bokeh_ssh._ssh.packetizer import Packetizer
from bokeh_ssh._ssh.transport import Transport

_LOOPBACK = "127.0.0.1"


def main() -> None:
    """Do as standard input says."""
    order = json.loads(sys.stdin.readline())
    keys = 0
    original = Transport._parse_newkeys

    def count(self: Transport, message: Any) -> None:
        nonlocal keys
        keys += 1
        original(self, message)

    Transport._parse_newkeys = count  # type: ignore[method-assign]  # that keys change is what has to be proven
    if order["rekey"]:
        Packetizer.REKEY_BYTES = order["rekey"]
    host, user, port, login = order["host"], order["user"], order["target"], order["login"]
    with (
        LocalForward(host, user, remote_port=port, remote_host=_LOOPBACK, reconnect=False, **login) as local,
        RemoteForward(
            host, user, remote_port=0, local_port=port, local_host=_LOOPBACK, reconnect=False, **login
        ) as remote,
    ):
        print(json.dumps({"ports": [local.local_port, remote.remote_port]}), flush=True)
        for line in sys.stdin:
            if line.strip():
                states = [local.state, remote.state]
                print(json.dumps({"keys": keys, "states": states}), flush=True)


if __name__ == "__main__":
    main()
