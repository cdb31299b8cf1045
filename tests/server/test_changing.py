"""What is brought while it changes: nothing hangs, has no end, leads elsewhere or goes without a word."""

from __future__ import annotations

import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import watchfiles

from beds import Knobs, Machine, until
from bokeh_ssh import Event, Host, Updated, UploadError, Warned
from bokeh_ssh._core import file_reader
from bokeh_ssh._core.file_reader import Reading
from bokeh_ssh._server import file_sync
from bokeh_ssh._server.file_sync import FileSync
from bokeh_ssh._server.launch_spec import Launch
from bokeh_ssh._server.server import Server
from bokeh_ssh._server.upload_set import Bundle
from bokeh_ssh._ssh.connect import connect

if os.name != "posix":
    pytest.skip("the remote side is a POSIX system", allow_module_level=True)

from local_runner import FAKE

#: Between the first look at what is brought, and the opening of it.
Change = Callable[[Path], object]


@pytest.fixture(params=["sftp", "messages"])
def machine(
    request: pytest.FixtureRequest,
    sshd: Callable[..., Machine],
    embedded: Callable[..., Machine],
    monkeypatch: pytest.MonkeyPatch,
) -> Machine:
    """A machine with SFTP (OpenSSH's), where even little goes that way, and one without."""
    if request.param == "sftp":
        monkeypatch.setattr(file_sync, "_LITTLE", -1)
        return sshd(Subsystem="sftp internal-sftp")
    return embedded(Knobs(sftp=False))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with some files, of which ``it`` is the one that changes."""
    folder = tmp_path / "work" / "app"
    (folder / "inner").mkdir(parents=True)
    for name in ("before", "it", "inner/it", "last"):
        (folder / name).write_text(f"what {name} has")
    return folder


class Brought:
    """What was brought, and what was told."""

    def __init__(self, mirror: FileSync, server: Server, events: list[Event]) -> None:
        self.mirror = mirror
        self.server = server
        self.events = events
        self.folder = Path(server.uploads.directory)

    @property
    def names(self) -> set[str]:
        """What is there, by its path below the folder."""
        return {
            str(path.relative_to(self.folder))
            for path in self.folder.rglob("*")
            if path.is_symlink() or not path.is_dir()
        }

    @property
    def warnings(self) -> str:
        """What was warned of."""
        return "\n".join(event.text for event in self.events if isinstance(event, Warned))


@contextmanager
def bringing(machine: Machine, *paths: Path) -> Iterator[Brought]:
    """Start a server that is brought these, with a server that starts at once in place of Bokeh."""
    events: list[Event] = []
    launch = Launch(command=FAKE, app=("app",), brings=True, python=sys.executable)
    with connect(Host(machine.host, machine.user, **machine.login)) as connection:
        mirror = FileSync(Bundle([str(path) for path in paths]), events.append)
        server = Server.start(connection, launch, bring=mirror.upload_all)
        try:
            yield Brought(mirror, server, events)
        finally:
            server.stop()


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Have something done between the first look and the first opening."""

    def have(change: Callable[[], object]) -> None:
        plain, left = file_sync.upload, [change]

        def deliver(*args: object, **keywords: object) -> set[str]:
            if left:
                left.pop()()
            return plain(*args, **keywords)  # type: ignore[arg-type]

        monkeypatch.setattr(file_sync, "upload", deliver)

    return have


def _become_socket(path: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o600)  # bind() takes no path as long as that of a test may be


def _become_device(path: Path) -> None:
    if os.getuid():
        pytest.skip("a device is made by root only")
    os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero: it has no end


BECOMES: dict[str, Callable[[Path], object]] = {
    "fifo": os.mkfifo,
    "socket": _become_socket,
    "device": _become_device,
    "link": lambda path: path.symlink_to("/etc/passwd"),
    "folder": Path.mkdir,
    "nothing": lambda path: None,
}


@pytest.mark.parametrize("becomes", BECOMES)
def test_file_that_becomes_something_else(
    machine: Machine, folder: Path, meanwhile: Callable[..., None], becomes: str
) -> None:
    """A file that is a FIFO, a socket, a device, a link that leads elsewhere, a folder or nothing when it is
    opened is not brought, and not waited for; all others are, and what is left out is told."""

    def change() -> None:
        (folder / "it").unlink()
        BECOMES[becomes](folder / "it")

    meanwhile(change)
    with bringing(machine, folder) as brought:
        assert brought.names == {"app/before", "app/inner/it", "app/last"}
        told = "app/it (" in brought.warnings
        assert told == (becomes in ("fifo", "socket", "device", "link"))
        assert (brought.folder / "app" / "last").read_text() == "what last has"


