#!/usr/bin/env bash
# ansible-core 2.19.14: with ssh retries (ANSIBLE_SSH_RETRIES, retries in [ssh_connection]), a command of the modules
# raw and script that is killed by a signal, loses its connection, or ends with 255 is run again, up to that many
# times, from its beginning. What it had done by then is done once more: half an installation, an entry in a file, a
# job that is submitted. The report is UNREACHABLE, so the machine is out of the rest of the play as well, though it was reached.
#
# ssh ends with 255 in each of these cases (its ssh(1): "exits with the exit status of the remote command or with 255 if
# an error occurred"; that is also what it makes of exit-signal), and Ansible takes 255 alone for a connection that was
# not made. The out-of-memory killer, a batch system's limit, `reboot`, and programs that exit with -1 end in it.
# The other modules are run by a shell that lives on, and report a status of their own.
#
# The documentation of retries: "Number of attempts to connect. Ansible retries connections only if it gets an SSH error
# with a return code of 255. Any errors with return codes other than 255 indicate an issue with program execution."
# What helps: 'COMMAND; exit $(($? > 127 ? 1 : $?))' in raw, which ends with a status that ssh does not use; a lost line
# it cannot help.
#
# Seen, three retries; how often the command ran, of one call:
#
#   raw     exit 3                     1    FAILED
#   raw     exit 255                   4    UNREACHABLE
#   raw     kill -KILL $$              4    UNREACHABLE
#   raw     kill the sshd above it     4    UNREACHABLE
#   script  exit 255                   4    UNREACHABLE
#   raw     exit 255, no retries       1    UNREACHABLE
#
# Needs sshd and ssh (Debian 12: openssh-server, openssh-client).
set -euo pipefail
work=$(mktemp -d)
sshd=
trap '[ -z "$sshd" ] || kill "$sshd"; rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check ansible-core==2.19.14
for name in host_key user; do ssh-keygen -q -t ed25519 -N '' -f $name; done
port=$(python3 -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')
printf '%s\n' "ListenAddress 127.0.0.1" "Port $port" "HostKey $work/host_key" "AuthorizedKeysFile $work/user.pub" \
    "PidFile none" "StrictModes no" "UsePAM no" "Subsystem sftp internal-sftp" > sshd_config
mkdir -p /run/sshd home
/usr/sbin/sshd -D -e -f "$work/sshd_config" 2> sshd.log &
sshd=$!
for _ in $(seq 100); do ! grep -q listening sshd.log || break; sleep 0.1; done

options="-F none -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
printf '%s ' box ansible_host=127.0.0.1 "ansible_port=$port" "ansible_user=$(id -un)" \
    "ansible_ssh_private_key_file=$work/user" "ansible_ssh_common_args='$options'" \
    "ansible_remote_tmp=$work/tmp" > inventory
# No ControlMaster: each attempt is a connection of its own.
export HOME="$work/home" ANSIBLE_LOCALHOST_WARNING=False ANSIBLE_SSH_ARGS="-C" ANSIBLE_HOST_KEY_CHECKING=False
export ANSIBLE_LOCAL_TEMP="$work/local"

changed=
try() {  # module, retries, how often it is to run, the report, what it does after its first line
    rm -f ran
    command="echo once >> $work/ran; $5"
    if [ "$1" = script ]; then
        printf '#!/bin/sh\n%s\n' "$command" > it.sh
        command=$work/it.sh
    fi
    ANSIBLE_SSH_RETRIES=$2 timeout 100 env/bin/ansible -i inventory box -m "$1" -a "$command" > said 2>&1 \
        < /dev/null || true
    times=$(wc -l < ran)
    report=$(grep -o 'FAILED\|UNREACHABLE' said | head -n 1)
    printf '%-7s %-32s retries %s: ran %s times, %s\n' "$1" "$5" "$2" "$times" "$report"
    [ "$times $report" = "$3 $4" ] || { changed=1; cat said; }
}
try raw 3 1 FAILED 'exit 3'
try raw 3 4 UNREACHABLE 'exit 255'
try raw 3 4 UNREACHABLE 'kill -KILL $$'
try raw 3 4 UNREACHABLE 'kill -TERM $PPID; exec sleep 9'
try script 3 4 UNREACHABLE 'exit 255'
try raw 0 1 UNREACHABLE 'exit 255'
[ -z "$changed" ] || { echo "it has changed"; exit 1; }
