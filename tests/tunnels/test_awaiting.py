"""``async with``: the same objects, while other tasks run."""

from __future__ import annotations

import asyncio
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import apps
from beds import Machine, until
from bokeh_ssh import ConnectionLostError, DirectTunnel, LocalForward, RefusedError, TunnelClosedError

pytestmark = pytest.mark.every_python


@pytest.fixture
def machine(embedded: Callable[..., Machine]) -> Machine:
    """A machine to log in to."""
    return embedded()


@contextmanager
def silent() -> Iterator[int]:
    """Listen, and never say a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def forward_to(machine: Machine, **keywords: Any) -> LocalForward:
    keywords = {"remote_port": machine.port, **machine.login, **keywords}
    return LocalForward(machine.host, machine.user, **keywords)


@pytest.mark.parametrize("isolate", [False, True])
def test_other_tasks_run_while_it_opens_and_closes(
    machine: Machine, no_leaks: Any, isolate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entering and leaving block nobody else; in between it works, and afterwards nothing is left."""
    turns = 0

    def held(call: Callable[[LocalForward], Any]) -> Callable[[LocalForward], Any]:
        def go_on_once_others_have_run(forward: LocalForward) -> Any:
            before = turns
            until(lambda: turns > before + 100, what="other tasks to run")
            return call(forward)

        return go_on_once_others_have_run

    for name in ("open", "close"):
        monkeypatch.setattr(LocalForward, name, held(getattr(LocalForward, name)))

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def main() -> None:
        task = asyncio.create_task(other())
        async with forward_to(machine, isolate=isolate) as forward:
            assert forward.state == "ready"
            reader, writer = await asyncio.open_connection("127.0.0.1", forward.local_port)
            assert (await reader.read(4)) == b"SSH-"
            writer.close()
        assert forward.state == "closed"
        task.cancel()

    with no_leaks():
        asyncio.run(main())


def test_what_fails_is_raised_where_it_is_awaited(machine: Machine) -> None:
    """The error of an opening that fails is the same as without asyncio."""

    async def main() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            async with forward_to(machine, port=taken.getsockname()[1]):
                pass

    with pytest.raises(RefusedError):
        asyncio.run(main())


def test_cancelling_ends_an_opening(machine: Machine, no_leaks: Any) -> None:
    """A task that is cancelled while it opens gives up at once, and leaves nothing."""

    async def main(port: int) -> None:
        forward = forward_to(machine, port=port, timeout=60)

        async def enter() -> None:
            async with forward:
                pass

        task = asyncio.create_task(enter())
        while forward.state == "new":
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 30)
        assert forward.state == "closed"

    with silent() as port, no_leaks():
        asyncio.run(main(port))


def test_cancelling_the_body_closes_it_first(machine: Machine, no_leaks: Any) -> None:
    """A task that is cancelled, and once more while that is closed, has closed it when it ends."""

    async def main() -> None:
        inside = asyncio.Event()
        forward = forward_to(machine)

        async def use() -> None:
            async with forward:
                inside.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(use())
        await asyncio.wait_for(inside.wait(), 30)
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert forward.state == "closed"

    with no_leaks():
        asyncio.run(main())


def test_its_end_can_be_awaited(machine: Machine, no_leaks: Any) -> None:
    """``ended`` raises why it ended; given up, it holds neither the loop nor the program."""

    async def main() -> None:
        async with forward_to(machine, reconnect=False) as forward:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(forward.ended(), 0.05)
            waiting = asyncio.create_task(forward.ended())
            await asyncio.sleep(0)
            await asyncio.to_thread(_cut, machine)
            with pytest.raises(ConnectionLostError):
                await asyncio.wait_for(waiting, 30)

    with no_leaks():
        asyncio.run(main())


def _cut(machine: Machine) -> None:
    server: Any = machine.server
    assert server.drop_connections() == 1


def test_one_object_serves_both(machine: Machine) -> None:
    """What was open with ``async with`` can be opened with ``with`` afterwards, and the other way round."""
    forward = forward_to(machine)
    with forward:
        pass

    async def main() -> None:
        async with forward:
            assert forward.state == "ready"

    asyncio.run(main())
    with pytest.raises(TunnelClosedError):
        forward.local_port  # noqa: B018 - it raises
    with forward:
        assert threading.current_thread() is threading.main_thread()
        with pytest.raises(Exception, match="SSH"):
            urllib.request.urlopen(f"http://127.0.0.1:{forward.local_port}", timeout=30)


def test_sessions_after_asyncio_run(embedded: Callable[..., Machine]) -> None:
    """Once ``asyncio.run`` has left this thread without a loop, Bokeh's client still works."""
    machine = embedded()
    app = apps.put(machine, "sliders.py", apps.SLIDER)

    async def nothing() -> None:
        pass

    asyncio.run(nothing())
    with DirectTunnel(
        machine.host, machine.user, app, python=machine.python, isolate=False, **machine.login
    ) as tunnel:
        for _ in range(2):
            session = tunnel.pull_session()
            session.close()
        session.close()
