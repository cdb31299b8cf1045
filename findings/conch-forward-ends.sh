#!/usr/bin/env bash
# Twisted Conch 26.10.0, server side, with its own openConnectForwardingClient for direct-tcpip (what `ssh -L` and
# ProxyJump use): neither a refusal nor an end gets through.
#
#   - A target where nothing listens: the channel is CONFIRMED, and then ends without a byte. A client cannot tell
#     it from a server that accepts and hangs up, so "does anything listen there?" has no answer before data came.
#   - The client's CHANNEL_EOF is never passed on: the target does not see the end of a request that is ended by a
#     half-close, and both wait. (OpenSSH shuts the target's socket down for writing: the control.)
#   - When the target ends, the client gets CHANNEL_CLOSE without CHANNEL_EOF before it. RFC 4254, section 5.3, allows
#     that; a client that takes only EOF for a good end takes each whole download for a broken one.
#
# Seen (asyncssh 2.24.1 as the client):
#
#   conch:   a port where nothing listens: confirmed, then b''
#   conch:   ten bytes and a half-close: no answer in 5 s, the target saw the end: False
#   conch:   the messages at the end of a download: ['CLOSE']
#   openssh: a port where nothing listens: refused, reason 2
#   openssh: ten bytes and a half-close: b'10 bytes', the target saw the end: True
#   openssh: the messages at the end of a download: ['EOF', 'CLOSE']
#
# The control needs sshd on the machine (Debian: openssh-server) and is left out where there is none.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check 'twisted[conch]==26.10.0' asyncssh==2.24.1

cat > conch.py <<'PY'
"""A server with one account, and forwarding as Conch has it; prints its port."""
from cryptography.hazmat.primitives.asymmetric import ed25519
from twisted.conch import avatar
from twisted.conch.interfaces import IConchUser
from twisted.conch.ssh import connection, factory, forwarding, keys, userauth
from twisted.cred import checkers, portal
from twisted.internet import reactor
from zope.interface import implementer


class User(avatar.ConchUser):
    def __init__(self):
        super().__init__()
        self.channelLookup[b"direct-tcpip"] = forwarding.openConnectForwardingClient


@implementer(portal.IRealm)
class Realm:
    def requestAvatar(self, name, mind, *interfaces):
        return IConchUser, User(), lambda: None


class Factory(factory.SSHFactory):
    services = {b"ssh-userauth": userauth.SSHUserAuthServer, b"ssh-connection": connection.SSHConnection}
    publicKeys = privateKeys = {b"ssh-ed25519": keys.Key(ed25519.Ed25519PrivateKey.generate())}
    portal = portal.Portal(Realm(), [checkers.InMemoryUsernamePasswordDatabaseDontUse(me=b"word")])

    def getPrimes(self):
        return None


print(reactor.listenTCP(0, Factory(), interface="127.0.0.1").getHost().port, flush=True)
reactor.run()
PY

cat > seen.py <<'PY'
import asyncio
import contextlib
import getpass
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import asyncssh
from asyncssh.channel import SSHChannel


def unused_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


async def look(name: str, port: int, **login: object) -> list:
    ended = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.CancelledError):  # the end of this program
            first = await reader.read(1)
            if first == b"d":  # a download
                writer.write(b"x" * 1000)
            else:
                data = first + await reader.read()
                ended.set()
                writer.write(b"%d bytes" % len(data))
            writer.close()

    target = await asyncio.start_server(answer, "127.0.0.1", 0)
    live = target.sockets[0].getsockname()[1]
    messages: list[str] = []
    for word in ("eof", "close"):
        real = getattr(SSHChannel, f"_process_{word}")

        def note(self, *args, real=real, word=word):
            messages.append(word.upper())
            return real(self, *args)

        table = dict(SSHChannel._packet_handlers)
        code = {"eof": 96, "close": 97}[word]  # RFC 4254, section 9
        table[code] = note
        SSHChannel._packet_handlers = table
    common = {"known_hosts": None, "config": None, **login}
    seen: list = []
    async with asyncssh.connect("127.0.0.1", port, **common) as connection:
        try:
            reader, _ = await connection.open_connection("127.0.0.1", unused_port())
            seen.append(("confirmed", await asyncio.wait_for(reader.read(), 10)))
            print(f"{name} a port where nothing listens: confirmed, then {seen[-1][1]!r}")
        except asyncssh.ChannelOpenError as error:
            seen.append(("refused", error.code))
            print(f"{name} a port where nothing listens: refused, reason {error.code}")
        reader, writer = await connection.open_connection("127.0.0.1", live)
        writer.write(b"x" * 10)
        writer.write_eof()
        try:
            said = repr(await asyncio.wait_for(reader.read(), 5))
        except asyncio.TimeoutError:
            said = "no answer in 5 s"
        seen.append((said, ended.is_set()))
        print(f"{name} ten bytes and a half-close: {said}, the target saw the end: {ended.is_set()}")
        messages.clear()
        reader, writer = await connection.open_connection("127.0.0.1", live)
        writer.write(b"d")
        assert len(await asyncio.wait_for(reader.read(), 10)) == 1000
        writer.close()
        await asyncio.wait_for(writer.wait_closed(), 10)
        seen.append(list(messages))
        print(f"{name} the messages at the end of a download: {messages}")
    target.close()
    return seen


server = subprocess.Popen([sys.executable, "conch.py"], stdout=subprocess.PIPE)
try:
    conch = asyncio.run(look("conch:  ", int(server.stdout.readline()), username="me", password="word", client_keys=None))
finally:
    server.terminate()
    server.wait()
good = True
sshd = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/usr/bin")
if sshd:
    Path("/run/sshd").mkdir(exist_ok=True)
    for name in ("host", "user"):
        asyncssh.generate_private_key("ssh-ed25519").write_private_key(name)
        Path(name).chmod(0o600)
    Path("authorized").write_bytes(asyncssh.read_private_key("user").export_public_key())
    port, here = unused_port(), Path.cwd()
    lines = [f"HostKey {here}/host", f"AuthorizedKeysFile {here}/authorized", "StrictModes no", "UsePAM no"]
    Path("config").write_text("\n".join([f"Port {port}", "ListenAddress 127.0.0.1", f"PidFile {here}/pid", *lines]))
    server = subprocess.Popen([sshd, "-D", "-e", "-f", f"{here}/config"], stderr=subprocess.PIPE, text=True)
    try:
        said = ""
        while "listening" not in said.lower():
            said = server.stderr.readline()
            assert said, "sshd did not start"
        openssh = asyncio.run(look("openssh:", port, username=getpass.getuser(), client_keys=["user"]))
    finally:
        server.terminate()
        server.wait()
    good = openssh == [("refused", 2), ("b'10 bytes'", True), ["EOF", "CLOSE"]]
bad = conch == [("confirmed", b""), ("no answer in 5 s", False), ["CLOSE"]]
sys.exit(0 if bad and good else "it has changed")
PY
timeout 120 env/bin/python -W ignore seen.py
