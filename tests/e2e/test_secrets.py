"""What must not be seen is looked for wherever a stranger, a log or a colleague may look."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncssh
import pytest

import apps
from beds import PASSWORD, Key, Knobs, until
from bokeh_ssh import Host

if TYPE_CHECKING:
    from docker_bed import Container

PASSPHRASE = "canary-passphrase-5d1f"
TOKEN = "canary-environment-81c2"

#: Opens a signed tunnel with all that is secret in it, logs what anybody says, and fails in the end.
_PROGRAM = """
import json, logging, pickle, sys, traceback, urllib.request, urllib.error
import bokeh_ssh
spec = json.load(sys.stdin)
logging.basicConfig(level=1, filename=spec["folder"] + "/log", encoding="utf-8")
seen = []

def prompt(question):
    seen.append(repr(question) + str(question))
    return spec["code"] if question.kind == "interactive" else spec["passphrase"]

events = []
tunnel = bokeh_ssh.DirectTunnel(
    spec["host"], spec["user"], app=spec["app"], env={"TOKEN": spec["token"]}, signed=True, prompt=prompt,
    isolate=spec["isolate"], on_event=events.append, **spec["login"],
)
seen += [repr(tunnel), str(tunnel)]
try:
    with tunnel:
        url = tunnel.url
        session = tunnel.pull_session()
        session.close()
        for path in (url, url.replace("/sliders", "/nothing"), url.partition("=")[0] + "=garbage"):
            try:
                urllib.request.urlopen(path, timeout=20).read()
            except urllib.error.HTTPError as error:
                error.close()
        seen += [repr(tunnel), str(tunnel), tunnel.server_document and "", *map(repr, tunnel.log)]
        try:
            seen.append(repr(pickle.dumps(tunnel)))
        except Exception as error:
            seen.append(repr(error))
        print(json.dumps({"url": url}), flush=True)
        sys.stdin = open(0)
        with open(spec["folder"] + "/go") as go:
            go.read()
        raise RuntimeError("in the body")
except RuntimeError as error:
    seen += traceback.format_exception(error)
try:
    with bokeh_ssh.DirectTunnel(
        spec["host"], spec["user"], app=spec["app"], env={"TOKEN": spec["token"]}, signed=True,
        prompt=lambda question: spec["token"] if question.kind == "interactive" else spec["passphrase"],
        isolate=spec["isolate"], on_event=events.append, **spec["login"],
    ):
        pass
except bokeh_ssh.BokehSSHError as error:
    seen += [*traceback.format_exception(error), repr(error), repr(vars(error)), repr(pickle.dumps(error))]
seen += [repr(event) + repr(pickle.dumps(event)) for event in events]
with open(spec["folder"] + "/seen", "w") as file:
    file.write("\\n".join(seen))
