"""Answers requests for the static files of one server, and keeps them; see ``static_requests``."""

from __future__ import annotations

import collections
import functools
import hashlib
import logging
import re
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

from bokeh_ssh._forwarding.http_responses import Answers, Due
from bokeh_ssh._forwarding.spare_channels import SPARE_OF_PAGE, SpareChannels
from bokeh_ssh._forwarding.static_cache import Content, Recording, StaticCache
from bokeh_ssh._forwarding.static_requests import (
    Address,
    Lasting,
    StaticFile,
    StaticRequest,
    find_hash_to_keep,
    find_lasting,
    find_length_to_keep,
    find_page,
    find_referer,
    fits,
    read_cookies,
    read_unchanged,
    write_lasting_head,
    write_question,
    write_static_head,
    write_static_request,
    write_unchanged_head,
)
from bokeh_ssh._ssh.connection import Connection
from bokeh_ssh._ssh.relay import Loop
from bokeh_ssh._ssh.transport import Channel, EarlyChannel

#: Gets an answer, head first, or None where only the server has one.
Use = Callable[["list[memoryview] | None"], None]

log = logging.getLogger("bokeh_ssh.forward")

#: Questions that wait for an answer; who has more to ask asks the server for the file.
_MOST = 64
#: Seconds for an answer.
_PATIENCE = 10.0
#: Seconds for which an answer counts that came before the browser asked.
_FRESH = 10.0
#: Seconds for which it is remembered which files a page needs.
_REMEMBERED = 365 * 86400
#: Known of Tornado alone: one of gunicorn's workers serves nobody else while a connection is idle.
_LEAVES_IDLE = re.compile(rb"^server:[ \t]*TornadoServer/", re.IGNORECASE | re.MULTILINE)


def _name_site(connection: Connection, server: str) -> str:
    """Name a server for whom alone files are kept: by host key, account, and what it is there.

    :returns: empty where the machine has no key of its own (:mod:`control_master`)
    """
    if connection.methods == ("ControlMaster",):
        return ""
    machine = hashlib.sha256(connection.transport.host_key_blob).hexdigest()
    return f"{machine} {connection.hop.user} {server}"


class _Revalidator:
    """Asks the server whether it still has what is kept here.

    A question has no content in its answer (``HEAD``), so all go over one channel, one behind the other. Its
    methods are for the loop's thread, except :meth:`close`.

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

    def ask(self, question: bytes) -> Future[bytes]:
        """Return the head of the answer, once it is there; empty where none comes.

        :param question: a request whose answer has no content
        """
        asked = _Question(question, Future())
        if self._over or len(self._unsent) + len(self._asked) >= _MOST:
            asked.answer.set_result(b"")
            return asked.answer
        self._unsent.append(asked)
        self._io_loop.later(_PATIENCE, lambda: self._expire(asked))
        if self._talk:
            self._send()
        elif not self._opening:
            self._opening = True
            self._spare.fill()
            self._spare.take(lambda early: self._io_loop.post(lambda: self._begin(early)))
        return asked.answer

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
            talk.due.append(Due("HEAD", asks=False))
            try:
                talk.channel.send(memoryview(question.text))
            except OSError as exc:
                log.debug("the server cannot be asked: %s", exc)
                self._end()

    def _expire(self, question: _Question) -> None:
        if not question.answer.done():  # those behind it would wait as long
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
            question.answer.set_result(b"")

    def on_head(self, talk: _Talk, head: bytes) -> None:
        """Take an answer, in the order of the questions."""
        if talk is self._talk:
            self._asked.popleft().answer.set_result(head)
            self._send()

    def on_end(self, talk: _Talk) -> None:
        """Take it that nothing more comes."""
        if talk is self._talk:
            self._end()

    def on_room(self, talk: _Talk) -> None:
        """Take it that the server takes more."""
        if talk is self._talk:
            self._send()


class _Question(NamedTuple):
    """What somebody wants to know."""

    text: bytes
    answer: Future[bytes]


class _Talk:
    """Reads what comes over one channel, on the transport's thread."""

    def __init__(self, owner: _Revalidator, channel: Channel) -> None:
        self._owner = owner
        self.channel = channel
        self.due: collections.deque[Due] = collections.deque()
        self._answers = Answers(self.due, self._take)

    def on_data(self, parts: list[memoryview]) -> None:
        for part in parts:
            self.channel.credit(len(part))
            self._answers.read(part)
        if self._answers.lost:  # it says what it was not asked for
            self.on_eof()

    def _take(self, _: StaticRequest | None, head: bytes) -> None:
        self._post(lambda: self._owner.on_head(self, head))

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


class _Early(NamedTuple):
    """What the server is asked about a file before the browser asks for that.

    :ivar answer: its head, and when it came
    """

    cookies: list[bytes]
    hashes: list[str]
    answer: Future[tuple[bytes, float]]


