#!/usr/bin/env bash
# parallel-ssh 2.16.0.post1 (ssh2-python 1.2.0.post1, ssh-python 1.2.0.post1): of many hosts, the one where things went
# wrong is the one that ParallelSSHClient does not name.
#
#   - A command that was killed by a signal (the out-of-memory killer, a batch system's limit, a shutdown) has the
#     exit_code 0 and no exception, like one that went well. The server tells (exit-signal, RFC 4254, section 6.10);
#     libssh2 keeps 0 as the status in that case, and parallel-ssh asks for the status alone.
#   - A host that is lost while its command runs (a reboot) makes join() raise SocketRecvError with an empty text and
#     no host, at once, while the commands of the others still run. That host's entry has exception None and exit_code
#     None, which is what those that still run have. stop_on_errors=False does not change that.
#   - pssh.clients.ssh, the same API by libssh: -1 for the signal, and nothing at all is raised for the lost host.
#
# Its documentation has output with `exit_code` and `exception` ("Exception from host if any") for each host, and of
# join(): "Wait until all remote commands in output have finished", which raises Timeout. ssh ends with 255 in both
# cases: the control. (Issue 73 of ssh-python is about the -1.)
# What helps: COMMAND; echo "status $?" as the last line to look for, which a shell that lives on writes; after an
# error of join(), read the stdout of each host before its exit_code, and take None for a loss.
#
# Seen on three hosts at once, exit_code and exception as join() ends, and the output read after it:
#
#                                      pssh.clients                  pssh.clients.ssh      ssh
#   join()                             SocketRecvError(), too soon   returns
#   echo half; kill -9 $$              0     None  half              -1    None  half      255
#   echo half; [the line is lost]      None  None  half              None  None  half      255
#   [5 s]; echo done                   None  None  done              0     None  done      0
#
# Needs sshd and ssh (Debian 12: openssh-server, openssh-client).
set -euo pipefail
work=$(mktemp -d)
sshd=
trap '[ -z "$sshd" ] || kill "$sshd"; rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check parallel-ssh==2.16.0.post1 ssh2-python==1.2.0.post1 \
    ssh-python==1.2.0.post1
for name in host_key user; do ssh-keygen -q -t ed25519 -N '' -f $name; done
port=$(python3 -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')
printf 'ListenAddress 127.0.0.%s\n' 1 2 3 > sshd_config
printf '%s\n' "Port $port" "HostKey $work/host_key" "AuthorizedKeysFile $work/user.pub" "PidFile none" \
    "StrictModes no" "UsePAM no" >> sshd_config
mkdir -p /run/sshd
/usr/sbin/sshd -D -e -f "$work/sshd_config" 2> sshd.log &
sshd=$!
for _ in $(seq 100); do [ "$(grep -c listening sshd.log)" -lt 3 ] || break; sleep 0.1; done

cat > try.py <<'PY'
import getpass
import subprocess
import sys

from pssh.clients import ParallelSSHClient
from pssh.clients.ssh import ParallelSSHClient as ByLibssh

PORT, USER = int(sys.argv[1]), getpass.getuser()
# The parent of the command's shell is what sshd runs for the connection; its end is the end of the line.
COMMANDS = {
    "127.0.0.1": "echo half; kill -9 $$",
    "127.0.0.2": "echo half; sleep 1; kill -9 $PPID",
    "127.0.0.3": "sleep 5; echo done",
}
EXPECTED = {
    ParallelSSHClient: ["SocketRecvError()", (0, None, "half"), (None, None, "half"), (None, None, "done")],
    ByLibssh: ["returns", (-1, None, "half"), (None, None, "half"), (0, None, "done")],
}
seen = {}
for kind in EXPECTED:
    client = kind([*COMMANDS], user=USER, port=PORT, pkey="user", allow_agent=False)
    output = client.run_command("%s", host_args=[(each,) for each in COMMANDS.values()], stop_on_errors=False)
    try:
        client.join(output, timeout=30)
        seen[kind] = ["returns"]
    except Exception as exc:
        seen[kind] = [repr(exc)]
    codes = [(each.exit_code, each.exception) for each in output]
    print(kind.__module__, seen[kind][0])
    for host, code, each in zip(COMMANDS, codes, output):
        seen[kind].append((*code, " ".join(each.stdout)))
        print(f"  {host}  {COMMANDS[host]:34}  {seen[kind][-1]}")
options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=QUIET"]
ssh = ["ssh", "-F", "none", "-n", "-p", str(PORT), "-i", "user", *(f"-o{option}" for option in options)]
statuses = []
for host, command in COMMANDS.items():
    statuses.append(subprocess.run([*ssh, f"{USER}@{host}", command], capture_output=True, timeout=30).returncode)
print("ssh", statuses)
sys.exit(0 if seen == EXPECTED and statuses == [255, 255, 0] else "it has changed")
PY
timeout 100 env/bin/python -W ignore try.py "$port"
