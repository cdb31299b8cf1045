"""A few lines of ``sh`` on the remote machine, through whatever login shell there is, and what they say."""

from __future__ import annotations

import secrets
import threading
from typing import Any

from bokeh_ssh._command import encode, exec_line
from bokeh_ssh._connection import Connection
from bokeh_ssh._errors import SessionError
from bokeh_ssh._report import Reader
from bokeh_ssh._wait import wait_for

#: Says one thing of two plain words.
_SAY = 'say() { printf \'%s{"event":"%s","text":"%s"}\\n\' "$mark" "$1" "$2"; }'


def run_script(connection: Connection, script: str, *, timeout: float) -> dict[str, Any] | None:
    """Run ``script``, which may call ``say WORD [WORD]`` once; gives that as ``event`` and ``text``.

    :param timeout: seconds for all of it
    :returns: None where no command may be run, or nothing was said in time
    :raises ConnectionLostError: if the line goes down
    """
    mark = secrets.token_hex(16)
    reader = Reader(mark)
    change = threading.Condition()
    said: dict[str, dict[str, Any]] = {}
    ended: list[int | None] = []

    def on_stdout(data: bytes) -> None:
        with change:
            for message in reader.feed(data):
                said.setdefault("hello" if message["event"] == "hello" else "answer", message)
            change.notify_all()

    def on_exit(status: int | None) -> None:
        with change:
            ended.append(status)
            change.notify_all()

    try:
        session = connection.run(
            exec_line(mark),
            on_stdout=on_stdout,
            on_stderr=lambda data: None,
            on_exit=on_exit,
            timeout=timeout,
        )
    except SessionError:
        return None

    def heard(word: str) -> bool:
        with change:
            wait_for(change, lambda: word in said or ended, timeout)
            return word in said

    try:
        if not heard("hello"):
            return None
        session.write(encode(f"mark={mark}\n{_SAY}\n{script}"))
        return said["answer"] if heard("answer") else None
    finally:
        session.close()