def test_folder_that_becomes_a_link(machine: Machine, folder: Path, meanwhile: Callable[..., None]) -> None:
    """What is below a folder that has become a link to another one is not brought from there."""
    other = folder.parent / "other"
    other.mkdir()
    (other / "it").write_text("a secret")

    def change() -> None:
        (folder / "inner" / "it").unlink()
        (folder / "inner").rmdir()
        (folder / "inner").symlink_to(other)

    meanwhile(change)
    with bringing(machine, folder) as brought:
        assert brought.names == {"app/before", "app/it", "app/last"}
        assert "app/inner (a link that leads elsewhere)" in brought.warnings


@pytest.mark.parametrize(
    "text",
    ["short", "x" * 300_000, "what it is?", "what it has"],
    ids=["less", "more", "other", "same"],
)
def test_file_that_is_written_anew(
    machine: Machine, folder: Path, meanwhile: Callable[..., None], text: str
) -> None:
    """A file that was written again after the look, shorter, longer or as long, is brought as it is then."""
    meanwhile(lambda: (folder / "it").write_text(text))
    with bringing(machine, folder) as brought:
        assert (brought.folder / "app" / "it").read_text() == text
        assert "out of date" not in brought.warnings


def test_file_that_is_written_while_it_is_read(
    machine: Machine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is written to while it is read is brought again: what is there is not half of each."""
    (folder / "it").write_bytes(b"a" * 1_000_000)
    plain, done = Reading.pieces, []

    def pieces(self: Reading, most: int) -> Iterator[tuple[int, bytes]]:
        for number, piece in enumerate(plain(self, most)):
            yield piece
            if number == 2 and self.name.endswith("app/it") and not done:
                done.append(True)
                with (folder / "it").open("r+b") as file:
                    file.write(b"b" * 1_000_000)

    monkeypatch.setattr(Reading, "pieces", pieces)
    with bringing(machine, folder) as brought:
        assert done
        assert (brought.folder / "app" / "it").read_bytes() == b"b" * 1_000_000


def test_file_that_grows_without_end(machine: Machine, folder: Path, meanwhile: Callable[..., None]) -> None:
    """A file that grows faster than it can be brought comes as far as it was looked at, which is told."""
    over = threading.Event()
    path = folder / "it"
    path.write_bytes(b"x" * 1000)

    def grow() -> None:
        with path.open("ab") as file:
            while not over.is_set() and file.tell() < 2_000_000_000:
                file.write(b"y" * 1_000_000)
                file.flush()

    def change() -> None:
        threading.Thread(target=grow, daemon=True).start()
        until(lambda: path.stat().st_size > 40_000_000, what="it to grow")

    meanwhile(change)
    began = time.monotonic()
    try:
        with bringing(machine, folder) as brought:
            assert (brought.folder / "app" / "it").read_bytes() == b"x" * 1000
            assert "out of date" in brought.warnings
            assert "app/it" in brought.warnings
            assert "app/last" in brought.names
    finally:
        over.set()
    assert time.monotonic() - began < 60


def test_file_that_fails_while_it_is_read_is_told(
    machine: Machine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that cannot be read any further, as on a broken disk, is an error with its name."""

    plain = Reading._read

    def read(self: Reading, at: int, count: int) -> bytes:
        if Path(self.name).name != "before":  # such as what git does not look at, in a folder above
            return plain(self, at, count)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Reading, "_read", read)
    with pytest.raises(UploadError, match=r"app/before cannot be read \(Input/output error\)"):
        with bringing(machine, folder):
            pass


