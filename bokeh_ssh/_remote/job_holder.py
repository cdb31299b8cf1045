"""Hold a batch job: answer each connection with an SSH server of the account's own, and end with its client.

Runs on the node, as the batch script's own process, so that a signal for the job reaches it; or as a step of
a job that has a script of its own. Standard library only, Python 3.8 or newer, Linux. It reads one line of
JSON from standard input, which has no secret in it: ``client_key`` (the public half of the key), ``grace``,
``output``, ``job`` (the variable that has the job's number), ``step`` (whether it is such a step) and
``ways``: where one of them is not ``srun``, the login nodes are met in the home (``job_place``); ``tcp`` has
the holder listen on a port, and ``back`` has it connect to theirs.

A second socket is for news: each of its connections gets a line of JSON when the scheduler warns that the job
will end (``warned``), and when others come and go (``clients``). Each says a name first, the same after
a loss. One that says ``keep`` has the job stay without clients, until its time limit (``kept``).

The SSH server is the node's ``sshd -i``, run as the user, with a host key that is made here and a socket that
only the account reaches. What it starts is in the batch step, and outlives the connection that started it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time

from bokeh_ssh._remote import process_tree
from bokeh_ssh._remote.job_place import (
    DIAL,
    DOOR,
    NEWS,
    TokenListener,
    allow_key,
    answers,
    clear_job_places,
    connect,
    make_job_place,
    make_meeting_place,
    read_record,
    write_record,
)
from bokeh_ssh._remote.run_dir import TOUCH, WITHIN, candidates, private, remove_tree, usable

TYPE_CHECKING = False  # typing costs milliseconds of a start and is not needed to run
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

#: What a server is called in the account's directory of servers.
_ID = re.compile(r"[0-9a-f]{8}")
_PLACES = ("/usr/sbin", "/usr/local/sbin", "/sbin", "/usr/bin", "/usr/local/bin")
#: Variables of the job that its servers see; sshd starts them with none of its own.
_PASSED = re.compile(
    r"(SLURM|SLURMD|SGE|PBS|LSB|CUDA|ROCR|HIP|NVIDIA|GPU|ZE|OMP)_[A-Z0-9_]+"
    r"|TMPDIR|JOB_ID|JOB_NAME|QUEUE|NSLOTS|NHOSTS|PE|PE_HOSTFILE"
)
#: Values that need no quoting in sshd_config.
_CLEAN = re.compile(r"[\w.,:;/@%+=()\[\]-]+", re.ASCII)
_PATIENCE = 10.0  # seconds between TERM and KILL
_HURRY = 3.0  # the same where the scheduler ends the job: it may send KILL itself after 5
_FIRST = 60.0  # seconds for the first client, which asks every 30 s whether the job runs, and then logs in
_LOOK = 10.0  # seconds between two looks at the clock
_MEET = 2.0  # seconds between two looks for a login node that waits, while there is no client
_REACH = 3.0  # seconds for a connection to it
_LISTENERS = 100


def find_program(name: str) -> str:
    """Find a program, also where the job's PATH does not lead; empty where there is none."""
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(_PLACES)) or ""


def server_config(place: str, environment: dict[str, str]) -> str:
    """Write the sshd_config of the job's SSH server: one key gets in, and one user."""
    passed = [f"{name}={value}" for name, value in sorted(environment.items())]
    passed = [pair for pair in passed if _PASSED.fullmatch(pair.partition("=")[0]) and _CLEAN.fullmatch(pair)]
    lines = [
        f"HostKey {place}/host_key",
        f"AuthorizedKeysFile {place}/authorized_keys",
        "AuthenticationMethods publickey",
        "PasswordAuthentication no",
        "KbdInteractiveAuthentication no",
        "UsePAM no",
        "StrictModes no",  # the folder is looked at already, and its parents may be another's
        "PidFile none",
        "PrintMotd no",
        "PrintLastLog no",
        "X11Forwarding no",
        "AllowAgentForwarding no",
        "MaxSessions 100",
        # A client that vanished without a word must not keep the job. OpenSSH 9.2 asks every other time only,
        # so this takes 20 to 40 s; the client itself gives up after 15 s.
        "ClientAliveInterval 5",
        "ClientAliveCountMax 3",
        "Subsystem sftp internal-sftp",
    ]
    # Only the first SetEnv counts.
    return "\n".join(lines + (["SetEnv " + " ".join(passed)] if passed else [])) + "\n"


