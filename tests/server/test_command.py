"""The text that goes to the remote machine, and the text that comes back: no server, but real shells."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bokeh_ssh._core.errors import LaunchError, PythonNotFoundError, SessionError, UsageError
from bokeh_ssh._core.events import Event
from bokeh_ssh._core.framing import Reader, Tail, plain
from bokeh_ssh._forwarding import port_ownership
from bokeh_ssh._remote import process_tree, readiness
from bokeh_ssh._server.bootstrap import supervisor_input
from bokeh_ssh._server.diagnosis import StartFailure, refused
from bokeh_ssh._server.launch_spec import COMPRESSION, Launch
from bokeh_ssh._server.log_parsing import AppErrors, is_windows, port_in_use, reason
from bokeh_ssh._server.server_state import Evidence, ServerState, Stage
from bokeh_ssh._ssh.remote_shell import encode, exec_line, exec_script
from skips import missing

MARK = "0123456789abcdef" * 2

#: All that an argument can hold: any character but NUL, and lone surrogates as os.fsdecode makes them.
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


def options(launch: Launch) -> list[Any]:
    return launch.argv()


@pytest.mark.parametrize("shell", ["sh", "dash", "bash", "busybox sh", "zsh --emulate sh"])
def test_encoded_script_arrives_byte_for_byte(shell: str) -> None:
    """Whatever a script holds, each kind of /bin/sh gets it back from its one encoded line."""
    words = shell.split()
    if not shutil.which(words[0]):
        missing(f"{words[0]} is not installed")

    @settings(max_examples=25, deadline=None)
    @given(TEXT)
    def check(text: str) -> None:
        line = encode(text)
        assert line.count(b"\n") == 1
        assert line.isascii()
        read = 'IFS= read -r s; printf %b "$s"; printf .; cat'
        done = subprocess.run([*words, "-c", read], input=line + b"rest", capture_output=True, check=True)
        assert done.stdout == text.encode() + b".rest"

    check()


def test_exec_line_is_plain_to_every_shell() -> None:
    """The login shell gets nothing but one pair of single quotes that could mean something to it."""
    look = port_ownership._LOOK
    for line, quotes in ((exec_line(MARK), 2), (exec_script(MARK, look), 4)):
        assert line.startswith("exec /bin/sh -c '")
        assert line.endswith("'")
        assert line.count("'") == quotes
        assert not set("!\\\n`\0") & set(line)
        assert line.isascii()


def test_exec_line_does_not_contain_what_it_prints() -> None:
    """A start file that prints the command cannot say hello in our place."""
    assert MARK not in exec_line(MARK)
    assert MARK not in exec_script(MARK, "true")


@pytest.mark.parametrize("shell", ["sh", "bash", "dash", "zsh", "ksh", "csh", "tcsh", "fish", "busybox ash"])
def test_script_runs_through_every_shell(shell: str) -> None:
    """What it says comes out as it is, whichever shell the account has."""
    words = shell.split()
    if not shutil.which(words[0]):
        missing(f"{words[0]} is not installed")
    line = exec_script(MARK, 'say one "$(echo a b)"; read -r n; say two "$n"')
    done = subprocess.run([*words, "-c", line], input=b"c d\n", capture_output=True, check=True, timeout=20)
    told = [
        f'{MARK}{{"event":"{event}","text":"{text}"}}' for event, text in (("one", "a b"), ("two", "c d"))
    ]
    assert done.stdout.decode().splitlines() == told


def test_no_secret_is_in_the_command_line() -> None:
    """What the caller gave is not in the login shell's command, nor in the repr; only in the input."""
    launch = Launch(
        env={"TOKEN": "canary-1"}, setup="export X=canary-2", args=("--cookie-secret", "canary-3")
    )
    assert "canary" not in exec_line(MARK)
    assert "canary-1" not in repr(launch)
    assert "canary-2" not in repr(launch)
    sent = supervisor_input(launch, MARK, b"pass")
    assert b"canary-1" in sent
    assert b"canary-3" in sent


