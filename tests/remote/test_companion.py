"""A program that runs beside a server: what it says is told, and it ends when the server does."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from beds import until
from bokeh_ssh._core.events import ServerExited

if os.name != "posix":
    pytest.skip("the remote side is a POSIX system", allow_module_level=True)

from bokeh_ssh._server.registry import list_servers
from bokeh_ssh._server.server import Server
from local_runner import Bench, Held, kinds, processes

#: Says where it is, and stays.
_STAYS = """
import json, os, sys, time
print("no word", flush=True)
print(json.dumps({"event": "port", "name": os.environ["CALLED"], "gateway": "gw:22"}), flush=True)
print("a complaint", file=sys.stderr, flush=True)
while True:
    time.sleep(1)
"""


def accompany(server: Server, mark: str, program: str = _STAYS) -> dict[str, object]:
    """Run a Python program beside a server."""
    return server.start_sidecar((sys.executable, "-S", "-c", program, mark), {"CALLED": "me"}, 20)


def test_its_word_is_told_and_its_complaints_are_in_the_log(bench: Bench, mark: str) -> None:
    """What it says of itself comes as it is, to one who adopts the server and to who lists it too."""
    held = Held(bench, mark)
    word = {"event": "port", "name": "me", "gateway": "gw:22"}
    assert held.server.sidecar_status == {}
    assert accompany(held.server, f"beside-{mark}") == word
    assert held.server.sidecar_status == word
    until(lambda: "a complaint" in held.server.log, what="its complaint to be told")
    assert "no word" not in held.server.log
    [listed] = [each for each in list_servers(bench.runner()) if each.id == held.server.server_ref.id]
    assert listed.published == "me on gw:22"
    again = Server.adopt(bench.runner(), held.server.server_ref, launch=held.server.launch)
    bench.servers.append(again)
    until(lambda: again.sidecar_status == word, what="the next client to be told")
    assert len(processes(f"beside-{mark}")) == 1


def test_there_is_only_one(bench: Bench, mark: str) -> None:
    """Asked for a second, the supervisor tells of the first."""
    held = Held(bench, mark)
    first = accompany(held.server, f"beside-{mark}")
    assert accompany(held.server, f"other-{mark}") == first
    assert processes(f"other-{mark}") == set()


@pytest.mark.parametrize("how", ["stop", "killed", "supervisor"])
def test_it_ends_with_the_server(bench: Bench, mark: str, how: str) -> None:
    """Stopped, killed, or without its supervisor: with the server its companion is gone too."""
    held = Held(bench, mark)
    accompany(held.server, f"beside-{mark}")
    assert processes(f"beside-{mark}")  # the control
    if how == "stop":
        assert held.server.stop() is True
    else:
        os.kill(held.server.pid if how == "killed" else held.supervisor, signal.SIGKILL)
    until(lambda: not processes(f"beside-{mark}"), what="it to end")
    held.check_gone()


def test_the_server_does_not_end_with_it(bench: Bench, mark: str) -> None:
    """Where it ends by itself the server runs on, and another one can be started."""
    held = Held(bench, mark)
    assert accompany(held.server, mark, """print('{"event": "missing"}')""") == {"event": "missing"}
    until(lambda: held.server.sidecar_status == {}, what="its end to be told")
    assert kinds(bench, ServerExited) == []
    assert held.alive()
    assert accompany(held.server, f"beside-{mark}")["name"] == "me"


def test_what_cannot_be_started_or_says_nothing_is_told(bench: Bench, mark: str) -> None:
    """A program that is not there, or ends without a word, is told at once, and costs nothing else."""
    held = Held(bench, mark)
    assert held.server.start_sidecar(("/no/such/program",), {}, 20) == {}
    assert accompany(held.server, mark, "print('nothing'); print([1])") == {}
    assert held.server.stop() is True
