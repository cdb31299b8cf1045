"""Asks a server whether it still has what is kept here, over a channel of its own.

A question has no content in its answer (``HEAD``), so all go over one channel, one behind the other.
"""

from __future__ import annotations

import collections
import logging
import re
from collections.abc import Callable

from bokeh_ssh._forwarding.spare_channels import SpareChannels
from bokeh_ssh._ssh.connection import EarlyChannel
from bokeh_ssh._ssh.relay import Loop
from bokeh_ssh._ssh.transport import Channel

log = logging.getLogger("bokeh_ssh.forward")

#: Questions that wait for an answer; who has more to ask asks the server for the file.
_MOST = 64
#: Bytes of an answer.
_MOST_HEAD = 64 * 1024
#: Seconds for an answer.
_PATIENCE = 10.0
_END = re.compile(rb"\n\r?\n")
_STATUS = re.compile(rb"HTTP/1\.1 (?!1)[0-9]{3}[ \r]")

Done = Callable[[bytes], None]


class Revalidator:
    """Has questions answered. Its methods are for the loop's thread, except :meth:`close`.

    :param spare: opens the channel; closed with this
    """

    def __init__(self, io_loop: Loop, spare: SpareChannels) -> None:
        self._io_loop = io_loop
        self._spare = spare
        self._unsent: collections.deque[_Question] = collections.deque()
        self._asked: collections.deque[_Question] = collections.deque()
        self._talk: _Talk | None = None
        self._opening = False
        self._over = False

    def ask(self, question: bytes, done: Done) -> None:
        """Have ``done`` called, later, with the head of the answer; with nothing where none comes.

        :param question: a request whose answer has no content
        """
        asked = _Question(question, done)
        if self._over or len(self._unsent) + len(self._asked) >= _MOST:
            self._io_loop.post(lambda: asked.finish(b""))
            return
        self._unsent.append(asked)
        self._io_loop.later(_PATIENCE, lambda: self._expire(asked))
        if self._talk:
            self._send()
        elif not self._opening:
            self._opening = True
            self._spare.fill()
            self._spare.take(lambda early: self._io_loop.post(lambda: self._begin(early)))

    def close(self) -> None:
        """Ask nothing more; idempotent, from any thread."""
        self._over = True
        self._spare.close()
        self._io_loop.post(self._end)

    def _begin(self, early: EarlyChannel | None) -> None:
        self._opening = False
        if early is None or self._over:
            if early:
                early.channel.close()
            self._end()
            return
        self._talk = _Talk(self, early.channel)
        early.hand_over(self._talk)
        self._send()

    def _send(self) -> None:
        talk = self._talk
        while talk and self._unsent and len(self._unsent[0].text) <= talk.channel.writable():
            question = self._unsent.popleft()
            self._asked.append(question)
            try:
                talk.channel.send(memoryview(question.text))
            except OSError as exc:
                log.debug("the server cannot be asked: %s", exc)
                self._end()

    def _expire(self, question: _Question) -> None:
        if not question.over:  # those behind it would wait as long
            log.info("the server does not say whether a file is still the same: it is loaded again")
            self._end()

    def _end(self) -> None:
        """Leave open questions without an answer; the next one opens another channel."""
        talk, self._talk = self._talk, None
        if talk:
            talk.channel.close()
        waiting = [*self._asked, *self._unsent]
        self._asked.clear()
        self._unsent.clear()
        for question in waiting:
            question.finish(b"")

    def on_heads(self, talk: _Talk, heads: list[bytes]) -> None:
        """Take answers, in the order of the questions."""
        for head in heads:
            if talk is self._talk and self._asked:
                self._asked.popleft().finish(head)
        if talk is self._talk:
            self._send()

    def on_end(self, talk: _Talk) -> None:
        """Take it that nothing more comes."""
        if talk is self._talk:
            self._end()

    def on_room(self, talk: _Talk) -> None:
        """Take it that the server takes more."""
        if talk is self._talk:
            self._send()


class _Question:
    """What somebody wants to know."""

    __slots__ = ("_done", "over", "text")

    def __init__(self, text: bytes, done: Done) -> None:
        self.text = text
        self._done = done
        self.over = False

    def finish(self, head: bytes) -> None:
        """Tell, once."""
        if not self.over:
            self.over = True
            self._done(head)


class _Talk:
    """Takes apart what comes over one channel, on the transport's thread."""

    def __init__(self, owner: Revalidator, channel: Channel) -> None:
        self._owner = owner
        self.channel = channel
        self._held = bytearray()
        self._fault = False

    def on_data(self, parts: list[memoryview]) -> None:
        for part in parts:
            self.channel.credit(len(part))
            if not self._fault:
                self._held += part
        heads = []
        while found := _END.search(self._held):
            head = bytes(self._held[: found.end()])
            del self._held[: found.end()]
            if _STATUS.match(head):
                heads.append(head)
            elif not head.startswith(b"HTTP/1.1 1"):
                self._fault = True
                break
        if heads:
            self._post(lambda: self._owner.on_heads(self, heads))
        if self._fault or len(self._held) > _MOST_HEAD:  # it says what it was not asked for
            self._fault = True
            self._held.clear()
            self.on_eof()

    def on_eof(self) -> None:
        self._post(lambda: self._owner.on_end(self))

    def on_close(self) -> None:
        self.on_eof()

    def on_lost(self) -> None:
        self.on_eof()

    def on_window(self) -> None:
        self._post(lambda: self._owner.on_room(self))

    def _post(self, call: Callable[[], None]) -> None:
        self._owner._io_loop.post(call)
