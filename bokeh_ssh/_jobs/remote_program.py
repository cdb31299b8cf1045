"""One of our programs in a session on the login node: its messages, and what it says besides."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bokeh_ssh._core.errors import BokehSSHError, ConnectionLostError, PythonNotFoundError, SessionError
from bokeh_ssh._core.framing import Reader, Tail
from bokeh_ssh._core.settings import setting
from bokeh_ssh._core.waiting import wait_for
from bokeh_ssh._server.bootstrap import control_client_script
from bokeh_ssh._server.launch_spec import encode_message
from bokeh_ssh._server.payload import payload
from bokeh_ssh._ssh.connection import Connection
from bokeh_ssh._ssh.remote_shell import exec_line
from bokeh_ssh._ssh.session import Session


class RemoteProgram:
    """A program of ``_remote`` that runs there and reads orders."""

    def __init__(self, name: str, *, pythons: Sequence[str], setup: str | Sequence[str] = ()) -> None:
        self.mark = secrets.token_hex(16)
        self._name = name
        self._pythons = pythons
        self._setup = setup
        self._reader = Reader(self.mark)
        self._errors = Tail(20)
        self._change = threading.Condition()
        self._messages: list[dict[str, Any]] = []
        self.over = False
        self._session: Session | None = None
        self.host = ""

    def start(
        self, connection: Connection, order: Mapping[str, Any], timeout: float, lead: bytes = b""
    ) -> None:
        """Run it, with this order.

        :param lead: what the shell reads before, and by which it may hand over to one elsewhere
        :raises SessionError: if no command may be run
        :raises ConnectionLostError: if the line goes down
        """
        self.host = connection.name
        deadline = time.monotonic() + timeout
        self._session = connection.run(
            exec_line(self.mark),
            on_stdout=self._on_stdout,
            on_stderr=self._errors.feed,
            on_exit=self._on_exit,
            timeout=timeout,
        )
        self.expect(("hello",), deadline - time.monotonic())
        program, line = payload(self._name), encode_message({**order, "mark": self.mark})
        text = control_client_script(self._pythons, {}, self.mark, program, line, setup=self._setup)
        self._session.write(lead + text)

    def send(self, order: Mapping[str, Any]) -> None:
        """Send another order; never blocks."""
        if self._session:
            self._session.write(encode_message(order))

    def expect(
        self,
        events: Sequence[str],
        timeout: float,
        fits: Callable[[dict[str, Any]], bool] = lambda message: True,
    ) -> dict[str, Any]:
        """Wait for a message and take it.

        :raises SessionError: if the program ends before, or says nothing in time
        :raises PythonNotFoundError: if there is no Python that runs it
        :raises ConnectionLostError: if the line goes down
        """

        def find() -> dict[str, Any] | None:
            wanted = (*events, "refused")
            return next((each for each in self._messages if each["event"] in wanted and fits(each)), None)

        with self._change:
            wait_for(self._change, lambda: find() or self.over, timeout)
            found = find()
            if found:
                self._messages.remove(found)
        if found and found["event"] in events:
            return found
        raise self._error(found, timeout)

    @property
    def last_words(self) -> str:
        """What it, or what it ran in, said last; empty if nothing."""
        return self._reader.last_words(self._errors)

    def _error(self, found: dict[str, Any] | None, timeout: float) -> BokehSSHError:
        said = self.last_words
        if found and found.get("why") == "python":
            msg = "there is no Python that can be run there"
            return PythonNotFoundError(msg, host=self.host, hint=f"give {setting('python=')}, a path there")
        if not self.over:
            msg = f"the {self._name} there did not answer within {timeout:.0f} s"
            return ConnectionLostError(msg, host=self.host, hint="try again")
        if not said:
            return ConnectionLostError("the session there ended", host=self.host, hint="try again")
        return SessionError(f"a program that was to run there did not: {said}", host=self.host)

    def close(self) -> None:
        """End its session; never blocks."""
        if self._session:
            self._session.close()

    def _on_stdout(self, data: bytes) -> None:
        messages = self._reader.feed(data)
        with self._change:
            self._messages += messages[:100]
            self._change.notify_all()

    def _on_exit(self, status: int | None) -> None:
        with self._change:
            self.over = True
            self._change.notify_all()