@pytest.mark.parametrize(
    "bad",
    [
        {"app": ("a\0b",)},
        {"args": ("\0",)},
        {"env": {"A": "\0"}},
        {"env": {"A\0": "x"}},
        {"python": "py\0thon"},
        {"cwd": "\0"},
        {"setup": "echo \0"},
        {"setup": ("true", "\0")},
        {"command": ("a\0",)},
        {"origins": ("\0",)},
        {"args": ("\ud800",)},
        {"args": (1,)},
        {"env": {"": "x"}},
        {"env": {"A=B": "x"}},
        {"app": ("",)},
        {"cwd": ""},
        {"command": ""},
        {"command": "'open"},
        {"port": 70000},
        {"port": True},
        {"grace": -1},
        {"timeout": float("nan")},
        {"lease": "5"},
        {"args": ("--port", "5006")},
        {"args": ("--address=0.0.0.0",)},
        {"args": ("--unix-socket", "/x")},
        {"args": ("--log-file", "x")},
        {"args": ("--log-level", "error")},
        {"args": ("--log-level=warning",)},
        {"args": ("--log-level",)},
    ],
)
def test_bad_input_is_refused_before_anything_starts(bad: dict[str, Any]) -> None:
    """What cannot work, NUL above all, is a UsageError that does not repeat a secret."""
    with pytest.raises(UsageError) as caught:
        Launch(**bad)
    assert "\0" not in str(caught.value)


def test_args_of_the_app_are_its_own() -> None:
    """After --args anything goes, and --log-level may ask for more lines."""
    args = ("--log-level", "debug", "--args", "--port", "1", "--log-level", "error")
    assert tuple(options(Launch(app=("a.py",), args=args))[-7:]) == args


def test_compression_is_asked_of_bokeh_alone() -> None:
    """On a slow line a script of one's own gets no option more than on a fast one."""
    for command, asked in (("bokeh serve", True), ("env X=1 panel serve a.py", True), ("./mine", False)):
        assert (COMPRESSION in Launch(command=command).argv(compresses=True)) == asked


def test_options_come_before_the_apps_and_args_last() -> None:
    """The caller's options win, and an option that takes many values swallows no app."""
    words = options(
        Launch(app=("a.py", "-b.py", "~/c.py", "~joe/d.py", "~x"), args=("--dev",), grace=1000, port=7)
    )
    assert words[:4] == [["python", "python3"], "-m", "bokeh", "serve"]
    assert words[-6:] == ["a.py", "./-b.py", ["home", "~/c.py"], ["home", "~joe/d.py"], "~x", "--dev"]
    text = " ".join(word for word in words if isinstance(word, str))
    assert "--address 127.0.0.1 --port 7 --log-level info" in text
    assert "--unused-session-lifetime 1000000 --session-token-expiration 31536000" in text


def test_short_grace_does_not_shorten_bokehs_own_times() -> None:
    """Sessions never last shorter than Bokeh would have them."""
    text = " ".join(word for word in options(Launch(grace=0)) if isinstance(word, str))
    assert "--unused-session-lifetime 15000 " in text


def test_origins_are_options() -> None:
    """Each page that may talk to the server is one --allow-websocket-origin."""
    words = options(Launch(origins=("localhost:1", "127.0.0.1:1")))
    at = words.index("--allow-websocket-origin")
    assert words[at : at + 4] == [*words[at : at + 1], "localhost:1", words[at], "127.0.0.1:1"]


@pytest.mark.parametrize(
    ("command", "package", "first"),
    [
        ("bokeh serve", "bokeh", [["python", "python3"], "-m", "bokeh", "serve"]),
        ("panel serve", "panel", [["python", "python3"], "-m", "panel", "serve"]),
        (("panel", "serve", "--warm"), "panel", [["python", "python3"], "-m", "panel", "serve", "--warm"]),
        ("~/bin/my-serve 'a b'", "", [["home", "~/bin/my-serve"], "a b", "--address"]),
        (("srun", "bokeh", "serve"), "", ["srun", "bokeh", "serve", "--address"]),
    ],
)
def test_command_is_taken_apart(command: Any, package: str, first: list[Any]) -> None:
    """Bokeh and Panel run as modules of the Python that was found; anything else runs as given."""
    launch = Launch(command=command)
    assert launch.package == package
    assert launch.argv()[: len(first)] == first


# --- what comes back

