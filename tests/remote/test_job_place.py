"""Where a job's node and the login nodes meet in the home."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bokeh_ssh._remote import job_place, job_stream
from bokeh_ssh._remote.run_dir import unsafe, usable

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the remote side is a POSIX system")


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
