"""Writing files over SFTP: to real servers, many at once, and against servers that misbehave."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from beds import Machine, until
from bokeh_ssh import SessionError
from bokeh_ssh._core.host import Host
from bokeh_ssh._ssh.connect import connect
from bokeh_ssh._ssh.sftp_writer import Sftp, SftpError

if os.name != "posix":
    pytest.skip("the remote side is a POSIX system", allow_module_level=True)

INIT, OPEN, CLOSE, WRITE = 1, 3, 4, 6


@contextmanager
def sftp_to(machine: Machine, **keywords: Any) -> Iterator[Sftp]:
    with connect(Host(machine.host, machine.user, **machine.login)) as connection:
        sftp = Sftp(connection, **keywords)
        try:
            yield sftp
        finally:
            sftp.close()


class File(io.BytesIO):
    """A file to be written, with no holes."""

    def pieces(self, most: int) -> Iterator[tuple[int, bytes]]:
        at = 0
        while data := self.read(most):
            yield at, data
            at += len(data)


def put(sftp: Sftp, files: Mapping[str, bytes | File]) -> tuple[list[str], list[int]]:
    """Write files; gives those that are there in their order, and what was told of the progress."""
    done: list[str] = []
    told: list[int] = []
    opened = (
        (path, path.encode(), File(data) if isinstance(data, bytes) else data) for path, data in files.items()
    )
    sftp.put(opened, done=done.append, on_progress=told.append)
    return done, told


# --- real servers


@pytest.fixture
def folder(machine: Machine) -> Iterator[str]:
    """An empty folder of the account's on the machine."""
    user = machine.user if machine.kind == "docker" else None
    path = str(machine.execute(["mktemp", "-d"], user=user))
    yield path
    machine.execute(["rm", "-rf", path])


def test_files_of_all_sizes_arrive(
    machine: Machine, folder: str, no_leaks: Callable[..., AbstractContextManager[None]]
) -> None:
    """Files arrive byte for byte, those at the edges of a packet too, and more than are opened at once; only
    their owner may read them, what was told adds up, and nothing is left open."""
    sizes = [0, 1, (32 << 10) - 1, 32 << 10, (32 << 10) + 1, 9_000_000, *range(100)]
    files = {f"{folder}/{number} ü": os.urandom(size) for number, size in enumerate(sizes)}
    with no_leaks(), sftp_to(machine) as sftp:
        done, told = put(sftp, files)
    assert done == list(files)
    assert told == sorted(told)
    assert told[-1] == sum(sizes)
    sums = machine.execute(["sha256sum", *files]).stdout.splitlines()
    assert [line.split()[0] for line in sums] == [hashlib.sha256(d).hexdigest() for d in files.values()]
    modes = machine.execute(["stat", "-c", "%a", *files]).stdout.split()
    assert set(modes) == {"600"}


def test_what_is_there_is_not_written_over(machine: Machine, folder: str) -> None:
    """A name that is taken is refused, and what has it stays as it is; those before it are there."""
    machine.execute(["sh", "-c", f"echo mine > {folder}/taken"])
    with sftp_to(machine) as sftp:
        done: list[str] = []
        files = [(n, f"{folder}/{n}".encode(), File(b"x" * 10)) for n in ("first", "taken", "last")]
        with pytest.raises(SftpError, match=r"[Ff]ail|exist"):
            sftp.put(iter(files), done=done.append, on_progress=lambda sent: None)
    assert str(machine.execute(["cat", f"{folder}/taken"])) == "mine"
    assert "taken" not in done
    assert all(file.closed for _, _, file in files)


def test_no_folder_and_no_subsystem(machine_with: Callable[..., Machine]) -> None:
    """A folder that is not there, a server without SFTP and one with no session to spare say so."""
    with sftp_to(machine_with()) as sftp, pytest.raises(SftpError, match="No such file"):
        put(sftp, {"/no/such/folder/x": b""})
    with sftp_to(machine_with(sftp=False)) as sftp, pytest.raises(SftpError, match=r"no sftp|has ended"):
        put(sftp, {"/tmp/x": b""})
    machine = machine_with(max_sessions=1)
    with connect(Host(machine.host, machine.user, **machine.login)) as connection:
        quiet: dict[str, Any] = {name: lambda _: None for name in ("on_stdout", "on_stderr", "on_exit")}
        first = connection.run("cat", timeout=10, **quiet)
        with pytest.raises(SftpError, match="refuses to open a session"):
            put(Sftp(connection), {"/tmp/x": b""})
        first.close()


