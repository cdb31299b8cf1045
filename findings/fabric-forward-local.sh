#!/usr/bin/env bash
# fabric 3.2.3 (paramiko 5.1.0): one connection that the other side refuses ends Connection.forward_local() for good,
# and nobody hears of it before the block is left. The local port goes on to take connections, which nobody answers.
#
#   - The refusal (nothing listens there yet, the server restarts) ends the thread that accepts, and the kernel accepts
#     in its place. So the usual "ask until the server is up" inside the block asks for ever. The SSH connection itself
#     is well: is_connected, run() work. A ThreadException comes at the end of the block, also of one that went well.
#   - The local port is opened by that thread while the block already runs. Where another program has the port, the
#     block talks to that one (sends it a password, migrates its database); the error comes at the end again.
#   - A client that ends its request by a half-close (nc -N, a pipe) gets no answer: one end closes both directions.
#
# Its documentation: "This method is analogous to using the -L option of OpenSSH's ssh program". That one closes the
# connection that was refused and takes the next, ends where it cannot have the port (ExitOnForwardFailure), and passes
# a half-close on: the controls. (Issue 2342 of fabric is about a reset that is raised at the end of the block.)
# What helps: wait for the server by run() before the block, and have the first answer in it prove who answers.
#
# Seen: what a client gets that connects before the server listens, one that connects when it does, one that ends its
# request by a half-close, and one where the local port is another program's:
#
#   fabric   no answer in 3 s, no answer in 3 s, an exception after the block
#            closed
#            answered by another program, an exception after the block
#   ssh      closed, pong
#            pong
#            status 255
#
# Needs sshd and ssh (Debian 12: openssh-server, openssh-client).
set -euo pipefail
work=$(mktemp -d)
sshd=
trap '[ -z "$sshd" ] || kill "$sshd"; rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check fabric==3.2.3 paramiko==5.1.0
for name in host_key user; do ssh-keygen -q -t ed25519 -N '' -f $name; done
port=$(python3 -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')
printf '%s\n' "ListenAddress 127.0.0.1" "Port $port" "HostKey $work/host_key" "AuthorizedKeysFile $work/user.pub" \
    "PidFile none" "StrictModes no" "UsePAM no" > sshd_config
mkdir -p /run/sshd
/usr/sbin/sshd -D -e -f "$work/sshd_config" 2> sshd.log &
sshd=$!
for _ in $(seq 100); do ! grep -q listening sshd.log || break; sleep 0.1; done

cat > try.py <<'PY'
import contextlib
import getpass
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fabric
from invoke.exceptions import ThreadException

PORT, USER = int(sys.argv[1]), getpass.getuser()
seen: dict[str, list[list[str]]] = {}


def unused() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def serve(port: int, answer: bytes) -> None:
    """Answer each connection once its request is there: four bytes, or what has come before its end."""
    listener = socket.create_server(("127.0.0.1", port))

    def run() -> None:
        while True:
            sock, _ = listener.accept()
            request = sock.recv(4)
            if request == b"half":
                sock.recv(1)
            with contextlib.suppress(OSError):
                sock.sendall(answer)
            sock.close()

    threading.Thread(target=run, daemon=True).start()


def ask(port: int, request: bytes) -> str:
    with socket.create_connection(("127.0.0.1", port), 3) as sock:
        sock.sendall(request)
        if request == b"half":
            sock.shutdown(socket.SHUT_WR)
        try:
            return sock.recv(100).decode() or "closed"
        except TimeoutError:
            return "no answer in 3 s"
        except ConnectionResetError:
            return "closed"


def until_open(port: int) -> None:
    """Wait for the listener, by the kernel's table: a connection would be a request."""
    end = time.monotonic() + 30
    while f":{port:04X} 00000000:0000 0A" not in Path("/proc/net/tcp").read_text():
        assert time.monotonic() < end, "no listener"
        time.sleep(0.05)


@contextlib.contextmanager
def by_fabric(local: int, target: int) -> Iterator[None]:
    login = {"key_filename": "user", "allow_agent": False, "look_for_keys": False}
    connection = fabric.Connection("127.0.0.1", USER, PORT, connect_kwargs=login)
    with connection, connection.forward_local(local, target):
        yield
        assert connection.is_connected and connection.run("echo in", hide=True).stdout == "in\n"


def ssh(local: int, target: int) -> subprocess.Popen:
    options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "ExitOnForwardFailure=yes", "LogLevel=QUIET"]
    forward = f"127.0.0.1:{local}:127.0.0.1:{target}"
    words = ["ssh", "-F", "none", "-p", str(PORT), "-i", "user", *(f"-o{option}" for option in options), "-N"]
    return subprocess.Popen([*words, "-L", forward, f"{USER}@127.0.0.1"])


@contextlib.contextmanager
def by_ssh(local: int, target: int) -> Iterator[None]:
    process = ssh(local, target)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


late = "an exception after the block"
for way in by_fabric, by_ssh:
    rows = seen[way.__name__.removeprefix("by_")] = [[], [], []]
    local, target = unused(), unused()
    try:
        with way(local, target):
            until_open(local)
            rows[0].append(ask(local, b"ping"))
            serve(target, b"pong")
            rows[0].append(ask(local, b"ping"))
    except ThreadException as exc:
        assert "ChannelException(2, 'Connect failed')" in str(exc)
        rows[0].append(late)
    local = unused()
    with way(local, target):
        until_open(local)
        rows[1].append(ask(local, b"half"))
local = unused()
serve(local, b"answered by another program")
try:
    with by_fabric(local, target):
        seen["fabric"][2].append(ask(local, b"ping"))
except ThreadException as exc:
    assert "Address already in use" in str(exc)
    seen["fabric"][2].append(late)
seen["ssh"][2].append(f"status {ssh(local, target).wait(30)}")
for name, rows in seen.items():
    for row in rows:
        print(f"{name:8} {', '.join(row)}")
expected = {
    "fabric": [["no answer in 3 s"] * 2 + [late], ["closed"], ["answered by another program", late]],
    "ssh": [["closed", "pong"], ["pong"], ["status 255"]],
}
sys.exit(0 if seen == expected else "it has changed")
PY
timeout 150 env/bin/python -W ignore try.py "$port" 2> errors || { cat errors && exit 1; }
