"""Everything that is run on this project, as a list of functions.

    python3 noxfile.py             what to run before a commit: lint, types, layers, docs, tests
    python3 noxfile.py -s demo     the whole thing on this machine alone
    python3 noxfile.py -l          what else there is

Nothing has to be installed for that: the first run makes an environment in ``.nox`` and installs nox there.
``nox`` itself does as well. With CI=true the default is everything: all tests on the oldest Python, with the
lowest versions of what the package depends on, and on the newest; on those between, what differs between
Pythons. A missing Python or Docker engine is then an error, not a skip.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
NOX = "nox[uv]>=2025.10.14"
OLDEST = (3, 10)


def _pyenv() -> None:
    """Make all of pyenv's Pythons callable by name, as python3.12; it hides all but the chosen one."""
    versions = Path(os.environ.get("PYENV_ROOT", "~/.pyenv"), "versions").expanduser()
    found: dict[int, int] = {}
    for path in versions.glob("3.*"):
        match = re.match(r"3\.(\d+)\.(\d+)$", path.name)
        if match and int(match[1]) >= OLDEST[1]:
            minor, patch = int(match[1]), int(match[2])
            found[minor] = max(patch, found.get(minor, 0))
    # What was chosen comes first; behind it, newer Pythons last, so that a bare "python3" stays what it is.
    chosen = os.environ.get("PYENV_VERSION", "").split(":")
    others = [f"3.{minor}.{found[minor]}" for minor in sorted(found)]
    if others:
        os.environ["PYENV_VERSION"] = ":".join(dict.fromkeys(filter(None, chosen + others)))


