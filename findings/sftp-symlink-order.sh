#!/usr/bin/env bash
# One SFTP request, five clients, three servers: a symbolic link points the wrong way round, or is not made at all.
#
# SFTP's draft has the new link first and its target second in SSH_FXP_SYMLINK; OpenSSH's server reads them the other
# way round (its PROTOCOL file: "the order of the arguments to the SSH_FXP_SYMLINK method was inadvertently reversed").
# asyncssh and libssh swap them for that where the SSH server's banner says OpenSSH. But the banner is not the SFTP
# server's: Dropbear, on routers and small machines, has none of its own and runs OpenSSH's sftp-server. There,
# symlink("run-7", "latest") fails with "Failure" where run-7 exists. Where it does not exist yet, the link is made by
# the name of run-7 and leads to latest, without an error: what then saves run-7 writes to a file called latest.
# The same with a server that looks at the client's banner: asyncssh's knows OpenSSH and paramiko by it, and not libssh2
# (curl, ssh2-python, parallel-ssh), which has OpenSSH's order too.
#
# asyncssh's documentation of symlink(oldpath, newpath): "The path the link should point to; The path of where to create
# the remote symbolic link".
# What helps: `ln -s` by a command; readlink() after symlink().
#
# Seen, symlink("run-7", "latest"), run-7 being there, and symlink("run-8", "next"), run-8 not:
#
#                        OpenSSH      Dropbear                     asyncssh's server
#   sftp (OpenSSH 9.2)   right right  right right                  right right
#   paramiko 5.1.0       right right  right right                  right right
#   libssh2 (ssh2-...)   right right  right right                  error "run-8 -> next"
#   libssh (ssh-python)  right right  error "run-8 -> next"        right right
#   asyncssh 2.24.1      right right  error "run-8 -> next"        right right
#
# Runs on Debian 12 as root, with dropbear-bin, openssh-sftp-server, openssh-server and openssh-client.
set -euo pipefail
work=$(mktemp -d)
pids=()
trap 'for pid in "${pids[@]}"; do kill "$pid" 2> /dev/null || true; done; rm -rf "$work"' EXIT
cd "$work"
for package in dropbear-bin=2022.83-1+deb12u3 openssh-sftp-server openssh-server; do
    dpkg-query -W -f '${Status}' "${package%%=*}" 2> /dev/null | grep -q 'ok installed' && continue
    RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "$package" > apt.log 2>&1 || { cat apt.log && exit 1; }
done
dropbear=$(PATH="$PATH:/usr/sbin" command -v dropbear)
"$dropbear" -V 2>&1 | grep -F v2022.83
ssh -V
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check asyncssh==2.24.1 paramiko==5.1.0 ssh2-python==1.2.0.post1 \
    ssh-python==1.2.0.post1
for name in host_key user; do ssh-keygen -q -t ed25519 -N '' -f $name; done
free() { python3 -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])'; }
sshd_port=$(free)
printf '%s\n' "ListenAddress 127.0.0.1" "Port $sshd_port" "HostKey $work/host_key" "AuthorizedKeysFile $work/user.pub" \
    "PidFile none" "StrictModes no" "UsePAM no" "Subsystem sftp internal-sftp" > sshd_config
mkdir -p /run/sshd
/usr/sbin/sshd -D -e -f "$work/sshd_config" 2> sshd.log &
pids+=($!)
# Dropbear reads the account's own ~/.ssh alone: in a mount namespace of its own, an empty one lies over it.
mkdir -m 700 -p home home/.ssh
cp user.pub home/.ssh/authorized_keys
chmod 600 home/.ssh/authorized_keys
dropbearkey -t rsa -s 2048 -f dropbear_key > /dev/null 2>&1
dropbear_port=$(free)
unshare -m sh -c 'mount --bind home "$1" && exec "$2" -F -E -s -r dropbear_key -p "127.0.0.1:$3" -P pid' sh \
    "$(getent passwd "$(id -u)" | cut -d : -f 6)" "$dropbear" "$dropbear_port" 2> dropbear.log &
pids+=($!)

cat > server.py <<'PY'
import asyncio
from pathlib import Path

import asyncssh


class Server(asyncssh.SSHServer):
    def begin_auth(self, username: str) -> bool:
        return False


async def main() -> None:
    options = {"server_host_keys": ["host_key"], "server_factory": Server, "sftp_factory": True}
    listener = await asyncssh.listen("127.0.0.1", 0, **options)
    Path("port.new").write_text(str(listener.get_port()))
    Path("port.new").rename("port")
    await listener.wait_closed()


