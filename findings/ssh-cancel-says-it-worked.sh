#!/usr/bin/env bash
# OpenSSH 9.2p1: `ssh -O cancel` through a ControlMaster ends with status 0 whether or not it cancelled anything, and
# it cancels only a forward whose target is the very one that was asked for, too. `ssh -O forward` fails with 255.
#
#   - A forward with another target, or one that was never there: "master cancel forward request failed" is printed,
#     the status is 0, the listener stays. A script that asks for the status goes on to reuse a port that still leads
#     to the old place: `ssh -O cancel -L 5006:localhost:5006 host && ssh -O forward -L 5006:localhost:5007 host`.
#   - A -L that is given with a command through the master outlives the command: its listener stays for as long as
#     the master does, and needs such a cancel.
#   - Two `-O forward -R 0:host:port` for the same target are one: the second prints the first one's port, and one
#     cancel ends both. Each of two programs that share the master takes the port for its own.
#
# ssh(1) on -O: "cancel" (cancel forwardings), "forward" (request forwardings without command execution); EXIT STATUS:
# "ssh exits with the exit status of the remote command or with 255 if an error occurred". Nothing says that the
# target counts, or that cancel is an exception.
#
# Seen:
#
#   forward, new                      status 0     listens: True   said: nothing
#   forward, the port is taken        status 255   (by another)    said: request failed
#   cancel, another target            status 0     listens: True   said: request failed
#   cancel, a port that has none      status 0     listens: False  said: request failed
#   cancel, as it was asked for       status 0     listens: False  said: nothing
#   a command with -L, when it ended  status 0     listens: True   said: nothing
#   -R 0 twice: one port: True, listens: True; one cancel, listens: False
#
# Needs sshd and ssh (Debian 12: openssh-server, openssh-client).
set -euo pipefail
work=$(mktemp -d)
sshd=
trap '[ -z "$sshd" ] || kill "$sshd" 2> /dev/null || true; rm -rf "$work"' EXIT
cd "$work"
ssh -V
ssh-keygen -q -t ed25519 -N '' -f host_key
ssh-keygen -q -t ed25519 -N '' -f id
port=$(python3 -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')
printf '%s\n' "ListenAddress 127.0.0.1" "Port $port" "HostKey $work/host_key" "AuthorizedKeysFile $work/id.pub" \
    "PidFile none" "StrictModes no" "UsePAM no" > sshd_config
mkdir -p /run/sshd
/usr/sbin/sshd -D -e -f sshd_config 2> sshd.log &
sshd=$!

cat > try.py <<'PY'
import getpass
import socket
import subprocess
import sys

SSH = [
    "ssh", "-F", "none", "-i", "id", "-p", sys.argv[1], "-o", "StrictHostKeyChecking=no", "-o", "ControlPath=ctl",
    "-o", "UserKnownHostsFile=known", "-o", "ConnectionAttempts=5", f"{getpass.getuser()}@127.0.0.1",
]
seen = []


def ssh(*words: str) -> tuple[int, str, str]:
    """Return the status, output, and whether it says that it failed."""
    done = subprocess.run([*SSH, *words], capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL)
    return done.returncode, done.stdout.strip(), "request failed" if "request failed" in done.stderr else "nothing"


def listens(port: int | str) -> bool:
    with socket.socket() as sock:
        sock.settimeout(10)
        return sock.connect_ex(("127.0.0.1", int(port))) == 0


def show(name: str, port: int, words: tuple[str, ...]) -> None:
    status, _, said = ssh(*words)
    seen.append((status, listens(port), said))
    print(f"{name:33} status {status:<5} listens: {seen[-1][1]!s:5}  said: {said}")


taken = socket.create_server(("127.0.0.1", 0))
free, none = (socket.create_server(("127.0.0.1", 0)).getsockname()[1] for _ in range(2))
busy = taken.getsockname()[1]
# Its errors go nowhere, so that nothing of ours is held open by the one that stays.
subprocess.run([*SSH, "-M", "-f", "-N"], check=True, stderr=subprocess.DEVNULL, timeout=60)
try:
    forward, other = f"127.0.0.1:{free}:127.0.0.1:22", f"127.0.0.1:{free}:127.0.0.1:23"
    show("forward, new", free, ("-O", "forward", "-L", forward))
    show("forward, the port is taken", busy, ("-O", "forward", "-L", f"127.0.0.1:{busy}:127.0.0.1:22"))
    show("cancel, another target", free, ("-O", "cancel", "-L", other))
    show("cancel, a port that has none", none, ("-O", "cancel", "-L", f"127.0.0.1:{none}:127.0.0.1:22"))
    show("cancel, as it was asked for", free, ("-O", "cancel", "-L", forward))
    show("a command with -L, when it ended", free, ("-L", forward, "true"))
    asked = ("-R", "127.0.0.1:0:127.0.0.1:22")
    ports = [ssh("-O", "forward", *asked)[1] for _ in range(2)]
    before = listens(ports[0])
    ssh("-O", "cancel", *asked)
    seen.append((ports[0] == ports[1], before, listens(ports[0])))
    print(f"-R 0 twice: one port: {seen[-1][0]}, listens: {before}; one cancel, listens: {seen[-1][2]}")
finally:
    ssh("-O", "exit")
expected = [
    (0, True, "nothing"), (255, True, "request failed"), (0, True, "request failed"), (0, False, "request failed"),
    (0, False, "nothing"), (0, True, "nothing"), (True, True, False),
]
sys.exit(0 if seen == expected else f"it has changed: {seen}")
PY
timeout 100 python3 try.py "$port"
