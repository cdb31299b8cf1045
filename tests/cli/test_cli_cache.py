"""``bokeh-ssh cache`` shows what is kept on this machine, and removes it."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest

from bokeh_ssh._cli.app import main
from bokeh_ssh._core.this_machine.private_folder import find_folder
from bokeh_ssh._forwarding.static_requests import StaticFile
from bokeh_ssh._forwarding.static_store import StaticStore


def keep(content: bytes) -> None:
    """Keep a file."""
    file = StaticFile("bokeh.min.js", hashlib.sha512(content).hexdigest())
    writer = StaticStore(find_folder("static")).begin(file)
    writer.write(content)
    assert writer.finish()


def say(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    """Run the command; gives what it writes on standard output, or on standard error where it fails."""
    with pytest.raises(SystemExit) as end:
        main(["cache", *words])
    assert (end.value.code or 0) == code
    shown = capsys.readouterr()
    return shown.err if code else shown.out


def test_what_is_kept_is_shown_and_removed(account: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder, the number of files and their bytes; removed, they are told as what they were."""
    folder = str(find_folder("static"))
    assert say(capsys) == f"{folder}\t0\t0\n"
    keep(b"content")
    keep(b"more content")
    assert say(capsys) == f"{folder}\t2\t19\n"
    assert say(capsys, "--clear") == f"{folder}\t2\t19\n"
    assert say(capsys) == f"{folder}\t0\t0\n"
    told = json.loads(say(capsys, "--json"))
    assert {name: told[name] for name in ("event", "folder", "files", "size", "cleared")} == {
        "event": "cache",
        "folder": folder,
        "files": 0,
        "size": 0,
        "cleared": False,
    }


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_folder_that_is_a_link_is_left_alone(account: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What stands elsewhere is neither counted nor removed, and the reason is told."""
    keep(b"content")
    folder = find_folder("static")
    elsewhere = folder.rename(account / "elsewhere")
    folder.symlink_to(elsewhere)
    for words in ([], ["--clear"]):
        assert "is a link" in say(capsys, *words, code=2)
    assert len(list(elsewhere.iterdir())) == 1