asyncio.run(main())
PY
env/bin/python server.py &
pids+=($!)

cat > seen.py <<'PY'
import asyncio
import getpass
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import asyncssh
import paramiko
from ssh import options
from ssh.key import import_privkey_file
from ssh.session import Session as LibsshSession
from ssh2.session import Session as Libssh2Session

USER = getpass.getuser()
FOLDER = Path("links").absolute()
PAIRS = [(f"{FOLDER}/{target}", f"{FOLDER}/{link}") for target, link in (("run-7", "latest"), ("run-8", "next"))]


def connected(port: int) -> socket.socket:
    until = time.monotonic() + 30
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=30)
        except ConnectionRefusedError:
            assert time.monotonic() < until
            time.sleep(0.1)


def each(symlink: Callable[[str, str], object]) -> None:
    for target, link in PAIRS:
        try:
            symlink(target, link)
        except Exception:  # each library has its own
            (FOLDER / f"error {Path(link).name}").touch()


def by_sftp(port: int) -> None:
    words = ["sftp", "-b", "-", "-F", "none", "-i", "user", "-P", str(port), "-oStrictHostKeyChecking=no",
             "-oUserKnownHostsFile=/dev/null", f"{USER}@127.0.0.1"]
    each(lambda *pair: subprocess.run(words, input=f"symlink {' '.join(pair)}\n", text=True, check=True, timeout=30,
                                      capture_output=True))


def by_paramiko(port: int) -> None:
    with paramiko.SSHClient() as client:
        client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
        client.connect("127.0.0.1", port, USER, key_filename="user", allow_agent=False, look_for_keys=False)
        each(client.open_sftp().symlink)


def by_libssh2(port: int) -> None:
    session = Libssh2Session()
    session.handshake(connected(port))
    if not session.userauth_list(USER):
        assert session.userauth_authenticated()
    else:
        session.userauth_publickey_fromfile(USER, "user", "", "user.pub")
    each(session.sftp_init().symlink)


def by_libssh(port: int) -> None:
    session = LibsshSession()
    session.options_set(options.HOST, "127.0.0.1")
    session.options_set(options.USER, USER)
    session.options_set_port(port)
    session.set_socket(connected(port))
    session.connect()
    try:
        session.userauth_none()
    except Exception:
        session.userauth_publickey(import_privkey_file("user"))
    sftp = session.sftp_new()
    sftp.init()
    each(sftp.symlink)


def by_asyncssh(port: int) -> None:
    async def links() -> None:
        login = {"username": USER, "client_keys": ["user"], "known_hosts": None, "config": None}
        async with asyncssh.connect("127.0.0.1", port, **login) as connection, connection.start_sftp_client() as sftp:
            for target, link in PAIRS:
                try:
                    await sftp.symlink(target, link)
                except asyncssh.SFTPError:
                    (FOLDER / f"error {Path(link).name}").touch()

    asyncio.run(links())


def outcome(target: str, link: str) -> str:
    """Return whether link leads to target; otherwise what is there, and whether there was an error."""
    there, wrong = Path(link), Path(target)
    if there.is_symlink() and str(there.readlink()) == target:
        return "right"
    if wrong.is_symlink():
        return f'"{wrong.name} -> {wrong.readlink().name}"'
    return "error" if (FOLDER / f"error {there.name}").exists() else "nothing"


clients = {"sftp": by_sftp, "paramiko": by_paramiko, "libssh2": by_libssh2, "libssh": by_libssh,
           "asyncssh": by_asyncssh}
ports = dict(zip(("OpenSSH", "Dropbear", "asyncssh"), map(int, sys.argv[1:]), strict=True))
good = True
for name, client in clients.items():
    row = []
    for server, port in ports.items():
        connected(port).close()
        FOLDER.mkdir()
        (FOLDER / "run-7").touch()
        client(port)
        row.append(" ".join(outcome(*pair) for pair in PAIRS))
        subprocess.run(["rm", "-r", FOLDER], check=True)
        swapped = (name, server) in {("libssh2", "asyncssh"), ("libssh", "Dropbear"), ("asyncssh", "Dropbear")}
        good = good and row[-1] == ('error "run-8 -> next"' if swapped else "right right")
    print(f"{name:8}  {row[0]:22}  {row[1]:22}  {row[2]}")
sys.exit(0 if good else "it has changed")
PY
for _ in $(seq 300); do [ ! -e port ] || break; sleep 0.1; done
timeout 200 env/bin/python -W ignore seen.py "$sshd_port" "$dropbear_port" "$(cat port)"
