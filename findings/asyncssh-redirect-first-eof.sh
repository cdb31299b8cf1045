#!/usr/bin/env bash
# asyncssh 2.24.1, server side: SSHServerProcess.redirect(stdin, stdout, stderr) ends the SSH channel's data at the
# FIRST of the two output streams to end. A command that closes its standard error early and goes on writing to
# standard output (or the other way round) loses all it writes from then on, and its exit status with it: the
# client sees an empty result, status None. A command that exits without output keeps its status.
#
# Seen with the redirect() of asyncssh's own documentation, default arguments, the client asyncssh too:
#
#   closes nothing, writes                     b'out\n' b'' 0
#   closes stderr, then writes to stdout       b''      b'' None     <- 'out' and the status 0 are lost
#   closes stdout, then writes to stderr       b''      b'' None     <- 'err' and the status 0 are lost
#   closes stderr, then exits with 7           b''      b'' 7
#
# With send_eof=False, and one write_eof() after both have ended, nothing is lost (the control below).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check asyncssh==2.24.1

cat > seen.py <<'PY'
import asyncio
import sys

import asyncssh

PIPE = asyncio.subprocess.PIPE
COMMANDS = {
    "closes nothing, writes": "echo out",
    "closes stderr, then writes to stdout": "exec 2>&-; read go; echo out",
    "closes stdout, then writes to stderr": "exec >&-; read go; echo err >&2",
    "closes stderr, then exits with 7": "exec 2>&-; exit 7",
}


class Server(asyncssh.SSHServer):
    def begin_auth(self, username: str) -> bool:
        return False


async def serve(process: asyncssh.SSHServerProcess, options: dict) -> None:
    child = await asyncio.create_subprocess_shell(process.command, stdin=PIPE, stdout=PIPE, stderr=PIPE)
    await process.redirect(child.stdin, child.stdout, child.stderr, **options)
    process.exit(await child.wait())


async def run(options: dict) -> list[tuple]:
    key = asyncssh.generate_private_key("ssh-ed25519")
    server = await asyncssh.create_server(
        Server, "127.0.0.1", 0, server_host_keys=[key], encoding=None,
        process_factory=lambda process: serve(process, options),
    )
    port = server.sockets[0].getsockname()[1]
    seen = []
    for name, command in COMMANDS.items():
        async with asyncssh.connect(
            "127.0.0.1", port, username="me", known_hosts=None, config=None, client_keys=None
        ) as connection:
            process = await connection.create_process(command, encoding=None)
            if "read go" in command:
                await asyncio.sleep(1)  # what it closes is closed by now
                process.stdin.write(b"go\n")
            done = await asyncio.wait_for(process.wait(), 20)
            seen.append((done.stdout, done.stderr, done.exit_status))
            print(f"{name:40} {done.stdout!r:9} {done.stderr!r:9} {done.exit_status}")
    server.close()
    return seen


lost = asyncio.run(run({}))
print("send_eof=False:")
kept = asyncio.run(run({"send_eof": False}))
good = [(b"out\n", b"", 0), (b"out\n", b"", 0), (b"", b"err\n", 0), (b"", b"", 7)]
bad = [(b"out\n", b"", 0), (b"", b"", None), (b"", b"", None), (b"", b"", 7)]
sys.exit(0 if lost == bad and kept == good else "it has changed")
PY
timeout 120 env/bin/python -W ignore seen.py
