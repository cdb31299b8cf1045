"""A relay whose requests are judged as they come: nothing goes to the server unread but TLS and WebSockets.

What the server sends is looked at as far as to see where each answer ends. Only where it says yes to a
WebSocket that was asked for, or speaks TLS, may what is not read follow. Until that is known nothing more is
let through. And only between two answers can there be one of ours: a refusal, or a static file that the cache
has. Static files that the server sends are handed to the cache as they pass.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass

from bokeh_ssh._forwarding.http_requests import MOST, Opened, RequestRefusedError
from bokeh_ssh._forwarding.http_responses import Answers
from bokeh_ssh._forwarding.request_filter import refusal
from bokeh_ssh._forwarding.site_cache import SiteCache
from bokeh_ssh._forwarding.static_requests import StaticRequest
from bokeh_ssh._ssh.relay import Loop, RelayChannel, SocketRelay, finish

log = logging.getLogger("bokeh_ssh.forward")

#: What is read and thrown away of a request that is refused, in pieces of MOST.
_MOST_PIECES = 16


class _Verdicts(Answers):
    """What the server answers, read by the transport thread; what that means is for the loop's.

    :ivar switched: whether it says yes to a WebSocket or TLS, until the loop's thread has taken that
    """

    switched: bool | None = None

    def take(self, parts: list[memoryview], *, asking: bool) -> bool:
        """Take what arrived; return whether there is a verdict now.

        :param asking: whether one is waited for
        """
        switched = None
        for part in parts:
            said = self.read(part)
            switched = switched if said is None else said
        if switched is None and self.lost and asking:
            switched = False  # it will not be known
        if switched is not None:
            self.switched = switched
        return switched is not None


@dataclass
class _KeptFiles:
    """The cache, and what one connection has of it.

    :ivar asked: whether the cache is asked for a file
    :ivar due: bytes at the front of the backlog that are from there, and did not come over the channel
    """

    cache: SiteCache | None
    asked: bool = False
    due: int = 0


class FilteredRelay(SocketRelay):
    """A :class:`SocketRelay` that lets through what an inspector lets through.

    :param opened: the connection's beginning, which was let in
    :param cache: answers requests for static files, if the inspector stops at them, and keeps the answers
    :param again: takes the local connection back, where the line is lost before anything came of a request
        that may be sent twice (RFC 9110, section 9.2.2)
    """

    __slots__ = ("_again", "_answers", "_files", "_inspector", "_outgoing")

    def __init__(
        self,
        io_loop: Loop,
        sock: socket.socket,
        channel: RelayChannel,
        on_end: Callable[[bool], None] | None,
        opened: Opened,
        cache: SiteCache | None = None,
        again: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(io_loop, sock, channel, on_end)
        self._again = again if opened.passed.startswith((b"GET ", b"HEAD ")) else None
        self._files = _KeptFiles(cache)
        self._inspector = opened.inspector
        self._outgoing = memoryview(opened.passed)  # let through, and more than the channel took
        self._answers = _Verdicts(opened.inspector.due, cache.record if cache else None)

    # The loop's thread's half.

    def _room(self) -> int:
        if self._outgoing or self._files.asked or (self._inspector.asking and self._inspector.held):
            return 0
        return self._channel.writable()

    def _update(self) -> None:
        super()._update()
        while self._outgoing and not self._done and self._started:
            self._push()
            super()._update()
            # A window that opened before the interest was changed woke nobody (on_window).
            if not self._channel.writable():
                return

    def _push(self) -> None:
        while self._outgoing:
            room = self._channel.writable()
            if self._done or not room:
                return
            part, self._outgoing = self._outgoing[:room], self._outgoing[room:]
            self._send(part)

    def _send_on(self, data: memoryview) -> None:
        self._again = None
        self._take_answer()  # the client has it, if there is one, and goes by it
        try:
            self._go_on(self._inspector.feed(data))
        except RequestRefusedError as exc:
            self._refuse(str(exc))

    def _take_answer(self) -> None:
        switched, self._answers.switched = self._answers.switched, None
        if switched is None or self._done:
            return
        try:
            self._go_on(self._inspector.answer(switched=switched))
        except RequestRefusedError as exc:
            self._refuse(str(exc), at_once=False)  # the answer may have yet to be delivered

    def _answered(self) -> None:
        self._take_answer()
        self._update()

    def _go_on(self, passed: bytes | memoryview) -> None:
        """Let through what may, and see to the request for a static file that follows, if one does.

        :raises RequestRefusedError: if a request behind that may not pass
        """
        inspector = self._inspector
        if inspector.static and not self._done:
            if not passed and self._is_idle():
                self._look_up(inspector.static)
            else:  # its answer has to wait for others, so the server sends it in its turn
                passed = bytes(passed) + inspector.pass_static()
        self._let_through(passed)

    def _is_idle(self) -> bool:
        """Return whether all that the client has asked for is answered: then one from here is in order."""
        with self._lock:
            ended = self._channel_eof or self._deaf or self._answers.last
            received = sum(map(len, self._backlog)) - self._files.due
        return bool(self._files.cache) and self._answers.over and not (ended or received or self._outgoing)

    def _look_up(self, request: StaticRequest) -> None:
        assert self._files.cache
        self._files.asked = True
        self._files.cache.look_up(request, self._on_found)

    def _on_found(self, answer: list[memoryview] | None) -> None:
        self._files.asked = False
        if self._done or self._closed:
            return
        try:
            if answer is not None and self._is_idle():
                self._inspector.drop_static()
                self._answer(answer)
                self._go_on(self._inspector.feed(b""))
            else:
                self._go_on(self._inspector.pass_static())
        except RequestRefusedError as exc:
            self._refuse(str(exc))
        self._update()

    def _answer(self, parts: list[memoryview]) -> None:
        """Answer from here, behind other answers from here."""
        with self._lock:
            self._backlog.extend(parts)
            self._files.due += sum(map(len, parts))
        self._write_backlog()

    def _credit(self, count: int) -> None:
        own = min(self._files.due, count)
        self._files.due -= own
        if count > own:
            super()._credit(count - own)

    def abort(self) -> None:
        """Reset the local socket and close the channel, or give the socket back. Loop thread only."""
        again, self._again = self._again, None
        if again and not self._sock_eof:
            self._end(lambda sock: again())
        else:
            super().abort()

    def _end(self, close_socket: Callable[[socket.socket], None], *, clean: bool = False) -> None:
        super()._end(close_socket, clean=clean)
        self._answers.stop()

    def _let_through(self, data: bytes | memoryview) -> None:
        if not data:
            return
        room = self._channel.writable()
        if room:
            self._send(memoryview(data)[:room])
        if len(data) > room:
            self._outgoing = memoryview(bytes(data[room:]))  # what was read into is read into again

    def _look_for_end(self) -> None:
        if not self._outgoing:  # else its end comes after that
            super()._look_for_end()

    def _send(self, part: memoryview) -> None:
        try:
            self._channel.send(part)
        except OSError as exc:
            log.debug("a local connection broke: %s", exc)
            self.abort()

    def _refuse(self, reason: str, *, at_once: bool = True) -> None:
        """Let nothing more through, and say so where that cannot come into the middle of an answer."""
        log.warning("refused a request on a local connection: %s", reason)
        if at_once and self._answers.over and not self._backlog:
            self._end(lambda sock: turn_away(sock, reason))
        else:
            self._stop()

    def _stop(self) -> None:
        """Take what the client has said so far for all that it says: the answers to that still come."""
        self._sock_eof = True
        try:
            self._channel.send_eof()
        except OSError as exc:
            log.debug("a local connection broke: %s", exc)
            self.abort()
        self._finish_if_done()

    # The transport thread's half.

    def on_data(self, parts: list[memoryview]) -> None:
        """Take what arrived, and look where answers end."""
        self._again = None
        # Before it is delivered: who has it may send the next request at once.
        if not self._answers.free and self._answers.take(parts, asking=self._inspector.asking):
            self._io_loop.post(self._answered)
        super().on_data(parts)


def turn_away(sock: socket.socket, reason: str) -> None:
    """Answer with a refusal, so that it arrives: a close over unread bytes would reset the connection."""
    try:
        for _ in range(_MOST_PIECES):
            if len(sock.recv(MOST)) < MOST:
                break
    except OSError:  # all is read, or it is gone
        pass
    try:
        sock.send(refusal(reason))
        sock.shutdown(socket.SHUT_WR)
    except OSError:  # it has gone
        pass
    finish(sock)