MESSAGES = [{"event": "log", "lines": ["a\u2028b"]}, {"event": "ready", "port": 5}, {"event": "beat"}]


def wire(message: dict[str, Any]) -> bytes:
    return MARK.encode() + json.dumps(message).encode() + b"\n"


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(MESSAGES) | st.binary(max_size=60), max_size=12),
    st.lists(st.integers(1, 50), max_size=30),
)
def test_messages_are_found_among_any_noise(parts: list[Any], cuts: list[int]) -> None:
    """Whatever surrounds them and however the stream is cut, our messages come out, whole and in order."""
    stream = b"".join(part + b"\n" if isinstance(part, bytes) else wire(part) for part in parts)
    reader = Reader(MARK)
    found = []
    while stream:
        cut = cuts.pop() if cuts else len(stream)
        found += reader.feed(stream[:cut])
        stream = stream[cut:]
    assert found == [part for part in parts if not isinstance(part, bytes)]


def test_message_after_an_unfinished_line_is_found() -> None:
    """A start file that ends without a line end does not hide the hello."""
    reader = Reader(MARK)
    assert reader.feed(b"Welcome! $ " + MARK.encode() + b"hello\n") == [{"event": "hello"}]
    assert reader.noise.lines == ("Welcome! $",)


@pytest.mark.parametrize(
    "noise",
    [
        b'{"event": "ready"}',
        MARK.encode() + b"{",
        MARK.encode() + b"hello there",
        MARK.encode() + b'["event"]',
        MARK.encode() + b'{"event": 7}',
        MARK[:-1].encode() + b'{"event":"ready"}',
        b"hello",
    ],
)
def test_what_only_looks_like_a_message_is_noise(noise: bytes) -> None:
    """Without the whole mark, or with anything but a message after it, a line means nothing."""
    reader = Reader(MARK)
    assert reader.feed(noise + b"\n") == []
    assert reader.noise.lines


@pytest.mark.parametrize("noise", [b"x" * 65536, b"x\n" * 32768, b"\n" * 65536, MARK.encode() + b"y" * 65500])
def test_noise_is_bounded(noise: bytes) -> None:
    """Megabytes of noise take neither memory nor time without bound."""
    reader = Reader(MARK)
    began = time.monotonic()
    for _ in range(160):  # 10 MiB
        reader.feed(noise)
    assert time.monotonic() - began < 20
    assert len(reader._rest) <= 5 << 20
    assert sum(map(len, reader.noise.lines)) < 2 << 20
    assert reader.feed(b"\n" + wire({"event": "beat"})) == [{"event": "beat"}]


def test_shown_lines_cannot_act_on_a_terminal() -> None:
    """Escape sequences and control characters are gone; the text around them stays."""
    assert plain("\x1b[31mred\x1b[0m \x1b]0;title\x07plain\x08\x9b ü\t.\r") == "red plain ü\t."
    tail = Tail()
    tail.feed(b"\x1b[2Jx\r\n\xff\n")
    assert tail.lines == ("x", "\ufffd")


STAMP = "2026-01-01 00:00:00,000 "
ERROR = [
    STAMP + "Error running application handler <ScriptHandler>: multi",
    "line",
    "raise ValueError() Traceback (most recent call last):",
    '  File "a.py", line 1, in f',
    "    raise ValueError()",
    "ValueError: multi",
    "line",
    "",
]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_app_errors_are_collected_whole(size: int) -> None:
    """An error with its traceback is one text, in however many parts its lines come."""
    lines = [STAMP + "before", *ERROR, STAMP + "after", *ERROR, STAMP + "after"]
    errors = AppErrors()
    found = []
    for i in range(0, len(lines), size):
        found += errors.feed(lines[i : i + size])
    assert len(found) == 2
    for text in found:
        assert text.splitlines()[:6] == ERROR[:6]
        assert "after" not in text


