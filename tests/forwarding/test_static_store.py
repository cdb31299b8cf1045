"""The folder with files of BokehJS: private, bounded, shared by processes, harmless when it is broken."""

from __future__ import annotations

import hashlib
import os
import pwd
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bokeh_ssh._core.this_machine.private_folder import FolderError, find_folder
from bokeh_ssh._forwarding.static_requests import MOST_BYTES, StaticFile
from bokeh_ssh._forwarding.static_store import StaticStore, Usage

posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no modes")


def named(content: bytes) -> StaticFile:
    """Name a file after its content."""
    return StaticFile("bokeh.min.js", hashlib.sha512(content).hexdigest())


def keep(store: StaticStore, content: bytes) -> StaticFile:
    """Keep a file."""
    file = named(content)
    writer = store.begin(file)
    writer.write(content)
    assert writer.finish()
    return file


@pytest.fixture
def store(account: Path) -> StaticStore:
    """Give the account's store, which is not there yet."""
    return StaticStore(find_folder("static"))


@posix
def test_only_the_account_can_read_what_is_kept(store: StaticStore) -> None:
    """The folder is 0700 and its files 0600, whatever the umask."""
    before = os.umask(0)
    try:
        file = keep(store, b"content")
    finally:
        os.umask(before)
    assert store.load(file) == b"content"
    modes = [path.stat().st_mode & 0o777 for path in (store.folder, *store.folder.iterdir())]
    assert modes == [0o700, 0o600]
    store.folder.chmod(0o777)
    assert store.load(file) == b"content"
    assert store.folder.stat().st_mode & 0o777 == 0o700


@posix
@pytest.mark.parametrize("which", ["static", "bokeh-ssh"])
def test_folder_that_is_a_link_is_not_used(store: StaticStore, which: str) -> None:
    """A link in place of the folder, or of the one above, leads nowhere: nothing is read, kept or removed."""
    file = keep(store, b"content")
    folder = store.folder if which == "static" else store.folder.parent
    elsewhere = folder.rename(folder.parent.parent / "elsewhere")
    assert store.load(file) is None
    folder.symlink_to(elsewhere)
    assert store.load(file) is None
    with pytest.raises(FolderError, match="link"):
        store.begin(named(b"more"))
    with pytest.raises(FolderError, match="link"):
        store.clear()
    assert len([path for path in elsewhere.rglob("*") if path.is_file()]) == 1


@posix
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("which", ["static", "bokeh-ssh", "home"])
def test_folder_of_another_user_is_not_used(store: StaticStore, account: Path, which: str) -> None:
    """What another user could have put there is not read, and root leaves nothing in the home of another."""
    file = keep(store, b"content")
    if which == "home":
        os.chown(account, 65534, 65534)
        other = StaticStore(account / "new" / "bokeh-ssh" / "static")
        with pytest.raises(FolderError, match="another user"):
            other.begin(file)
        assert not other.folder.parent.parent.exists()
        return
    os.chown(store.folder if which == "static" else store.folder.parent, 65534, 65534)
    assert store.load(file) is None
    for call in (store.clear, lambda: store.begin(file)):
        with pytest.raises(FolderError, match="another user"):
            call()


@posix
def test_file_that_others_could_write_is_not_used(store: StaticStore) -> None:
    """A file of another user, or open to others, is removed: the folder was not always private."""
    file = keep(store, b"content")
    (path,) = store.folder.iterdir()
    path.chmod(0o620)
    assert store.load(file) is None
    assert store.usage() == Usage(0, 0)
    if os.geteuid() == 0:  # only root can give files away
        keep(store, b"content")
        os.chown(path, 65534, 65534)
        assert store.load(file) is None


def test_least_recently_used_give_way(account: Path) -> None:
    """Together the files have no more bytes than they may; those that were used last stay."""
    store = StaticStore(find_folder("static"), most=250)
    files = []
    for number in range(2):
        files.append(keep(store, bytes([number]) * 100))
        os.utime(next(store.folder.glob(f"{files[-1].sha512}*")), (0, 1000 + number))
    assert store.load(files[0])  # notes its use
    files.append(keep(store, bytes([9]) * 100))
    assert [store.load(file) is not None for file in files] == [True, False, True]
    assert store.usage() == Usage(2, 200)


def test_clock_that_is_set_back_keeps_nothing_in_place_of_others(account: Path) -> None:
    """A file whose last use lies in the future, and which nobody uses any more, gives way first."""
    store = StaticStore(find_folder("static"), most=250)
    files = [keep(store, bytes([number]) * 100) for number in range(2)]
    later = time.time() + 4e8
    os.utime(next(store.folder.glob(f"{files[0].sha512}*")), (later, later))
    files.append(keep(store, bytes([9]) * 100))
    assert [store.load(file) is not None for file in files] == [False, True, True]


