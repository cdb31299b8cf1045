"""Text from elsewhere costs time in proportion to its length, in patterns and in parsers."""

from __future__ import annotations

import ast
import contextlib
import importlib
import pkgutil
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import bokeh_ssh
from bokeh_ssh import BokehSSHError
from bokeh_ssh._cli.options.words import as_flag
from bokeh_ssh._core.forward_spec import parse_forward
from bokeh_ssh._core.framing import Reader, Tail, plain
from bokeh_ssh._core.settings import word
from bokeh_ssh._core.text import clean
from bokeh_ssh._core.this_machine.proc_net import listeners
from bokeh_ssh._forwarding.http_requests import Inspector, RequestRefusedError
from bokeh_ssh._forwarding.request_filter import RequestFilter
from bokeh_ssh._remote.readiness import Facts, mask, parse_notice
from bokeh_ssh._server.gitignore import spec
from bokeh_ssh._server.log_parsing import AppErrors, reason
from bokeh_ssh._ssh.auth.known_hosts import find
from bokeh_ssh._ssh.config.syntax import criteria, expand, seconds, split_keyword, split_words

#: Characters, or bytes, of a hostile text. What is linear takes milliseconds for that, what is not much more.
_LENGTH = 20_000
#: Seconds of computing, which a busy machine does not change.
_LIMIT = 0.1
#: What takes more of them than this for a fifth of the length is tried with all of it.
_SHORT, _QUICK = _LENGTH // 5, _LIMIT / 50

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(
        not hasattr(signal, "ITIMER_VIRTUAL"), reason="only POSIX can break off a pattern that computes"
    ),
]


class TooSlowError(Exception):
    """The limit is over."""


@contextlib.contextmanager
def limited(seconds: float = _LIMIT) -> Iterator[None]:
    """Break off what computes for longer."""
    assert threading.current_thread() is threading.main_thread()

    def late(number: int, frame: FrameType | None) -> None:
        raise TooSlowError

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _modules() -> list[Path]:
    """List the package's files, and those of folders in it, that have patterns of ours."""
    assert bokeh_ssh.__file__
    return sorted(Path(bokeh_ssh.__file__).parent.rglob("*.py"))


def _named() -> dict[str, re.Pattern[Any]]:
    """List all patterns that are attributes of our modules."""
    found: dict[str, re.Pattern[Any]] = {}
    for info in pkgutil.walk_packages(bokeh_ssh.__path__, "bokeh_ssh."):
        if info.name.endswith(("__main__", "demo_app")):
            continue
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            if isinstance(value, re.Pattern) and getattr(module, "__file__", None):
                found[f"{info.name}.{name}"] = value
    return found


_FUNCTIONS = ("match", "search", "fullmatch", "sub", "split", "findall", "finditer")


def _inline() -> dict[str, re.Pattern[Any]]:
    """List all patterns that stand where they are used."""
    found: dict[str, re.Pattern[Any]] = {}
    for path in _modules():
        source = path.read_text(encoding="utf-8")
        if not re.search(rf"\bre\s*\.\s*(?:{'|'.join(_FUNCTIONS)})\b", source):
            continue
        for node in ast.walk(ast.parse(source)):
            called = node.func if isinstance(node, ast.Call) else None
            if not isinstance(called, ast.Attribute) or called.attr not in _FUNCTIONS:
                continue
            if not isinstance(called.value, ast.Name) or called.value.id != "re":
                continue
            assert isinstance(node, ast.Call)
            text = node.args[0]
            where = f"{path.stem}:{ast.unparse(text)}"
            if isinstance(text, ast.Constant):
                found[where] = re.compile(text.value)
            else:
                module = importlib.import_module(f"bokeh_ssh.{path.stem}")
                known = isinstance(text, ast.Name) and isinstance(vars(module).get(text.id), re.Pattern)
                assert known, f"{where} is not seen by this test: compile it at the top of the module"
    return found


PATTERNS = _named()


