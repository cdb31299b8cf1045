#!/usr/bin/env bash
# asyncssh 2.24.1: SFTP put() of a file that ends in a hole saves a file that is shorter, without an error: all from the
# last hole on is missing. A file that is one hole, such as what truncate or fallocate has made, comes out empty.
#
# Disk images, core dumps, and files whose size is set before they are filled (a download with space reserved, a file
# that several processes map) end that way. The copy cannot be opened, or ends early; nothing says so where it was made.
# Since put() overwrites, a good copy from before is gone too.
#
# put(), get() and copy() ask the source for its ranges of data (SEEK_DATA, SEEK_HOLE; over SFTP asyncssh's own
# extension) and write these at their offsets. Nothing sets the size at the end, and the check that all bytes have come
# is left out for a sparse copy. From OpenSSH's server, which has no such extension, get() is right; from asyncssh's own
# server it is short as well. The documentation: "sparse: Whether or not to do a sparse file copy where it is
# supported", True where it is not given. OpenSSH's sftp and paramiko's put() are the controls.
# What helps: sparse=False.
#
# Seen, the size of each copy of data.bin (1 MiB of data, 3 MiB of hole) and of empty.img (a hole of 4 MiB):
#
#   asyncssh  put(), to sshd                 1048576  0
#   asyncssh  put(sparse=False), to sshd     4194304  4194304
#   asyncssh  get(), from sshd               4194304  4194304
#   asyncssh  get(), from asyncssh's server  1048576  0
#   paramiko  put(), to sshd                 4194304  4194304
#   OpenSSH   put, to sshd                   4194304  4194304
#
# Needs sshd and sftp (Debian 12: openssh-server, openssh-client), and a file system with holes for temporary files.
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
import os
import subprocess
import sys
from pathlib import Path

import asyncssh
import paramiko

PORT, USER, HERE = int(sys.argv[1]), getpass.getuser(), Path.cwd()
NAMES, DATA, SIZE = ("data.bin", "empty.img"), os.urandom(1 << 20), 4 << 20
for name in NAMES:
    with open(name, "wb") as file:
        file.write(DATA if name == "data.bin" else b"")
        file.truncate(SIZE)


class Server(asyncssh.SSHServer):
    def begin_auth(self, username: str) -> bool:
        return False


def copies() -> list[str]:
    """Return the size of each copy, and remove it; what is there is right, and the rest are zeros."""
    sizes = []
    for name in NAMES:
        path, whole = HERE / f"copy-of-{name}", Path(name).read_bytes()
        data = path.read_bytes()
        assert whole.startswith(data)
        sizes.append(str(len(data)))
        path.unlink()
    return sizes


async def by_asyncssh() -> dict[str, list[str]]:
    login = {"username": USER, "client_keys": ["user"], "known_hosts": None, "config": None}
    seen = {}
    async with asyncssh.connect("127.0.0.1", PORT, **login) as connection, connection.start_sftp_client() as sftp:
        for options in ({}, {"sparse": False}):
            for name in NAMES:
                await sftp.put(name, HERE / f"copy-of-{name}", **options)
            seen["asyncssh  put(sparse=False), to sshd" if options else "asyncssh  put(), to sshd"] = copies()
        for name in NAMES:
            await sftp.get(HERE / name, f"copy-of-{name}")
        seen["asyncssh  get(), from sshd"] = copies()
    async with asyncssh.listen("127.0.0.1", 0, server_factory=Server, server_host_keys=["host_key"],
                               sftp_factory=True) as listener:
        async with asyncssh.connect("127.0.0.1", listener.get_port(), **login) as connection:
            async with connection.start_sftp_client() as sftp:
                for name in NAMES:
                    await sftp.get(HERE / name, f"copy-of-{name}")
        seen["asyncssh  get(), from asyncssh's server"] = copies()
    return seen


def by_paramiko() -> dict[str, list[str]]:
    with paramiko.SSHClient() as client:
        client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
        client.connect("127.0.0.1", PORT, USER, key_filename="user", allow_agent=False, look_for_keys=False)
        sftp = client.open_sftp()
        for name in NAMES:
            sftp.put(name, str(HERE / f"copy-of-{name}"))
    return {"paramiko  put(), to sshd": copies()}


def by_openssh() -> dict[str, list[str]]:
    options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR"]
    words = ["sftp", "-q", "-b", "-", "-F", "none", "-i", "user", "-P", str(PORT)]
    words += [f"-o{option}" for option in options]
    lines = "".join(f"put {name} {HERE}/copy-of-{name}\n" for name in NAMES)
    subprocess.run([*words, f"{USER}@127.0.0.1"], input=lines, text=True, check=True, timeout=30,
                   stdout=subprocess.DEVNULL)
    return {"OpenSSH   put, to sshd": copies()}


seen = {**asyncio.run(by_asyncssh()), **by_paramiko(), **by_openssh()}
for name, sizes in seen.items():
    print(f"{name:39}  {'  '.join(sizes)}")
short, whole = ["1048576", "0"], ["4194304", "4194304"]
sys.exit(0 if list(seen.values()) == [short, whole, whole, short, whole, whole] else "it has changed")
PY
timeout 100 env/bin/python -W ignore seen.py "$port"
