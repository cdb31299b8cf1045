#!/usr/bin/env bash
# Dropbear 2022.83 and Erlang/OTP ssh 4.15.2 as servers: a remote forward cannot be taken back.
#
# cancel-tcpip-forward (RFC 4254, section 7.1), with the very address that was asked for and the port that the server
# answered with, is refused by both, and both go on listening; each connection that comes is still offered to the
# client. Since the port is taken by that listener, the same forward cannot be asked for again either. Only the end of
# the whole SSH connection frees it: a client that drops one forward among many, or renews one (`ssh -O cancel -R`,
# asyncssh's and paramiko's cancel), has to reconnect, or to use another port. OpenSSH is the control.
#
# Seen, the client paramiko 5.1.0:
#
#   dropbear localhost listens: True; cancel: FAILURE, listens: True; asked again: FAILURE
#   dropbear 127.0.0.1 listens: True; cancel: FAILURE, listens: True; asked again: FAILURE
#   erlang   localhost listens: True; cancel: FAILURE, listens: True; asked again: FAILURE
#   erlang   127.0.0.1 listens: True; cancel: FAILURE, listens: True; asked again: FAILURE
#   sshd     localhost listens: True; cancel: SUCCESS, listens: False; asked again: SUCCESS
#   sshd     127.0.0.1 listens: True; cancel: SUCCESS, listens: False; asked again: SUCCESS
#
# Runs on Debian 12 as root, with dropbear-bin, erlang-ssh, openssh-server and openssh-client.
set -euo pipefail
work=$(mktemp -d)
pids=()
trap 'for pid in "${pids[@]}"; do kill "$pid" 2> /dev/null || true; done; rm -rf "$work"' EXIT
cd "$work"
chmod 700 .
for package in dropbear-bin=2022.83-1+deb12u3 erlang-ssh=1:25.2.3+dfsg-1+deb12u4; do
    [ "$(dpkg-query -W -f '${Package}=${Version}' "${package%%=*}" 2> /dev/null)" = "$package" ] && continue
    apt-get install -y -qq --no-install-recommends "$package" > apt.log 2>&1 || { cat apt.log && exit 1; }
done
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check paramiko==5.1.0

mkdir -m 700 -p home/.ssh erlang
ssh-keygen -q -t ed25519 -N '' -f key
cp key.pub home/.ssh/authorized_keys

free() { python3 -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

dropbearkey -t ed25519 -f dropbear_key > /dev/null 2>&1
dropbear=$(free)
# Dropbear reads the account's own authorized_keys and no other, so it gets a home of its own.
unshare -m sh -c 'mount --bind home "$1" && exec "$2" -F -E -s -r dropbear_key -p "127.0.0.1:$3" -P pid' sh \
    "$(getent passwd "$(id -u)" | cut -d : -f 6)" "$(PATH="$PATH:/usr/sbin" command -v dropbear)" "$dropbear" 2> dropbear.log &
pids+=($!)

ssh-keygen -q -t ed25519 -N '' -f erlang/ssh_host_ed25519_key
cat > server.escript <<'ERL'
%%! -noshell
main([Directory]) ->
    {ok, _} = application:ensure_all_started(ssh),
    {ok, Daemon} = ssh:daemon({127, 0, 0, 1}, 0, [{system_dir, Directory}, {user_dir, Directory},
        {no_auth_needed, true}, {tcpip_tunnel_in, true}, {tcpip_tunnel_out, true}]),
    {ok, Facts} = ssh:daemon_info(Daemon),
    ok = file:write_file("erlang/port.new", integer_to_list(proplists:get_value(port, Facts))),
    ok = file:rename("erlang/port.new", "erlang/port"),
    receive after infinity -> ok end.
ERL
escript server.escript erlang &
pids+=($!)

sshd=$(free)
ssh-keygen -q -t ed25519 -N '' -f sshd_key
"$(PATH="$PATH:/usr/sbin" command -v sshd)" -D -e -f /dev/null -h "$work/sshd_key" -p "$sshd" -o ListenAddress=127.0.0.1 \
    -o StrictModes=no -o UsePAM=no -o "AuthorizedKeysFile=$work/key.pub" -o PidFile=none 2> sshd.log &
pids+=($!)
for _ in $(seq 100); do [ ! -e erlang/port ] || break; sleep 0.1; done

cat > seen.py <<'PY'
import socket
import sys
import time

import paramiko


def listens(port):
    try:
        socket.create_connection(("127.0.0.1", port), 2).close()
    except ConnectionRefusedError:
        return False
    return True


def connect(name, port):
    deadline = time.monotonic() + 10
    while not listens(port):
        assert time.monotonic() < deadline
    transport = paramiko.Transport(("127.0.0.1", port))
    transport.start_client(timeout=10)
    if name == "erlang":
        transport.auth_none(USER)
    else:
        transport.auth_publickey(USER, paramiko.Ed25519Key.from_private_key_file("key"))
    return transport


def answer(message):
    return "SUCCESS" if message is not None else "FAILURE"


USER = sys.argv[1]
for name, port in zip(sys.argv[2::2], map(int, sys.argv[3::2])):
    for address in ("localhost", "127.0.0.1"):
        transport = connect(name, port)
        reply = transport.global_request("tcpip-forward", (address, 0), wait=True)
        place = (address, reply.get_int())
        before = listens(place[1])
        cancelled = answer(transport.global_request("cancel-tcpip-forward", place, wait=True))
        deadline = time.monotonic() + 2
        while listens(place[1]) and time.monotonic() < deadline:
            time.sleep(0.1)
        after = listens(place[1])
        again = answer(transport.global_request("tcpip-forward", place, wait=True))
        transport.close()
        print(f"{name:8} {address:9} listens: {before}; cancel: {cancelled}, listens: {after}; asked again: {again}")
PY
env/bin/python seen.py "$(id -un)" dropbear "$dropbear" erlang "$(cat erlang/port)" sshd "$sshd" > seen
cat seen
diff - seen << 'EXPECTED'
dropbear localhost listens: True; cancel: FAILURE, listens: True; asked again: FAILURE
dropbear 127.0.0.1 listens: True; cancel: FAILURE, listens: True; asked again: FAILURE
erlang   localhost listens: True; cancel: FAILURE, listens: True; asked again: FAILURE
erlang   127.0.0.1 listens: True; cancel: FAILURE, listens: True; asked again: FAILURE
sshd     localhost listens: True; cancel: SUCCESS, listens: False; asked again: SUCCESS
sshd     127.0.0.1 listens: True; cancel: SUCCESS, listens: False; asked again: SUCCESS
EXPECTED
