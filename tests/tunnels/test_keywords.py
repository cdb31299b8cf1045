"""What people give for each keyword: taken as its annotation says, or refused in a sentence."""

from __future__ import annotations

import dataclasses
import datetime
import os
import pickle
import typing
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, get_args, get_origin

import pytest

import bokeh_ssh
from beds import Machine
from bokeh_ssh import DirectTunnel, GatewayTunnel, Host, LocalForward, RemoteForward, UsageError
from bokeh_ssh._tunnels.options import (
    DirectOptions,
    GatewayOptions,
    LocalForwardOptions,
    RemoteForwardOptions,
)

#: Each class, the record of its keywords, and what it cannot do without.
_CLASSES: list[tuple[Any, Any, dict[str, Any]]] = [
    (DirectTunnel, DirectOptions, {"host": "h"}),
    (GatewayTunnel, GatewayOptions, {"gateway": "g", "host": "h"}),
    (LocalForward, LocalForwardOptions, {"host": "h", "remote_port": 1}),
    (RemoteForward, RemoteForwardOptions, {"gateway": "g"}),
    (Host, Host, {"name": "h"}),
]


def _hint(record: Any, name: str) -> Any:
    return typing.get_type_hints(record)[name]


_KEYWORDS = [
    pytest.param(cls, record, needed, name, id=f"{cls.__name__}-{name}")
    for cls, record, needed in _CLASSES
    for name in (field.name for field in dataclasses.fields(record))
]
_PATHS = [
    each
    for each in _KEYWORDS
    if "PathLike" in (hint := str(_hint(*each.values[1::2]))) and "float" not in hint
]
#: What nobody can take for anything.
_STRANGE = [
    object(),
    datetime.date(2024, 1, 1),
    b"bytes",
    1j,
    [object()],
    {"a": object()},
    ["a", None],
    float("nan"),
]


@pytest.mark.parametrize(("cls", "record", "needed", "name"), _KEYWORDS)
def test_what_a_keyword_cannot_be_is_refused_in_a_sentence(
    cls: Any, record: Any, needed: dict[str, Any], name: str
) -> None:
    """Whatever is given for any keyword is taken, or is a UsageError; nothing else is raised."""
    refused = 0
    for value in [*_STRANGE, True, 3, 2.5, -1, "text", ["text"], ("a", "b"), {}, Path("x"), print]:
        try:
            cls(**{**needed, name: value})
        except UsageError:
            refused += 1
    assert refused or name == "pkey"


@pytest.mark.parametrize(("cls", "record", "needed", "name"), _PATHS)
def test_paths_are_paths(
    cls: Any, record: Any, needed: dict[str, Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a path is taken, a pathlib.Path is as good as its text, and so is each of a list."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "it"
    path.touch()
    (tmp_path / "other").touch()
    (tmp_path / "app.py").touch()
    others = {"app": "app.py"} if name == "bring" else {}
    if name == "remote_socket":
        needed = {key: value for key, value in needed.items() if key != "remote_port"}
    several = any(get_origin(each) not in (None, os.PathLike) for each in get_args(_hint(record, name)))
    for value in [path, PurePosixPath(path), *([[path, str(path.with_name("other"))]] if several else [])]:
        made = record(**{**needed, **others, name: value})
        text = [*map(str, value)] if isinstance(value, list) else str(path)
        assert made == record(**{**needed, **others, name: text})
        assert "Path" not in repr(made)


def test_numbers_and_paths_are_words(tmp_path: Path) -> None:
    """Numbers and paths may stand among the words of a command, and as values of variables."""
    options = DirectOptions("h", args=["--args", 2024, 0.5, tmp_path], env={"YEAR": 2024, "DATA": tmp_path})
    launch = options.launch_spec(5006)
    assert launch.args == ("--args", "2024", "0.5", str(tmp_path))
    assert launch.env == {"YEAR": "2024", "DATA": str(tmp_path)}


def test_a_secret_of_the_wrong_type_is_not_shown() -> None:
    """The error about a password that is no text does not have it."""
    with pytest.raises(UsageError, match="password") as caught:
        Host("h", password=b"correct horse")  # type: ignore[arg-type]
    assert "horse" not in str(caught.value)


def test_several_known_hosts_files_count(embedded: Callable[..., Machine], tmp_path: Path) -> None:
    """A list of known_hosts is looked through in its order."""
    machine = embedded()
    login = {**machine.login, "known_hosts": [tmp_path / "none", Path(machine.login["known_hosts"])]}
    with LocalForward(machine.host, machine.user, remote_port=machine.port, **login) as forward:
        assert forward.local_port


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), 10**400, -1, True], ids=str)
@pytest.mark.parametrize("name", ["timeout", "queue_timeout", "launch_timeout", "grace"])
def test_seconds_that_no_clock_counts_are_refused(name: str, seconds: float) -> None:
    """A time of years and years, infinite or less than none is refused at once; a long one is taken."""
    options = {"host": "h", "app": "app.py", "batch": "slurm"}
    DirectTunnel(**options, **{name: 1e8})
    with pytest.raises(UsageError, match=rf"(^|\W){name}=.* is no(t a)? time"):
        DirectTunnel(**options, **{name: seconds})


@pytest.mark.parametrize(("cls", "record", "needed"), _CLASSES[:4])
def test_pickling_what_is_opened_is_refused_in_a_sentence(
    cls: Any, record: Any, needed: dict[str, Any]
) -> None:
    """What is opened belongs to its process, and says so."""
    with pytest.raises(TypeError, match=rf"^a {cls.__name__} cannot be pickled"):
        pickle.dumps(cls(**needed))


def test_slips_in_python_are_told() -> None:
    """An app as the second argument, which is the user; an item of a list; a time that is a text. A job's
    number may be one."""
    with pytest.raises(UsageError, match=r"looks like an app; give the app by its name: app='app.py'"):
        DirectTunnel("h", "app.py")
    DirectTunnel("h", "me.py", "app.py")
    with pytest.raises(UsageError, match=r"args of type list\[str, NoneType\] is not a list of texts"):
        DirectTunnel("h", app="app.py", args=["--x", None])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="timeout='5' is not a time; give seconds"):
        DirectTunnel("h", app="app.py").wait("5")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="timeout=nan is not a time"):
        DirectTunnel("h", app="app.py").wait(float("nan"))
    with pytest.raises(UsageError, match="known_hosts has an empty path"):
        DirectTunnel("h", known_hosts=["a", ""])
    DirectTunnel("h", app="app.py", job=4711)
    with pytest.raises(UsageError, match="is not the number or the name of a job"):
        DirectTunnel("h", app="app.py", job=-1)


@pytest.mark.parametrize("what", ["box", None])
def test_show_takes_a_tunnel(what: Any) -> None:
    """``show()``, used as Bokeh's own is, says that it takes a tunnel, and how one is opened."""
    with pytest.raises(UsageError, match=r"takes a tunnel.*DirectTunnel"):
        bokeh_ssh.show(what)
