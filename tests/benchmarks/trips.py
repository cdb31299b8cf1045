"""How long it takes to open a tunnel or a forward, or to have one back after a loss; in a process of its own.

It reads an order, does what that says as often as it says, and tells the seconds of each.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

_LOGIN: dict[str, Any] = {"ssh_config": None, "allow_agent": False, "look_for_keys": False}


def _make(words: dict[str, Any], login: dict[str, Any], **more: Any) -> Any:
    import bokeh_ssh

    where = words["host"], words["user"]
    if words["jump"]:
        login = {**login, "jump": bokeh_ssh.Host(*where, **login), "port": words["inner"]}
    if words["kind"] in ("forward", "jump"):
        return bokeh_ssh.LocalForward(*where, remote_port=words["target"], **login)
    server: dict[str, Any] = {"remote_port": words["target"], "launch": False}
    if words["kind"] in ("launch", "upload"):
        server = {"app": words["app"], "python": sys.executable, "upload": words["kind"] == "upload"}
    return bokeh_ssh.DirectTunnel(*where, local_port=0, isolate=False, **server, **login, **more)


def _open(words: dict[str, Any], login: dict[str, Any]) -> float:
    """Open it, and for a page ask for that; return the seconds."""
    import apps

    began = time.monotonic()
    with _make(words, login) as opened:
        if words["kind"] == "page":
            apps.get(opened.url)
        return time.monotonic() - began


def _have_back(words: dict[str, Any], login: dict[str, Any]) -> float:
    """Break its connection; return the seconds from the first new one until a page's WebSocket answers."""
    import apps
    from bokeh_ssh import Connecting
    from cable import Cable

    dialled: list[float] = []

    def note(event: object) -> None:
        if isinstance(event, Connecting):
            dialled.append(time.monotonic())

    with ExitStack() as stack:
        cable = stack.enter_context(Cable(words["host"], login["port"]))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        known = Path(login["known_hosts"]).read_text(encoding="ascii")
        path = folder / "known_hosts"
        path.write_text(known.replace(str(login["port"]), str(cable.port)), encoding="ascii")
        through = {**login, "port": cable.port, "known_hosts": str(path)}
        tunnel = stack.enter_context(_make(words, through, on_event=note))
        page = apps.get(tunnel.url)
        cable.pull()
        while len(dialled) < 2:
            time.sleep(0.001)
        answered: list[float] = []
        apps.exchange(tunnel.url, page, lambda: answered.append(time.monotonic()))
        return answered[0] - dialled[1]


def main() -> None:
    """Do as standard input says."""
    words: dict[str, Any] = json.loads(sys.stdin.readline())
    os.environ["XDG_CACHE_HOME"] = words["cache"]
    from bokeh_ssh import BokehSSHError

    do = _have_back if words["kind"] == "back" else _open
    try:
        times = [do(words, {**_LOGIN, **words["login"]}) for _ in range(words["count"])]
        print(json.dumps({"times": times}), flush=True)
    except BokehSSHError as exc:
        print(json.dumps({"failed": str(exc)[:200]}), flush=True)


if __name__ == "__main__":
    main()
