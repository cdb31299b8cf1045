"""Why a server did not start: from what was seen on the way to one typed error. Text only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from bokeh_ssh._core.errors import (
    MEMORY_HINT,
    BokehNotFoundError,
    BokehSSHError,
    ConnectionLostError,
    LaunchError,
    LaunchTimeoutError,
    PortInUseError,
    PythonNotFoundError,
    ServerExitedError,
    ServerGoneError,
    ServerNotFoundError,
    ServerTakenError,
    SessionError,
    UploadError,
    describe_kill,
)
from bokeh_ssh._core.framing import plain
from bokeh_ssh._core.settings import setting
from bokeh_ssh._server.launch_spec import OLDEST_BOKEH, OLDEST_PYTHON, Launch
from bokeh_ssh._server.log_parsing import is_windows, port_in_use, port_told, reason
from bokeh_ssh._server.server_state import Evidence, Stage, read_memory

#: What OpenSSH and PAM say of a password that has run out, and programs where there is no terminal.
_EXPIRED = re.compile(
    r"(?i)password.{0,40}expired|expired.{0,40}password|change.{0,20}password|password change"
)
_NO_TERMINAL = re.compile(r"(?i)not a (terminal|tty)|connected to a terminal|inappropriate ioctl|no tty")
#: A shell's complaint about a line of a start file: `/home/me/.bashrc: line 3: exec: tmux: not found`.
_START_FILE = re.compile(r"(rc|profile|login|env|config\.fish)(:| \()(\s?line )?\s?\d+")
#: A shell or Python for which the account, or the machine, has no more processes, memory or files.
_SCARCE = re.compile(
    r"(?i)cannot fork|fork: |cannot allocate memory|memoryerror|can't start new thread|too many open files"
    r"|pthread_create failed|memory allocation still failed"
)
#: What comes of `exec $SSH_ORIGINAL_COMMAND`, which takes each word as it is, quotes and all.
_UNQUOTED = re.compile(r"exec: exec: |not found: exec$|hello;: (-c: )?(line )?\d{1,4}: ")
_RESTRICTED = re.compile(r"exec: restricted$")
#: What Python says of variables that it does not start with.
_FATAL = re.compile(r"Fatal Python error|PYTHONHOME = '")
#: What shells say of a program that they have found, whose own interpreter is not there.
_NO_INTERPRETER = re.compile(
    r"exec: (line \d{1,4}: )?/[^:]+: not found|required file not found|bad interpreter"
)
_NO_DEVICES = re.compile(r"/dev/null: (No such file|Permission denied|No such device)")
#: What a wrapper in the place of Python has to do.
_WRAPPER_HINT = (
    f"; a script in {setting('python=')} has to pass on its arguments, input and output "
    "(conda run --no-capture-output)"
)
_SCARCE_HINT = (
    "see what of yours runs there (ps -u $USER) and what is allowed (ulimit -a); "
    "end something, or ask for more"
)
_FULL_HINT = "see whether /tmp there is full"
_NOT_EXECUTABLE = 126  # as a shell says it
_NOT_FOUND = 127
_NO_INPUT = 3  # as our own first lines of Python say it
_NO_SESSION = 254  # as sshd ends a login for which PAM opens no session
#: What Bokeh says before it looks at its certificate, and nothing once that is done.
_TLS = "Configuring for SSL termination"
_PYTHON_HINT = (
    f"give {setting('python=')} the path of one, or {setting('setup=')} "
    'what makes one available ("conda activate NAME")'
)
#: No shell reads a path; one that has a dollar is mostly meant for one.
_LITERAL_HINT = "a variable in a path is not replaced by its value: write that, or ~/ for the home"
#: A command without a place for the port is given Bokeh's options.
_PLACE_HINT = (
    f"{setting('command')} has no {{port}}, so it was given the options of bokeh serve; "
    f"for another kind of server, write {{port}} where its port goes, there or in {setting('env=')}"
)


@dataclass(frozen=True, kw_only=True)
class StartFailure:
    """What was seen of a start that failed.

    :param stage: how far it came
    :param evidence: what was said on the way
    :param over: whether the session ended
    :param status: how the session ended; None where that is not known
    :param exit_status: how the server ended; None where it did not
    :param log: what the server wrote
    :param before: what start files and ``setup`` wrote
    :param timeout: seconds that it was given; None is the launch's own
    """

    host: str
    launch: Launch
    stage: Stage
    evidence: Evidence
    over: bool = False
    status: int | None = None
    exit_status: int | None = None
    log: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    timeout: float | None = None

    def error(self) -> BokehSSHError:
        """Name the cause and the next step."""
        if self.evidence.failed:
            return self._of_message(self.evidence.failed)
        if self.exit_status is not None:
            return self._of_server()
        if not self.over:
            return self._of_deadline()
        if self.status is None:
            msg = "the connection ended while the server was being started"
            hint = "try again; if it always ends there, the SSH server ends what is silent (ChannelTimeout)"
            return ConnectionLostError(msg, host=self.host, hint=hint)
        return self._of_session(self.status)

    def _make(
        self, kind: type[LaunchError], message: str, hint: str | None, status: int | None
    ) -> LaunchError:
        log = self.log or self.before
        return kind(
            message, host=self.host, hint=hint, log=log, exit_status=status, command=self.evidence.argv
        )

    @property
    def _may_lack_place(self) -> bool:
        """Whether it was taken for one that has Bokeh's options, and may be none."""
        return not (self.launch.package or self.launch.plain or self.launch.verbatim)

    def _of_message(self, failed: dict[str, Any]) -> BokehSSHError:
        at, status = str(failed.get("at", "")), failed.get("status")
        status, text = status if isinstance(status, int) else None, failed.get("text", "")
        kind: type[LaunchError] = LaunchError
        if at == "interpreter":
            return self._of_interpreters(status)
        if at == "python":
            return self._of_python(status)
        if at.startswith("setup"):
            number = at[len("setup") :]
            msg = f"setup step {number} failed with exit status {status}"
            hint = "try that line in a shell there"
            if status == 0:
                msg = f"setup step {number} ended the shell, though it did not fail"
                hint = "leave out exit: the server is started in the shell that setup leaves"
            if status == _NOT_FOUND:
                hint = (
                    "setup runs in bash: have it source the file that defines the command first, "
                    "as in 'source ~/miniconda3/etc/profile.d/conda.sh', 'source /etc/profile.d/modules.sh'"
                )
        elif at == "cwd":
            msg = f"there is no directory {self.launch.cwd!r} to run in, or your account cannot enter it"
            hint = f"give {setting('cwd=')} a directory of that machine"
            if "$" in str(self.launch.cwd):
                hint = _LITERAL_HINT
        elif at == "spawn":
            msg = f"{self.evidence.argv[0]!r} could not be started ({text})"
            hint = (
                f"give {setting('command=')} a program of that machine, "
                f"or {setting('setup=')} what puts it on the PATH there"
            )
            if failed.get("scarce"):
                hint = _SCARCE_HINT
        elif at == "socket":
            msg = f"there is no place for its socket ({text})"
            hint = f"write {{port}} into {setting('command')} in place of {{socket}}"
        elif at == "depot":
            kind, msg, hint = UploadError, f"no folder could be made for the app ({text})", _FULL_HINT
        else:
            msg = f"the shell ended early (exit status {status})"
            hint = "a start file of the login shell may end it"
        return self._make(kind, msg, hint, status)

    def _of_python(self, status: int | None) -> LaunchError:
        wanted = repr(self.launch.python) if self.launch.python else "python3 or python"
        if self._is_script_of_nothing():
            return self._of_script_of_nothing(status)
        if scarce := self._find_scarcity(self.before):
            return self._of_scarcity(scarce, status)
        msg, hint = f"there is no {wanted}", _LITERAL_HINT if "$" in wanted else _PYTHON_HINT
        if status == _NOT_EXECUTABLE and self.launch.python:
            msg = f"{wanted} is there, but is no program that your account may run"
            hint = f"give {setting('python=')} a program, such as bin/python in that folder"
        elif " " in wanted and not wanted.startswith(("'/", "'~")) and self.launch.python:
            hint = f'{setting("python=")} takes a path, and {setting("setup=")} "conda activate NAME"'
        return self._make(PythonNotFoundError, msg, hint, status)

    @staticmethod
    def _find_scarcity(lines: tuple[str, ...]) -> str:
        return next((line.strip() for line in lines if _SCARCE.search(line)), "")

    def _of_scarcity(self, said: str, status: int | None) -> LaunchError:
        msg = f"there are not enough processes, memory or files left to run Python: {said}"
        return self._make(LaunchError, msg, _SCARCE_HINT, status)

    def _is_script_of_nothing(self) -> bool:
        """Return whether ``python`` was found, and the system does not find what is to run it."""
        return bool(self.launch.python) and any(_NO_INTERPRETER.search(line) for line in self.before)

    def _of_script_of_nothing(self, status: int | None) -> LaunchError:
        what = "its first line names a program that is not, or ends in a carriage return"
        msg = f"{self.launch.python!r} is there, but {what}"
        return self._make(PythonNotFoundError, msg, _PYTHON_HINT, status)

    def _of_interpreters(self, status: int | None) -> LaunchError:
        what = "; ".join(f"{it['path']} {it['text']}" for it in self.evidence.tried)
        package = [it for it in self.evidence.tried if it["kind"] == "package"]
        if package:
            name = self.launch.package
            oldest = ".".join(map(str, OLDEST_BOKEH))
            hint = (
                f"install it there ({package[0]['path']} -m pip install '{name}'), or name the Python that "
                f"has it with {setting('python=')}, or activate it "
                f"with {setting('setup=')} (Bokeh {oldest} or newer)"
            )
            return self._make(BokehNotFoundError, f"no Python there can run {name} ({what})", hint, status)
        oldest = ".".join(map(str, OLDEST_PYTHON))
        msg = f"there is no Python {oldest} or newer ({what})"
        return self._make(PythonNotFoundError, msg, _PYTHON_HINT, status)

    def _of_server(self) -> BokehSSHError:
        # NumPy's OpenBLAS says so, and then has Python interrupted.
        scarce = self._find_scarcity(self.log)
        why = scarce or reason(self.log) or "it wrote nothing"
        status = self.exit_status
        if port_in_use(self.log) and self.launch.port:
            msg = f"port {self.launch.port} is already in use there"
            hint = f"choose another {setting('remote_port')}, or leave it out for any free one"
            return PortInUseError(msg, host=self.host, hint=hint, port=self.launch.port, side="remote")
        how = f"signal {-status}" if status is not None and status < 0 else f"exit status {status}"
        if self.evidence.memory_limit is not None:
            msg = f"the server ended before it listened: {describe_kill(self.evidence.memory_limit)}"
            return self._make(LaunchError, msg, MEMORY_HINT, status)
        hint = (
            "its last lines say more"
            if self.log
            else "run it there by hand; it must not go into the background"
        )
        if scarce:
            hint = _SCARCE_HINT
            if "OpenBLAS" in scarce:
                hint += f", or give {setting('env=')} OPENBLAS_NUM_THREADS=1"
        elif status == 2:
            hint = f"check {setting('command' if self.launch.plain and not self.launch.args else 'args')}"
        elif "BOKEH_SECRET_KEY" in why:
            hint = f"give {setting('signed=True')}, which makes a key and has it signed with"
        elif "does not exist" in why:
            hint = (
                f"an app is a path of that machine: of a script, a notebook, or a folder with a main.py; a "
                f"relative one starts at {setting('cwd')}, or at the home"
            )
            if any("$" in app for app in self.launch.app):
                hint = _LITERAL_HINT
        elif any(_TLS in line for line in self.log):
            hint = (
                "see whether the certificate's file is there, and has its key in it (else --ssl-keyfile); "
                f"BOKEH_SSL_PASSWORD in {setting('env=')} opens a key with a password"
            )
        if self._may_lack_place and (status or self.log):
            hint = _PLACE_HINT
        return self._make(LaunchError, f"the server ended before it listened ({how}): {why}", hint, status)

    def _of_deadline(self) -> LaunchError:
        seconds = f"{self.launch.timeout if self.timeout is None else self.timeout:g} s"
        place = self.evidence.place
        if self.stage is Stage.LOGIN:
            msg = f"the login shell did not run our command within {seconds}"
            what = place or "a start file (such as ~/.bashrc)"
            hint = f"{what} may be slow or wait for input; try: ssh {self.host} true"
        elif self.launch.setup and not self.evidence.begun:
            msg = f"the login shell that setup runs in did not get past its start files within {seconds}"
            what = place or "one (such as ~/.bash_profile)"
            hint = f"{what} may be slow, or ask again and again: bash -l </dev/null"
        elif self.stage <= Stage.PYTHON and self.evidence.begun.startswith("setup"):
            msg = f"setup step {self.evidence.begun[len('setup') :]} did not end within {seconds}"
            hint = f"see what it waits for in a shell there, or give a longer {setting('launch_timeout')}"
        elif self.stage <= Stage.PYTHON:
            msg = f"Python did not start within {seconds}"
            hint = f"setup, a start file or the disk may be slow; give a longer {setting('launch_timeout')}"
            hint += _WRAPPER_HINT if self.launch.python and not self.launch.setup else ""
        else:
            msg = f"the server did not say within {seconds} that it listens"
            more = f"give a longer {setting('launch_timeout')}, or see its log"
            hint = _PLACE_HINT if self._may_lack_place else more
            port = port_told(self.log) if self.launch.plain else None
            if port is not None and port != self.launch.port:
                more = f"see that {setting('command')} has it listen on {{port}}"
                hint = f"its log speaks of port {port}: {more}"
        return self._make(LaunchTimeoutError, msg, hint, None)

    def _of_session(self, status: int) -> BokehSSHError:
        said = " / ".join(self.before[-3:])
        if self.stage is Stage.LOGIN and is_windows(self.before):
            msg = "this is a Windows machine, and starting a server there is not supported"
            hint = f"start the server by hand there, and attach to it with {setting('launch=False')}"
            return self._make(LaunchError, msg, hint, status)
        if self.stage is Stage.LOGIN:
            return refused_command(self.host, status, said)
        if self.stage >= Stage.UPLOAD:
            return self._make(LaunchError, "the supervisor of the server was ended", "try again", status)
        if self.launch.setup and not self.evidence.begun:
            msg = f"the login shell that setup runs in ended by itself (exit status {status}): {said}".rstrip(
                ": "
            )
            hint = "a start file (such as ~/.bash_profile) may end it (exit, set -e), or replace it (exec)"
            return self._make(LaunchError, msg, hint, status)
        if not (status or said):
            msg = "the shell there ended before Python ran, without a word"
            hint = (
                f"{setting('setup')}, a start file or what the login itself runs (command= of your key) "
                "may replace it (exec, setsid), or have taken its input (exec </dev/null)"
            )
            hint += _WRAPPER_HINT if self.launch.python else ""
            return self._make(LaunchError, msg, hint, status)
        if status == _NO_INPUT and not said:
            msg = "Python there found nothing to read, though it was sent what to run"
            hint = f"{setting('setup')} or a start file may have taken its input{_WRAPPER_HINT}"
            return self._make(LaunchError, msg, hint, status)
        msg = f"Python ended before it ran anything (exit status {status}): {said or 'it said nothing'}"
        if self._is_script_of_nothing():
            return self._of_script_of_nothing(status)
        if _SCARCE.search(said):
            return self._of_scarcity(said, status)
        if _NO_DEVICES.search(said):
            msg = f"the account cannot use /dev/null there: {said}"
            hint = "ask the administrator; a folder that it is confined to (ChrootDirectory) needs its own"
            return SessionError(msg, host=self.host, hint=hint)
        fatal = any(_FATAL.search(line) for line in self.before)
        if fatal and not any("PYTHONHOME = (not set)" in line for line in self.before):
            hint = (
                "a variable of Python's (env | grep ^PYTHON) is set there that is wrong, or for another "
                f"Python: {setting('setup')} can unset it"
            )
            return self._make(PythonNotFoundError, msg, hint, status)
        return self._make(PythonNotFoundError, msg, _PYTHON_HINT, status)


