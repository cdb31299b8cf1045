"""Every example of the documentation and the README runs, in Python and on the command line, on machines that
are all this one."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import importlib.util
import inspect
import os
import re
import shlex
import sys
import textwrap
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import apps
import bokeh_ssh
from bokeh_ssh import DirectTunnel, RemoteForward, testing
from programs import Program

ROOT = Path(__file__).resolve().parents[2]
TEXTS = (
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("[!_]*.md")),
    *sorted((ROOT / "docs").glob("[!_]*/*.md")),
)
PAGES = [page for page in TEXTS if "```python" in page.read_text()]
#: Commands that end by themselves; the others are held until Ctrl-C.
BRIEF = ("doctor", "ls", "stop", "cache")
#: A web server of another kind, by the name that an example has for one.
STAND_IN = """#!{python}
import http.server, sys
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), http.server.SimpleHTTPRequestHandler).serve_forever()
"""
pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(os.name != "posix", reason="shell programs as stand-ins"),
]


def examples(page: Path) -> list[tuple[int, str]]:
    """List the Python blocks of a page, each with its line; a job takes a cluster (`test_cluster.py`)."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    blocks = [(text.count("\n", 0, match.start()) + 1, match[1]) for match in found]
    return [block for block in blocks if "batch=" not in block[1]]


def steps(page: Path) -> Iterator[tuple[str, str]]:
    """List what a page has for the command line: a "command", "settings" for it, where a "section" begins."""
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^ *```(\w*)[^\n]*\n(.*?)^ *```$|^## ", text, re.MULTILINE | re.DOTALL):
        kind, block = match[1], textwrap.dedent(match[2] or "")
        block = re.sub(r" \\\n *", " ", block)
        block = re.sub(r"^(# run with [^\n]*)\n([^\n]*)", r"\2  \1", block, flags=re.MULTILINE)
        if kind is None:
            yield "section", ""
        elif kind == "toml" and "[tool.bokeh-ssh" in block:
            yield "settings", block
        elif kind in ("sh", "console"):
            lines = [line.removeprefix("$ ").partition(" | ")[0] for line in block.splitlines()]
            lines = [line.removeprefix("exec ") for line in lines]  # as the last line of a job's script
            commands = [line for line in lines if line.startswith("bokeh-ssh ")]
            cluster = ("--batch", "--job ", " 123456")
            yield from (("command", line) for line in commands if not any(word in line for word in cluster))


def first_pages() -> dict[str, Path]:
    """List the commands that are run, each with the page that runs it: the first of several that have it.

    What stands for itself alone is run once; what others need, or need others, on each page.
    """
    found: dict[str, Path] = {}
    for page in (ROOT / "docs" / "commands.md", *TEXTS):
        for kind, text in steps(page):
            if kind == "command":
                found.setdefault(text, page)
    return found


def is_run(page: Path, text: str) -> bool:
    """Return whether a command is run with a page's others.

    Some are of programs that the tests' environment lacks, as a remark behind them says with the version that
    they were run with.
    """
    words = shlex.split(text, comments=True)
    alone = words[1] in ("demo", "direct", "forward", "me@remote.host") and "--detach" not in words
    mark = re.search(r"# run with (\w+)", text)
    if mark and not importlib.util.find_spec(mark[1].lower()):
        return False
    return not alone or first_pages()[text] == page


