"""Why a login does not come as far as our command: others are begun beside it, and looked at.

What a start file does cannot be seen from outside. But a shell that has nothing to read gets past what waits
for input; and one whose program is ended says where in which file that was (bash), and mostly goes on.
"""

from __future__ import annotations

import re
import secrets
import threading
import time
from collections.abc import Callable

from bokeh_ssh._core.errors import BokehSSHError
from bokeh_ssh._core.events import ignore
from bokeh_ssh._core.framing import Reader, Tail
from bokeh_ssh._core.waiting import wait, wait_for
from bokeh_ssh._ssh.messages import string
from bokeh_ssh._ssh.remote_shell import exec_line
from bokeh_ssh._ssh.runner import Runner, Session, Signals, Subsystems

#: Seconds that a login may take before it is looked why.
HESITATION = 2.0
#: Seconds until another one is where the first is, and until a shell has said what it has to say.
_PATIENCE, _SETTLE = 2.0, 1.0
#: What bash says, in any language, of a program that was ended: the file, and the line.
_PLACE = re.compile(r"^(/[^:]{1,300}: (?:\w{1,20} )?\d{1,7}) ?: {0,20}\d{1,10} {1,20}\w")
#: Of SFTP (draft-ietf-secsh-filexfer-02): its beginning, a question about a path, the answer if it is there.
_INIT, _STAT, _ATTRS = 1, 17, 105

_ELSEWHERE = "runs another shell or program in place of our command, or sends its output elsewhere"
_WAITS = "waits for input"
_RC = "~/.ssh/rc, which the SSH server runs first, or a start file"


class LoginProbe:
    """Another login, whose ``with`` block ends it.

    :param changed: notified of what becomes of it, and of the first one
    :param is_past: whether the first is held up no longer, so that nothing of this matters
    :param reads: whether it waits for input that does not come, and does not end
    :ivar passed: whether it has come as far as our command
    :ivar ended: whether it has ended
    """

    def __init__(
        self,
        runner: Runner,
        changed: threading.Condition,
        is_past: Callable[[], bool],
        command: Callable[[str], str] = exec_line,
        *,
        reads: bool = False,
    ) -> None:
        self.passed = self.ended = False
        self._changed = changed
        self._is_past = is_past
        self._errors = Tail()
        nonce = secrets.token_hex(16)
        reader = Reader(nonce)
        self._session = runner.run(
            command(nonce),
            on_stdout=lambda data: self._note(passed=bool(reader.feed(data))),
            on_stderr=self._errors.feed,
            on_exit=lambda _: self._note(ended=True),
            timeout=10,
        )
        if not reads:
            self._session.write_eof()

    def __enter__(self) -> LoginProbe:
        return self

    def __exit__(self, *_: object) -> None:
        send_signal(self._session, "KILL")
        self._session.close()

    def _note(self, *, passed: bool = False, ended: bool = False) -> None:
        with self._changed:
            self.passed, self.ended = self.passed or passed, self.ended or ended
            self._changed.notify_all()

    def wait(self, timeout: float) -> bool:
        """Wait until it has passed or ended; False if it has not, or if that does not matter any more."""
        with self._changed:
            wait_for(self._changed, lambda: self.passed or self.ended or self._is_past(), timeout)
            return (self.passed or self.ended) and not self._is_past()

    def find_place(self) -> str:
        """End the program that its shell waits for; return where that is, if the shell says it."""
        send_signal(self._session, "QUIT")  # which bash ignores itself
        self.wait(_SETTLE)
        return next((found[1] for found in map(_PLACE.search, self._errors.lines) if found), "")


def find_fault(
    runner: Runner,
    changed: threading.Condition,
    is_past: Callable[[], bool],
    deadline: float,
    on_place: Callable[[str], object],
) -> str:
    """Return what keeps a login from running our command for ever; empty where it may only be slow.

    :param changed: for this and ``is_past``, see :class:`LoginProbe`
    :param deadline: by ``time.monotonic()``
    :param on_place: called with where it is held up, once; empty if that is not seen
    """
    began = time.monotonic()
    try:
        with LoginProbe(runner, changed, is_past) as probe:
            if not probe.wait(min(_PATIENCE, deadline - began)):
                place = find_place(runner, changed, is_past)
                if not is_past():
                    on_place(place)
                if not probe.wait(deadline - time.monotonic()):
                    return ""
            passed, took = probe.passed, time.monotonic() - began
        if not passed:
            with changed:
                return "" if wait_for(changed, is_past, _SETTLE) else _ELSEWHERE
        # Something that is done once a day may have held up the first alone: see what one does that is alike.
        with LoginProbe(runner, changed, is_past, reads=True) as probe:
            return "" if probe.wait(max(_PATIENCE, 2 * took)) or is_past() else _WAITS
    except BokehSSHError:  # no other login at the same time, or the first tells of it as well
        return ""


def find_place(
    runner: Runner,
    changed: threading.Condition,
    is_past: Callable[[], bool],
    command: Callable[[str], str] = exec_line,
) -> str:
    """Return what a login is held up by: a file, with the line if its shell says that; or empty.

    :param command: makes what the login runs of the mark that it is to say
    """
    try:
        with LoginProbe(runner, changed, is_past, command) as probe:
            place = "" if probe.wait(_SETTLE) or is_past() else probe.find_place()
            if place or probe.passed or not probe.ended:
                return place
        return _RC if _has_rc(runner) else ""
    except BokehSSHError:
        return ""


def _has_rc(runner: Runner) -> bool:
    """Return whether there is a ~/.ssh/rc; it is not run for SFTP."""
    said, answered = bytearray(), threading.Event()

    def hear(data: bytes) -> None:
        said.extend(data[:1000])
        if len(said) > 4 + int.from_bytes(said[:4], "big") + 4:
            answered.set()

    request = string(bytes((_INIT, 0, 0, 0, 3))) + string(bytes((_STAT, 0, 0, 0, 1)) + string(b".ssh/rc"))
    if not isinstance(runner, Subsystems):
        return False
    session = runner.subsystem(
        "sftp",
        on_stdout=hear,
        on_stderr=ignore,
        on_exit=lambda _: answered.set(),
        timeout=_PATIENCE,
        first=request,
    )
    wait(answered, _SETTLE)
    session.close()
    begin = 4 + int.from_bytes(said[:4], "big")
    return said[begin + 4 : begin + 5] == bytes((_ATTRS,))


def send_signal(session: Session, name: str) -> None:
    """Send a session's command a signal, where that can be done."""
    if isinstance(session, Signals):
        session.signal(name)
