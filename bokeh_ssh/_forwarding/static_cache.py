"""Looks for files in the store, and keeps those that pass, on a thread of its own.

A disk can be slow, full, or a file server that does not answer. Neither the loop's nor the transport's thread
may wait for it: a look-up has a deadline, and what comes faster than it can be written is not kept.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import threading
import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

from bokeh_ssh._core.this_machine.private_folder import FolderError, find_folder
from bokeh_ssh._core.threads import Thread
from bokeh_ssh._forwarding.static_requests import Address, Lasting, StaticFile, name_static_file
from bokeh_ssh._forwarding.static_store import StaticStore, StaticWriter
from bokeh_ssh._ssh.relay import Loop

log = logging.getLogger("bokeh_ssh.forward")

Read = TypeVar("Read")

#: Seconds until a request that the store does not answer goes to the server.
_PATIENCE = 1.0
#: Seconds that one may wait for a file that is on its way already.
_EXPECTED_PATIENCE = 60.0
#: Bytes that may wait to be written.
_MOST_WAITING = 8 * 1024 * 1024


def open_cache(stack: contextlib.ExitStack, warn: Callable[[str], None]) -> StaticCache | None:
    """Return a :class:`StaticCache` of the account's store, closed with ``stack``; None where it has none."""
    try:
        cache = StaticCache(StaticStore(find_folder("static")), warn)
    except FolderError as exc:
        log.info("static files are not kept: %s", exc)
        return None
    stack.callback(cache.close)
    return cache


class Content(bytearray):
    """The content of a file, checked; can be referred to weakly, as bytes cannot.

    :ivar answer: in which it came, where it was kept for its address
    """

    answer: Lasting | None = None


class StaticCache:
    """The store of one tunnel, and the thread that reads and writes it.

    :param warn: called once for a file that is not what its address says
    """

    def __init__(self, store: StaticStore, warn: Callable[[str], None]) -> None:
        self._store = store
        self._warn = warn
        self._told = False
        self._change = threading.Condition()
        self._reads: collections.deque[Callable[[], None]] = collections.deque()
        self._writes: collections.deque[Callable[[], None]] = collections.deque()
        self._waiting = 0  # bytes to be written
        #: What is being sent now: many may ask for the same file, and take their time.
        self._loaded: weakref.WeakValueDictionary[StaticFile | Address, Content] = (
            weakref.WeakValueDictionary()
        )
        #: What is on its way ahead of the browser's asking, and who waits for it.
        self._expected: dict[StaticFile | Address, list[Callable[[], None]]] = {}
        self._late = 0  # look-ups that nobody waits for any more
        self._closed = False
        self._thread: threading.Thread | None = None

    def look_up(self, loop: Loop, file: StaticFile | Address, done: Callable[[Content | None], None]) -> None:
        """Call ``done`` on the loop's thread with the content of a file, or None. Loop thread only."""
        with self._change:
            waiting = self._expected.get(file)
            if waiting is not None:
                wait = _LookUp[Content](lambda _: self.look_up(loop, file, done))
                waiting.append(lambda: loop.post(lambda: wait.finish(None)))
        if waiting is not None:
            # On its way, it is as fast as the line; only a line that has stalled is not waited for.
            loop.later(_EXPECTED_PATIENCE, lambda: self._settle(file))
            return
        self._read(loop, lambda: self._load(file), done)

    def find(self, loop: Loop, name: str, done: Callable[[list[str] | None], None]) -> None:
        """Call ``done`` likewise with the hashes of the files of that name."""
        self._read(loop, lambda: self._store.find(name), done)

    def _read(self, loop: Loop, load: Callable[[], Read], done: Callable[[Read | None], None]) -> None:
        look = _LookUp(done)

        def read() -> None:
            content = load()
            with self._change:
                look.read = True
                if look.late:
                    self._late -= 1
            loop.post(lambda: look.finish(content))

        def give_up() -> None:
            with self._change:
                if look.over or look.read:
                    return
                look.late = True
                self._late += 1
            log.info("the store of static files does not answer: they come from the server")
            look.finish(None)

        if self._late or self._closed:
            loop.post(lambda: look.finish(None))
            return
        loop.later(_PATIENCE, give_up)
        self._put(self._reads, read)

    def _load(self, file: StaticFile | Address) -> Content | None:
        content = self._loaded.get(file)
        if content is None and isinstance(file, Address):
            if kept := self._store.load_answer(file):
                content = Content(kept[1])
                content.answer = kept[0]
        elif content is None and isinstance(file, StaticFile):
            read = self._store.load(file)
            content = None if read is None else Content(read)
        if content is not None:
            self._loaded[file] = content
        return content

    def record(
        self, file: StaticFile | Address, answer: Lasting | None = None, *, promised: bool = True
    ) -> Recording:
        """Begin to keep a file; returns at once, and from then on neither blocks nor raises.

        :param answer: to whose address it is
        :param promised: whether its address says which content it has, so that another one is reported
        """
        return Recording(self, file, answer, promised=promised)

    def expect(self, name: str, sha512: str) -> Recording | None:
        """Begin to keep a file that comes before it is asked for; who asks meanwhile waits for it.

        :returns: None where it is no file that is kept
        """
        file = name_static_file(name, sha512)
        if file is None:
            return None
        with self._change:
            self._expected.setdefault(file, [])
        return Recording(self, file, on_end=lambda: self._settle(file))

    def _settle(self, file: StaticFile | Address) -> None:
        """Let those go on who wait for a file, whatever became of it."""
        with self._change:
            waiting = self._expected.pop(file, [])
        for go_on in waiting:
            go_on()

    def hashes(self) -> set[str]:
        """Return the hashes of the files that are kept. Waits for the disk."""
        return self._store.hashes()

    def close(self, timeout: float = 2.0) -> None:
        """Write what waits to be written, and end; idempotent."""
        with self._change:
            self._closed = True
            self._change.notify_all()
            thread = self._thread
        if thread:
            thread.join(timeout)

    def _put(self, jobs: collections.deque[Callable[[], None]], job: Callable[[], None]) -> None:
        with self._change:
            jobs.append(job)
            if self._thread is None and not self._closed:
                self._thread = Thread(self._run, name="bokeh-ssh static files")
                self._thread.start()
            self._change.notify_all()

    def _run(self) -> None:
        while True:
            with self._change:
                while not (self._reads or self._writes or self._closed):
                    self._change.wait()
                jobs = self._reads or self._writes  # pages wait for what is read
                if not jobs:
                    self._thread = None
                    return
                job = jobs.popleft()
            try:
                job()
            except Exception:  # one file's failure must not end the others
                log.exception("a static file could not be handled")

    def _report_mismatch(self, name: str) -> None:
        text = (
            f"{name} came with other content than its address says, and is not kept: the server was "
            "changed under an open page, or something on the way to it changes files"
        )
        log.info("%s", text)
        if not self._told:
            self._told = True
            self._warn(text)


