#!/usr/bin/env bash
# paramiko 5.1.0: a Transport keeps an entry for every channel that it ever had (Transport.channels_seen), for as
# long as the connection lives; closing and dropping the channels frees nothing of it. A program that holds one
# connection and opens a channel for each request (a forward, a poll with exec_command) grows without a bound.
#
# Seen: 2,001 channels opened and closed one after the other on one connection, client and server both paramiko:
#
#   channels that are open: 0    entries kept by the client: 2001    entries kept by the server: 2001
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check paramiko==5.1.0

cat > seen.py <<'PY'
import gc
import socket
import sys
import threading

import paramiko


class Rules(paramiko.ServerInterface):
    def check_auth_none(self, username: str) -> int:
        return paramiko.AUTH_SUCCESSFUL

    def get_allowed_auths(self, username: str) -> str:
        return "none"

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.OPEN_SUCCEEDED


here, there = socket.socketpair()
server = paramiko.Transport(there)
server.add_server_key(paramiko.ECDSAKey.generate())
server.start_server(threading.Event(), Rules())


def drop() -> None:
    while server.is_active():
        channel = server.accept(1)
        if channel:
            channel.recv(1)  # until the client closes it
            channel.close()


threading.Thread(target=drop, daemon=True).start()
client = paramiko.Transport(here)
client.start_client()
client.auth_none("me")
for _ in range(2000):
    channel = client.open_session()
    channel.close()
del channel
client.open_session().close()  # a round trip behind all of them
gc.collect()
for _ in range(100):
    if not len(client._channels.values()) and not len(server._channels.values()):
        break
    threading.Event().wait(0.05)
kept = len(client.channels_seen), len(server.channels_seen)
print(f"channels that are open: {len(client._channels.values())}    entries kept by the client: {kept[0]}", end="    ")
print(f"entries kept by the server: {kept[1]}")
client.close()
sys.exit(0 if min(kept) >= 2000 else "it has changed")
PY
timeout 120 env/bin/python -W ignore seen.py