# --- servers that a test plays


class Played:
    """An SFTP server that answers as its test says: ``answer(server, kind, number, body)``."""

    def __init__(self, answer: Callable[[Played, int, int, bytes], object]) -> None:
        self._answer = answer
        self._arrived = bytearray()
        self.requests: list[int] = []
        self.closed = threading.Event()

    def subsystem(self, name: str, *, first: bytes, **callbacks: Any) -> Played:
        assert name == "sftp"
        self.send: Callable[[bytes], None] = callbacks["on_stdout"]
        self.end: Callable[[int | None], None] = callbacks["on_exit"]
        self.write(first)
        return self

    def write(self, data: bytes) -> None:
        self._arrived += data
        while len(self._arrived) >= 4:
            (length,) = struct.unpack_from(">I", self._arrived)
            if len(self._arrived) < 4 + length:
                return
            kind, number = struct.unpack_from(">BI", self._arrived, 4)
            body = bytes(self._arrived[9 : 4 + length])
            del self._arrived[: 4 + length]
            self.requests.append(kind)
            self._answer(self, kind, number, body)

    def write_eof(self) -> None:
        pass

    def close(self) -> None:
        self.closed.set()

    def say(self, kind: int, number: int, body: bytes = b"") -> None:
        self.send(struct.pack(">IBI", 5 + len(body), kind, number) + body)

    def version(self) -> None:
        self.say(2, 3)

    def handle(self, number: int) -> None:
        self.say(102, number, struct.pack(">I", 4) + struct.pack(">I", number))

    def status(self, number: int, code: int = 0, text: bytes = b"no") -> None:
        self.say(101, number, struct.pack(">II", code, len(text)) + text + struct.pack(">I", 0))


def behaves(server: Played, kind: int, number: int, body: bytes) -> None:
    if kind == INIT:
        server.version()
    elif kind == OPEN:
        server.handle(number)
    else:
        server.status(number)


def test_no_file_waits_for_another() -> None:
    """Files are opened while others are, and written while others are written: a server that answers nothing
    before all of it has come is no deadlock. So no file pays for a round trip of its own."""
    held: list[tuple[int, int]] = []

    def answer(server: Played, kind: int, number: int, body: bytes) -> None:
        if kind == INIT:
            server.version()
            return
        held.append((kind, number))
        wanted = OPEN if OPEN in {kind for kind, _ in held} else CLOSE
        if sum(kind == wanted for kind, _ in held) == 20:
            for each, asked in held:
                (server.handle if each == OPEN else server.status)(asked)
            held.clear()

    sftp = Sftp(Played(answer), patience=5)
    done, told = put(sftp, {f"/{number}": b"x" * 50_000 for number in range(20)})
    assert len(done) == 20
    assert told[-1] == 1_000_000


class Endless(File):
    """A file without end, that counts what was read of it."""

    taken = 0

    def read(self, size: int | None = -1) -> bytes:
        assert size
        self.taken += size
        return b"\0" * size


def test_little_is_under_way_and_silence_ends_it() -> None:
    """A server that takes and never answers is given up after its patience, with no more than some megabytes
    read for it; one that answers at its leisure is not."""

    def silent(server: Played, kind: int, number: int, body: bytes) -> None:
        if kind in (INIT, OPEN):
            behaves(server, kind, number, body)

    endless = Endless()
    with pytest.raises(SftpError, match=r"nothing was heard for 0\.3 s"):
        put(Sftp(Played(silent), patience=0.3), {"/x": endless})
    assert 3 << 20 < endless.taken < 5 << 20

    def slow(server: Played, kind: int, number: int, body: bytes) -> None:
        threading.Timer(0.2, behaves, (server, kind, number, body)).start()

    done, _ = put(Sftp(Played(slow), patience=3), {f"/{number}": b"x" for number in range(3)})
    assert len(done) == 3


def _twice(server: Played, kind: int, number: int, body: bytes) -> None:
    behaves(server, kind, number, body)
    behaves(server, kind, number, body)


