"""What the other user of a machine tries."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from docker_bed import Container

#: What an attacker runs: asks every TCP listener and every socket file of the machine for the app's page.
_ATTACK = """
import glob, http.client, os, socket, sys
path = sys.argv[1]
found = set()
for name in ("/proc/net/tcp", "/proc/net/tcp6"):
    for row in open(name).read().splitlines()[1:]:
        fields = row.split()
        if fields[3] == "0A":
            found.add(int(fields[1].rpartition(":")[2], 16))
targets = [("port", port) for port in sorted(found) if port != 22]
for row in open("/proc/net/unix").read().splitlines()[1:]:
    fields = row.split()
    if len(fields) > 7 and fields[7].startswith("/"):
        targets.append(("socket", fields[7]))
for folder, _, files in os.walk("/tmp"):
    targets += [("socket", os.path.join(folder, name)) for name in files]
for kind, where in targets:
    try:
        client = http.client.HTTPConnection("localhost", where if kind == "port" else 80, timeout=3)
        if kind == "socket":
            client.sock = socket.socket(socket.AF_UNIX)
            client.sock.settimeout(3)
            client.sock.connect(where)
        client.request("GET", path)
        answer = client.getresponse()
        text = answer.read().decode(errors="replace")
        if "bokeh" in text.lower() and answer.status == 200:
            print("GOT IN", kind, where)
    except (OSError, http.client.HTTPException, ValueError):
        pass
print("tried", len(targets))
"""


def attack(machine: Container, route: str) -> list[str]:
    """Have the machine's other user try everything that listens there; gives what let it in."""
    done = machine.execute([machine.python, "-c", _ATTACK, route], user="mallory", timeout=60)
    assert re.search(r"tried [1-9]", done.stdout), done.stderr  # the proof that there was something to try
    return [line for line in done.stdout.splitlines() if line.startswith("GOT IN")]