def fill(folder: Path) -> None:
    """Put there what the examples name."""
    for name in (
        *("dashboard.py", "app.py", "projects/dashboard.py", "myapp/main.py", "helpers.py"),
        *("small.py", "big.py", "overview.py"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(apps.SLIDER.replace('"slider"', '"frequency"'))
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "table.csv").write_text("1,2\n")


@pytest.fixture
def everywhere(
    account: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[testing.SSHMachine]:
    """A machine that all the names of the documentation lead to, by the ssh config, with what they need."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "tensorboard").write_text(STAND_IN.format(python=sys.executable))
    (programs / "tensorboard").chmod(0o755)
    path = f"{Path(sys.executable).parent}:{programs}:/usr/bin:/bin"
    with testing.machine(env={"PATH": path, "BOKEH_SSH_DIR": os.environ["BOKEH_SSH_DIR"]}) as machine:
        fill(machine.home)
        (machine.home / ".bash_profile").write_text(f"conda() {{ :; }}\nmodule() {{ :; }}\nPATH={path}\n")
        (machine.home / ".jupyter").mkdir()  # where the tests are run by root, as in a container
        settings = '{"ServerApp": {"allow_root": true}}'
        (machine.home / ".jupyter" / "jupyter_server_config.json").write_text(settings)
        known_hosts = tmp_path / "known_hosts"
        line = Path(str(machine.host.known_hosts)).read_text().partition(" ")[2]
        names = f"[{machine.host.target.host}]:{machine.host.port},[localhost]:{machine.host.port}"
        known_hosts.write_text(f"{names} {line}")
        here = tmp_path / "here"
        here.mkdir()
        fill(here)
        monkeypatch.chdir(here)
        config = f"""
Host node*
  HostName localhost
Host *
  HostName {machine.host.target.host}
  Port {machine.host.port}
  IdentityFile {machine.host.key_filename}
  UserKnownHostsFile {known_hosts}
"""
        (account / ".ssh" / "config").write_text(config)
        (account / ".ssh" / "config").chmod(0o600)
        for name in ("cluster", "node"):
            key = account / ".ssh" / name
            key.write_bytes(Path(str(machine.host.key_filename)).read_bytes())
            key.chmod(0o600)
        (machine.home / ".ssh").mkdir(mode=0o700)  # there too: a Bokeh host logs in to a gateway by itself
        (machine.home / ".ssh" / "config").write_text(config)
        yield machine


@contextlib.contextmanager
def published() -> Iterator[None]:
    """Publish an app on the gateway, as the Bokeh host of shape A does."""
    with (
        DirectTunnel("remote.host", "me", app="dashboard.py", signed=False) as tunnel,
        RemoteForward("gateway.host", "me", local_port=tunnel.remote_port, name="dashboard"),
    ):
        yield


@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)], ids=lambda page: page.stem)
def test_examples_run(page: Path, everywhere: testing.SSHMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run one after the other; what would wait for its end does not, and what would open
    a browser opens none."""
    seen: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: seen.append(url) or True)  # type: ignore[func-returns-value]
    monkeypatch.setattr("bokeh_ssh._tunnels.openable.Openable.wait", lambda self, timeout=None: True)

    async def ended(self: Any) -> None:
        return None

    monkeypatch.setattr("bokeh_ssh._tunnels.openable.Openable.ended", ended)
    space: dict[str, Any] = {name: getattr(bokeh_ssh, name) for name in bokeh_ssh.__all__}
    space |= {"asyncio": asyncio, "urllib": urllib, "my_tool": SimpleNamespace(check=seen.append)}
    space |= {"signal": __import__("signal"), "getpass": __import__("getpass")}
    needs = published() if page.stem in ("gateway", "README") else contextlib.nullcontext()
    with needs, contextlib.ExitStack() as stack:
        for line, text in examples(page):
            text = re.sub(r"(forwards=\[\")\d+:", r"\g<1>0:", text)  # the machine there is this one too
            code = compile("\n" * line + text, str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            result = eval(code, space)
            if inspect.iscoroutine(result):
                asyncio.run(result)
            for value in list(space.values()):
                if hasattr(value, "close") and isinstance(value, DirectTunnel):
                    stack.callback(value.close)
            for name in [name for name in space if name.startswith("test_")]:
                space.pop(name)(everywhere)


def end(program: Program) -> None:
    """End what a person would end with Ctrl-C."""
    program.interrupt()
    assert program.end(30) == 0, program


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in TEXTS if any(kind == "command" for kind, _ in steps(page))],
    ids=lambda page: page.stem,
)
def test_commands_run(page: Path, everywhere: testing.SSHMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of a page run one after the other: each opens what it says, and ends well by itself or at
    Ctrl-C. What is published stays so to the end of its section."""
    monkeypatch.setenv("BROWSER", "true")  # a program that opens nothing
    with contextlib.ExitStack() as section:
        for kind, text in steps(page):
            if kind == "command" and not is_run(page, text):
                continue
            # Ports that are free in the examples may not be here.
            text = re.sub(r"(-L |--forward |forwards = \[\")\d+:", r"\g<1>0:", text)
            if kind == "section":
                section.close()
            elif kind == "settings":
                Path("pyproject.toml").write_text(text)
            else:
                _, *words = shlex.split(text, comments=True)
                program = section.enter_context(Program(*words))
                if words[0] in BRIEF or "--dry-run" in words:
                    assert program.end(60) == 0, program
                    continue
                program.address()
                if "--json" in words:
                    program.expect('"opened"', timeout=60)
                if words[0] == "publish":
                    section.callback(end, program)
                else:
                    end(program)


def test_suggested_commands_work(everywhere: testing.SSHMachine) -> None:
    """What a tunnel that leaves its server says to open it again, and to end it, does that as it stands."""
    with Program("gateway", "me@login.cluster", "dashboard.py", "--host", "node17", "--detach") as program:
        program.address()
        program.expect("For good: ")
        end(program)
    told = dict(line.split(": bokeh-ssh ") for line in program.stderr.splitlines() if ": bokeh-ssh " in line)
    assert told.keys() == {"Again", "For good"}
    with Program(*told["Again"].split()) as again:
        assert again.address().endswith("/dashboard")
        end(again)
    with Program(*told["For good"].split()) as stop:
        assert stop.end(60) == 0, stop
    with Program(*told["Again"].split(), "--launch-timeout", "1") as gone:
        assert gone.end(60) == 1, gone
    assert "nothing is published" in gone.stderr


def test_nothing_is_passed_over() -> None:
    """The pages that people read first have examples, and these are found."""
    assert {"README", "direct", "gateway", "launching", "notebook", "testing", "tutorial"} <= {
        page.stem for page in PAGES
    }
    assert sum(len(examples(page)) for page in PAGES) > 20
    commands = [text.split()[1] for page in TEXTS for kind, text in steps(page) if kind == "command"]
    assert len(commands) > 25
    assert len(list(steps(ROOT / "docs" / "commands.md"))) == 24 + 1 + 5  # commands, settings, sections
    assert set(commands) - {"me@remote.host"} == {  # that one is short for direct
        *("direct", "gateway", "publish", "forward", "attach", "ls", "stop", "doctor", "up", "demo", "cache")
    }


def test_code_fits_its_box() -> None:
    """No line of code on a page is cut off, or has to be scrolled, in a window of 1,200 pixels."""
    long = []
    for page in sorted((ROOT / "docs").rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(
            r"^ *```\{?(sh|console|python|toml|doctest)\}?\n(.*?)^ *```$", text, re.M | re.S
        ):
            long += [(page.name, line) for line in match[2].splitlines() if len(line) > 88]
    assert long == []


def test_tests_that_the_pages_name_exist() -> None:
    """A promise that is said to be tested by a test is: it exists, in the file that is named with it."""
    pages = {*TEXTS, *(page for folder in (".", "tests") for page in (ROOT / folder).glob("*.md"))}
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    code = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    named = set(re.findall(r"\b(test_\w+)`", text))
    assert len(named) > 40
    assert [name for name in sorted(named) if not any(f"def {name}(" in each for each in code.values())] == []
    pairs = re.findall(r"`(test_\w+\.py):\s+(test_\w+)`", text)
    assert len(pairs) > 40
    assert [pair for pair in pairs if f"def {pair[1]}(" not in code.get(pair[0], "")] == []
    assert [name for name in re.findall(r"\b(test_\w+\.py)\b", text) if name not in code] == []
    paths = re.findall(r"\btests/[\w/]+\.py\b", text)
    assert [path for path in paths if not (ROOT / path).is_file()] == []