class SiteCache:
    """What one server's files are looked for in, over one connection.

    :param server: names the server on its machine, the same each time; empty keeps nothing for an address
    :param questions: opens the channel over which the server is asked whether it still has a file; closed
        with this
    :param ahead: opened in advance once the server is known to leave idle connections alone, if given
    """

    def __init__(
        self,
        cache: StaticCache,
        connection: Connection,
        server: str,
        questions: SpareChannels,
        ahead: SpareChannels | None = None,
    ) -> None:
        self._cache = cache
        self._io_loop = connection.io_loop
        self._revalidator = _Revalidator(connection.io_loop, questions)
        self._site = _name_site(connection, server) if server else ""
        self._ahead = ahead
        #: Paths of pages, and the files that were asked for by them, which the server is asked about.
        self._pages: dict[str, list[str]] = {}
        self._learned: set[str] = set()
        self._early: dict[str, _Early] = {}

    def close(self) -> None:
        """Ask no more, and keep what pages need; idempotent."""
        self._revalidator.close()
        while self._learned:
            page = self._learned.pop()
            answer = Lasting((), (), time.time(), _REMEMBERED)
            recording = self._cache.record(self._address_of(page), answer)
            recording.write(memoryview("\n".join(tuple(self._pages[page])).encode("latin-1")))
            recording.finish()

    def look_up(self, request: StaticRequest, done: Use) -> None:
        """Call ``done`` on the loop's thread, later, with an answer. Loop thread only."""
        loop = self._io_loop
        if request.sha512:
            file = StaticFile(request.name, request.sha512)
            self._cache.look_up(loop, file, lambda content: done(_answer_by_content(request, content)))
        elif request.again:
            self._ask_again(request, done)
        elif self._site:
            address = Address(self._site, request.target)
            self._cache.look_up(loop, address, lambda content: done(_answer_lasting(request, content)))
        else:
            loop.post(lambda: done(None))

    def _ask_again(self, request: StaticRequest, done: Use) -> None:
        self._learn(request)

        def ask(hashes: list[str] | None) -> None:
            if hashes:
                answer = self._revalidator.ask(write_question(request, hashes))
                answer.add_done_callback(lambda answer: take(answer.result(), hashes))
            else:
                done(None)

        def take(head: bytes, hashes: list[str]) -> None:
            sha512 = read_unchanged(head)
            if sha512 not in hashes:
                done(None)
                return
            file = StaticFile(request.name, sha512)
            self._cache.look_up(self._io_loop, file, lambda content: use(head, content))

        def use(head: bytes, content: Content | None) -> None:
            if content is None:
                done(None)
            else:
                done(_parts(write_unchanged_head(request, head, len(content)), content))

        def take_early(early: _Early) -> None:
            head, came = early.answer.result()
            if head and time.monotonic() - came < _FRESH:
                take(head, early.hashes)
            else:
                self._cache.find(self._io_loop, request.name, ask)

        early = self._early.pop(request.target, None)
        if early and early.cookies == read_cookies(request.head):
            early.answer.add_done_callback(lambda _: take_early(early))
        else:
            self._cache.find(self._io_loop, request.name, ask)

    # Files of a page: the server is asked about them together with the page, before the browser asks.

    def _address_of(self, page: str) -> Address:
        return Address(self._site, f"files of {page}")

    def _learn(self, request: StaticRequest) -> None:
        page = find_referer(request.head)
        if not (page and self._site) or len(self._pages) >= _MOST:
            return
        files = self._pages.setdefault(page, [])
        if request.target not in files and len(files) < _MOST:
            files.append(request.target)
            self._learned.add(page)

    def open_page(self, head: bytes) -> None:
        """Ask about the files that a page has needed before. Loop thread only.

        :param head: of the request for it, which was let in
        """
        page = find_page(head) if self._site else ""
        if page in self._pages:
            self._ask_early(page, head)
        elif page:
            address = self._address_of(page)
            self._cache.look_up(self._io_loop, address, lambda content: self._remember(page, content, head))

    def _remember(self, page: str, content: Content | None, head: bytes) -> None:
        if content is not None:
            files = content.decode("latin-1").split("\n")
            self._pages.setdefault(page, files[:_MOST])
            self._ask_early(page, head)

    def _ask_early(self, page: str, head: bytes) -> None:
        cookies = read_cookies(head)
        for target in list(self._pages[page]):
            request, unused = write_static_request(target, head), self._early.pop(target, None)
            if request is None or unused:  # the page needs it no more, or the browser has it
                self._pages[page].remove(target)
                self._learned.add(page)
            else:
                self._cache.find(self._io_loop, request.name, functools.partial(self._ask, request, cookies))

    def _ask(self, request: StaticRequest, cookies: list[bytes], hashes: list[str] | None) -> None:
        if hashes:
            early = self._early[request.target] = _Early(cookies, hashes, Future())
            answer = self._revalidator.ask(write_question(request, hashes))
            answer.add_done_callback(lambda it: early.answer.set_result((it.result(), time.monotonic())))

    def record(self, request: StaticRequest | None, head: bytes) -> Recording | None:
        """Begin to keep the file that follows the head of an answer; None where it is not to be kept."""
        if self._ahead and _LEAVES_IDLE.search(head):
            ahead, self._ahead = self._ahead, None
            self._io_loop.post(lambda: ahead.keep(SPARE_OF_PAGE))
        if request is None:
            return None
        if request.sha512:
            file = StaticFile(request.name, request.sha512)
            return self._cache.record(file) if find_length_to_keep(head) else None
        if request.again:
            sha512 = find_hash_to_keep(head)
            return self._cache.record(StaticFile(request.name, sha512), promised=False) if sha512 else None
        answer = find_lasting(request, head, time.time()) if self._site else None
        return self._cache.record(Address(self._site, request.target), answer) if answer else None


def _parts(head: bytes, content: Content) -> list[memoryview]:
    return [memoryview(head), memoryview(content)]


def _answer_by_content(request: StaticRequest, content: Content | None) -> list[memoryview] | None:
    if content is None:
        return None
    head = write_static_head(request, len(content))
    return [memoryview(head)] if request.known else _parts(head, content)


def _answer_lasting(request: StaticRequest, content: Content | None) -> list[memoryview] | None:
    answer, now = content.answer if content is not None else None, time.time()
    if content is None or answer is None or not (fits(answer, request) and answer.is_fresh(now)):
        return None
    return _parts(write_lasting_head(answer, len(content), now), content)
