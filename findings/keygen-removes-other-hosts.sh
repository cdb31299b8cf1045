#!/usr/bin/env bash
# OpenSSH 9.2p1: ssh-keygen -R HOST, the command that ssh itself prints where a host's key has changed, forgets other
# hosts too: each line of known_hosts that HOST matches goes as a whole, with all its other names, and with its pattern.
#
#   - gate,box,192.0.2.7 KEY: after -R box neither gate nor the address is known any more.
#   - node* KEY, by which the nodes of a cluster or the machines of a lab are known: after -R node7, none of them is.
#     One node that was installed again is enough; batch jobs (BatchMode, StrictHostKeyChecking=yes) then fail for all
#     others, and who answers "yes" at a prompt trusts each one on sight.
#
# It says "Host node7 found: line 2", as it does for a line of that host alone, and ends with 0. A pattern of which HOST
# is a negated part (node*,!node7) stays, and so do @cert-authority and @revoked. Its sister -H takes care: it leaves
# lines with patterns as they are and says so ("ignoring host name with wildcard").
#
# ssh-keygen(1): "-R hostname | [hostname]:port: Removes all keys belonging to the specified hostname (with optional
# port number) from a known_hosts file."
# What helps: ssh-keygen -F HOST first, which prints the lines; to put the lines back from known_hosts.old.
#
# Seen, what ssh-keygen -F finds:
#
#                       gate  box  192.0.2.7  node7  node8  node9
#   before              yes   yes  yes        yes    yes    yes
#   after -R box        no    no   no         yes    yes    yes
#   after -R node7      yes   yes  yes        no     no     no
#
# and what ssh does in batch mode, without a question, for a key of node* that is right:
#
#   node8, before             status 0
#   node8, after -R node7     status 255  Host key verification failed.
#
# Needs sshd, ssh and ssh-keygen (Debian 12: openssh-server, openssh-client).
set -euo pipefail
work=$(mktemp -d)
sshd=
trap '[ -z "$sshd" ] || kill "$sshd"; rm -rf "$work"' EXIT
cd "$work"
ssh -V
for name in host_key other_key user; do ssh-keygen -q -t ed25519 -N '' -f $name; done
port=$(python3 -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')
printf '%s\n' "ListenAddress 127.0.0.1" "Port $port" "HostKey $work/host_key" "AuthorizedKeysFile $work/user.pub" \
    "PidFile none" "StrictModes no" "UsePAM no" > sshd_config
mkdir -p /run/sshd
/usr/sbin/sshd -D -e -f "$work/sshd_config" 2> sshd.log &
sshd=$!
for _ in $(seq 100); do ! grep -q listening sshd.log || break; sleep 0.1; done

key() { cut -d ' ' -f 1,2 "$1"; }
begin() { printf '%s\n' "gate,box,192.0.2.7 $(key other_key.pub)" "node* $(key host_key.pub)" > known; }
known() {
    for name in gate box 192.0.2.7 node7 node8 node9; do
        ssh-keygen -F $name -f known > found && echo -n "$name yes  " || echo -n "$name no  "
    done
    echo
}
# HostKeyAlias: the name under which known_hosts is asked, as if node8 were that machine.
log_in() {
    status=0
    timeout 30 ssh -F none -i user -p "$port" -o HostKeyAlias=node8 -o UserKnownHostsFile="$work/known" \
        -o LogLevel=ERROR -o GlobalKnownHostsFile=none -o BatchMode=yes "$(id -un)@127.0.0.1" true \
        > said 2>&1 < /dev/null || status=$?
    echo "status $status $(tail -n 1 said | tr -d '\r')"
}

{
    begin
    echo "before: $(known)"
    echo "node8: $(log_in)"
    ssh-keygen -R box -f known > removed 2>&1
    grep found: removed
    echo "after -R box: $(known)"
    begin
    ssh-keygen -R node7 -f known > removed 2>&1
    grep found: removed
    echo "after -R node7: $(known)"
    echo "node8: $(log_in)"
} | sed 's/ *$//' | tee seen

diff seen - <<'EXPECTED' || { echo "it has changed"; exit 1; }
before: gate yes  box yes  192.0.2.7 yes  node7 yes  node8 yes  node9 yes
node8: status 0
# Host box found: line 1
after -R box: gate no  box no  192.0.2.7 no  node7 yes  node8 yes  node9 yes
# Host node7 found: line 2
after -R node7: gate yes  box yes  192.0.2.7 yes  node7 no  node8 no  node9 no
node8: status 255 Host key verification failed.
EXPECTED
