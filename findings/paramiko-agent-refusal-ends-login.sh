#!/usr/bin/env bash
# paramiko 5.1.0: a key in the agent that the agent will not sign with ends the whole connection. The agent's other
# keys, key files and the password are never tried, and what connect() raises is "No existing session".
#
# An agent refuses for ordinary reasons: a key added with ssh-add -c whose question is answered No or finds no screen
# to be asked on, a security token that nobody touches or that is unplugged, a key that is bound to other hosts
# (ssh-add -h). The login fails only where the server would take that key, and it comes first, so it works with one
# account and not with another. fabric, sshtunnel and ansible's paramiko connections are built on this connect().
#
# The refusal is raised in the transport's thread ("key cannot be used for signing", issue 1574 of paramiko, in the log
# alone), which ends with it; each further attempt then finds no session. The documentation of connect() on the order:
# "The pkey or key_filename passed in; Any key we can find through an SSH agent; Any id_* keys ...; Plain
# username/password auth". ssh and asyncssh 2.24.1 say so or say nothing, and go on with the next key: the controls.
# What helps: allow_agent=False and key_filename, or the other key first in the agent.
#
# Seen, an agent with two keys that the server takes, of which it does not sign with the first:
#
#   ssh                                     in (signing failed ... agent refused operation)
#   asyncssh                                in
#   paramiko                                SSHException: No existing session
#   paramiko, the other key first           in
#   paramiko, allow_agent=False, a file     in
#
# Needs sshd, ssh and ssh-agent (Debian 12: openssh-server, openssh-client).
set -euo pipefail
work=$(mktemp -d)
pids=()
trap 'for pid in "${pids[@]}"; do kill "$pid" 2> /dev/null || true; done; rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check paramiko==5.1.0 asyncssh==2.24.1
for name in host_key asks plain; do ssh-keygen -q -t ed25519 -N '' -f $name; done
cat asks.pub plain.pub > keys
port=$(python3 -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')
printf '%s\n' "ListenAddress 127.0.0.1" "Port $port" "HostKey $work/host_key" "AuthorizedKeysFile $work/keys" \
    "PidFile none" "StrictModes no" "UsePAM no" > sshd_config
mkdir -p /run/sshd
/usr/sbin/sshd -D -e -f "$work/sshd_config" 2> sshd.log &
pids+=($!)
echo "[127.0.0.1]:$port $(cut -d ' ' -f 1,2 host_key.pub)" > known
# The agent asks nobody: a "no" to each question.
DISPLAY='' WAYLAND_DISPLAY='' SSH_ASKPASS=/bin/false ssh-agent -D -a agent > /dev/null 2>&1 &
pids+=($!)
export SSH_AUTH_SOCK="$work/agent"
for _ in $(seq 100); do [ -S agent ] && break; sleep 0.1; done

cat > try.py <<'PY'
import asyncio
import getpass
import logging
import subprocess
import sys

import asyncssh
import paramiko

logging.disable(logging.CRITICAL)
PORT, USER = int(sys.argv[1]), getpass.getuser()


def fill(*words: str) -> None:
    subprocess.run(["ssh-add", "-q", "-D"], check=True, stderr=subprocess.DEVNULL)
    for word in words:
        subprocess.run(["ssh-add", "-q", *(["-c"] if word == "asks" else []), word], check=True)


def by_ssh() -> str:
    done = subprocess.run(
        ["ssh", "-F", "none", "-p", str(PORT), "-o", "BatchMode=yes", "-o", "UserKnownHostsFile=known", "-o",
         "IdentityFile=none", "-o", "ConnectionAttempts=5", f"{USER}@127.0.0.1", "echo in"],
        capture_output=True, text=True, timeout=30)
    refused = "agent refused operation" in done.stderr
    return done.stdout.strip() + (", the agent refused" if refused else "")


async def by_asyncssh() -> str:
    async with asyncssh.connect("127.0.0.1", PORT, username=USER, known_hosts="known", config=None) as connection:
        return (await connection.run("echo in")).stdout.strip()


def by_paramiko(**login) -> str:
    with paramiko.SSHClient() as client:
        client.load_host_keys("known")
        try:
            client.connect("127.0.0.1", PORT, USER, look_for_keys=False, timeout=30, **login)
        except paramiko.SSHException as exc:
            return f"{type(exc).__name__}: {exc}"
        return client.exec_command("echo in")[1].read().decode().strip()


seen = {}
fill("asks", "plain")
seen["ssh"] = by_ssh()
seen["asyncssh"] = asyncio.run(by_asyncssh())
seen["paramiko"] = by_paramiko(password="never asked for")
seen["paramiko, allow_agent=False, a file"] = by_paramiko(allow_agent=False, key_filename="plain")
fill("plain", "asks")
seen["paramiko, the other key first"] = by_paramiko()
for name, outcome in seen.items():
    print(f"{name:38}  {outcome}")
expected = ["in, the agent refused", "in", "SSHException: No existing session", "in", "in"]
sys.exit(0 if list(seen.values()) == expected else "it has changed")
PY
timeout 100 env/bin/python try.py "$port"
