"""Fixtures: machines to log in to, and a clean account to log in from."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import beds
from beds import Key, Knobs, Machine, until
from skips import missing

if TYPE_CHECKING:
    from docker_bed import Bed, Docker
    from local_runner import Bench


_ENGINE: pytest.StashKey[Docker | str] = pytest.StashKey()
_LONGEST = ("tunnels", "e2e", "benchmarks")


@pytest.fixture
def mark() -> str:
    """A word that no other process has in its command line."""
    return f"mark-{uuid.uuid4().hex}"


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """A place to start servers from, without SSH; POSIX only."""
    from local_runner import Bench

    with Bench(tmp_path) as bench:
        yield bench


@pytest.fixture(autouse=True)
def account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give each test an empty home, no agent and no askpass, and no servers of the account's but its own."""
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(home))
    for name in list(os.environ):
        if name.startswith(("SSH_", "BOKEH_", "XDG_C", "XDG_STATE")) or name in (
            "DISPLAY",
            "WAYLAND_DISPLAY",
            "BROWSER",
        ):
            monkeypatch.delenv(name)
    place = Path("/tmp", f"bokeh-ssh-test-{uuid.uuid4().hex[:8]}")  # tmp_path is too long for sockets
    monkeypatch.setenv("BOKEH_SSH_DIR", str(place))
    yield home
    for record in place.glob("*/record"):  # a server that was left on purpose, where its test has failed
        with suppress(OSError, ValueError, KeyError):
            os.kill(json.loads(record.read_text())["supervisor"], signal.SIGTERM)
    shutil.rmtree(place, ignore_errors=True)
    shutil.rmtree(f"{place}-tunnels", ignore_errors=True)


def pytest_configure() -> None:
    """Have what is started heed all signals, also where the tests run under nohup, or behind a shell's ``&``.

    What is ignored stays so in every program that is started; what has a handler does not.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for name in ("SIGINT", "SIGQUIT", "SIGHUP", "SIGTERM"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if name == "SIGINT" else lambda *_: None)


@pytest.hookimpl(tryfirst=True)  # before what is chosen by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs containers; begin with the folders whose files take longest, which would be last."""
    for item in items:
        if "docker_engine" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.container)
    items.sort(key=lambda item: item.path.parent.name not in _LONGEST)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Get the container image ready before the first test, where a test will want it: no test's time pays."""
    wanted = any(item.get_closest_marker("container") for item in session.items)
    if session.config.option.collectonly or not wanted:
        return
    try:
        import docker_bed
    except ImportError as exc:
        session.stash[_ENGINE] = f"the docker SDK is not installed ({exc})"
        return
    session.stash[_ENGINE] = engine = docker_bed.connect()
    if not isinstance(engine, str):
        engine.prepare()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hang up."""
    engine = session.stash.get(_ENGINE, "")
    if not isinstance(engine, str):
        engine.client.close()


@pytest.fixture(scope="session")
def key() -> Key:
    """A key that may log in to every machine of this session."""
    return Key.generate()


@pytest.fixture(scope="session")
def _engine(
    request: pytest.FixtureRequest, key: Key, tmp_path_factory: pytest.TempPathFactory
) -> Docker | str:
    engine = request.session.stash[_ENGINE]
    if not isinstance(engine, str):
        engine.key, engine.directory = key, tmp_path_factory.mktemp("docker")
    return engine


@pytest.fixture(scope="session")
def docker_engine(_engine: Docker | str) -> Docker:
    """Docker, with the image built; the test is skipped where there is none."""
    if isinstance(_engine, str):
        missing(_engine)
    assert not isinstance(_engine, str)
    return _engine


@pytest.fixture(scope="session")
def _shared(_engine: Docker | str) -> Iterator[Callable[[str], Any]]:
    """Containers that live as long as the session, made when first asked for."""
    with ExitStack() as stack:
        made: dict[str, Any] = {}

        def get(name: str) -> Any:
            assert not isinstance(_engine, str)
            if name not in made:
                make = _engine.machine() if name == "machine" else _engine.bed(name)
                made[name] = stack.enter_context(make)
            return made[name]

        yield get


@pytest.fixture(
    params=[
        pytest.param("embedded", marks=pytest.mark.embedded),
        pytest.param("docker", marks=pytest.mark.container),
    ]
)
def kind(request: pytest.FixtureRequest) -> str:
    """The two servers that every test of ``machine`` and ``machine_with`` runs against."""
    if request.param == "docker":
        request.getfixturevalue("docker_engine")
    return str(request.param)


def _own_place() -> dict[str, str]:
    """Have what an account publishes, or leaves, found by the same test alone: this machine has others."""
    return {"BOKEH_SSH_DIR": os.environ["BOKEH_SSH_DIR"]}


@pytest.fixture
def machine(kind: str, key: Key, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A machine that allows what sshd's defaults allow; its container is shared by the session."""
    if kind == "docker":
        yield request.getfixturevalue("_shared")("machine")
        return
    with beds.embedded(Knobs(), key, tmp_path, env=_own_place()) as made:
        yield made


