"""``bokeh-ssh demo``: the whole way on one machine, with real parts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from beds import until
from programs import CLI, Program

pytest.importorskip("asyncssh")
pytest.importorskip("bokeh")

pytestmark = pytest.mark.skipif(os.name != "posix", reason="its server runs on POSIX")


@pytest.mark.filterwarnings("ignore:There is no current event loop")  # Bokeh's own client
def test_demo_from_start_to_end(tmp_path: Path) -> None:
    """The address opens the shipped app, whose Python callback answers; Ctrl-C leaves nothing: no process, no
    port, no file."""
    from bokeh.client import pull_session

    temporary = tmp_path / "temporary"
    temporary.mkdir()

    with Program("demo", "--no-show", "--local-port", "0", env={"TMPDIR": str(temporary)}) as program:
        url = program.address()
        port = int(url.split(":")[2].split("/")[0])
        with urllib.request.urlopen(url, timeout=30) as page:
            assert page.status == 200
            assert b"bokeh_ssh demo" in page.read()
        with pull_session(url=url) as session:
            slider: Any = session.document.select_one({"name": "frequency"})
            before = _wave(session)
            slider.value = 7
            session.force_roundtrip()

            def answered() -> bool:
                session.pull()
                return _wave(session) != before

            until(answered, what="the callback's answer")
            said: Any = session.document.select_one({"name": "answer"})
            assert "1 answer so far" in said.text
            pid = int(said.text.split("process ")[1].split(",")[0])
        assert pid != program.process.pid
        os.kill(pid, 0)  # it runs
        program.interrupt()
        assert program.end() == 0, program
    stages = ["An SSH server listens", "Logged in", "Started Bokeh", "Ready", "Closed"]
    places = [program.stderr.find(stage) for stage in stages]
    assert -1 not in places, program
    assert places == sorted(places)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", port), timeout=2):  # noqa: PT011
        pass
    assert list(temporary.iterdir()) == []


def _wave(session: Any) -> list[float]:
    source = session.document.select_one({"name": "wave"})
    return list(source.data["y"])


def test_demo_reads_nothing_of_the_persons_own(account: Path) -> None:
    """The demo neither reads the ssh config and keys of the person nor writes to their home."""
    config = account / ".ssh" / "config"
    config.write_text("nonsense that no ssh takes\n")
    before = sorted(account.rglob("*"))
    with Program("demo", "--no-show", "--local-port", "0") as program:
        program.address()
        program.interrupt()
        assert program.end() == 0, program
    assert sorted(account.rglob("*")) == before


@pytest.mark.parametrize("missing", ["asyncssh", "bokeh"])
def test_demo_names_what_is_missing(missing: str) -> None:
    """Without the extra's packages the demo says what to install."""
    code = f"import sys; sys.modules[{missing!r}] = None; from bokeh_ssh.__main__ import main; main(['demo'])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "pip install 'bokeh-ssh[demo]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_module_and_script_are_one() -> None:
    """``python -m bokeh_ssh`` calls itself ``bokeh-ssh``."""
    done = subprocess.run([*CLI, "demo", "--help"], capture_output=True, text=True, timeout=60, check=True)
    assert "bokeh-ssh demo" in done.stdout
    assert tempfile.gettempdir() not in done.stdout