class _LookUp(Generic[Read]):
    """What somebody waits for."""

    __slots__ = ("_done", "late", "over", "read")

    def __init__(self, done: Callable[[Read | None], None]) -> None:
        self._done = done
        self.over = False
        self.read = False  # by the thread
        self.late = False  # so that nobody waits any more

    def finish(self, content: Read | None) -> None:
        if not self.over:
            self.over = True
            self._done(content)


class Recording:
    """One file that passes. Made by :meth:`StaticCache.record`.

    :param on_end: called on the cache's thread once it is kept, or is not
    """

    def __init__(
        self,
        cache: StaticCache,
        file: StaticFile | Address,
        answer: Lasting | None = None,
        on_end: Callable[[], None] = lambda: None,
        *,
        promised: bool = True,
    ) -> None:
        self._cache = cache
        self._on_end = on_end
        self._file = file
        self._answer = answer
        self._promised = promised
        self._name = file.name if isinstance(file, StaticFile) else file.target
        self._writer: StaticWriter | None = None
        self._ended = False  # on the caller's side
        self._failed = False  # on the thread's side

    def write(self, data: memoryview) -> None:
        """Add the next bytes."""
        cache, size = self._cache, len(data)
        with cache._change:
            if self._ended or self._failed:
                return
            full = cache._waiting + size > _MOST_WAITING
            if not full:
                cache._waiting += size
        if full:
            log.info("%s is not kept: it comes faster than it can be written", self._name)
            self.discard()
            return
        copied = bytes(data)
        cache._put(cache._writes, lambda: self._write(copied))

    def finish(self) -> None:
        """Keep the file, if its content is what it should be."""
        self._end(self._finish)

    def discard(self) -> None:
        """Keep nothing; of no effect after :meth:`finish`."""
        self._end(self._discard)

    def _end(self, job: Callable[[], None]) -> None:
        with self._cache._change:
            if self._ended:
                return
            self._ended = True

        def end() -> None:
            try:
                job()
            finally:
                self._on_end()

        self._cache._put(self._cache._writes, end)

    # On the cache's thread.

    def _write(self, data: bytes) -> None:
        with self._cache._change:
            self._cache._waiting -= len(data)
        if self._failed:
            return
        try:
            if self._writer is None:
                self._writer = self._cache._store.begin(self._file, self._answer)
            self._writer.write(data)
        except (OSError, FolderError) as exc:
            self._fail(exc)

    def _finish(self) -> None:
        if self._failed or self._writer is None:
            return
        try:
            if not self._writer.finish() and self._promised:
                self._cache._report_mismatch(self._name)
        except OSError as exc:
            self._fail(exc)

    def _discard(self) -> None:
        if self._writer:
            self._writer.discard()

    def _fail(self, exc: Exception) -> None:
        log.info("%s is not kept: %s", self._name, exc)
        self._failed = True
        self._discard()
