#!/usr/bin/env bash
# paramiko 5.1.0: an SFTP file with set_pipelined(True), the usual advice for slow uploads, reports no error of its last
# writes: close() returns, the disk was full, and the end of the file is not there.
#
# The documentation of set_pipelined() says who tells: "At the first non-write operation (including .close), all
# remaining server responses are collected. This means that if there was an error with one of your later writes, an
# exception might be thrown from within .close instead of .write." It is not: the answers to the writes are noted as
# belonging to no file, so close() waits for none of them, and each answer is passed over when it is read. Only with
# more than 100 writes under way are answers looked at, so a large file may raise, and a log, a result or a chunk of
# some MB (32 KB each) does not. put(confirm=False) and putfo(confirm=False) write in that way, and tell no more.
#
# Without set_pipelined() write() raises, and put() notices by the size, for which it asks afterwards: the controls.
# What helps: file.stat().st_size before close(), compared with what has been written.
#
# Seen, 1 MB to a full device (/dev/full), the server OpenSSH's internal-sftp, which answers "Failure":
#
#   open(), write(), close()                       OSError: Failure
#   open(), set_pipelined(True), write(), close()  no exception
#   put(confirm=False)                             no exception
#   put()                                          OSError: size mismatch in put!  0 != 1000000
#
# Needs sshd (Debian 12: openssh-server).
set -euo pipefail
work=$(mktemp -d)
sshd=
trap '[ -z "$sshd" ] || kill "$sshd"; rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check paramiko==5.1.0
for name in host_key user; do ssh-keygen -q -t ed25519 -N '' -f $name; done
port=$(python3 -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')
printf '%s\n' "ListenAddress 127.0.0.1" "Port $port" "HostKey $work/host_key" "AuthorizedKeysFile $work/user.pub" \
    "PidFile none" "StrictModes no" "UsePAM no" "Subsystem sftp internal-sftp" > sshd_config
mkdir -p /run/sshd
/usr/sbin/sshd -D -e -f "$work/sshd_config" 2> sshd.log &
sshd=$!
for _ in $(seq 100); do ! grep -q listening sshd.log || break; sleep 0.1; done

cat > seen.py <<'PY'
import getpass
import sys
from collections.abc import Callable
from pathlib import Path

import paramiko

PORT, FULL, DATA = int(sys.argv[1]), "/dev/full", b"x" * 1_000_000
Path("data").write_bytes(DATA)


def written(sftp: paramiko.SFTPClient, pipelined: bool) -> None:
    file = sftp.open(FULL, "r+")
    file.set_pipelined(pipelined)
    file.write(DATA)
    file.close()


def outcome(call: Callable[[], object]) -> str:
    try:
        call()
    except OSError as exc:
        return f"OSError: {exc}"
    return "no exception"


with paramiko.SSHClient() as client:
    client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
    client.connect("127.0.0.1", PORT, getpass.getuser(), key_filename="user", allow_agent=False, look_for_keys=False)
    sftp = client.open_sftp()
    sftp.get_channel().settimeout(30)
    seen = {
        "open(), write(), close()": outcome(lambda: written(sftp, False)),
        "open(), set_pipelined(True), write(), close()": outcome(lambda: written(sftp, True)),
        "put(confirm=False)": outcome(lambda: sftp.put("data", FULL, confirm=False)),
        "put()": outcome(lambda: sftp.put("data", FULL)),
    }
for name, said in seen.items():
    print(f"{name:45}  {said}")
expected = ["OSError: Failure", "no exception", "no exception", "OSError: size mismatch in put!  0 != 1000000"]
sys.exit(0 if list(seen.values()) == expected else "it has changed")
PY
timeout 100 env/bin/python -W ignore seen.py "$port"