class Cleaner:
    """A process that calls a function, should the one that has started it be killed.

    :ivar pid: its number; 0 once it is no more
    """

    def __init__(self, clean: Callable[[], None]) -> None:
        waits, self._death_pipe = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
                    signal.signal(number, signal.SIG_IGN)
                os.close(self._death_pipe)
                os.read(waits, 1)  # until there is nobody who could write
                clean()
            finally:
                os._exit(0)
        os.close(waits)

    def dismiss(self) -> None:
        """End it."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)


class JobHolder:
    """What stays in the batch step while the job is of use."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.grace = float(order["grace"])
        self.client_key = str(order["client_key"])
        self.output = str(order.get("output", ""))
        self.job = os.environ.get(str(order["job"]), "").partition(".")[0]  # PBS: with the server's name
        self.ways = list(order["ways"])
        self.step = os.environ.get("SLURM_STEP_ID", "") if order["step"] else ""
        clear_job_places(self.job)
        self.place = make_job_place(self.job)
        self.meeting = make_meeting_place(self.job, self.place) if self.ways != ["srun"] else ""
        self.network = TokenListener() if "tcp" in self.ways else None
        self.sshd = ""
        self.clients: dict[int, tuple[subprocess.Popen[bytes], socket.socket]] = {}  # by the SSH server's id
        self.listeners: dict[socket.socket, bytes] = {}  # who is to get the news, with what they said first
        self.keep = False  # whether it stays without clients
        self.warned = False  # the scheduler's warning has come, and is to be passed on
        self.patience = max(self.grace, _FIRST)  # seconds without a client
        self.seen = time.monotonic()
        # What to end with, once that is ordered: Grid Engine's accounting knows such an end by it alone.
        self.status: int | None = None
        self.cleaner = Cleaner(self.remove_files)
        self.wakes, self.wake = os.pipe()
        for fd in (self.wakes, self.wake):
            os.set_blocking(fd, False)

    def prepare(self) -> str:
        """Make keys and settings; return why no SSH server can run here, empty where one can."""
        self.sshd, keygen = find_program("sshd"), find_program("ssh-keygen")
        if not self.sshd or not keygen:
            return f"there is no {'sshd' if not self.sshd else 'ssh-keygen'} on it"
        key = os.path.join(self.place, "host_key")
        # ECDSA: a machine in FIPS mode takes no Ed25519.
        made = subprocess.run(
            [keygen, "-q", "-t", "ecdsa", "-b", "256", "-N", "", "-C", "", "-f", key],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
        if made.returncode:
            return "ssh-keygen failed: " + made.stderr.decode("utf-8", "replace").strip()
        allow_key(self.place, self.client_key)
        why = self.configure(dict(os.environ))
        return self.configure({}) if why else ""  # before OpenSSH 7.8 there is no SetEnv

    @property
    def config(self) -> str:
        """The path of the SSH server's settings."""
        return os.path.join(self.place, "sshd_config")

    def configure(self, environment: dict[str, str]) -> str:
        """Write the server's settings; return what it says against them."""
        with open(self.config, "w", encoding="ascii") as file:
            file.write(server_config(self.place, environment))
        checked = subprocess.run(
            [self.sshd, "-t", "-f", self.config],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
        said = checked.stderr.decode("utf-8", "replace").strip()
        return f"its sshd refuses its settings: {said}" if checked.returncode else ""

    def run(self) -> int:
        """Serve until nobody needs it, or the job is to end."""
        with private():
            news, door = self.listen_at(NEWS), self.listen_at(DOOR)  # first: who answers has not been killed
            why = self.prepare()
        self.write_records(why)
        touched = time.monotonic()
        while self.status is None:
            now = time.monotonic()
            if self.clients:
                self.seen = now
            elif now - self.seen > self.patience and not self.keep:
                print(f"bokeh_ssh: no client for {self.patience:g} s, so the job ends")
                break
            if now - touched > TOUCH:
                touched = now
                self.touch()
            left = _LOOK if self.clients or self.keep else self.seen + self.patience - now
            wait = min(_LOOK, max(0.1, left))
            if self.meeting:
                wait = min(wait, _LOOK if self.clients else _MEET)
                self.meet()
            network = self.network.sources() if self.network else []
            sources: list[socket.socket | int] = [door, news, self.wakes, *self.listeners, *network]
            ready = select.select(sources, [], [], wait)[0]
            if self.wakes in ready:
                os.read(self.wakes, 1 << 12)
                self.reap()
            if self.warned:
                self.warned = False
                self.send(event="warned")
            if door in ready:
                with contextlib.suppress(OSError):
                    self.serve(door.accept()[0])
            for client in self.network.take(ready) if self.network else ():
                self.serve(client)
            for listener in list(self.listeners):
                if listener in ready:
                    self.hear(listener)
            if news in ready and len(self.listeners) < _LISTENERS:
                with contextlib.suppress(OSError):
                    self.listeners[news.accept()[0]] = b""
        door.close()
        return self.status or 0

    def write_records(self, why: str) -> None:
        """Write what clients have to know, where they look for it.

        :param why: why no SSH server can run here; empty where one can
        """
        record = {"node": os.uname().nodename, "user": pwd.getpwuid(os.getuid()).pw_name, "why": why}
        record.update(step=self.step, client_key=self.client_key)
        record["news"] = os.path.join(self.place, NEWS)
        if self.network:
            record.update(port=self.network.port, word=self.network.word)
        if not why:
            with open(os.path.join(self.place, "host_key.pub"), encoding="ascii") as file:
                record["host_key"] = " ".join(file.read().split()[:2])
        for place in filter(None, (self.place, self.meeting)):
            write_record(place, record)

    def touch(self) -> None:
        """Keep what cleans /tmp by age away."""
        for path in (self.place, *(os.path.join(self.place, each) for each in os.listdir(self.place))):
            with contextlib.suppress(OSError):
                os.utime(path)

    def listen_at(self, name: str) -> socket.socket:
        """Listen on a socket in the job's place."""
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(os.path.join(self.place, name))
        sock.listen(64)
        sock.setblocking(False)
        return sock

    def send(self, **message: object) -> None:
        """Say something to all who listen."""
        for listener in self.listeners:
            with contextlib.suppress(OSError):
                listener.send(json.dumps(message).encode() + b"\n", socket.MSG_DONTWAIT)

    def hear(self, listener: socket.socket) -> None:
        """Take a word of one who listens, or its end."""
        try:
            said = listener.recv(1 << 10)
        except OSError:
            said = b""
        if not said:
            del self.listeners[listener]
            listener.close()
        elif not self.listeners[listener]:
            self.listeners[listener] = said
        if b"keep" in said:
            self.keep = True
            self.send(event="kept")
        self.send(event="clients", count=len(set(self.listeners.values()) - {b""}))

    def meet(self) -> None:
        """Connect to the login nodes that wait for that."""
        with contextlib.suppress(OSError):
            for name in os.listdir(self.meeting):
                if name.startswith(DIAL):
                    ends = read_record(self.meeting, name)
                    os.unlink(os.path.join(self.meeting, name))
                    client = connect(ends["hosts"], ends["port"], ends["word"], _REACH)
                    if client:
                        self.serve(client)

    def serve(self, client: socket.socket) -> None:
        """Start an SSH server for a connection."""
        client.setblocking(True)
        words, fd = [self.sshd, "-i", "-f", self.config], client.fileno()
        try:
            made = subprocess.Popen(words, stdin=fd, stdout=fd, stderr=subprocess.DEVNULL)
        except OSError as exc:  # no memory, too many processes: the next one may do better
            print(f"bokeh_ssh: sshd cannot be started ({exc})")
            client.close()
            return
        self.clients[made.pid] = made, client
        self.patience = self.grace

    def reap(self) -> None:
        """Take note of who has ended: SSH servers, and what theirs have left to us."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    break
                self.cleaner.pid = 0 if pid == self.cleaner.pid else self.cleaner.pid
                ended = self.clients.pop(pid, None)
                if ended:
                    sshd, client = ended
                    sshd.returncode = status
                    client.close()
                    self.seen = time.monotonic()

    def on_signal(self, number: int, frame: object) -> None:
        """End the job; or pass a warning on, which comes before its time limit."""
        if number == signal.SIGUSR1 or (number == signal.SIGUSR2 and self.step):  # what its user has chosen
            self.warned = True
        else:
            self.status = 128 + number if number == signal.SIGUSR2 else 0

    def listen(self) -> None:
        """Take signals, and adopt what the SSH servers leave."""
        process_tree.adopt()
        signal.set_wakeup_fd(self.wake, warn_on_full_buffer=False)
        # USR2: Grid Engine's word before KILL.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self.on_signal)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def finish(self) -> None:
        """End all that runs in the job, and leave no file."""
        for _, client in self.clients.values():  # first: what ends it is the job's end, not the server's own
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.cleaner.dismiss()
        mine = process_tree.below(os.getpid(), process_tree.table())
        servers = {os.fsdecode(value) for value in process_tree.values(WITHIN.encode(), mine)}
        patience = _PATIENCE if self.status is None else _HURRY
        process_tree.end(lambda rows: process_tree.below(os.getpid(), rows), patience)
        for folder in candidates() if servers else ():  # what those whose patience was over have left
            for name in servers:
                if _ID.fullmatch(name) and not usable(folder):
                    remove_tree(os.path.join(folder, name))
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        self.remove_files()

    def remove_files(self) -> None:
        """Leave no file of the holder's own."""
        for place in filter(None, (self.meeting, self.place)):
            remove_tree(place)
        if self.output:
            with contextlib.suppress(OSError):
                os.unlink(os.path.expanduser(self.output).replace("%j", self.job))


def main() -> None:
    """Read the order and hold the job."""
    order = json.loads(sys.stdin.buffer.read())
    if order["step"] and answers(os.environ.get(str(order["job"]), "")):
        return  # another client was faster
    holder = JobHolder(order)
    try:
        holder.listen()
        status = holder.run()
    finally:
        holder.finish()
    sys.exit(status)