def _has_venv(python: str) -> bool:
    """Return whether that Python is new enough and can make an environment with pip in it."""
    check = f"import sys, venv, ensurepip; sys.exit(sys.version_info < {OLDEST})"
    try:
        return subprocess.run([python, "-c", check], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _uv_installs(python: Path) -> bool:
    """Return whether uv can install here: it reads none of pip's settings, as those of a mirror."""
    command = [str(python), "-m", "uv", "pip", "install", "--dry-run", "--python", str(python), "hatchling"]
    try:
        return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _bootstrap() -> int:
    """Run nox from an environment of its own, made first where it is missing."""
    place = HERE / ".nox" / "bootstrap"
    python = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = place / "installed"
    made_of = f"{NOX} for {sys.executable}"
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != made_of or not python.exists():
        names = [sys.executable, *(f"python3.{minor}" for minor in range(15, OLDEST[1] - 1, -1)), "python3"]
        base = next((name for name in names if _has_venv(name)), None)
        if base is None:
            return _complain()
        print(f"noxfile.py: installing nox into {place}", flush=True)
        shutil.rmtree(place, ignore_errors=True)
        subprocess.run([base, "-m", "venv", str(place)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", NOX], check=True)
        (place / "uv-installs").unlink(missing_ok=True)
        if _uv_installs(python):
            (place / "uv-installs").touch()
        stamp.write_text(made_of, encoding="utf-8")
    command = [str(python), "-m", "nox", "-f", str(HERE / "noxfile.py"), *sys.argv[1:]]
    if os.name != "nt":
        os.execv(command[0], command)  # one process less between Ctrl-C and what runs
    return subprocess.run(command, check=False).returncode


def _complain() -> int:
    oldest = ".".join(map(str, OLDEST))
    print(
        f"noxfile.py: no Python {oldest} or newer with the venv module was found; install one "
        "(on Debian and Ubuntu: apt install python3-venv)",
        file=sys.stderr,
    )
    return 1


_pyenv()
os.environ.setdefault("UV_SYSTEM_CERTS", "1")  # as pip does: some networks have a certificate of their own
if __name__ == "__main__":
    sys.exit(_bootstrap())

import nox  # noqa: E402 - only inside the environment

CI = os.environ.get("CI", "").lower() in ("1", "true")
CURRENT = f"{sys.version_info[0]}.{sys.version_info[1]}"
PYTHONS = sorted({*(f"3.{minor}" for minor in range(10, 16)), CURRENT}, key=lambda name: int(name[2:]))
#: The newest that is here: .ci/run says so where a distribution has not got it yet.
NEWEST = next((name for name in reversed(PYTHONS) if shutil.which(f"python{name}")), CURRENT)
PROJECT = nox.project.load_toml(HERE / "pyproject.toml")


def _unread() -> list[str]:
    """Leave out files all of whose tests are marked `once`: each process would read them, for nothing."""
    files = sorted((HERE / "tests").rglob("test_*.py"))
    every = re.compile(r"^pytestmark = (?:\[\s*)?pytest\.mark\.once\b", re.MULTILINE)
    unread = [path.relative_to(HERE) for path in files if every.search(path.read_text(encoding="utf-8"))]
    return [f"--ignore={path}" for path in unread]


#: Most of a test is waiting. A file's tests stay together: they share containers. Only CI runs the few that
#: are marked as slow.
SPREAD = ("-n", "6", "--dist", "loadfile", "--no-loadscope-reorder")
OPTIONS = (*SPREAD, "--durations", "10") if CI else (*SPREAD, "-m", "not slow")
#: What is tried with both an embedded server and one in a container is run once with each: with the first by
#: the oldest Python, with the second by the newest, which alone has containers, and tests the project's tools
#: and pages.
LOWEST = (*OPTIONS, "-m", "not once and not container", *_unread()) if CI else OPTIONS
HIGHEST = (*OPTIONS, "-m", "once or not embedded") if CI else OPTIONS
#: What is run on the Pythons between the oldest and the newest: no containers, whose Python is their own,
#: so that no two tests share any.
BETWEEN = (*OPTIONS, "--dist", "load", "-m", "every_python and not container")
#: Where the benchmark and the soak run find: themselves, and what they share with the tests.
OF_TESTS = {"PYTHONPATH": os.pathsep.join(("tests", "tests/support"))}

nox.needs_version = NOX.removeprefix("nox[uv]")
nox.options.reuse_venv = "yes"
if (HERE / ".nox/bootstrap/uv-installs").exists():
    nox.options.default_venv_backend = "uv|virtualenv"  # which installs in seconds what takes pip a minute
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = CI
CHECKS = ["lint", "layers", "types", "docs"]
TESTS = [f"tests-{CURRENT}"]
if CI:
    TESTS = ["lowest", *(f"tests-{name}" for name in PYTHONS[1 : PYTHONS.index(NEWEST) + 1])]
# The tests come last, so that a run ends with pytest's closing line. .ci/run has each part alone.
nox.options.sessions = TESTS if os.environ.get("PART") == "tests" else CHECKS + TESTS


def _group(name: str) -> list[str]:
    return list(nox.project.dependency_groups(PROJECT, name))


def _lowest() -> list[str]:
    """Return the lowest version that the project allows of each of its dependencies."""
    project = PROJECT["project"]
    asked = [project["dependencies"], *project["optional-dependencies"].values()]
    bounds = (re.match(r"([A-Za-z0-9._-]+)>=([0-9.]+)", line) for lines in asked for line in lines)
    return sorted({f"{bound[1]}=={bound[2]}" for bound in bounds if bound})


def _files_with(mark: str) -> list[str]:
    """List the files of tests that use a mark: each process would read all the others too, for nothing."""
    files = sorted((HERE / "tests").rglob("test_*.py"))
    return [str(path.relative_to(HERE)) for path in files if mark in path.read_text(encoding="utf-8")]


def _tools(session: nox.Session) -> list[str]:
    """Return what the tests need: no JupyterLab, Panel and browser's driver where named ones are run."""
    whole = not session.posargs or any("e2e" in option for option in session.posargs)
    return _group("e2e" if whole else "test")


def _compile(session: nox.Session, *files: str) -> None:
    """Have what the tests import compiled once, before six processes do so at the same time."""
    if CI and not session.posargs:
        session.run_install("pytest", "--collect-only", "-qq", *files, silent=True)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting with ruff."""
    session.install(*_group("lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def layers(session: nox.Session) -> None:
    """Check that each module imports only from below."""
    session.install(*_group("layers"))
    session.run("lint-imports")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types with mypy, strictly."""
    session.install(".[demo]", *_group("types"), NOX)
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation, and run the examples in it; a warning is an error."""
    session.install(".[demo]", *_group("docs"))
    for builder in ("html", "doctest"):
        options = ("-W", "--keep-going", "-n", "-q", "-b", builder, "-d", "docs/_build/doctrees")
        session.run("sphinx-build", *options, "docs", f"docs/_build/{builder}")
    session.log("the documentation is in docs/_build/html/index.html")


@nox.session(python="3.10")
def lowest(session: nox.Session) -> None:
    """Run the tests with the lowest versions that the package allows of what it depends on."""
    # Not in session.create_tmp(): that would be the tests' TMPDIR, too long a path for their sockets.
    constraints = Path(session.virtualenv.location, "lowest.txt")
    constraints.write_text("".join(f"{line}\n" for line in _lowest()), encoding="utf-8")
    session.install(".[demo]", *_tools(session), "-c", str(constraints))
    _compile(session, *_unread())
    session.run("pytest", *(session.posargs or LOWEST))


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run the tests; what follows ``--`` goes to pytest."""
    between = CI and not session.posargs and session.python not in (PYTHONS[0], NEWEST)
    session.install(".[demo]", *(_group("test") if between else _tools(session)))
    files = _files_with("every_python") if between else []
    _compile(session, *files)
    session.run("pytest", *(session.posargs or (*(BETWEEN if between else HIGHEST), *files)))


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Measure against other SSH forwards; ``-- --quick`` for a look, ``-- --help`` for more."""
    session.install(".", *_group("bench"))
    session.run("python", "-m", "benchmarks", *session.posargs, env=OF_TESTS)


@nox.session(default=False)
def soak(session: nox.Session) -> None:
    """Open, close, stall and break connections for 10 minutes (``-- --minutes 1``); nothing may grow."""
    session.install(".[demo]", *_group("test"))
    session.run("python", "-m", "soak", *session.posargs, env=OF_TESTS)


@nox.session(default=False)
def servers(session: nox.Session) -> None:
    """Try everything with each SSH server that is here, and compare it with docs/servers.md; once a week."""
    session.install(".[demo]", *_group("test"))
    files = ("e2e/test_matrix.py", "forwarding/test_other_servers.py", "forwarding/test_reach.py")
    session.run("pytest", "-v", *(session.posargs or [f"tests/{name}" for name in files]))


@nox.session(default=False)
def release(session: nox.Session) -> None:
    """Build what is published into dist, check it, and run the demo from the wheel in a clean environment."""
    session.install(*_group("release"))
    dist = HERE / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(dist))
    session.run("twine", "check", "--strict", *sorted(map(str, dist.iterdir())))
    source = PROJECT["project"]["urls"]["Source"]
    origin = session.run(
        "git", "remote", "get-url", "origin", silent=True, external=True, success_codes=(0, 2, 128)
    )
    if source.partition("://")[2].partition("/")[2] not in str(origin):
        session.warn(f"{source} is not where this clone comes from: look at the addresses in pyproject.toml")
    clean = Path(session.virtualenv.location, "clean")
    session.run("python", "-m", "venv", "--clear", str(clean))
    python = str(clean / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    (wheel,) = dist.glob("*.whl")
    session.run(python, "-m", "pip", "install", "--quiet", f"{wheel}[demo]", external=True)
    session.run(python, "tests/support/try_demo.py", external=True)


@nox.session(default=False)
def demo(session: nox.Session) -> None:
    """Show a Bokeh app through a real tunnel to an SSH server on this machine; Ctrl-C ends it."""
    session.log("installing what the demo needs into .nox: about a minute the first time, then seconds")
    session.install("--quiet", ".[demo]")
    # It stops what it started on Ctrl-C: give it the time.
    session.run("bokeh-ssh", "demo", *session.posargs, interrupt_timeout=30, terminate_timeout=10)