def test_what_was_left_behind_is_removed(store: StaticStore) -> None:
    """What a killed program had begun stays for an hour at most, once another file is kept; others stay."""
    writers = [store.begin(named(b"")) for _ in range(2)]
    begun = sorted(store.folder.iterdir())
    os.utime(begun[0], (0, time.time() - 4000))
    other = store.folder / "notes.txt"
    other.write_text("mine")
    keep(store, b"content")
    assert [path.exists() for path in begun] == [False, True]
    assert store.usage() == Usage(1, 7)
    assert store.clear() == Usage(1, 7)
    assert list(store.folder.iterdir()) == [other]
    for writer in writers:
        writer.discard()


def test_file_that_is_too_large_is_not_read(store: StaticStore) -> None:
    """A file that was blown up is not read into memory."""
    path = store.folder / f"{keep(store, b'content').sha512}-bokeh.min.js"
    os.truncate(path, MOST_BYTES + 1)
    assert store.load(named(b"content")) is None
    assert not path.exists()


def test_content_that_is_another_one_is_not_kept(store: StaticStore) -> None:
    """Where the hash differs, nothing is left."""
    writer = store.begin(named(b"content"))
    writer.write(b"other")
    assert not writer.finish()
    assert list(store.folder.iterdir()) == []


def test_nothing_there_is_nothing_kept(store: StaticStore) -> None:
    """A folder that was never made can be asked and cleared, and is not made for that."""
    assert store.load(named(b"")) is None
    assert store.usage() == Usage(0, 0)
    assert store.clear() == Usage(0, 0)
    assert not store.folder.parent.parent.exists()


@posix
@pytest.mark.parametrize("home", ["missing", "a file"])
def test_home_that_cannot_be_written_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str) -> None:
    """Where no folder can be made, that is an error that the cache takes for no store."""
    place = tmp_path / "place"
    place.write_text("")
    monkeypatch.setenv("HOME", str(place / "home" if home == "missing" else place))
    store = StaticStore(find_folder("static"))
    with pytest.raises((OSError, FolderError)):
        store.begin(named(b""))
    assert store.load(named(b"")) is None


@pytest.mark.parametrize(
    ("system", "environment", "folder"),
    [
        ("linux", {}, "{home}/.cache/bokeh-ssh/static"),
        ("linux", {"XDG_CACHE_HOME": "/var/c"}, "/var/c/bokeh-ssh/static"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "{home}/.cache/bokeh-ssh/static"),
        ("linux", {"HOME": ""}, "{own}/.cache/bokeh-ssh/static"),
        ("darwin", {}, "{home}/Library/Caches/bokeh-ssh/static"),
        ("win32", {"LOCALAPPDATA": "/app/local"}, "/app/local/bokeh-ssh/Cache/static"),
        ("win32", {"LOCALAPPDATA": ""}, "{home}/AppData/Local/bokeh-ssh/Cache/static"),
    ],
)
def test_it_is_where_caches_are(
    account: Path, monkeypatch: pytest.MonkeyPatch, system: str, environment: dict[str, str], folder: str
) -> None:
    """The folder is where the system keeps caches, and where the environment says."""
    monkeypatch.setattr(sys, "platform", system)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert find_folder("static") == Path(folder.format(home=account, own=pwd.getpwuid(os.getuid()).pw_dir))


_MANY = """
import hashlib, random, sys
from pathlib import Path
from bokeh_ssh._forwarding.static_requests import StaticFile
from bokeh_ssh._forwarding.static_store import StaticStore

store, seen = StaticStore(Path(sys.argv[1]), most=400_000), 0
for turn in range(300):
    content = bytes([random.randrange(8)]) * 100_000
    file = StaticFile("bokeh.min.js", hashlib.sha512(content).hexdigest())
    found = store.load(file)
    assert found in (None, content)
    seen += found is not None
    if found is None:
        writer = store.begin(file)
        for at in range(0, len(content), 7000):
            writer.write(content[at : at + 7000])
        assert writer.finish()
print(seen)
"""


def test_processes_share_it(store: StaticStore) -> None:
    """Programs that keep, read and remove the same files at once never read a wrong one, and all go on."""
    words = [sys.executable, "-c", _MANY, str(store.folder)]
    running = [
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)
    ]
    for each in running:
        said, errors = each.communicate(timeout=60)
        assert each.returncode == 0, errors
        assert int(said) > 0
    usage = store.usage()
    assert 0 < usage.size <= 400_000 + 3 * 100_000
    assert not list(store.folder.glob("begun-*"))