def _as(what: Callable[[Played, int], object], kind: int = OPEN) -> Callable[..., None]:
    def answer(server: Played, asked: int, number: int, body: bytes) -> None:
        if asked == kind:
            what(server, number)
        else:
            behaves(server, asked, number, body)

    return answer


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (_as(lambda server, _: server.send(b"Welcome to the cluster!\n"), INIT), "is not SFTP"),
        (_as(lambda server, _: server.send(b"\xff\xff\xff\xff"), INIT), "is not SFTP"),
        (_as(lambda server, _: server.send(b"\0\0\0\4abcd"), INIT), "is not SFTP"),
        (_as(lambda server, _: server.say(2, 2), INIT), "is not SFTP"),
        (_twice, "is not SFTP"),
        (_as(lambda server, number: server.handle(number + 1)), "is not SFTP"),
        (_as(lambda server, number: server.status(number)), "reason 0|no"),
        (_as(lambda server, number: server.status(number, 3, b"Permission denied")), "^Permission denied$"),
        (_as(lambda server, number: server.status(number, 4, b"")), "reason 4"),
        (_as(lambda server, number: server.say(101, number, b"\0\0")), "another way"),
        (_as(lambda server, number: server.say(101, number, b"\0\0\0\4\0\0\xff\0x")), "another way"),
        (_as(lambda server, number: server.say(102, number, b"\0\0\0\4x")), "another way"),
        (_as(lambda server, number: server.say(105, number)), "another way"),
        (_as(lambda server, number: server.handle(number), WRITE), "another way|reason"),
        (_as(lambda server, number: server.status(number, 4), WRITE), "no"),
        (_as(lambda server, number: server.status(number, 4), CLOSE), "no"),
        (_as(lambda server, _: server.end(1), WRITE), "has ended"),
        (_as(lambda server, _: server.end(None), INIT), "has ended"),
    ],
)
def test_wrong_answers_end_it(answer: Callable[..., None], words: str) -> None:
    """Whatever a server says that is no answer, or says no, ends it at once; no file counts as there."""
    done: list[str] = []
    sftp = Sftp(Played(answer), patience=20)
    with pytest.raises(SftpError, match=words):
        sftp.put(iter([("x", b"/x", File(b"data"))]), done=done.append, on_progress=lambda sent: None)
    assert not done


@given(st.lists(st.binary(max_size=60), max_size=8), st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_answer_is_an_answer_or_an_error(pieces: list[bytes], greeted: bool) -> None:
    """Any bytes in place of answers give that one error, and none in the thread that brought them."""

    def answer(server: Played, kind: int, number: int, body: bytes) -> None:
        if greeted and kind == INIT:
            server.version()
            return
        for piece in pieces:
            server.send(piece)
        server.end(0)

    with pytest.raises(SftpError):
        put(Sftp(Played(answer), patience=20), {"/x": b"data"})


def test_file_that_cannot_be_read_is_an_error() -> None:
    """A file that stops to be readable in the middle is an error, and all files are closed."""

    class Broken(Endless):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(5, "Input/output error")

    files = [("a", b"/a", Broken()), ("b", b"/b", File())]
    with pytest.raises(OSError, match="Input/output"):
        Sftp(Played(behaves)).put(iter(files), done=lambda _: None, on_progress=lambda _: None)
    assert all(file.closed for _, _, file in files)


def test_closed_while_it_opens() -> None:
    """Closed before the server has answered, it leaves no session, and whoever waits for it is told."""
    opened, go_on = threading.Event(), threading.Event()

    class Late(Played):
        def subsystem(self, name: str, **callbacks: Any) -> Played:
            opened.set()
            go_on.wait(20)
            return super().subsystem(name, **callbacks)

    server = Late(behaves)
    sftp = Sftp(server)
    assert opened.wait(20)
    sftp.close()
    go_on.set()
    until(server.closed.is_set, what="the session to be closed")
    with pytest.raises(SftpError, match="closed"):
        put(sftp, {"/x": b""})

    class Without(Played):
        def subsystem(self, name: str, **callbacks: Any) -> Played:
            raise SessionError("there is none")

    with pytest.raises(SftpError, match="there is none"):
        put(Sftp(Without(behaves)), {"/x": b""})
