#!/usr/bin/env bash
# plumbum 2.0.2 with OpenSSH 9.2p1: SshMachine.upload("in.txt", "my results.txt") makes a file there whose name has the
# quotes in it, 'my results.txt' with both of them, and says nothing. An absolute path with a space, a bracket or a $
# can neither be written nor fetched ("No such file or directory"), although machine.path(...).exists() is True.
#
# upload() and download() quote the path on the other machine for its shell, which the scp of old needed: it ran a
# command there. From 9.0 on scp speaks SFTP, where no shell reads the path, so the quotes are part of the name. A name
# without such characters is not quoted, so it works in each try-out.
#
# The documentation of upload(): "Uploads a local file/directory (src) to a remote destination (dst). src must be a
# string or a LocalPath, and dst must be a string or a RemotePath". (datalad met the same change of scp in 2022, in its
# pull request 6812.)
# ParamikoMachine, of the same package, uses SFTP without scp, and scp -O is the old protocol: the controls.
# What helps: scp_opts=["-O"], while the server still has the old protocol; or ParamikoMachine.
#
# Seen:
#
#   upload to DIR/plain.txt          saved as plain.txt
#   upload to 'my results.txt'       saved as 'my results.txt'     <- the quotes are part of the name
#   upload to 'DIR/my results.txt'   ProcessExecutionError
#   download 'DIR/there (1).txt'     ProcessExecutionError
#   with -O, 'DIR/my results.txt'    saved as my results.txt
#   ParamikoMachine, the same        saved as my results.txt
#
# Needs sshd, ssh and scp (Debian 12: openssh-server, openssh-client).
set -euo pipefail
work=$(mktemp -d)
sshd=
trap '[ -z "$sshd" ] || kill "$sshd"; rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check plumbum==2.0.2 paramiko==5.1.0
for name in host_key user; do ssh-keygen -q -t ed25519 -N '' -f $name; done
port=$(python3 -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')
mkdir start
printf '%s\n' "ListenAddress 127.0.0.1" "Port $port" "HostKey $work/host_key" "AuthorizedKeysFile $work/user.pub" \
    "PidFile none" "StrictModes no" "UsePAM no" "Subsystem sftp internal-sftp -d $work/start" > sshd_config
mkdir -p /run/sshd
/usr/sbin/sshd -D -e -f "$work/sshd_config" 2> sshd.log &
sshd=$!
for _ in $(seq 100); do ! grep -q listening sshd.log || break; sleep 0.1; done
ssh -V

cat > seen.py <<'PY'
import getpass
import sys
from collections.abc import Callable
from pathlib import Path

import paramiko
from plumbum import ProcessExecutionError, SshMachine
from plumbum.machines.paramiko_machine import ParamikoMachine

PORT, USER, HERE = int(sys.argv[1]), getpass.getuser(), Path.cwd()
START = HERE / "start"  # where SFTP begins, in place of the account's home
OPTIONS = ["-F", "none", "-oStrictHostKeyChecking=no", "-oUserKnownHostsFile=/dev/null", "-oLogLevel=ERROR"]
Path("in.txt").write_text("what is sent")


def machine(*scp_options: str) -> SshMachine:
    options = [*OPTIONS, *scp_options]
    return SshMachine("127.0.0.1", user=USER, port=PORT, keyfile="user", ssh_opts=OPTIONS, scp_opts=options)


def saved(call: Callable[[], object]) -> str:
    try:
        call()
    except ProcessExecutionError:
        return "ProcessExecutionError"
    names = [path.name for path in START.iterdir()]
    for path in START.iterdir():
        path.unlink()
    return f"saved as {', '.join(names)}"


seen = {}
with machine() as remote:
    seen["upload to DIR/plain.txt"] = saved(lambda: remote.upload("in.txt", f"{START}/plain.txt"))
    seen["upload to 'my results.txt'"] = saved(lambda: remote.upload("in.txt", "my results.txt"))
    seen["upload to 'DIR/my results.txt'"] = saved(lambda: remote.upload("in.txt", f"{START}/my results.txt"))
    there = START / "there (1).txt"
    there.write_text("what is fetched")
    assert remote.path(str(there)).exists()
    seen["download 'DIR/there (1).txt'"] = saved(lambda: remote.download(str(there), "got.txt"))
    there.unlink()
with machine("-O") as remote:
    seen["with -O, 'DIR/my results.txt'"] = saved(lambda: remote.upload("in.txt", f"{START}/my results.txt"))
with ParamikoMachine("127.0.0.1", user=USER, port=PORT, keyfile="user", look_for_keys=False,
                     missing_host_policy=paramiko.AutoAddPolicy()) as remote:
    seen["ParamikoMachine, the same"] = saved(lambda: remote.upload("in.txt", f"{START}/my results.txt"))
for name, outcome in seen.items():
    print(f"{name:31}  {outcome}")
expected = ["saved as plain.txt", "saved as 'my results.txt'", "ProcessExecutionError", "ProcessExecutionError",
            "saved as my results.txt", "saved as my results.txt"]
sys.exit(0 if list(seen.values()) == expected else "it has changed")
PY
SSH_AUTH_SOCK='' timeout 100 env/bin/python -W ignore seen.py "$port"