def expired_password(host: str, said: str) -> SessionError | None:
    """Return the error of an account whose password has to be changed; None where that is not said.

    :param said: what a command got to hear: such an account may do nothing else
    """
    if not _EXPIRED.search(said):
        return None
    msg = f"the account's password has to be changed: {said}"
    return SessionError(msg, host=host, hint="log in with a terminal once, which asks for a new one")


def refused_command(host: str, status: int, said: str) -> SessionError:
    """Say why a login ran something else than our command, or nothing.

    :param said: the last lines that came instead
    """
    if expired := expired_password(host, said):
        return expired
    if "/etc/nologin exists" in said:
        msg = f"the machine takes no logins at the moment: {said}"
        return SessionError(msg, host=host, hint="it may be under maintenance: try again later")
    if status == _NO_SESSION and said:
        msg = f"the machine opens no session for the account: {said}"
        hint = "log out elsewhere, if it is the number of logins, or ask the administrator"
        return SessionError(msg, host=host, hint=hint)
    if _UNQUOTED.search(said):
        msg = "what the login runs (ForceCommand, or command= of your key) takes no quotes in our command"
        hint = 'have it say: exec sh -c "$SSH_ORIGINAL_COMMAND"'
        return SessionError(msg, host=host, hint=hint)
    if _RESTRICTED.search(said):
        msg = f"the login shell is a restricted one, which runs no program by its path: {said}"
        hint = f"ask for another shell, or attach to a server that is there with {setting('launch=False')}"
        return SessionError(msg, host=host, hint=hint)
    if not said or _NO_TERMINAL.search(said) or _START_FILE.search(said):
        msg = f"the login shell ended before our command (exit status {status}): {said or 'no output'}"
        hint = (
            "a start file (such as ~/.bashrc) may exit, or run something else in its place (exec tmux): "
            "have it do that on a terminal only; an account without "
            f"commands can attach ({setting('launch=False')})"
        )
        return SessionError(msg, host=host, hint=hint)
    msg = f"the account does not run commands (exit status {status}): {said}"
    hint = f"ask for a login shell, or attach to a server that is there with {setting('launch=False')}"
    return SessionError(msg, host=host, hint=hint)