@pytest.fixture
def machine_with(
    kind: str, key: Key, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Callable[..., Machine]]:
    """Make machines of this test's own: ``machine_with(max_sessions=1)``; the keywords are those of Knobs."""
    with ExitStack() as stack:

        def make(**knobs: Any) -> Machine:
            if kind == "docker":
                engine: Docker = request.getfixturevalue("docker_engine")
                return stack.enter_context(engine.machine(Knobs(**knobs)))
            return stack.enter_context(beds.embedded(Knobs(**knobs), key, tmp_path, env=_own_place()))

        yield make


@pytest.fixture
def embedded(key: Key, tmp_path: Path) -> Iterator[Callable[..., Machine]]:
    """Make embedded servers: ``embedded(knobs, **settings)``; the settings are the server's own."""
    with ExitStack() as stack:

        def make(knobs: Knobs | None = None, **settings: Any) -> Machine:
            return stack.enter_context(beds.embedded(knobs or Knobs(), key, tmp_path, **settings))

        yield make


@pytest.fixture
def here(embedded: Callable[..., Machine]) -> Machine:
    """A machine with servers of this test's own, on which the tests' own Python is the first."""
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    return embedded(env={"PATH": path, "BOKEH_SSH_DIR": os.environ["BOKEH_SSH_DIR"]})


@pytest.fixture
def light(embedded: Callable[..., Machine], tmp_path: Path) -> Callable[..., Machine]:
    """Make embedded servers like ``here``, with a stand-in for Bokeh: ``light(knobs, **settings)``."""
    import light_bokeh

    bin_ = Path(sys.executable).parent
    env = {
        "PATH": f"{bin_}:/usr/bin:/bin",
        "BOKEH_SSH_DIR": os.environ["BOKEH_SSH_DIR"],
        "PYTHONPATH": light_bokeh.path_with_it(tmp_path),
    }

    def make(knobs: Knobs | None = None, **settings: Any) -> Machine:
        return embedded(knobs, env=env, **settings)

    return make


@pytest.fixture
def sshd(key: Key, tmp_path: Path) -> Iterator[Callable[..., Machine]]:
    """Make real sshds on this machine: ``sshd(MaxSessions="1")``; the keywords are sshd_config's."""
    if beds.find_sshd() is None:
        missing("OpenSSH's sshd is not installed")
    with ExitStack() as stack:
        yield lambda **directives: stack.enter_context(beds.local_sshd(key, tmp_path, directives))


@pytest.fixture
def container(docker_engine: Docker) -> Iterator[Callable[..., Any]]:
    """Make containers of this test's own: ``container(Knobs(...), directives={...}, package=False)``."""
    with ExitStack() as stack:
        yield lambda *args, **keywords: stack.enter_context(docker_engine.machine(*args, **keywords))


@pytest.fixture
def bed(docker_engine: Docker) -> Iterator[Callable[..., Bed]]:
    """Make a gateway bed of this test's own: ``bed("A", gateway=Knobs(...))``."""
    with ExitStack() as stack:
        yield lambda *args, **keywords: stack.enter_context(docker_engine.bed(*args, **keywords))


@pytest.fixture
def shape_a(docker_engine: Docker, _shared: Callable[[str], Any]) -> Any:
    """A gateway, and a Bokeh host that can reach it and that nobody can reach; shared by the session."""
    return _shared("A")


@pytest.fixture
def shape_b(docker_engine: Docker, _shared: Callable[[str], Any]) -> Any:
    """As A, and this machine can reach the Bokeh host too; shared by the session."""
    return _shared("B")


@pytest.fixture
def shape_c(docker_engine: Docker, _shared: Callable[[str], Any]) -> Any:
    """A gateway, and a Bokeh host that only the gateway can reach; shared by the session."""
    return _shared("C")


def _resources() -> tuple[set[str], set[str]]:
    """Tell this process's threads, and its open files and sockets (where the system shows them)."""
    # asyncio's pool resolves names for the embedded server's loop, and lives as long as that.
    every = [thread for thread in threading.enumerate() if not thread.name.startswith("asyncio_")]
    threads = {f"{thread.name} #{thread.ident}" for thread in every}
    files = set()
    place = Path("/proc/self/fd")
    for entry in place.iterdir() if place.is_dir() else ():
        try:
            files.add(f"{entry.name} -> {entry.readlink()}")
        except OSError:
            continue  # the listing's own descriptor
    return threads, files


@pytest.fixture
def no_leaks() -> Callable[..., AbstractContextManager[None]]:
    """Check that a block leaves no thread, open file, socket or listener behind: ``with no_leaks(): ...``."""

    @contextmanager
    def check(timeout: float = 30) -> Iterator[None]:
        before = _resources()
        yield

        def extra() -> list[str]:
            return sorted(name for old, new in zip(before, _resources(), strict=True) for name in new - old)

        try:
            until(lambda: not extra(), timeout=timeout)
        except AssertionError:
            raise AssertionError(f"left behind: {', '.join(extra())}") from None

    return check
