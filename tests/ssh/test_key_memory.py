"""A login begins with the key that fitted last time: a round trip less, and no key more than before."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asyncssh
import pytest
from asyncssh.constants import MSG_USERAUTH_REQUEST

import other_servers
from auth_servers import USER, Bed, Rules, Sshd, make_key
from beds import Key
from bokeh_ssh import AuthenticationError, Host, TooManyKeysError
from bokeh_ssh._core.this_machine.private_folder import find_folder
from bokeh_ssh._ssh.auth.key_memory import KeyMemory, clear_keys
from bokeh_ssh._ssh.connect import connect
from skips import missing


class Bench:
    """Logs in as a person would, again and again."""

    def __init__(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        self._known_hosts = folder / "known"
        self._caplog = caplog
        caplog.set_level(logging.DEBUG, "bokeh_ssh")
        self.keys = folder / "keys"
        self.keys.mkdir()

    def enter(self, port: int, *names: str, **more: Any) -> list[str]:
        """Log in with keys of these names; gives what was tried, with "none" where it asked for methods."""
        keywords = {
            "port": port,
            "key_filename": [str(self.keys / name) for name in names],
            "known_hosts": str(self._known_hosts),
            "host_keys": "accept-new",
            "ssh_config": None,
            "allow_agent": False,
            "look_for_keys": False,
            "timeout": 10,
            **more,
        }
        self._caplog.clear()
        try:
            with connect(Host("127.0.0.1", USER, **keywords)):
                pass
        finally:
            self.tried = []
            for record in self._caplog.records:
                text = record.getMessage()
                if ": none refused=" in text:
                    self.tried.append("none")
                elif ": trying publickey " in text:
                    self.tried.append(text.rpartition(" ")[2])
        return self.tried


@pytest.fixture
def bench(account: object, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Bench:
    """Give one, with a home of its own."""
    return Bench(tmp_path, caplog)


def remembered() -> list[Path]:
    """List what is remembered."""
    folder = find_folder("logins")
    return sorted(folder.iterdir()) if folder.exists() else []


def test_second_login_begins_with_the_key(make_bed: Callable[..., Bed], bench: Bench) -> None:
    """The first asks for methods and tries the keys in order, the second knows; what is kept is private."""
    make_key(bench.keys / "a")
    bed = make_bed(("publickey",), keys=(make_key(bench.keys / "b"),))
    assert bench.enter(bed.port, "a", "b") == ["none", "a", "b"]
    assert bench.enter(bed.port, "a", "b") == ["b"]
    (path,) = remembered()
    if sys.platform != "win32":
        assert [each.stat().st_mode & 0o777 for each in (path, path.parent)] == [0o600, 0o700]
    clear_keys()
    assert bench.enter(bed.port, "a", "b") == ["none", "a", "b"]


@pytest.mark.parametrize("kind", ["ssh-rsa", "ecdsa-sha2-nistp256"])
def test_key_signs_as_it_did(bench: Bench, tmp_path: Path, kind: str) -> None:
    """An RSA key too, of which the server has yet to say how it may sign."""
    key = make_key(bench.keys / "a", kind)
    with contextlib.closing(Sshd(tmp_path, [key])) as sshd:
        assert bench.enter(sshd.port, "a") == ["none", "a"]
        assert bench.enter(sshd.port, "a") == ["a"]


def test_locked_key_is_asked_for_when_it_fits(bench: Bench, tmp_path: Path) -> None:
    """The server is asked whether it takes it; if it does not, nobody is asked for its passphrase."""
    asked: list[object] = []
    key = make_key(bench.keys / "a", passphrase="open sesame")
    other = make_key(bench.keys / "b")

    def prompt(question: object) -> str:
        asked.append(question)
        return "open sesame"

    with contextlib.closing(Sshd(tmp_path, [key])) as sshd:
        for tried in (["none", "a"], ["a"]):
            assert bench.enter(sshd.port, "a", prompt=prompt) == tried
        assert len(asked) == 2
        (tmp_path / "authorized").write_bytes(other.export_public_key())
        assert bench.enter(sshd.port, "a", "b", prompt=prompt) == ["a", "b"]
        assert len(asked) == 2
        assert bench.enter(sshd.port, "a", "b", prompt=prompt) == ["b"]


def test_only_keys_that_are_to_be_offered_are(make_bed: Callable[..., Bed], bench: Bench) -> None:
    """One that is not named this time is not offered, whatever fitted before; nor without publickey."""
    both = tuple(make_key(bench.keys / name) for name in "ab")
    bed = make_bed({"publickey", "password"}, keys=both)
    bench.enter(bed.port, "a")
    assert bench.enter(bed.port, "b") == ["none", "b"]
    config = bench.keys / "config"
    config.write_text("Host *\n PreferredAuthentications password,publickey\n")
    assert bench.enter(bed.port, "b", ssh_config=str(config), password="right") == ["none"]
    assert bed.seen[-1].offered == []


def test_other_accounts_and_servers_have_their_own(make_bed: Callable[..., Bed], bench: Bench) -> None:
    """The key is remembered with the host key and the account."""
    key = make_key(bench.keys / "a")
    beds = [make_bed(("publickey",), keys=(key,)) for _ in range(2)]
    for bed in beds:
        assert bench.enter(bed.port, "a") == ["none", "a"]
    assert len(remembered()) == 2
    assert KeyMemory(b"key", "me").recall() is None


def test_server_counts_no_more_keys_than_before(bench: Bench, tmp_path: Path) -> None:
    """With MaxAuthTries at the number of keys, one that fits no more is counted once, and another fits."""
    keys = {name: make_key(bench.keys / name) for name in "abc"}
    with contextlib.closing(Sshd(tmp_path, [keys["c"]], "MaxAuthTries 3")) as sshd:
        assert bench.enter(sshd.port, "a", "b", "c") == ["none", "a", "b", "c"]
        assert bench.enter(sshd.port, "a", "b", "c") == ["c"]
        (tmp_path / "authorized").write_bytes(keys["b"].export_public_key())
        assert bench.enter(sshd.port, "a", "b", "c") == ["c", "a", "b"]
        connections = sshd.connections
        (tmp_path / "authorized").write_bytes(b"")
        with pytest.raises(TooManyKeysError):
            bench.enter(sshd.port, "a", "b", "c")
        assert bench.tried == ["b", "a", "c"]
        assert sshd.connections == connections + 1  # a server that has had enough is left alone


def test_server_that_takes_one_key_is_left_alone(bench: Bench, tmp_path: Path) -> None:
    """With MaxAuthTries 1 it hangs up at a key that fits no more: that was counted, and is no objection."""
    key = make_key(bench.keys / "a")
    with contextlib.closing(Sshd(tmp_path, [key], "MaxAuthTries 1")) as sshd:
        bench.enter(sshd.port, "a")
        (tmp_path / "authorized").write_bytes(b"")
        with pytest.raises(AuthenticationError, match="Too many"):
            bench.enter(sshd.port, "a")
        assert bench.tried == ["a"]
        assert sshd.connections == 2


def test_second_factor_follows(make_bed: Callable[..., Bed], bench: Bench) -> None:
    """Where the key is one of two, it is remembered as well; where a password did, no key is."""
    key = make_key(bench.keys / "a")
    bed = make_bed(("publickey", "password"), keys=(key,))
    for tried in (["none", "a"], ["a"]):
        assert bench.enter(bed.port, "a", password="right") == tried
    other = make_bed({"publickey", "password"})
    assert bench.enter(other.port, "a", password="right") == ["none", "a"]
    assert len(remembered()) == 1


@pytest.mark.parametrize("text", [b"", b"x" * 1000, b"0" * 64, b"0" * 64 + b" ../../x\n", b"\xff\xfe", None])
def test_broken_memory_is_none(make_bed: Callable[..., Bed], bench: Bench, text: bytes | None) -> None:
    """Whatever stands in its place; it is written again, and a link leads nowhere."""
    bed = make_bed(("publickey",), keys=(make_key(bench.keys / "a"),))
    bench.enter(bed.port, "a")
    (path,) = remembered()
    if text is None:
        elsewhere = path.rename(bench.keys / "elsewhere")
        path.symlink_to(elsewhere)
    else:
        path.write_bytes(text)
    assert bench.enter(bed.port, "a") == ["none", "a"]
    assert bench.enter(bed.port, "a") == ["a"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
def test_memory_of_another_user_is_none(make_bed: Callable[..., Bed], bench: Bench) -> None:
    """Nor is anything written there."""
    bed = make_bed(("publickey",), keys=(make_key(bench.keys / "a"),))
    bench.enter(bed.port, "a")
    os.chown(find_folder("logins"), 65534, 65534)
    for _ in range(2):
        assert bench.enter(bed.port, "a") == ["none", "a"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
@pytest.mark.parametrize("age", [0, 30 * 86400])
def test_pipe_is_not_waited_for(make_bed: Callable[..., Bed], bench: Bench, age: int) -> None:
    """Not even one that is old: the login goes on at once, and writes it again."""
    bed = make_bed(("publickey",), keys=(make_key(bench.keys / "a"),))
    bench.enter(bed.port, "a")
    (path,) = remembered()
    path.unlink()
    os.mkfifo(path)
    os.utime(path, (time.time() - age,) * 2)
    assert bench.enter(bed.port, "a") == ["none", "a"]
    assert bench.enter(bed.port, "a") == ["a"]


@pytest.mark.parametrize("writable", [True, False])
def test_server_that_minds_is_asked_first(
    make_bed: Callable[..., Bed], bench: Bench, monkeypatch: pytest.MonkeyPatch, writable: bool
) -> None:
    """One that hangs up at a login that begins with a key: it works all the same, and what it has done twice
    is remembered where that can be written."""
    handlers = asyncssh.SSHServerConnection._packet_handlers
    usual = handlers[MSG_USERAUTH_REQUEST]
    asked: set[int] = set()

    def mind(conn: Any, *args: Any) -> Any:
        if b"none" in args[-1].get_full_payload():
            asked.add(id(conn))
        elif id(conn) not in asked:
            conn.abort()
            return None
        return usual(conn, *args)

    bed = make_bed(("publickey",), keys=(make_key(bench.keys / "a"),))
    bench.enter(bed.port, "a")
    monkeypatch.setitem(handlers, MSG_USERAUTH_REQUEST, mind)
    if not writable:

        def fail(*args: object, **keywords: object) -> None:
            raise OSError(errno.ENOSPC, "no space left")

        monkeypatch.setattr(Path, "touch", fail)
        for _ in range(2):
            assert bench.enter(bed.port, "a") == ["a", "none", "a"]
        return
    for _ in range(2):
        assert bench.enter(bed.port, "a") == ["a", "none", "a"]
    assert len(bed.seen) == 5
    for _ in range(2):
        assert bench.enter(bed.port, "a") == ["none", "a"]
    (path,) = remembered()
    os.utime(path, (0, time.time() - 8 * 86400))  # servers are updated
    monkeypatch.undo()
    assert bench.enter(bed.port, "a") == ["none", "a"]
    assert bench.enter(bed.port, "a") == ["a"]


def test_refusal_is_told_as_ever(make_bed: Callable[..., Bed], bench: Bench) -> None:
    """A key that was taken away, and nothing else to try: one login, and an error that names it."""
    make_key(bench.keys / "a")
    keys = [make_key(bench.keys / "a")]
    bed = make_bed(("publickey",), keys=tuple(keys))
    bench.enter(bed.port, "a")
    bed._rules = lambda: Rules(("publickey",))
    with pytest.raises(AuthenticationError, match="publickey a"):
        bench.enter(bed.port, "a")
    assert bench.tried == ["a"]
    assert len(bed.seen) == 2


@contextlib.contextmanager
def _run(name: str, key: Key, folder: Path) -> Iterator[Any]:
    try:
        if name in ("dropbear", "tinyssh"):
            with getattr(other_servers, name)(key, folder) as machine:
                yield machine
        else:
            with other_servers.running(other_servers.command(name, folder), key, folder) as machine:
                yield machine
    except other_servers.MissingError as exc:
        if name in ("mina", "tinyssh"):  # not in every distribution
            pytest.skip(str(exc))
        missing(str(exc))


@pytest.mark.parametrize("name", ["conch", "dropbear", "gliderlabs", "mina", "tinyssh"])
def test_other_servers_take_it(
    name: str, key: Key, tmp_path: Path, account: object, caplog: pytest.LogCaptureFixture
) -> None:
    """Servers of other kinds take a login that begins with the key, and requests with it."""
    with _run(name, key, tmp_path) as machine:
        caplog.set_level(logging.DEBUG, "bokeh_ssh")
        for first in (True, False):
            caplog.clear()
            with connect(Host(machine.host, machine.user, **machine.login), ahead=[None]) as connection:
                assert connection.methods == ("publickey",)
                words = {"on_stdout": len, "on_stderr": len, "on_exit": bool, "timeout": 10}
                assert connection.run("true", **words).ended.wait(10)
            assert (": none refused=" in caplog.text) == first
    assert remembered()[0].read_text().endswith(" alone\n")
