#!/usr/bin/env bash
# fsspec 2026.9.0, its SFTPFileSystem (paramiko 5.1.0): rm(LINK, recursive=True) of a symbolic link to a folder deletes
# all that the folder holds, and then fails with FileNotFoundError, the link still there. So does rm("out/*",
# recursive=True), for each such link in out. `latest -> run-7` is what results, checkpoints and releases are kept by.
#
# A path that is named, or that * has found, is looked at by stat, which follows the link, and what is found behind it
# is removed as its contents. The link itself is then removed as a folder, which no server does; OpenSSH answers "No
# such file". Nothing but that error is seen, so one looks for a path that is wrong, not for files that are gone.
#   - The same rmdir ends rm(FOLDER, recursive=True) at the first link to a folder in it: half is left.
#   - rm(LINK) without recursive has this error too, and removes nothing.
#
# The documentation of rm(): "recursive: If file(s) are directories, recursively delete contents and then also remove
# the directory"; no page names links. rm -r removes the link alone, the control, and so does LocalFileSystem (issue
# 1299 of fsspec is about that one, which refused).
# What helps: fs.ftp.remove(LINK), which is paramiko's.
#
# Seen, with run-7/result, run-7/state, latest -> run-7, out/link -> ../run-7 and out/log:
#
#   rm -r latest                  left: out/link out/log run-7/result run-7/state
#   rm('latest', recursive=True)  left: latest out/link out/log, FileNotFoundError    <- what run-7 held is gone
#   rm -r out/*                   left: latest run-7/result run-7/state
#   rm('out/*', recursive=True)   left: latest out/link, FileNotFoundError            <- here too
#   rm -r out                     left: latest run-7/result run-7/state
#   rm('out', recursive=True)     left: latest out/link run-7/result run-7/state, FileNotFoundError
#   rm latest                     left: out/link out/log run-7/result run-7/state
#   rm('latest')                  left: latest out/link out/log run-7/result run-7/state, FileNotFoundError
#
# Needs sshd (Debian 12: openssh-server).
set -euo pipefail
work=$(mktemp -d)
sshd=
trap '[ -z "$sshd" ] || kill "$sshd"; rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check fsspec==2026.9.0 paramiko==5.1.0
for name in host_key user; do ssh-keygen -q -t ed25519 -N '' -f $name; done
port=$(python3 -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')
printf '%s\n' "ListenAddress 127.0.0.1" "Port $port" "HostKey $work/host_key" "AuthorizedKeysFile $work/user.pub" \
    "PidFile none" "StrictModes no" "UsePAM no" "Subsystem sftp internal-sftp" > sshd_config
mkdir -p /run/sshd
/usr/sbin/sshd -D -e -f "$work/sshd_config" 2> sshd.log &
sshd=$!
for _ in $(seq 100); do ! grep -q listening sshd.log || break; sleep 0.1; done

cat > try.py <<'PY'
import getpass
import shutil
import subprocess
import sys
from pathlib import Path

from fsspec.implementations.sftp import SFTPFileSystem

BASE = Path("base").absolute()
RUN = ["run-7/result", "run-7/state"]
LINK_GONE = ["out/link", "out/log", *RUN]
CALLS = {  # for each: the command that does what is meant, what is left by that one, and by fsspec, which fails
    "rm('latest', recursive=True)": ("rm -r latest", LINK_GONE, ["latest", "out/link", "out/log"]),
    "rm('out/*', recursive=True)": ("rm -r out/*", ["latest", *RUN], ["latest", "out/link"]),
    "rm('out', recursive=True)": ("rm -r out", ["latest", *RUN], ["latest", "out/link", *RUN]),
    "rm('latest')": ("rm latest", LINK_GONE, ["latest", *LINK_GONE]),
}


def make_tree() -> None:
    shutil.rmtree(BASE, ignore_errors=True)
    for name in ("run-7/result", "run-7/state", "out/log"):
        (BASE / name).parent.mkdir(parents=True, exist_ok=True)
        (BASE / name).write_text(name)
    (BASE / "latest").symlink_to("run-7")
    (BASE / "out" / "link").symlink_to("../run-7")


def left() -> list[str]:
    return sorted(str(path.relative_to(BASE)) for path in BASE.rglob("*") if path.is_symlink() or path.is_file())


login = {"port": int(sys.argv[1]), "username": getpass.getuser(), "key_filename": "user"}
sftp = SFTPFileSystem("127.0.0.1", **login, look_for_keys=False, allow_agent=False)
same = True
for call, (command, meant, seen) in CALLS.items():
    make_tree()
    subprocess.run(command, shell=True, cwd=BASE, check=True)
    same = same and left() == meant
    print(f"{command:29} left: {' '.join(left())}")
    make_tree()
    error = "no error"
    try:
        sftp.rm(f"{BASE}/{call.split(chr(39))[1]}", recursive="recursive" in call)
    except OSError as exc:
        error = type(exc).__name__
    print(f"{call:29} left: {' '.join(left())}, {error}")
    same = same and (left(), error) == (seen, "FileNotFoundError")
sys.exit(0 if same else "it has changed")
PY
timeout 100 env/bin/python -W ignore try.py "$port"