def test_permission_that_is_lost_is_told(
    machine: Machine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that may not be read any more is an error with its name."""
    plain = file_reader._open

    def refuse(path: Path, top: Path) -> int:
        if path.name == "last":
            raise PermissionError(13, "Permission denied")
        return plain(path, top)

    monkeypatch.setattr(file_reader, "_open", refuse)
    with pytest.raises(UploadError, match=r"app/last cannot be read \(Permission denied\)"):
        with bringing(machine, folder):
            pass


def test_names_of_our_own_are_anybodys(machine: Machine, folder: Path) -> None:
    """Files that are named as what is half there is, or was, are brought like any others."""
    for name in (".bokeh-ssh-part", ".bokeh-ssh-link", ".bokeh-ssh-part-1"):
        (folder / name).write_text(f"its own {name}")
        (folder / "inner" / name).write_text(f"its own {name}")
    (folder / "leads").symlink_to("inner/it")
    more = folder.parent / ".bokeh-ssh-part-2"
    more.write_text("brought")
    with bringing(machine, folder, more) as brought:
        assert (brought.folder / more.name).read_text() == "brought"
        wanted = {f"app/{p.relative_to(folder)}" for p in folder.rglob("*") if p.is_symlink() or p.is_file()}
        assert brought.names == wanted | {more.name}
        for name in (".bokeh-ssh-part", ".bokeh-ssh-link", "inner/.bokeh-ssh-part-1"):
            assert (brought.folder / "app" / name).read_text() == f"its own {Path(name).name}"
        assert (brought.folder / "app" / "leads").readlink() == Path("inner/it")


def test_holes_cost_nothing(machine: Machine, folder: Path) -> None:
    """Files of 3 GB with little in them come as fast as that, byte for byte, and are as small there; so does
    one of plain zeros. What ends in a hole has its size."""
    size = 3 << 30
    for name, places in (("ends", (0, size // 2 + 7)), ("whole", (12345, size - 9)), ("empty", ())):
        with (folder / name).open("wb") as file:
            file.truncate(size)
            for place in places:
                file.seek(place)
                file.write(b"some data"[: size - place])
    (folder / "zeros").write_bytes(bytes(20_000_000) + b"end" + bytes(3))
    began = time.monotonic()
    with bringing(machine, folder) as brought:
        assert time.monotonic() - began < 30
        for name in ("ends", "whole", "empty", "zeros"):
            here, there = folder / name, brought.folder / "app" / name
            facts = there.stat()
            assert facts.st_size == here.stat().st_size
            assert facts.st_blocks * 512 < 2_000_000
            assert list(_pieces(there)) == list(_pieces(here))


def _pieces(path: Path) -> Iterator[tuple[int, bytes]]:
    """Read what a file has, without its zeros."""
    reading = Reading(path, path, path.stat().st_size, 0)
    try:
        for at, data in reading.pieces(1 << 16):
            text = data.strip(b"\0")
            if text:
                yield at + data.index(text), text
    finally:
        reading.close()


def test_changes_that_follow(machine: Machine, folder: Path) -> None:
    """What is watched: a file that becomes a FIFO goes there too, with a word, and comes back with the file;
    one that is appended to follows."""
    with bringing(machine, folder) as brought, brought.mirror.watching():
        brought.mirror.sync_to(brought.server.uploads)
        (folder / "it").unlink()
        os.mkfifo(folder / "it")
        until(lambda: "app/it" not in brought.names, what="it to go")
        until(lambda: "app/it (no file)" in brought.warnings, what="a warning")
        (folder / "it").unlink()
        (folder / "it").write_text("again")
        until(lambda: "app/it" in brought.names, what="it to come back")
        with (folder / "last").open("a") as file:
            for _ in range(20):
                file.write("x" * 50_000)
                file.flush()
        wanted = (folder / "last").read_text()
        until(lambda: (brought.folder / "app" / "last").read_text() == wanted, what="all of it to follow")
        assert any(isinstance(event, Updated) for event in brought.events)
        brought.mirror.sync_to(None)


def test_change_before_the_watch_stands_follows(
    machine: Machine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What changes after the first look, and before anybody would notice, follows without another change."""
    plain, made = watchfiles.watch, threading.Event()

    def watch(*args: Any, **keywords: Any) -> Iterator[Any]:
        assert made.wait(60)
        yield from plain(*args, **keywords)

    monkeypatch.setattr(watchfiles, "watch", watch)
    with bringing(machine, folder) as brought, brought.mirror.watching():
        there = brought.folder / "app" / "it"
        (folder / "it").write_text("second")
        brought.mirror.sync_to(brought.server.uploads)
        until(lambda: there.read_text() == "second", what="the first look")
        until(lambda: any(isinstance(event, Updated) for event in brought.events), what="its end")
        (folder / "it").write_text("third")
        made.set()
        until(lambda: there.read_text() == "third", what="what was changed before the watch stood")
        brought.mirror.sync_to(None)


def test_what_a_watch_is_late_for_follows(
    machine: Machine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was put into a new folder after a look, and before that folder was watched, follows once it is
    quiet: the watch has told of the folder only."""
    told, looked = threading.Event(), threading.Event()

    def watch(*args: Any, **keywords: Any) -> Iterator[set[Any]]:
        yield set()
        assert told.wait(60)
        yield {(1, str(folder / "new"))}
        assert looked.wait(60)
        for _ in range(2):
            yield set()
        keywords["stop_event"].wait()

    monkeypatch.setattr(watchfiles, "watch", watch)
    with bringing(machine, folder) as brought, brought.mirror.watching():
        brought.mirror.sync_to(brought.server.uploads)
        (folder / "new").mkdir()
        (folder / "new" / "first").touch()
        told.set()
        until(lambda: "app/new/first" in brought.names, what="the first look")
        until(lambda: any(isinstance(event, Updated) for event in brought.events), what="its end")
        (folder / "new" / "second").touch()
        looked.set()
        until(lambda: "app/new/second" in brought.names, what="the look once it is quiet")
        brought.mirror.sync_to(None)


def test_change_that_is_missed_follows(
    machine: Machine, folder: Path, meanwhile: Callable[..., None]
) -> None:
    """What changes just while a change of it is brought follows with the next look, without another event."""
    with bringing(machine, folder) as brought:
        meanwhile(lambda: (folder / "it").write_text("third, and longer"))
        (folder / "it").write_text("second")
        brought.mirror._upload_changes(brought.server.uploads)
        brought.mirror._upload_changes(brought.server.uploads)
        assert (brought.folder / "app" / "it").read_text() == "third, and longer"
        (folder / "it").unlink()
        brought.mirror._upload_changes(brought.server.uploads)
        assert "app/it" not in brought.names


@pytest.mark.parametrize("size", [9, 1_500_000], ids=["little", "much"])
def test_what_the_server_has_made_gives_way(machine: Machine, folder: Path, size: int) -> None:
    """What is brought takes the place of what the server has put there: in a folder that is a file now, or
    as a file or a link where there is a folder now. Nothing is written outside, and what the server has made
    elsewhere stays."""
    text = os.urandom(size // 2).hex()
    with bringing(machine, folder) as brought:
        there, outside = brought.folder / "app", folder.parent / "outside"
        outside.mkdir()
        (there / "inner" / "__pycache__").mkdir()
        (there / "inner" / "__pycache__" / "it.pyc").touch()
        (there / "inner" / "made").touch()
        (there / "made").touch()
        (there / "linked").symlink_to(outside)
        (there / "last").unlink()
        (there / "last").mkdir()
        (there / "stays").touch()
        (folder / "inner" / "it").unlink()
        (folder / "inner").rmdir()
        (folder / "inner").write_text(text)
        for name in ("made", "linked"):
            (folder / name).mkdir()
            (folder / name / "it").write_text(text)
        (folder / "last").unlink()
        (folder / "before").unlink()
        (folder / "before").symlink_to("it")
        brought.mirror._upload_changes(brought.server.uploads)
        assert brought.warnings == ""
        for name in ("inner", "made/it", "linked/it"):
            assert (there / name).read_text() == text
        assert (there / "before").readlink() == Path("it")
        assert (there / "last").is_dir()
        assert (there / "stays").exists()
        assert list(outside.iterdir()) == []


def test_package_that_goes_goes_whole(machine: Machine, folder: Path) -> None:
    """Of a folder that is removed here nothing is left there that Python would take for a package, unless the
    server has put something else there."""
    (folder / "other").mkdir()
    (folder / "other" / "it").touch()
    with bringing(machine, folder) as brought:
        for name in ("inner", "other"):
            (brought.folder / "app" / name / "__pycache__").mkdir()
            (brought.folder / "app" / name / "__pycache__" / "it.pyc").touch()
            (folder / name / "it").unlink()
        (brought.folder / "app" / "other" / "made").touch()
        brought.mirror._upload_changes(brought.server.uploads)
        assert not (brought.folder / "app" / "inner").exists()
        assert brought.names == {
            "app/before",
            "app/it",
            "app/last",
            "app/other/made",
            "app/other/__pycache__/it.pyc",
        }


def test_ignore_file_that_becomes_a_fifo_is_not_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is one that becomes a FIFO between the look at it and its opening."""
    file = folder / ".gitignore"
    file.write_text("last")
    assert "app/last" not in Bundle([str(folder)]).scan().items
    plain = Path.stat

    def stat(path: Path, *args: bool, **keywords: bool) -> os.stat_result:
        facts = plain(path, *args, **keywords)
        if path == file:
            file.unlink()
            os.mkfifo(file)
        return facts

    monkeypatch.setattr(Path, "stat", stat)
    found = Bundle([str(folder)]).scan()
    assert "app/last" in found.items
    assert found.left_out == ["app/.gitignore (no file)"]


def test_ignore_file_that_is_none_is_not_waited_for(folder: Path) -> None:
    """A .gitignore that is a FIFO says nothing, and is waited for by nobody."""
    os.mkfifo(folder / ".gitignore")
    found = Bundle([str(folder)]).scan()
    assert "app/it" in found.items
    assert found.left_out == ["app/.gitignore (no file)"]
