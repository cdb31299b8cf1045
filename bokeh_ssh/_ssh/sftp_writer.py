"""Writes files over SFTP: what an upload needs of version 3 (draft-ietf-secsh-filexfer-02), and no more.

Not paramiko's SFTPClient: that waits for the answer of each open and each close, so that a folder of 300
files takes a minute over a line of 100 ms. Here the next files are opened while one is written, and what is
under way is bounded by its bytes alone.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

from bokeh_ssh._core.errors import BokehSSHError
from bokeh_ssh._core.waiting import wait_for
from bokeh_ssh._ssh.messages import string, strings
from bokeh_ssh._ssh.runner import Session, Subsystems

_T = TypeVar("_T")

_INIT, _VERSION, _OPEN, _CLOSE, _WRITE, _STATUS, _HANDLE = 1, 2, 3, 4, 6, 101, 102
_OK = 0
_NEW = 0x02 | 0x08 | 0x20  # to be written, created, not there yet: SSH_FXF_WRITE, _CREAT, _EXCL
_WITH_MODE = 0x04  # SSH_FILEXFER_ATTR_PERMISSIONS
_LONGEST = 256 << 10  # bytes of an answer, as OpenSSH has it; those to us are far shorter
_CHUNK = 32 << 10  # bytes of a write that every server takes (section 3 of the draft)
_AHEAD = 4 << 20  # bytes under way: 40 MB/s at 100 ms
_EACH = 256  # what a request counts for besides its bytes
_OPENED = 32  # files that are opened before their turn: an account may have few descriptors


class Source(Protocol):
    """What is in a file: a :class:`Reading`."""

    def pieces(self, most: int) -> Iterator[tuple[int, bytes]]: ...
    def close(self) -> None: ...


class SftpError(Exception):
    """Files cannot be written this way; the text says why. There is another way: see ``_server.upload``."""


class Sftp:
    """An SFTP session beside the others of a connection. It opens by itself, from now on, in the background.

    :param runner: the connection
    :param patience: seconds without anything heard, after which it is given up; few, as there is another way
    """

    def __init__(self, runner: Subsystems, patience: float = 10) -> None:
        self._patience = patience
        self._change = threading.Condition()
        self._session: Session | None = None
        self._numbers = itertools.count(1)
        self._arriving = bytearray()
        self._asked: set[int] = set()
        self._answers: dict[int, tuple[int, bytes]] = {}
        self._heard = time.monotonic()
        self._ready = False
        self._fault = ""
        self._closed = False
        threading.Thread(target=self._open, args=(runner,), name="bokeh-ssh sftp", daemon=True).start()

    def _open(self, runner: Subsystems) -> None:
        try:
            session = runner.subsystem(
                "sftp",
                on_stdout=self._on_stdout,
                on_stderr=lambda data: None,
                on_exit=lambda status: self._fail("its session has ended"),
                timeout=self._patience,
                first=_packet(_INIT, struct.pack(">I", 3)),
            )
        except BokehSSHError as exc:
            self._fail(exc.message)
            return
        with self._change:
            self._session, closed = session, self._closed
            self._change.notify_all()
        if closed:
            session.close()

    def close(self) -> None:
        """End the session; idempotent, never blocks."""
        with self._change:
            self._closed = True
            session = self._session
        if session:
            session.write_eof()
            session.close()

    def wait(self) -> None:
        """Wait until it has opened.

        :raises SftpError: if there can be no such session
        """
        self._await(lambda: self._ready and self._session and not self._closed)

    def put(
        self,
        files: Iterable[tuple[_T, bytes, Source]],
        *,
        done: Callable[[_T], object],
        on_progress: Callable[[int], object],
    ) -> None:
        """Write files that are not there yet, for nobody but their owner to read.

        :param files: whose each is, its path there, and its contents here; taken as their turn comes near.
        :param done: gets whose each is that is there, whole
        :param on_progress: gets how many bytes have arrived in all, each time that more have
        :raises SftpError: if that does not work; a file that was begun may be there in part
        :raises OSError: if a file cannot be read
        """
        self.wait()
        coming = iter(files)
        opening: collections.deque[tuple[_T, Source, int]] = collections.deque()
        under_way: collections.deque[tuple[int, int, int, list[_T]]] = collections.deque()
        load = sent = 0

        def settle(most: int) -> None:
            """Wait for the oldest answers, until no more than this is under way."""
            nonlocal load, sent
            while load > most:
                number, size, much, ends = under_way.popleft()
                self._expect(number, _STATUS)
                load -= size + _EACH
                sent += much
                if much:
                    on_progress(sent)
                for whose in ends:
                    done(whose)

        def request(kind: int, body: bytes, size: int, much: int, ends: list[_T]) -> None:
            nonlocal load
            settle(_AHEAD)
            under_way.append((self._send_request(kind, body), size, much, ends))
            load += size + _EACH

        try:
            while True:
                for whose, path, file in itertools.islice(coming, _OPENED - len(opening)):
                    how = struct.pack(">III", _NEW, _WITH_MODE, 0o600)
                    opening.append((whose, file, self._send_request(_OPEN, string(path) + how)))
                if not opening:
                    break
                whose, file, number = opening[0]
                handle = string(self._expect(number, _HANDLE))
                end = 0
                for offset, data in file.pieces(_CHUNK):
                    much = offset + len(data) - end  # with the hole before it
                    end += much
                    request(_WRITE, handle + struct.pack(">Q", offset) + string(data), len(data), much, [])
                request(_CLOSE, handle, 0, 0, [whose])
                opening.popleft()
                file.close()
            settle(0)
        finally:
            for _, file, _ in opening:
                file.close()

    # --- what is asked, and what is answered

    def _send_request(self, kind: int, body: bytes) -> int:
        number = next(self._numbers)
        with self._change:
            if not self._asked:
                self._heard = time.monotonic()  # until now there was nothing to be heard
            self._asked.add(number)
            session = self._session
        if session:
            session.write(_packet(kind, struct.pack(">I", number) + body))
        return number

    def _expect(self, number: int, kind: int) -> bytes:
        """Wait for an answer; return the handle, where it is to have one.

        :raises SftpError: if it is another one, or none comes
        """
        self._await(lambda: number in self._answers)
        with self._change:
            got, body = self._answers.pop(number)
        try:
            if got == kind == _HANDLE:
                return strings(body, 1)[0]
            (code,) = struct.unpack_from(">I", body)
            if got == kind == _STATUS and code == _OK:
                return b""
            words = strings(body[4:], 1)[0] if got == _STATUS and len(body) > 4 else b""
        except (struct.error, ValueError):
            raise SftpError("it answers in another way than SFTP does") from None
        raise SftpError(words.decode("utf-8", "replace")[:200] or f"the request was refused, reason {code}")

    def _await(self, met: Callable[[], object]) -> None:
        with self._change:
            while True:
                left = self._heard + self._patience - time.monotonic()
                wait_for(self._change, lambda: met() or self._fault or self._closed, max(0.0, left))
                if met():
                    return
                if self._fault or self._closed:
                    raise SftpError(self._fault or "it was closed")
                if time.monotonic() >= self._heard + self._patience:
                    raise SftpError(f"nothing was heard for {self._patience:g} s")

    def _on_stdout(self, data: bytes) -> None:
        with self._change:
            self._heard = time.monotonic()
            self._arriving += data
            with contextlib.suppress(EOFError):
                try:
                    while not self._fault:
                        self._take()
                except (struct.error, ValueError):  # a start file that prints, most often
                    self._fault = "what it says is not SFTP"
            self._change.notify_all()

    def _take(self) -> None:
        """Take the next answer.

        :raises EOFError: if it has not arrived yet
        :raises ValueError: if it is none, or to nothing that was asked: so no more are kept than were asked
        """
        if len(self._arriving) < 4:
            raise EOFError
        (length,) = struct.unpack_from(">I", self._arriving)
        if not 5 <= length <= _LONGEST:
            raise ValueError(length)
        if len(self._arriving) < 4 + length:
            raise EOFError
        kind, number = struct.unpack_from(">BI", self._arriving, 4)
        body = bytes(self._arriving[9 : 4 + length])
        del self._arriving[: 4 + length]
        if kind == _VERSION and not self._ready and number == 3:
            self._ready = True
            return
        if number not in self._asked:
            raise ValueError(number)
        self._asked.remove(number)
        self._answers[number] = kind, body

    def _fail(self, why: str) -> None:
        with self._change:
            self._fault = self._fault or why
            self._change.notify_all()


def _packet(kind: int, body: bytes) -> bytes:
    return struct.pack(">IB", len(body) + 1, kind) + body