def test_app_error_does_not_wait_for_the_next_record() -> None:
    """An error that is the last thing the server writes is told at once."""
    errors = AppErrors()
    assert len(errors.feed(ERROR)) == 1


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["x Cannot start Bokeh server, port 5 is in use"], "Cannot start Bokeh server, port 5 is in use"),
        (
            [
                "ERROR: ['ssl_certfile', 'port'] args are not supported with a unix socket",
                "2026 Cannot start Bokeh server [ENOENT]: No such file or directory",
            ],
            "Cannot start Bokeh server [ENOENT]: No such file or directory",
        ),
        (["ERROR: ERROR: Path does not exist: /x"], "Path does not exist: /x"),
        (["ERROR: Error loading /a.py:", "", "Invalid syntax", "z"], "Error loading /a.py: Invalid syntax"),
        (["usage: x", "  [-h]", "x: error: unrecognized arguments: --zzz"], "unrecognized arguments: --zzz"),
        (
            ["Traceback", "  File", "NameError: name 'x' is not defined", ""],
            "NameError: name 'x' is not defined",
        ),
        ([], ""),
    ],
)
def test_reason_is_the_line_that_says_why(lines: list[str], expected: str) -> None:
    """Of a failed start's log, the one line that a person would point at is shown."""
    assert reason(lines) == expected


def test_port_in_use_is_told_from_other_reasons() -> None:
    """Only Bokeh's own words for a taken port count as such."""
    assert port_in_use(["starting", "2026 Cannot start Bokeh server, port 5006 is already in use"])
    assert not port_in_use(["Cannot start Bokeh server, address '10.9.9.9' not available"])


@pytest.mark.parametrize(
    "text",
    [
        "'exec' is not recognized as an internal or external command,",
        'Der Befehl "exec" ist entweder falsch geschrieben oder',
        "    + FullyQualifiedErrorId : CommandNotFoundException",
        "« exec » n’est pas reconnu en tant que commande interne",
    ],
)
def test_windows_is_recognised_in_any_language(text: str) -> None:
    """What cmd.exe and PowerShell say to our command tells that this is Windows."""
    assert is_windows([text])


@pytest.mark.parametrize(
    "text", ["This account is currently not available.", "sh: exec: /bin/sh: not found", ""]
)
def test_other_refusals_are_not_windows(text: str) -> None:
    """A POSIX account without a shell is not taken for Windows."""
    assert not is_windows([text])


def test_account_without_shell_is_a_session_error_with_its_text() -> None:
    """An account that runs no commands gives its own words as the reason."""
    launch = Launch()
    said = ("This account is currently not available.",)
    found = StartFailure(
        host="h", launch=launch, stage=Stage.LOGIN, evidence=Evidence(()), over=True, status=1, before=said
    ).error()
    assert isinstance(found, SessionError)
    assert said[0] in str(found)


@pytest.mark.parametrize(
    ("said", "kind", "hint"),
    [
        ("/bin/sh: 1: Cannot fork", LaunchError, "ulimit"),
        ("-bash: fork: retry: Resource temporarily unavailable", LaunchError, "ulimit"),
        ("  PYTHONHOME = '/opt/other'", PythonNotFoundError, "unset"),
        ("  PYTHONHOME = (not set)", PythonNotFoundError, "python="),
        ("Fatal Python error: preconfig_init_utf8_mode: invalid PYTHONUTF8", PythonNotFoundError, "unset"),
    ],
)
def test_python_is_not_blamed_for_its_surroundings(said: str, kind: type[LaunchError], hint: str) -> None:
    """A limit of the account, and a variable that a start file sets, are named as what keeps Python from
    running."""
    launch, evidence = Launch(), Evidence(())
    found = StartFailure(
        host="h", launch=launch, stage=Stage.PYTHON, evidence=evidence, over=True, status=1, before=(said,)
    ).error()
    assert type(found) is kind
    assert hint in str(found.hint)


def test_python_that_no_file_is_left_to_look_for_is_not_missing() -> None:
    """What the shell says of a limit counts, not that it has found no Python then."""
    evidence = Evidence((), failed={"at": "python", "status": 127})
    found = StartFailure(
        host="h",
        launch=Launch(),
        stage=Stage.PYTHON,
        evidence=evidence,
        before=("/bin/sh: 22: eval: 3: Too many open files",),
    ).error()
    assert type(found) is LaunchError
    assert "ulimit" in str(found.hint)


