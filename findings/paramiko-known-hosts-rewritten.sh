#!/usr/bin/env bash
# paramiko 5.1.0: to accept one new host is to write ~/.ssh/known_hosts anew from what paramiko understood of it, and
# ssh then refuses hosts that it knew before. Some files that ssh reads every day it cannot load at all.
#
# load_host_keys(FILE) with AutoAddPolicy is what its documentation has for new hosts ("adding the hostname and new
# host key to the local HostKeys object, and saving it"). The file as saved has
#
#   - of several keys of one kind for a name (machines behind one name, a key that is being replaced) the first one,
#     three times: for the others ssh now says REMOTE HOST IDENTIFICATION HAS CHANGED;
#   - no keys of a kind that it does not know (sk-ssh-ed25519@openssh.com);
#   - no comments, neither lines nor those behind a key.
#
# With @cert-authority, @revoked or two spaces in a line (all in sshd(8), SSH_KNOWN_HOSTS FILE FORMAT, or read by ssh)
# load_host_keys() and load_system_host_keys() raise InvalidHostKey, "Incorrect padding", so no host is reached at all.
# HostKeys.save() promises: "The order of keys in the file will be preserved when possible. ... The single exception is
# that combined lines will be split into individual key lines".
# What helps: read known_hosts with load_system_host_keys(), and save new hosts to a file of one's own.
#
# Seen, is the host known to ssh-keygen -F with the very key, before and after paramiko met another host:
#
#   the first of two keys of a kind   before: yes   after: yes
#   the second of them                before: yes   after: no
#   a key of a kind it does not know  before: yes   after: no
#   comments                          before: 2     after: 0
#   the first of them is in the file 3 times
#   @cert-authority: InvalidHostKey   @revoked: InvalidHostKey   two spaces: InvalidHostKey
#
# Needs sshd and ssh-keygen (Debian 12: openssh-server, openssh-client).
set -euo pipefail
work=$(mktemp -d)
sshd=
trap '[ -z "$sshd" ] || kill "$sshd" 2> /dev/null || true; rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check paramiko==5.1.0
for name in host_key id one two; do ssh-keygen -q -t ed25519 -N '' -C '' -f $name; done
port=$(python3 -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')
printf '%s\n' "ListenAddress 127.0.0.1" "Port $port" "HostKey $work/host_key" "AuthorizedKeysFile $work/id.pub" \
    "PidFile none" "StrictModes no" "UsePAM no" > sshd_config
mkdir -p /run/sshd
/usr/sbin/sshd -D -e -f "$work/sshd_config" 2> sshd.log &
sshd=$!

cat > try.py <<'PY'
import base64
import getpass
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import paramiko

PORT = int(sys.argv[1])


def string(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


one, two = (" ".join(Path(f"{name}.pub").read_text().split()[:2]) for name in ("one", "two"))
kind = "sk-ssh-ed25519@openssh.com"  # what a key on a security token looks like
point = base64.b64decode(one.split()[1])[-32:]
token = f"{kind} {base64.b64encode(string(kind.encode()) + string(point) + string(b'ssh:')).decode()}"
known = Path("known_hosts")
known.write_text(
    f"# machines of the group\npool.example.net {one} first node\npool.example.net {two}\nbox.example.net {token}\n")


def knows(host: str, key: str) -> str:
    """Return whether OpenSSH finds this key for this host."""
    found = subprocess.run(["ssh-keygen", "-F", host, "-f", str(known)], capture_output=True, text=True)
    return "yes" if key in found.stdout else "no"


def look() -> list:
    text = known.read_text()
    return [
        knows("pool.example.net", one), knows("pool.example.net", two), knows("box.example.net", token),
        text.count("# machines") + text.count("first node"),
    ]


before = look()
end = time.monotonic() + 20
while time.monotonic() < end:
    with socket.socket() as sock:
        if sock.connect_ex(("127.0.0.1", PORT)) == 0:
            break
    time.sleep(0.05)
with paramiko.SSHClient() as client:
    client.load_host_keys(str(known))
    client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
    client.connect(
        "127.0.0.1", PORT, getpass.getuser(), key_filename="id", look_for_keys=False, allow_agent=False)
after = [*look(), known.read_text().count(one)]
names = ("the first of two keys of a kind", "the second of them", "a key of a kind it does not know", "comments")
for name, was, now in zip(names, before, after[:-1]):
    print(f"{name:33} before: {was!s:5} after: {now}")
print(f"the first of them is in the file {after[-1]} times")

said = {}
lines = {
    "@cert-authority": f"@cert-authority *.example.net {one}", "@revoked": f"@revoked * {two}",
    "two spaces": f"box.example.net  {one}",
}
for name, line in lines.items():
    known.write_text(f"{line}\n")
    for load in ("load_host_keys", "load_system_host_keys"):
        try:
            getattr(paramiko.SSHClient(), load)(str(known))
            said[name, load] = "loaded"
        except paramiko.hostkeys.InvalidHostKey:
            said[name, load] = "InvalidHostKey"
        print(f"{load} with {name}: {said[name, load]}")
same = before == ["yes", "yes", "yes", 2] and after == ["yes", "no", "no", 0, 3]
sys.exit(0 if same and set(said.values()) == {"InvalidHostKey"} else "it has changed")
PY
timeout 100 env/bin/python try.py "$port"
