"""Where a job's node and the login nodes meet in the home."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from pathlib import Path

import pytest

from bokeh_ssh._remote import job_place, job_stream
from bokeh_ssh._remote.run_dir import remove_tree, unsafe, usable

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the remote side is a POSIX system")


def test_what_killed_holders_have_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A holder that begins removes what others have left, and nothing of one that lives, or just begins."""
    root = tempfile.mkdtemp(prefix="bokeh-ssh-", dir="/tmp")  # a socket's path is short

    def places(job: str) -> list[str]:
        return [f"{root}/job-1-{job}"]

    monkeypatch.setattr(job_place, "job_places", places)
    monkeypatch.setattr(job_place, "_YOUNG", 0.0)
    with contextlib.ExitStack() as stack:
        stack.callback(remove_tree, root)
        for name in ("job-1-7", "job-1-8", "job-1-9", "job-1-x", "job-11-7"):
            Path(root, name).mkdir(mode=0o700)
        for name, lives in (("job-1-8", False), ("job-1-9", True)):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.bind(f"{root}/{name}/news")
            sock.listen()
            if not lives:
                sock.close()
        job_place.clear_job_places("6")
        assert sorted(each.name for each in Path(root).iterdir()) == ["job-1-9", "job-1-x", "job-11-7"]
        Path(root, "job-1-7").mkdir(mode=0o700)
        monkeypatch.setattr(job_place, "_YOUNG", 600.0)
        job_place.clear_job_places("6")
        assert Path(root, "job-1-7").exists(), "the control: its holder may be about to listen"
        job_place.clear_job_places("7")
        assert not Path(root, "job-1-7").exists(), "its own is of no other holder"


def test_home_may_have_a_long_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job is found in a home whose path is longer than a socket's may be; not in a folder of others."""
    home = tmp_path / ("h" * 120)
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    place = tmp_path / "place"
    place.mkdir()
    meeting = job_place.make_meeting_place("7", str(place))
    assert usable(meeting) == "has too long a name for sockets", "the control: no server can be there"
    order = {"job": "7", "ways": ["tcp", "back"]}
    assert not job_stream.find(order), "nothing is written there yet"
    job_place.write_record(meeting, {"node": "c1"})
    assert job_stream.find(order) == meeting
    # What an earlier job of that number has left is no obstacle.
    assert job_place.make_meeting_place("7", str(tmp_path)) == meeting
    assert not job_stream.find(order)
    job_place.write_record(meeting, {"node": "c1"})
    Path(meeting).chmod(0o755)
    assert unsafe(meeting)
    assert not job_stream.find(order)