def test_limit_that_ends_the_server_is_named() -> None:
    """What OpenBLAS says where threads are scarce is the reason, not the interrupt that it answers with."""
    said = "OpenBLAS blas_thread_init: pthread_create failed for thread 1 of 2"
    found = StartFailure(
        host="h",
        launch=Launch(),
        stage=Stage.SERVER,
        evidence=Evidence(()),
        exit_status=-2,
        log=(said, "Traceback (most recent call last):", "    from . import multiarray", "KeyboardInterrupt"),
    ).error()
    assert said in str(found)
    assert "OPENBLAS_NUM_THREADS=1" in str(found)


def test_start_files_of_setup_are_blamed_for_its_silence() -> None:
    """Where the login shell of ``setup`` never gets to it, Python is not called slow."""
    launch, evidence = Launch(setup="true"), Evidence(())
    found = StartFailure(host="h", launch=launch, stage=Stage.PYTHON, evidence=evidence).error()
    assert "did not get past its start files" in str(found)
    evidence.begun = "setup2"
    found = StartFailure(host="h", launch=launch, stage=Stage.PYTHON, evidence=evidence).error()
    assert "setup step 2 did not end" in str(found)
    evidence.begun = "python"
    found = StartFailure(host="h", launch=launch, stage=Stage.PYTHON, evidence=evidence).error()
    assert "Python did not start" in str(found)


def test_command_that_ends_at_once_is_told_what_to_do() -> None:
    """One that goes into the background is told so; for another kind's usage error, see its command."""
    for command, status, says in (
        ("sh -c daemon", 0, "into the background"),
        ("sh -c daemon", 1, "has no {port}"),
        ("python3 -m http.server --port {port}", 2, "check command"),
    ):
        found = StartFailure(
            host="h",
            launch=Launch(command=command),
            stage=Stage.SERVER,
            evidence=Evidence(()),
            exit_status=status,
            log=("usage",) if status == 2 else (),
        ).error()
        assert says in str(found), command


def test_launch_error_shows_log_status_and_command() -> None:
    """A LaunchError carries all that is known of the failed server."""
    found = StartFailure(
        host="h",
        launch=Launch(),
        stage=Stage.SERVER,
        evidence=Evidence(("a", "b")),
        exit_status=-9,
        log=("l",),
    ).error()
    assert isinstance(found, LaunchError)
    assert (found.log, found.exit_status, found.command) == (("l",), -9, ("a", "b"))
    assert "signal 9" in str(found)


# --- Bokeh's own lines


@pytest.mark.parametrize(
    ("url", "port", "route"),
    [
        ("http://localhost:5006/app", 5006, "/app"),
        ("http://127.0.0.1:1/", 1, "/"),
        ("http://127.0.0.1:1", 1, "/"),
        ("http://::1:5006/app", 5006, "/app"),
        ("http://[::1]:5006/app", 5006, "/app"),
        ("https://evil.example:80/pre/my app", 80, "/pre/my app"),
        ("http://h:5006/a:7/b", 5006, "/a:7/b"),
    ],
)
def test_port_and_route_are_read_from_the_log(url: str, port: int, route: str) -> None:
    """The port and the routes come from Bokeh's line, whatever host it names."""
    facts = readiness.Facts()
    assert facts.read("Starting Bokeh server version 3.9.2 (running on Tornado 6.5.1)") is None
    assert facts.read(f"2026 Bokeh app running at: {url}") is None
    assert facts.read("2026 Starting Bokeh server with process id: 77") == {
        "event": "ready",
        "port": port,
        "pid": 77,
        "routes": [route],
        "versions": "Bokeh 3.9.2, Tornado 6.5.1",
        "tls": url.startswith("https"),
    }


def test_restarted_server_is_read_anew() -> None:
    """With --dev the server starts over in the same process: its new port counts, its old routes do not."""
    facts = readiness.Facts()
    for port in (1, 2):
        facts.read("Starting Bokeh server version 3 (running on Tornado 6)")
        facts.read(f"Bokeh app running at: http://h:{port}/a{port}")
        facts.read(f"Bokeh app running at: http://h:{port}/a{port}")
        ready = facts.read("Starting Bokeh server with process id: 7")
        assert ready
        assert (ready["port"], ready["routes"]) == (port, [f"/a{port}"])