def blocked_login(host: str, fault: str, said: str, argv: tuple[str, ...]) -> LaunchError:
    """Say why a login never runs our command.

    :param fault: what it does, as a part of a sentence
    :param said: the last lines that came instead
    """
    msg = f"a start file (such as ~/.bashrc), or what the login itself runs, {fault}"
    hint = (
        "have the start file do that on a terminal only (sh, bash, zsh: [ -t 0 ] || return; "
        "fish: if status is-interactive; csh: if ($?prompt)); an account without commands can "
        f"attach ({setting('launch=False')})"
    )
    return LaunchError(f"{msg}: {said}" if said else msg, host=host, hint=hint, command=argv)


def refused(host: str, message: dict[str, Any]) -> BokehSSHError:
    """Say why a server could not be taken over again, or ended: the error for a ``refused`` message."""
    why = message.get("why")
    if why == "exited":
        status, log = message.get("status"), message.get("log")
        lines = tuple(plain(str(text)) for text in log) if isinstance(log, list) else ()
        status = status if isinstance(status, int) else None
        return ServerExitedError.of(host, status, lines, read_memory(message))
    if why == "attached":
        msg = "another client is attached to the server"
        return ServerTakenError(msg, host=host, hint="end that one first, or detach it")
    if why == "starting":
        msg = "the server is still being started by another client"
        return ServerTakenError(msg, host=host, hint="try again in a moment")
    if why == "elsewhere":
        msg = f"this is {plain(str(message.get('node')))}, and the server runs on another machine"
        return ServerNotFoundError(msg, host=host, hint="name that machine itself, or try again")
    if why == "python":
        msg = "there is no Python any more that runs"
        return PythonNotFoundError(msg, host=host, hint=_PYTHON_HINT)
    if why == "gone":
        msg = "the server is no longer there: stopped, out of its grace time, or the machine restarted"
        return ServerGoneError(msg, host=host, hint="start it again")
    msg = f"the server's supervisor does not answer ({plain(str(message.get('text', why)))})"
    return LaunchTimeoutError(msg, host=host, hint="the machine may be overloaded; try again")
