"""Ask a scheduler for its client, and cancel a job that still waits when the client has gone.

Runs on the login node: standard library only, Python 3.8 or newer. It knows no scheduler: the client sends
the commands, and reads what they say. The first line of JSON on standard input has ``mark``, ``grace``,
``programs``, ``silence`` (seconds without a question after which a client whose job waits is gone) and
``renewal`` (seconds between two renewals); each further one is an order:

- ``run``: run ``argv`` with ``input``, answer ``ran`` with ``id``, ``status``, ``out`` and ``err``. With
  ``guard`` it submits a job, whose number in the output stands for ``{job}`` in the guard.
- ``ask``: likewise, with the numbers of all jobs that the account's wardens here wait for in place of
  ``{jobs}``; or answer with what one of them has heard of ``job`` in the last ``fresh`` seconds. Its age in
  seconds is ``age``. With ``waits``, the job waited when it was last seen: a client that asks no more is
  gone, also where its connection does not end; and ``renew`` is run at times, which writes into the comment
  until when (``{until}``) nobody but this warden is to cancel the job.
- ``guard``: look after a job that is there: when the client has been gone for ``grace`` seconds, ``check`` is
  run, which says a state and a comment. Where the state is one of ``waits``, and the comment is ``mine``,
  renewed or not, or does not begin with ``claim``, which is another warden's, ``cancel`` is run.
- ``inherit``: cancel those of these jobs that still wait though nobody has renewed them in time: the warden
  of each was killed, or its machine was.
- ``end``: cancel the job now, and see to it that this was heard; answer ``ended``.
- ``release``: look after nothing any more.

Commands run beside each other, since each may hang while the scheduler is not there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import select
import shutil
import signal
import subprocess
import threading
import time

from bokeh_ssh._remote.run_dir import candidates, found

TYPE_CHECKING = False  # typing costs milliseconds of a start and is not needed to run
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, NoReturn

#: A job's number, alone in a line; with a cluster's name behind it, as ``sbatch --parsable`` says it.
_NUMBER = re.compile(r"^(\d+)(?:;[\w.-]+)?$", re.M)
#: What a scheduler needs to be set, beside the PATH.
_SETTING = re.compile(
    r"PATH|SGE_(ROOT|CELL|CLUSTER_NAME|QMASTER_PORT|EXECD_PORT)|SLURM_CONF|MUNGE_SOCKET"
    r"|PBS_(CONF_FILE|EXEC|SERVER|DEFAULT)|LSF_(ENVDIR|SERVERDIR|BINDIR|LIBDIR)"
)
#: What people set for their own commands, which changes what ours do and say.
_MISLEADING = re.compile(
    r"SQUEUE_|SCANCEL_|SACCT_|SRUN_|SLURM_(?!CONF$)"
    r"|SBATCH_(ARRAY_INX|WAIT|CLUSTERS|DEBUG)$|SGE_(LONG_QNAMES|SINGLE_LINE)$"
    r"|PBS_(DPREFIX|QSTAT_\w+)$|BSUB_(BLOCK|CHK_RESREQ|QUIET2?|STDERR)$|LSB_(BJOBS_\w+|HMS)$"
)
_WITH_JOB = ("check", "cancel", "renew")  # the commands of a guard
_LONGEST = 1 << 20  # characters of an answer that are passed on
_TIMEOUT = 30.0  # seconds for a command, where the order has no time
_AGAIN = 15.0  # seconds between two tries to reach a scheduler that does not answer
_TRIES = 240  # an hour of them
_LEASE = 600.0  # seconds for which a job is renewed, at least: clocks of a cluster differ by less
#: At the end of a comment: until when its warden has renewed it.
_UNTIL = re.compile(r"t(\d{10,12})$")
_ANSWER = "queue"  # the file with the last answer, where the account's servers are found
_TURN = 5.0  # seconds for another warden's question, before one is asked that nobody shares
_WAITED_FOR = 90.0  # seconds after which a job that nobody has asked for is in no question any more


def login_settings(programs: list[str]) -> dict[str, str]:
    """Return what a login shell has set for a scheduler, where it finds one of the programs; see _SETTING."""
    text = f"command -v {' '.join(programs)} >/dev/null; exec env -0"
    for shell in ("bash", "sh"):
        try:
            done = subprocess.run(
                [shell, "-lc", text],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_TIMEOUT,
                check=False,
            )
        except (OSError, subprocess.SubprocessError):
            continue
        pairs = [os.fsdecode(pair).partition("=") for pair in done.stdout.split(b"\0")]
        # What a start file says stands before the first one, which is none of these or is lost.
        found = {name: value for name, _, value in pairs if _SETTING.fullmatch(name)}
        if any(shutil.which(program, path=found.get("PATH")) for program in programs):
            return found
    return {}


class SharedAnswer:
    """What the scheduler has said last, for all wardens of this account on this machine.

    A file has it, and which jobs are waited for. Whoever has the lock asks; it is the kernel's, so that one
    that is killed holds up nobody.
    """

    def __init__(self) -> None:
        self.key: object = None  # of the same scheduler, asked in the same words; None: nothing was asked

    def ask(self, order: dict[str, Any], run: Any) -> dict[str, Any]:
        """Return status, output, errors and age of an answer about the job; see the module."""
        settings = {name: os.environ[name] for name in sorted(os.environ) if _SETTING.fullmatch(name)}
        job, self.key = order["job"], [order["argv"], settings]
        with self.locked() as folder:
            jobs, answer = self.read(folder)
            now = time.time()
            jobs[job] = [os.getpid(), now]
            age = now - answer.get("at", 0.0)
            if job not in answer.get("of", ()) or not 0 <= age < order["fresh"]:
                argv = [word.replace("{jobs}", ",".join(jobs)) for word in order["argv"]]
                status, out, err = run(argv, timeout=order["timeout"])
                answer = {"status": status, "out": out, "err": err, "of": list(jobs), "at": time.time()}
                age = 0.0
            self.write(folder, jobs, answer)
        return {**{name: answer[name] for name in ("status", "out", "err")}, "age": age}

    def leave(self) -> None:
        """Wait for no job; the last one leaves no file."""
        if self.key is None:
            return
        with self.locked() as folder:
            jobs, answer = self.read(folder)
            if jobs:
                self.write(folder, jobs, answer)
            elif folder is not None:
                with contextlib.suppress(OSError):
                    os.unlink(_ANSWER, dir_fd=folder)
        for root in candidates():
            with contextlib.suppress(OSError):
                os.rmdir(root)  # servers may be in it

    @contextlib.contextmanager
    def locked(self) -> Iterator[int | None]:
        """Open the folder with the file, for one at a time; None where there is none, or another is slow."""
        root = next((root for root in candidates() if not found(root)), None)
        folder, locked, until = None, False, time.monotonic() + _TURN
        try:
            with contextlib.suppress(OSError):
                folder = os.open(root or "", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            while folder is not None and not locked and time.monotonic() < until:
                try:
                    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    locked = True
                except BlockingIOError:
                    time.sleep(0.05)
                except OSError:  # a file system without
                    break
            yield folder if locked else None
        finally:
            if folder is not None:
                os.close(folder)

    def read(self, folder: int | None) -> tuple[dict[str, list[Any]], dict[str, Any]]:
        """Read the jobs that others wait for, each with its process and a time; and the last answer."""
        try:
            assert folder is not None
            with open(os.open(_ANSWER, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)) as file:
                known = json.load(file)
            if known["key"] != self.key:
                return {}, {}
            now = time.time()
            jobs = {}
            for job, (pid, at) in known["jobs"].items():
                with contextlib.suppress(OSError):  # it was killed
                    os.kill(pid, 0)
                    if pid != os.getpid() and 0 <= now - at < _WAITED_FOR:
                        jobs[job] = [pid, at]
            return jobs, known["answer"]
        except (AssertionError, AttributeError, OSError, ValueError, KeyError, TypeError):
            return {}, {}

    def write(self, folder: int | None, jobs: dict[str, list[Any]], answer: dict[str, Any]) -> None:
        """Write it; a full disk costs no more than the sharing."""
        if folder is None:
            return
        how = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        with contextlib.suppress(OSError), open(os.open(_ANSWER, how, 0o600, dir_fd=folder), "w") as file:
            json.dump({"key": self.key, "jobs": jobs, "answer": answer}, file)  # in ASCII


class Warden:
    """One client's."""

    def __init__(self, head: dict[str, Any]) -> None:
        self.mark = str(head["mark"])
        self.grace = float(head["grace"])
        self.silence = max(self.grace, float(head["silence"]))
        self.renewal = float(head["renewal"])
        self.guard: dict[str, Any] | None = None
        self.asked: float | None = None  # when the client has asked last, while its job waits
        self.renewed = 0.0
        self.inherited: list[dict[str, Any]] = []
        self.submitting: list[threading.Thread] = []
        self.ending: list[threading.Thread] = []
        self.inheriting: list[threading.Thread] = []
        self.lock = threading.Lock()
        self.shared = SharedAnswer()
        for name in [name for name in os.environ if _MISLEADING.match(name)]:
            del os.environ[name]
        names = [str(name) for name in head["programs"]]
        if not any(map(shutil.which, names)):
            os.environ.update(login_settings(names))
        found = [name for name in names if shutil.which(name)]
        self.send("found", programs=found, path=os.environ.get("PATH", ""))

    def send(self, event: str, **facts: object) -> None:
        """Say something to the client; that it is gone is noticed elsewhere."""
        line = (self.mark + json.dumps({"event": event, **facts}) + "\n").encode("ascii")
        with self.lock:
            try:
                while line:
                    line = line[os.write(1, line) :]
            except OSError:
                pass

    def run(self, argv: list[str], text: str = "", timeout: float = _TIMEOUT) -> tuple[int, str, str]:
        """Run a command; its status (127: there is none, 124: it did not end in time), output and errors."""
        try:
            done = subprocess.run(
                argv, input=text.encode(), capture_output=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired:
            return 124, "", f"{argv[0]} did not end within {timeout:g} s"
        except OSError as exc:
            return 127, "", f"{argv[0]}: {exc.strerror or exc}"
        out, err = (part.decode("utf-8", "replace")[:_LONGEST] for part in (done.stdout, done.stderr))
        return done.returncode, out, err

    def do_run(self, order: dict[str, Any]) -> None:
        """Run a command for the client."""
        thread = threading.Thread(target=self.answer, args=(order,), daemon=True)
        if "guard" in order:
            self.submitting.append(thread)
        thread.start()

    def answer(self, order: dict[str, Any]) -> None:
        """Run a command, and say what came of it."""
        timeout = float(order.get("timeout", _TIMEOUT))
        status, out, err = self.run(order["argv"], order.get("input", ""), timeout)
        guard = order.get("guard")
        found = _NUMBER.search(out) if guard and not status else None
        if guard and found:
            self.look_after(fill_in(guard, found.group(1)))
        self.send("ran", id=order["id"], status=status, out=out, err=err)

    def do_ask(self, order: dict[str, Any]) -> None:
        """Ask what a job does, or take what another warden has heard."""
        self.asked = time.monotonic() if order["waits"] else None

        def answer() -> None:
            self.send("ran", id=order["id"], **self.shared.ask(order, self.run))
            if order["waits"]:
                self.renew()

        threading.Thread(target=answer, daemon=True).start()

    def renew(self) -> None:
        """Let the account's other wardens know that there is one for the job."""
        guard, now = self.guard, time.monotonic()
        if guard and now > self.renewed + self.renewal:
            until = str(int(time.time() + max(_LEASE, self.silence) + 2 * self.renewal))
            if not self.run([word.replace("{until}", until) for word in guard["renew"]])[0]:
                self.renewed = now

    def do_guard(self, order: dict[str, Any]) -> None:
        """Look after a job that is there."""
        self.look_after(order["guard"])

    def look_after(self, guard: dict[str, Any]) -> None:
        """Look after a job, which is another one than before, or has another comment."""
        self.guard, self.asked = guard, time.monotonic()
        self.renewed = time.monotonic() - 0.8 * self.renewal  # a short wait is not worth one

    def do_inherit(self, order: dict[str, Any]) -> None:
        """Look which jobs have nobody."""
        thread = threading.Thread(target=self.inherit, args=(order["guards"],), daemon=True)
        self.inheriting.append(thread)
        thread.start()

    def inherit(self, guards: list[dict[str, Any]]) -> None:
        """Look after the jobs that nobody has renewed in time."""
        for guard in guards:
            status, out, _ = self.run(guard["check"])
            comment = "" if status else find_expired(guard, out)
            if comment:
                guard = {**guard, "mine": comment, "claim": ""}  # renewed after all, it is another's
                self.inherited.append(guard)
                threading.Thread(target=self.follow, args=(guard, self.renewal), daemon=True).start()

    def do_release(self, order: dict[str, Any]) -> None:
        """Look after nothing."""
        self.guard = None

    def do_end(self, order: dict[str, Any]) -> None:
        """Cancel the job, whatever state it is in."""
        thread = threading.Thread(target=self.end_now, daemon=True)
        self.ending.append(thread)
        thread.start()

    def end_now(self) -> None:
        """Cancel the job, once it is known which one it is."""
        for thread in self.submitting:
            thread.join()
        guard, self.guard = self.guard, None
        if guard is None:
            self.send("ended", status=0, err="")
            return
        status, _, err = self.run(guard["cancel"])
        if status:  # the scheduler does not answer: it is asked on when the client has gone
            self.guard = {**guard, "now": True}
        self.send("ended", status=status, err=err)

    def patience(self) -> float:
        """Return in how many seconds to look whether the client asks on."""
        if self.guard is None or self.asked is None:
            return self.silence
        return max(0.0, self.asked + self.silence - time.monotonic())

    def on_silence(self) -> None:
        """Cancel the job of a client that has vanished without a word."""
        guard, asked = self.guard, self.asked
        if guard and asked is not None and time.monotonic() >= asked + self.silence:
            self.asked = None if self.settle(guard) else asked + _AGAIN

    def settle(self, guard: dict[str, Any]) -> bool:
        """Cancel a job that still waits; return False where the scheduler does not answer."""
        waits = guard.get("now") or self.waits(guard)
        return not self.run(guard["cancel"])[0] if waits else waits is not None

    def waits(self, guard: dict[str, Any]) -> bool | None:
        """Return whether a job waits, and is ours to cancel; None where the scheduler does not answer."""
        status, out, _ = self.run(guard["check"])
        return None if status else still_waits(guard, out)

    def follow(self, guard: dict[str, Any], pause: float) -> None:
        """Cancel a job that still waits after some seconds.

        One that runs ends by itself, and one that another warden has taken over is that one's: there is
        nothing to stay for.
        """
        soon = min(pause, _AGAIN)
        time.sleep(soon)
        if soon < pause:
            if self.waits(guard) is False:
                return
            time.sleep(pause - soon)
        for _ in range(_TRIES):
            if self.settle(guard):
                break
            time.sleep(_AGAIN)

    def outlive(self) -> NoReturn:
        """Go on without the client, in a session of its own, until the job needs nobody to look after it."""
        for thread in self.submitting + self.ending + self.inheriting:
            thread.join()
        self.shared.leave()
        jobs = [(guard, self.renewal) for guard in self.inherited]
        if self.guard:
            jobs.append((self.guard, 0.0 if self.guard.get("now") else self.grace))
        if not jobs or os.fork():
            os._exit(0)
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(null, stream)
        os.closerange(3, 256)  # the lock of a question that has no answer yet
        threads = [threading.Thread(target=self.follow, args=job) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        os._exit(0)


def find_expired(guard: dict[str, Any], out: str) -> str:
    """Return the comment of a job that waits, and that its warden has not renewed in time; or nothing."""
    for line in out.splitlines():
        state, _, comment = line.partition(" ")
        until = _UNTIL.search(comment)
        if state in guard["waits"] and comment.startswith(guard["claim"]) and until:
            return comment if int(until.group(1)) < time.time() else ""
    return ""


def still_waits(guard: dict[str, Any], out: str) -> bool:
    """Return whether a job waits, by a line of state and comment, and no other warden looks after it."""
    for line in out.splitlines():
        state, _, comment = line.partition(" ")
        if state in guard["waits"]:
            mine = _UNTIL.sub("", comment) == guard["mine"] or comment == guard["mine"]
            return mine or not comment.startswith(guard["claim"])
    return False


def fill_in(guard: dict[str, Any], job: str) -> dict[str, Any]:
    """Put a job's number where ``{job}`` stands."""
    filled = {name: [word.replace("{job}", job) for word in guard[name]] for name in _WITH_JOB}
    return {**guard, **filled}


def read_line(rest: bytearray, warden: Warden | None = None) -> bytes:
    """Read one line; empty at the end."""
    while b"\n" not in rest:
        while warden and not select.select([0], [], [], warden.patience())[0]:
            warden.on_silence()
        data = os.read(0, 1 << 16)
        if not data:
            return b""
        rest += data
    line, _, left = bytes(rest).partition(b"\n")
    rest[:] = left
    return line


def main() -> NoReturn:
    """Take orders until the client has gone; then look after its job."""
    for number in (signal.SIGHUP, signal.SIGPIPE, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    rest = bytearray()
    warden = Warden(json.loads(read_line(rest)))
    while True:
        try:
            line = read_line(rest, warden)
        except OSError:
            line = b""
        if not line:
            warden.outlive()
        order = json.loads(line)
        getattr(warden, "do_" + order["do"])(order)