"""


@pytest.mark.parametrize("isolate", [True, False])
def test_secrets_are_nowhere(
    container: Callable[..., Container], key: Key, tmp_path: Path, isolate: bool
) -> None:
    """A passphrase, a second factor, a variable, the signing key and a session's id: in no log at any level,
    no repr, traceback, event, error or pickle, on no command line and in no environment or file of others."""
    machine = container(Knobs(interactive=True, require=("publickey", "keyboard-interactive")))
    private = asyncssh.import_private_key(key.private)
    key_file = tmp_path / "locked"
    key_file.write_bytes(private.export_private_key(passphrase=PASSPHRASE))
    key_file.chmod(0o600)
    os.mkfifo(tmp_path / "go")
    spec = {
        "folder": str(tmp_path), "host": machine.host, "user": machine.user, "isolate": isolate,
        "app": apps.put(machine, "sliders.py", apps.SLIDER), "code": PASSWORD, "passphrase": PASSPHRASE,
        "token": TOKEN,
        "login": {**machine.login, "key_filename": str(key_file), "python": machine.python},
    }  # fmt: skip
    errors = tmp_path / "errors"
    with (
        errors.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
            text=True,
        ) as program,
    ):  # fmt: skip
        try:
            assert program.stdin
            assert program.stdout
            program.stdin.write(json.dumps(spec))
            program.stdin.close()
            line = program.stdout.readline()
            assert line, errors.read_text()
            session = json.loads(line)["url"].partition("bokeh-session-id=")[2]
            assert len(session) > 40
            [server] = [
                pid for pid in machine.pids("sliders.py") if "BOKEH_SECRET_KEY" in environment(machine, pid)
            ]
            signing = dict(
                pair.partition("=")[::2] for pair in environment(machine, server).split("\n")
            )["BOKEH_SECRET_KEY"]  # fmt: skip
            assert TOKEN in environment(machine, server)  # it got there
            secrets = [PASSPHRASE, PASSWORD, TOKEN, signing, session, session.partition(".")[0]]
            found = {
                "command lines here": processes(program.pid, "cmdline"),
                "environments here": processes(program.pid, "environ"),
                "command lines there": machine.execute(["ps", "-ww", "-eo", "args="]).stdout,
                "environments there": machine.execute(
                    f"for p in $(pgrep -u {machine.user}); do cat /proc/$p/environ; done", user="mallory"
                ).stdout,
            }
            for secret in secrets:
                words = ["grep", "-rlF", "--", secret, "/tmp", "/home", "/var/log", "/run"]
                found[f"files there ({secret[:12]})"] = machine.execute(words, timeout=60).stdout
            (tmp_path / "go").write_text("on")
            assert program.wait(60) == 0, errors.read_text()
        finally:
            if program.poll() is None:
                program.kill()
    found |= {name: (tmp_path / name).read_text() for name in ("log", "seen", "errors")}
    found["what sshd logged"] = machine.log
    assert "login" in found["log"] or "auth" in found["log"].lower()  # that which is searched is not empty
    assert "AuthenticationError" in found["seen"]
    assert "in the body" in found["seen"]
    hidden = [text for secret in secrets for text in (secret, repr(secret.encode())[2:-1])]
    lines = [(name, line) for name, text in found.items() for line in text.splitlines()]
    assert [(name, line) for name, line in lines if any(secret in line for secret in hidden)] == []


def environment(machine: Container, pid: int) -> str:
    """Read a process's environment, as its own user can."""
    return machine.execute(f"tr '\\0' '\\n' < /proc/{pid}/environ", user=machine.user).stdout


def processes(parent: int, what: str) -> str:
    """Read a file of /proc of a process and of all that it has started."""
    found, ids = "", [parent]
    while ids:
        pid = ids.pop()
        found += Path(f"/proc/{pid}/{what}").read_bytes().decode(errors="replace").replace("\0", "\n")
        for task in Path(f"/proc/{pid}/task").iterdir():
            ids += map(int, (task / "children").read_text().split())
    return found


@pytest.mark.parametrize("name", ["password", "passphrase", "pkey"])
def test_host_with_a_secret_is_not_pickled(name: str) -> None:
    """A pickle has no secret in it: making one is refused, and names the next step; copies are fine."""
    secret: Any = object() if name == "pkey" else "canary"
    host = Host("example.org", "me", **{name: secret})
    with pytest.raises(TypeError, match=f"Host with a {name} cannot be pickled.*prompt"):
        pickle.dumps(host)
    assert copy.deepcopy(host) == copy.copy(host) == host
    plain = Host("example.org", "me", port=2222, jump=("gate",))
    assert pickle.loads(pickle.dumps(plain)) == plain


def test_control_the_search_finds_what_is_there() -> None:
    """A secret on a command line would be seen."""
    mark = "canary-that-is-there"
    with subprocess.Popen([sys.executable, "-c", "input()", mark], stdin=subprocess.PIPE) as process:
        until(lambda: mark in processes(process.pid, "cmdline"))
        process.communicate(b"\n", timeout=20)
