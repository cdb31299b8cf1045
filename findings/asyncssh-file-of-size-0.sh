#!/usr/bin/env bash
# asyncssh 2.24.1: a file whose size the server does not know is empty for asyncssh, without an error. SFTP's
# file.read(), get() and scp() all read as much as stat says, and stat says 0 for each file in /proc (and for what a
# server or a FUSE file system makes up when it is read). A program that collects /proc/meminfo or /proc/loadavg from
# its machines gets "" from all of them; a directory that is copied from there is a directory of empty files.
#
# The documentation of read(): "If size is negative, all data up to the end of the file is returned." With a size it
# does read. OpenSSH's sftp and paramiko go on until the server says that the file has ended: the controls. (Issue 814
# of asyncssh is about servers that answer with less than was asked for.)
# What helps: read(SIZE) with one that is large enough, or run("cat FILE").
#
# Seen, /proc/version, with OpenSSH's internal-sftp as the server:
#
#   asyncssh  file.read()         0 bytes
#   asyncssh  file.read(1000000)  all
#   asyncssh  sftp.get()          0 bytes
#   asyncssh  scp()               0 bytes
#   paramiko  file.read()         all
#   paramiko  sftp.get()          all
#   OpenSSH   sftp                all
#
# Needs sshd and sftp (Debian 12: openssh-server, openssh-client).
set -euo pipefail
work=$(mktemp -d)
sshd=
trap '[ -z "$sshd" ] || kill "$sshd"; rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check asyncssh==2.24.1 paramiko==5.1.0
for name in host_key user; do ssh-keygen -q -t ed25519 -N '' -f $name; done
port=$(python3 -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')
printf '%s\n' "ListenAddress 127.0.0.1" "Port $port" "HostKey $work/host_key" "AuthorizedKeysFile $work/user.pub" \
    "PidFile none" "StrictModes no" "UsePAM no" "Subsystem sftp internal-sftp" > sshd_config
mkdir -p /run/sshd
/usr/sbin/sshd -D -e -f "$work/sshd_config" 2> sshd.log &
sshd=$!
for _ in $(seq 100); do ! grep -q listening sshd.log || break; sleep 0.1; done

cat > seen.py <<'PY'
import asyncio
import getpass
import subprocess
import sys
from pathlib import Path

import asyncssh
import paramiko

PORT, USER, FILE = int(sys.argv[1]), getpass.getuser(), "/proc/version"


def look(data: bytes | str | None = None) -> str:
    """Return whether data, or the file that was saved, is all of it."""
    data = Path("saved").read_bytes() if data is None else data
    data = data.encode() if isinstance(data, str) else data
    Path("saved").unlink(missing_ok=True)
    return "all" if data == Path(FILE).read_bytes() else f"{len(data)} bytes"


async def by_asyncssh() -> dict[str, str]:
    login = {"username": USER, "client_keys": ["user"], "known_hosts": None, "config": None}
    async with asyncssh.connect("127.0.0.1", PORT, **login) as connection, connection.start_sftp_client() as sftp:
        seen = {}
        async with sftp.open(FILE) as file:
            seen["asyncssh  file.read()"] = look(await file.read())
            seen["asyncssh  file.read(1000000)"] = look(await file.read(1_000_000))
        await sftp.get(FILE, "saved")
        seen["asyncssh  sftp.get()"] = look()
        await asyncssh.scp((connection, FILE), "saved")
        seen["asyncssh  scp()"] = look()
        return seen


def by_paramiko() -> dict[str, str]:
    with paramiko.SSHClient() as client:
        client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
        client.connect("127.0.0.1", PORT, USER, key_filename="user", allow_agent=False, look_for_keys=False)
        sftp = client.open_sftp()
        with sftp.open(FILE) as file:
            seen = {"paramiko  file.read()": look(file.read())}
        sftp.get(FILE, "saved")
        return {**seen, "paramiko  sftp.get()": look()}


def by_openssh() -> dict[str, str]:
    options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR"]
    words = ["sftp", "-q", "-F", "none", "-i", "user", "-P", str(PORT), *(f"-o{option}" for option in options)]
    subprocess.run([*words, f"{USER}@127.0.0.1:{FILE}", "saved"], check=True, timeout=30, stdout=subprocess.DEVNULL)
    return {"OpenSSH   sftp": look()}


seen = {**asyncio.run(by_asyncssh()), **by_paramiko(), **by_openssh()}
for name, outcome in seen.items():
    print(f"{name:28}  {outcome}")
expected = ["0 bytes", "all", "0 bytes", "0 bytes", "all", "all", "all"]
sys.exit(0 if list(seen.values()) == expected else "it has changed")
PY
timeout 100 env/bin/python -W ignore seen.py "$port"