def _words(pattern: re.Pattern[Any]) -> list[str]:
    """List what stands in a pattern as it is, and the beginnings of that."""
    source = pattern.pattern if isinstance(pattern.pattern, str) else pattern.pattern.decode("latin-1")
    plain = re.sub(
        r"\\([^\w\s])", r"\1", re.sub(r"\\[a-zA-Z]|\(\?[a-zA-Z]+\)|\(\?P<\w+>|\(\?[:=!<]+", "\0", source)
    )
    words = [word for word in re.split(r"[\0()|?*+{}$^]+", plain) if word]
    every = dict.fromkeys([*words, "".join(words), *(word[:1] for word in words), source])
    return [word for word in every if word]


def hostile(pattern: re.Pattern[Any], length: int) -> Iterator[str]:
    """Give texts of about that length: pieces over and over, alone, behind a beginning, before an odd end."""
    pieces = [
        " ",
        "\t",
        "\r",
        "\n",
        "a",
        "A",
        "0",
        "9",
        "-",
        ".",
        ":",
        "/",
        "\\",
        "[",
        "]",
        '"',
        "'",
        "%",
        "$",
        "{",
    ]
    pieces += [
        "\x1b",
        "\x1b[",
        "\x1b]",
        "\x1b[0",
        "a ",
        " a",
        "a-",
        "0:",
        ":0",
        "a:",
        "http://",
        "://",
        "${",
        "~",
    ]
    words = _words(pattern)
    for piece in dict.fromkeys([*pieces, *words]):
        yield (piece * (length // len(piece) + 1))[:length]
    fronts = [word for word in words if len(word) > 1][:4]
    for front in fronts:
        for piece in pieces:
            yield front + piece * (length // len(piece)) + "\0"
            yield (front + piece * 2) * (length // len(front + piece * 2))


@pytest.mark.parametrize("name", [*PATTERNS, pytest.param("", id="those in place")])
def test_pattern_takes_time_in_proportion(name: str) -> None:
    """Each pattern of the package, searched for and matched in long texts, is done at once; so are those that
    stand where they are used."""
    # These are looked for here: each process of a run would do so while it lists the tests.
    for pattern in [PATTERNS[name]] if name else _inline().values():
        _check_pattern(pattern)


def _check_pattern(pattern: re.Pattern[Any]) -> None:
    for short, whole in zip(hostile(pattern, _SHORT), hostile(pattern, _LENGTH), strict=True):
        try:
            if _look_through(pattern, short) > _QUICK:
                _look_through(pattern, whole)
        except TooSlowError:
            pytest.fail(f"{pattern.pattern!r} takes too long for {short[:60]!r}…")


def _look_through(pattern: re.Pattern[Any], text: str) -> float:
    """Search for a pattern, and match it, within the limit; tells how many seconds of computing that took."""
    given: Any = text if isinstance(pattern.pattern, str) else text.encode("latin-1", "replace")
    began = time.process_time()
    with limited():
        pattern.fullmatch(given)
        sum(1 for _ in pattern.finditer(given))
    return time.process_time() - began


def _drips(reader: Reader, text: bytes) -> None:
    for at in range(0, len(text), 16):
        reader.feed(text[at : at + 16])


def _chunked(text: bytes) -> None:
    inspector = Inspector(RequestFilter(()))
    inspector.feed(b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
    inspector.feed(b"1\r\na\r\n" * (len(text) // 6))


def _dripped_head(text: bytes) -> None:
    inspector = Inspector(RequestFilter(()))
    with contextlib.suppress(RequestRefusedError):
        inspector.feed(b"GET / HTTP/1.1\r\n")
        for at in range(0, len(text), 8):
            inspector.feed(text[at : at + 8])


def _ignored(text: str) -> None:
    name = "/".join(text[at : at + 250] for at in range(0, 4000, 250))
    for piece in ("*a", "*-", "*?", "*[a]", "**/a/", "**/*/", "a/**/*a"):
        assert not spec([piece * 12 + "\\x01"]).match_file(name)
    spec([text[:4000], text])


def _records(text: str) -> None:
    errors = AppErrors()
    errors.feed(["Error running application handler x: " + text])
    for _ in range(len(text) // 100):
        errors.feed(["  " + text[:100]])


#: What reads text from elsewhere, and is more than a pattern.
_PARSERS: dict[str, Callable[[str], object]] = {
    "plain": plain,
    "clean": lambda text: clean(text, 8000, lines=True),
    "messages": lambda text: _drips(Reader("m" * 32), text.encode("latin-1", "replace")),
    "one message": lambda text: _drips(Reader("m" * 32), b"m" * 32 + 10 * text.encode("latin-1", "replace")),
    "stderr": lambda text: Tail().feed(text.encode("latin-1", "replace")),
    "app errors": _records,
    "reason": lambda text: reason(text.split("\n")),
    "facts": lambda text: [Facts().read(line) for line in text.split("\n")],
    "told": parse_notice,
    "mask": lambda text: mask(text, "--" + text + "=x"),
    "owners": lambda text: listeners(text, 80),
    "known_hosts": lambda text: find([("", text.encode("latin-1", "replace"))], "host"),
    "known_hosts names": lambda text: find(
        [("", b"".join((text.encode("latin-1", "replace"), b" x y")))], "host" * 60
    ),
    "config words": lambda text: split_words(text.replace("'", "").replace('"', "").replace("\\", "")),
    "config line": split_keyword,
    "criteria": lambda text: criteria(["final", *text]),
    "forward": lambda text: _refused(parse_forward, text),
    "chunks": lambda text: _chunked(text.encode("latin-1", "replace")),
    "head": lambda text: _dripped_head(text.encode("latin-1", "replace")),
    "tokens": lambda text: _refused(expand, text, {}, {}),
    "gitignore": _ignored,
    "time": lambda text: _refused(seconds, text),
    "settings": lambda text: word(text + "\ue000", as_flag),
}


#: What takes a text in many parts.
_SLOW = ("messages", "one message", "app errors", "chunks", "head")


def _refused(parse: Callable[..., object], *args: object) -> None:
    with contextlib.suppress(BokehSSHError, ValueError):
        parse(*args)


_PIECES = (
    " ", "\t", "\r", "\n", "a", "0", "-", ".", ":", "/", ",", "*a", "|", "[", "[[:", "${", "%h", "a=", '"',
    "=", "\x1b[", "\x1b]", "Error running application handler\n", "error: ", "m" * 31, "secret", "[[",
)  # fmt: skip


@pytest.mark.parametrize("name", _PARSERS)
def test_parser_takes_time_in_proportion(name: str) -> None:
    """What reads the other side's words, settings or requests is done at once with long ones."""
    for piece in _PIECES if name not in _SLOW else ("a", "m" * 31):
        length = 200_000 if name in _SLOW else 40_000
        text = piece * (length // len(piece))
        try:
            with limited(2.5):
                _PARSERS[name](text)
        except TooSlowError:
            pytest.fail(f"{name} takes too long for {text[:60]!r}…")


def test_the_limit_is_one() -> None:
    """The control of the above: a pattern that tries all ends is broken off."""
    with pytest.raises(TooSlowError), limited():
        re.search(r"\s+$", " " * _LENGTH + "x")


def test_all_patterns_are_seen() -> None:
    """Patterns are compiled at the top of a module only; pathspec's are tried as ``gitignore``, above."""
    assert len(PATTERNS) > 30
    for path in _modules():
        source = path.read_text(encoding="utf-8")
        if not re.search(rf"\bre\s*\.\s*(?:{'|'.join(_FUNCTIONS)})\b", source):
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                for inner in ast.walk(node):
                    if isinstance(inner, ast.Call) and ast.unparse(inner.func) == "re.compile":
                        assert path.stem == "gitignore", f"{path.name}:{inner.lineno}"
