#!/usr/bin/env bash
# asyncssh 2.24.1: SSHClientConnection.run(command, check=True) whose line is lost while the command runs returns like
# one that went well: half of the output, no exception. Only exit_status, which is None then, tells.
#
# run(), and process.wait() and communicate() below it, collect what has come so far and leave the ConnectionLost that
# lies behind it where it is; check=True raises for a status that is not 0, and None is none. So `result = await
# connection.run("tar c data", check=True, encoding=None)` is an archive cut in two when the machine reboots, the
# keepalive gives up (keepalive_interval), or sshd's child is killed; with stdout="FILE" the file is. Of
# process.stdout.read(), which reads "until EOF", the first call returns the half, and a second one raises.
# fabric's run() raises in that place (UnexpectedExit, -1), and ssh ends with 255.
#
# The documentation of wait() on check: "Whether or not to raise an error on non-zero exit status"; of the result:
# exit_status is "The exit status returned, or -1 if an exit signal is sent", an int. Nothing says that a lost line
# is no error; connection.run(..., check=True) after the loss raises ChannelOpenError, as one would expect.
# What helps: `if result.exit_status is None: raise`.
#
# Seen, a command that writes "half", and "done" later; the line is cut between the two:
#
#   nothing is cut          'half\ndone\n'   status 0
#   end of the connection   'half\n'         status None, no exception
#   reset                   'half\n'         status None, no exception
#   keepalive gave up       'half\n'         status None, no exception
#   into a file, reset      'half\n'         status None, no exception
#   two reads of stdout     'half\n', then ConnectionLost
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check asyncssh==2.24.1

cat > seen.py <<'PY'
import asyncio
import sys
from pathlib import Path

import asyncssh


class Server(asyncssh.SSHServer):
    def begin_auth(self, username: str) -> bool:
        return False


class Line:
    """A line between client and server that can be cut, reset, or go silent."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.writers: list[asyncio.StreamWriter] = []
        self.pumps: list[asyncio.Task] = []
        self.silent = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self.port)
        self.writers += [writer, back]
        self.pumps += [asyncio.create_task(self.pump(reader, back)), asyncio.create_task(self.pump(there, writer))]

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            if not self.silent:
                writer.write(data)

    def cut(self, how: str) -> None:
        if how == "silence":
            self.silent = True
        elif how:
            for writer in self.writers:
                writer.transport.abort() if how == "reset" else writer.close()


async def work(process: asyncssh.SSHServerProcess) -> None:
    process.stdout.write("half\n")
    await asyncio.sleep(2)
    process.stdout.write("done\n")
    process.exit(0)


async def main() -> list[tuple]:
    key = asyncssh.generate_private_key("ssh-ed25519")
    server = await asyncssh.create_server(Server, "127.0.0.1", 0, server_host_keys=[key], process_factory=work)
    seen = []
    for name, how, kind in (
        ("nothing is cut", "", "run"),
        ("end of the connection", "end", "run"),
        ("reset", "reset", "run"),
        ("keepalive gave up", "silence", "run"),
        ("into a file, reset", "reset", "file"),
        ("two reads of stdout", "reset", "read"),
    ):
        line = Line(server.sockets[0].getsockname()[1])
        between = await asyncio.start_server(line.serve, "127.0.0.1", 0)
        connection = await asyncssh.connect(
            "127.0.0.1", between.sockets[0].getsockname()[1], username="me", known_hosts=None, config=None,
            client_keys=None, keepalive_interval=0.5, keepalive_count_max=2)
        asyncio.get_running_loop().call_later(1, line.cut, how)
        try:
            if kind == "read":
                process = await connection.create_process("work")
                seen.append((await process.stdout.read(),))
                seen[-1] += (await process.stdout.read(),)
            else:
                options = {"stdout": "out"} if kind == "file" else {}
                done = await asyncio.wait_for(connection.run("work", check=True, **options), 20)
                out = Path("out").read_text() if kind == "file" else done.stdout
                seen.append((out, done.exit_status))
        except asyncssh.Error as exc:
            seen[-1] += (type(exc).__name__,)
        print(f"{name:23} {seen[-1]}")
        connection.abort()
        between.close()
    server.close()
    return seen


lost = ("half\n", None)
good = [("half\ndone\n", 0), lost, lost, lost, lost, ("half\n", "ConnectionLost")]
sys.exit(0 if asyncio.run(main()) == good else "it has changed")
PY
timeout 100 env/bin/python -W ignore seen.py
