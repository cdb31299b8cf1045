#!/usr/bin/env bash
# OpenSSH 9.2p1, client and server: a port forward whose IPv4 listener cannot be had is set up all the same, on ::1
# alone, and ExitOnForwardFailure=yes does not exit. The port on 127.0.0.1 is then somebody else's server, and whoever
# connects to 127.0.0.1, or to a "localhost" that is 127.0.0.1, gets that one, with no error on either side.
#
# A forward without an address to listen on, or with "localhost", stands for both loopback addresses; ssh (-L, -D) and
# sshd (-R) are content with one. For -L and -D ssh prints "bind [127.0.0.1]:PORT: Address already in use", and goes
# on with status 0; for -R the server answers SUCCESS and nobody says anything. With 127.0.0.1 spelt out all fail.
#
# ssh_config(5) on ExitOnForwardFailure: "whether ssh(1) should terminate the connection if it cannot set up all
# requested dynamic, tunnel, local, and remote port forwardings, (e.g. if either end is unable to bind and listen on a
# specified port)". So a script that relies on it to find a free port, or to notice a second instance of itself, takes
# the port of another program for its own: `ssh -o ExitOnForwardFailure=yes -NfL 5006:localhost:5006 host`.
# What helps: name 127.0.0.1 in the forward, or check on both addresses who answers.
#
# Seen, 127.0.0.1:PORT taken by another server (status of ssh; what 127.0.0.1 and ::1 lead to meanwhile):
#
#   -L PORT:...            0     127.0.0.1 the other one   ::1 the forward
#   -L localhost:PORT:...  0     127.0.0.1 the other one   ::1 the forward
#   -L 127.0.0.1:PORT:...  255
#   -R PORT:...            0     127.0.0.1 the other one   ::1 the forward      said by ssh: nothing
#   -R localhost:PORT:...  0     127.0.0.1 the other one   ::1 the forward      said by ssh: nothing
#   -R 127.0.0.1:PORT:...  255
#
# Needs a loopback with ::1, and sshd and ssh (Debian 12: openssh-server, openssh-client).
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
import threading

SSH = [
    "ssh", "-F", "none", "-i", "id", "-p", sys.argv[1], "-o", "StrictHostKeyChecking=accept-new", "-o",
    "UserKnownHostsFile=known", "-o", "ExitOnForwardFailure=yes", "-o", "ConnectionAttempts=5",
    f"{getpass.getuser()}@127.0.0.1",
]


def serve(word: bytes) -> int:
    """Start a server that says one word to each, and return its port."""
    server = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        while True:
            with server.accept()[0] as connection:
                connection.sendall(word)

    threading.Thread(target=run, daemon=True).start()
    return server.getsockname()[1]


def heard(host: str, port: int) -> str:
    try:
        with socket.create_connection((host, port), timeout=10) as sock:
            return sock.makefile().read()
    except OSError as exc:
        return type(exc).__name__


target = serve(b"the forward")
subprocess.run([*SSH, "true"], check=True, stderr=subprocess.DEVNULL, timeout=30)  # the host key is known now
bad = False
for flag in ("-L", "-R"):
    for listen in ("", "localhost:", "127.0.0.1:"):
        taken = serve(b"the other one")
        ssh = subprocess.Popen(
            [*SSH, flag, f"{listen}{taken}:127.0.0.1:{target}", "echo up; read end"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        up = ssh.stdout.readline() == "up\n"
        seen = [heard("127.0.0.1", taken), heard("::1", taken)] if up else []
        said = " ".join(ssh.communicate("end\n", timeout=30)[1].split())
        spec, words = f"{flag} {listen}PORT:...", said.replace(str(taken), "PORT") or "nothing"
        print(f"{spec:22} {ssh.returncode:<5} {'   '.join(seen)}   ssh: {words}")
        if listen == "127.0.0.1:":
            bad |= up or ssh.returncode != 255
        else:
            bad |= seen != ["the other one", "the forward"] or ssh.returncode != 0 or (flag == "-R" and said != "")
sys.exit("it has changed" if bad else 0)
PY
timeout 100 python3 try.py "$port"