@pytest.mark.skipif(os.name != "posix", reason="the supervisor needs POSIX")
def test_members_sees_this_process() -> None:
    """The process table is read, on this system, well enough to find ourselves in our group."""
    assert os.getpid() in process_tree.members(os.getpgrp(), process_tree.table())


# --- what a far side says of its server, whatever it is

HEARD = sorted(name[len("_heard_") :] for name in vars(ServerState) if name.startswith("_heard_"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = [
    "argv",
    "at",
    "id",
    "key",
    "lines",
    "log",
    "path",
    "pid",
    "port",
    "routes",
    "socket",
    "status",
    "text",
]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.builds(
            lambda event, fields: {**fields, "event": event},
            st.sampled_from([*HEARD, "nonsense"]),
            st.dictionaries(st.sampled_from([*FIELDS, "versions", "why", "token", "kind"]), JSON, max_size=6),
        ),
        max_size=12,
    )
)
@example([{"event": "ready", "port": 5, "pid": 1, "routes": ["@evil.example/", "0/"], "versions": ""}])
@example([{"event": "ready", "port": float("inf"), "pid": 1, "routes": [], "versions": ""}])
@example([{"event": "exit", "status": float("nan")}, {"event": "exit", "status": float("-inf")}])
def test_any_message_is_survived(messages: list[dict[str, Any]]) -> None:
    """A hostile or newer far side says what it likes: no error, and what is known keeps its kind."""

    told: list[Event] = []
    heard = ServerState("host", Launch(), told.append)
    for message in messages:
        heard.receive(message)
    assert 0 <= heard.listening.port < 65536
    assert all(
        isinstance(route, str) and route.isascii() and route[0] == "/" for route in heard.listening.routes
    )
    assert all(
        isinstance(text, str)
        for text in (*heard.log.lines, *heard.evidence.argv, heard.listening.versions, heard.listening.socket)
    )
    assert heard.exit_status is None or isinstance(heard.exit_status, int)
    assert all(event.host == "host" and repr(event) for event in told)
    if heard.evidence.failed:
        findings = StartFailure(host="host", launch=Launch(), stage=Stage.PYTHON, evidence=heard.evidence)
        assert str(findings.error())
        assert str(refused("host", heard.evidence.failed))


@given(st.binary(max_size=200))
def test_any_word_of_readiness_is_survived(raw: bytes) -> None:
    """What a command says of itself is a port or a socket, or nothing."""
    word = readiness.parse_notice(raw.decode("utf-8", "replace"))
    assert word is None or word["port"] or word["socket"]
    assert readiness.parse_notice('{"port": 5, "routes": 7}') is None
    assert readiness.parse_notice('{"port": Infinity}') is None
    assert readiness.parse_notice("[]") is None


def test_words_that_look_secret_are_masked() -> None:
    """In what is told of a command line, the values of such options are hidden, and nothing else is."""
    words = ["x", "--cookie-secret", "A", "--api-key=B", "--ssl-keyfile", "f", "--token", "C", "key", "D"]
    shown = [readiness.mask(*pair) for pair in zip(["", *words], words, strict=False)]
    assert shown == [
        "x",
        "--cookie-secret",
        "***",
        "--api-key=***",
        "--ssl-keyfile",
        "f",
        "--token",
        "***",
        "key",
        "D",
    ]
    assert readiness.mask("", "--session-token-expiration=600") == "--session-token-expiration=600"


@pytest.mark.parametrize(
    ("command", "place"),
    [
        ("jupyter lab", "--port {port}"),
        ("/opt/bin/jupyter-lab --port 8888", "--port {port}"),
        ("python3 -m streamlit run app.py", "--server.port={port}"),
        ("gunicorn app:server", "--bind unix:{socket}"),
    ],
)
def test_other_servers_are_told_how_they_say_where_they_listen(command: str, place: str) -> None:
    """A server that is known to be none of Bokeh's is refused at once without a place for its port; with one
    it is taken, and so is what is not known."""
    with pytest.raises(UsageError, match=f"add .*{re.escape(place)} to it"):
        Launch(command=command)
    Launch(command=f"{command.partition(' --port')[0]} {place}")
    Launch(command="my-jupyter lab")
