#!/usr/bin/env bash
# Dropbear 2022.83: dbclient ends with status 0 when the command on the other machine was killed by a signal. Half of
# the output has come, nothing is said, and the script goes on: `dbclient host 'tar c data' > data.tar && rm ...`.
#
# That is what the out-of-memory killer, a batch system's limit, a shutdown, or somebody's kill does to a command. The
# server tells (exit-signal, RFC 4254, section 6.10); dbclient begins with status 0, reads exit-status alone, and
# passes exit-signal over, also in the sources of later releases. It shows only where the login shell becomes the
# command (bash and dash do for a simple one) or is killed with it: otherwise the shell's own 137 or 143 comes back as
# a status, so the same script is right for one command line and wrong for the next. ssh ends with 255 (its ssh(1):
# "exits with the exit status of the remote command or with 255 if an error occurred"); dbclient(1) does not name its
# status at all.
# What helps: a last line to look for in the output, or 'COMMAND; exit $?', which keeps a shell in between.
#
# Seen, the server OpenSSH's sshd, the account's shell bash:
#
#   the command                               ssh   dbclient
#   echo half; exit 3                         3     3
#   echo half; kill -KILL $$                  255   0
#   echo half; kill -TERM $$                  255   0
#   echo half; exec sh -c 'kill -9 $$'        255   0
#   echo half; sh -c 'kill -9 $$'; exit $?    137   137
#
# Needs dropbear-bin, openssh-server and openssh-client (Debian 12).
set -euo pipefail
work=$(mktemp -d)
sshd=
trap '[ -z "$sshd" ] || kill "$sshd" 2> /dev/null || true; rm -rf "$work"' EXIT
cd "$work"
dropbear=$(PATH="$PATH:/usr/sbin" command -v dropbear)
"$dropbear" -V 2>&1 | grep -F v2022.83
ssh-keygen -q -t ed25519 -N '' -f host_key
ssh-keygen -q -t ed25519 -N '' -f id
dropbearkey -t ed25519 -f id_dropbear 2> /dev/null | grep ^ssh-ed25519 > keys
cat id.pub >> keys
port=$(python3 -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')
printf '%s\n' "ListenAddress 127.0.0.1" "Port $port" "HostKey $work/host_key" "AuthorizedKeysFile $work/keys" \
    "PidFile none" "StrictModes no" "UsePAM no" > sshd_config
mkdir -p /run/sshd
/usr/sbin/sshd -D -e -f "$work/sshd_config" 2> sshd.log &
sshd=$!
user=$(id -un)

by_ssh() {
    timeout 30 ssh -F none -i id -p "$port" -o StrictHostKeyChecking=no -o UserKnownHostsFile=known \
        -o ConnectionAttempts=5 "$user@127.0.0.1" "$1" 2> /dev/null < /dev/null
}
# -y -y: the host key is not looked at, and no file of the account is written.
by_dbclient() { timeout 30 dbclient -y -y -i id_dropbear -p "$port" "$user@127.0.0.1" "$1" 2> dbclient.log < /dev/null; }

changed=
while IFS='|' read -r command ssh_status dbclient_status; do
    status=0 && output=$(by_ssh "$command") || status=$?
    other=0 && other_output=$(by_dbclient "$command") || other=$?
    printf '%-40s ssh: %-4s dbclient: %-4s output: %s, %s\n' "$command" $status $other "$output" "$other_output"
    [ "$output,$other_output" = half,half ] && [ $status = "$ssh_status" ] && [ $other = "$dbclient_status" ] || changed=1
done <<'ROWS'
echo half; exit 3|3|3
echo half; kill -KILL $$|255|0
echo half; kill -TERM $$|255|0
echo half; exec sh -c 'kill -9 $$'|255|0
echo half; sh -c 'kill -9 $$'; exit $?|137|137
ROWS
[ -z "$changed" ] || { cat dbclient.log; echo "it has changed"; exit 1; }
