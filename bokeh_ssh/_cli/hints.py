"""What people type out of habit, and what they meant. Text, and what lies in the current directory."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bokeh_ssh._core.errors import (
    AuthenticationError,
    BokehSSHError,
    ConnectError,
    LaunchError,
    PortInUseError,
    ResolveError,
    ServerNotFoundError,
    ServerTakenError,
    UsageError,
)
from bokeh_ssh._core.settings import setting

if TYPE_CHECKING:
    from bokeh_ssh._cli.options.command import Asked

#: The last line of a traceback about a file that is not there, and about a module.
_NO_FILE = re.compile(r"^FileNotFoundError: .*'(?P<name>[^'\n]+)'\s*$", re.MULTILINE)
_NO_MODULE = re.compile(r"^ModuleNotFoundError: No module named '(?P<name>\w+)", re.MULTILINE)

#: An app that is none: where a server listens that runs already.
_ADDRESS = re.compile(
    r"^(?:https?://[\w.-]*|[\w.-]+(?=:)|(?=[0-9]+$))(?::?(?P<port>[0-9]+))?(?:$|/)", re.ASCII
)
#: What stands after -L of ssh.
_FORWARD = re.compile(r"^(?:[^:@]*:)?[0-9]+:[^:@]+:[0-9]+$", re.ASCII)
#: What was typed as USER:PASSWORD@HOST, which is a user's name for some servers.
_PASSWORD = re.compile(r"login as [^\s:]+:")
_ORDER = "name the machine first, as in: bokeh-ssh HOST app.py"
_AFTER = (
    "all options of the server are written last, after --, as in: bokeh-ssh HOST app.py -- --args --year 2024"
)
#: What other programs begin with, in place of a machine or of an app.
_VERBS = (
    *("bokeh", "panel", "ssh", "autossh", "python", "python3", "jupyter", "streamlit", "voila"),
    *("serve", "run", "open", "connect", "start", "lab", "notebook", "tunnel"),
)
#: Servers other than Bokeh's, and how they are started.
_JUPYTER = "jupyter lab --no-browser --port {port}"
_SERVERS = {
    "jupyter": _JUPYTER,
    "lab": _JUPYTER,
    "notebook": "jupyter notebook --no-browser --port {port}",
    "streamlit": "streamlit run app.py --server.headless=true --server.port={port}",
    "voila": "voila report.ipynb --no-browser --port {port}",
}
#: What other programs call options of ours, or what has no need of one here.
_RETURNS = "Leave it out: a lost connection is made again anyway."
_CONFIG = "Write it into ~/.ssh/config, or into a file that -F names."
_HABITS = {
    "-N": "Leave it out: no command of yours runs there anyway.",
    "-n": "Leave it out: no command of yours runs there anyway.",
    "-T": "Leave it out: no terminal is opened there anyway.",
    "-t": "Leave it out: no terminal is opened there anyway.",
    "-X": "Leave it out: the app's page opens in the browser here.",
    "-Y": "Leave it out: the app's page opens in the browser here.",
    "-o": _CONFIG,
    "-4": f"It is AddressFamily inet. {_CONFIG}",
    "-6": f"It is AddressFamily inet6. {_CONFIG}",
    "-A": "Only bokeh-ssh gateway forwards the agent, where the Bokeh host logs in to the gateway.",
    "-D": "There is no SOCKS proxy here; other ports are forwarded with -L.",
    "-G": "It is --dry-run here.",
    "-M": _RETURNS,
    "-P": "It is -p here.",
    "-R": "It is an option of bokeh-ssh forward; bokeh-ssh publish takes a server to a gateway.",
    "-m": "An app is a path: of a script, a notebook, or a folder with a main.py.",
    "--allow-websocket-origin": "Pages from here are allowed by themselves; others with --extra-origins.",
    "--autoreload": "It is --dev here.",
    "--conda-env": "It is --setup 'conda activate NAME' here.",
    "--host": "The machine is named first, without a flag.",
    "--identity": "It is -i here.",
    "--launch-command": "It is --command here.",
    "--notebook-dir": "It is --cwd here.",
    "--password": "Leave it out: it is asked for on a terminal.",
    "--reload": "It is --dev here.",
    "--watch": "It is --dev here.",
    "--no-browser": "Leave it out: only --show opens a browser.",
    "--no-show": "Leave it out: only --show opens a browser.",
    "--open": "It is --show here.",
    "--reconnect": _RETURNS,
}
#: What other programs call commands of ours, or what has no need of one here.
_COMMANDS = {
    **dict.fromkeys(("list", "ps", "tunnels"), "It is ls here."),
    **dict.fromkeys(("kill", "end", "quit", "disconnect"), "It is stop here."),
    **dict.fromkeys(("check", "diagnose"), "It is doctor here."),
    "logs": "It is an option here, as in: bokeh-ssh HOST app.py --log",
    **dict.fromkeys(("restart", "reconnect"), _RETURNS),
}
#: What asks for help and for the version.
_HELP = {
    **{"help": "--help", "-help": "--help"},
    **{"version": "--version", "-V": "--version", "-version": "--version"},
}
#: What stands before a command for many programs, and has no value.
_SHOWN = ("--json", "-q", "--quiet", "-v", "-vv", "-vvv", "--log", "-f", "--background", "--dry-run")
#: What may stand before a command.
_TOP = ("-h", "--help", "--version", "--install-completion", "--show-completion")


def with_command(
    words: Sequence[str], commands: Collection[str], is_alias: Callable[[str], bool] = lambda word: False
) -> list[str]:
    """Return the words of a command line with ``direct`` in front where they begin with a machine or a flag.

    :param is_alias: whether a word is a machine of the ssh config

    >>> with_command(["me@host", "app.py"], ["direct", "gateway"])
    ['direct', 'me@host', 'app.py']
    >>> with_command(["gatewy", "me@host"], ["direct", "gateway"])
    ['gatewy', 'me@host']
    >>> with_command(["help", "direct"], ["direct", "gateway"])
    ['direct', '--help']
    >>> with_command(["--json", "gateway", "me@host"], ["direct", "gateway"])
    ['gateway', '--json', 'me@host']
    """
    shown = list(itertools.takewhile(_SHOWN.__contains__, words))
    rest = words[len(shown) :]
    if shown and rest and not rest[0].startswith("-"):
        words = [rest[0], *shown, *rest[1:]]
    first = words[0] if words else ""
    if not first or first in commands or first.partition("=")[0] in _TOP:
        return list(words)
    if first in _HELP and all(word in commands for word in words[1:]):
        return [*words[1:], _HELP[first]]
    if explain_command(first) and not is_alias(first):
        return list(words)
    if not first.startswith("-"):
        alone = all(word.startswith("-") for word in words[1:]) and not set("@.:") & set(first)
        near = bool(difflib.get_close_matches(first, commands, n=1, cutoff=0.75))
        if (alone or near) and not is_alias(first):
            return list(words)  # a word that may be meant as a command is no machine
    return ["direct", *words]


def explain_command(name: str) -> str:
    """Return what to do in place of a command that other programs have; empty where that is not known.

    >>> explain_command("kill"), explain_command("box")
    ('It is stop here.', '')
    """
    if name in _VERBS:
        return f"{_ORDER[0].upper()}{_ORDER[1:]}"
    return _COMMANDS.get(name, "")


def explain_option(name: str) -> str:
    """Return what to do in place of an option that other programs have; empty where that is not known.

    >>> explain_option("-P"), explain_option("--keep-alive")
    ('It is -p here.', '')
    """
    return _HABITS.get(name, "")


def nearest(name: str, names: Collection[str]) -> str:
    """Return the name that was probably meant; empty where none is near.

    >>> nearest("uplaod", ["upload", "setup"])
    'upload'
    """
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0.7)), "")


def advise(error: BokehSSHError, asked: Asked, aliases: Collection[str] = ()) -> None:
    """Put a better next step into the error, where what was typed shows what was meant.

    :param asked: what was typed; nothing is opened by a command without a list of apps
    :param aliases: the machines of the ssh config
    """
    if hint := _find_hint(error, asked.apps, asked, aliases):
        error.advise(hint)


def _find_hint(error: BokehSSHError, apps: Sequence[str], asked: Asked, aliases: Collection[str]) -> str:
    typed, host = asked.keywords, error.host or ""
    if isinstance(error, ConnectError) and apps and typed.get("port"):
        own = f"{error.sentences[1]}; and " if error.hint else ""
        return (
            f"{own}{setting('port=')} is the SSH server's; for the app's port, use "
            f"{setting('remote_port=')} there or {setting('local_port=')} here"
        )
    if isinstance(error, PortInUseError) and any(
        f":{error.port}:" in f":{spec}" for spec in typed.get("forwards", ())
    ):
        own = setting("remote_port=")
        return f"leave out -L, which is for other ports: the Bokeh server's is opened anyway, as {own} says"
    if isinstance(error, ResolveError):
        if host in _VERBS or _is_app(host) or any("@" in app or app in aliases for app in apps):
            return _ORDER
        near = difflib.get_close_matches(host, aliases, n=1)
        return f"did you mean {near[0]}, which is in your ssh config?" if near else ""
    if isinstance(error, AuthenticationError) and _PASSWORD.match(error.message):
        return "write no password into the host: it is asked for on a terminal"
    if isinstance(error, LaunchError) and "does not exist" in error.message and not typed.get("upload"):
        missing = next((app for app in apps if error.message.rstrip("'").endswith(Path(app).name)), "")
        return _advise_path(missing, apps, typed) if missing else ""
    if isinstance(error, LaunchError) and "unrecognized arguments" in error.message and typed.get("args"):
        return _AFTER
    if isinstance(error, UsageError) and len(apps) > 1 and repr(apps[-1]) in error.message:
        return _AFTER if typed.get("args") and not Path(apps[-1]).exists() else ""
    if isinstance(error, ServerTakenError) and asked.command == "attach":
        return "if it is open on this machine, bokeh-ssh ls shows where, and bokeh-ssh stop ends that"
    unnamed = isinstance(error, ServerNotFoundError) and "no server named" in error.message
    if unnamed and asked.command != "stop" and not typed.get("job"):
        return f"{error.sentences[1]}; one in a batch job is opened with {setting('job=')}, by name or number"
    return ""


def _advise_path(missing: str, apps: Sequence[str], typed: Mapping[str, Any]) -> str:
    """Return the next step for an app that is not on the other machine; empty where none is better known."""
    if missing in _SERVERS:
        command = setting(f"command={_SERVERS[missing]}")
        return f"{missing} is no app; a server other than Bokeh's is named with {command}"
    if missing in _VERBS:
        other = f"; another server is named with {setting('command=')}, as in 'panel serve'"
        return f"leave out {missing}, the Bokeh server is run anyway{other}"
    if typed.get("args") and missing in apps[1:]:
        return _AFTER
    if found := _ADDRESS.match(missing):
        port = setting(f"remote_port={found['port'] or ''}")
        return f"{missing} is no app; a server that runs there already is opened without one, with {port}"
    for path in (missing, f"{missing}.py"):
        if Path(path).exists():
            return f"{path} is on this machine: upload it with {setting('upload=True')}"
    return ""


def check_order(asked: Asked) -> None:
    """Refuse what stands in the place of the host: an app of this machine, or the value of ssh's -L.

    Some top-level domain is called ``py``.

    :raises UsageError: if it is one
    """
    host = asked.target or ""
    if _is_app(host) and Path(host).is_file():
        msg = f"{host} is a file here, and no machine"
        raise UsageError(msg, hint=_ORDER)
    if _FORWARD.match(host):
        msg = f"{host} is a forward, and no machine"
        raise UsageError(msg, hint=f"write bokeh-ssh forward {next(iter(asked.apps), 'HOST')} -L {host}")


def _is_app(name: str) -> bool:
    return name.endswith((".py", ".ipynb"))


def advise_app(traceback: str, apps: Sequence[str], typed: Mapping[str, Any]) -> str:
    """Return the next step for an app that was uploaded without what it opens or imports; else empty.

    :param traceback: what the app's failure wrote
    """
    found = _find_left_here(traceback, apps) if typed.get("upload") or typed.get("bring") else None
    return f"{found} is on this machine: upload it too, with {setting(f'bring={found}')}" if found else ""


def _find_left_here(traceback: str, apps: Sequence[str]) -> Path | None:
    file, module = _NO_FILE.search(traceback), _NO_MODULE.search(traceback)
    names = [file["name"]] if file else [f"{module['name']}.py", module["name"]] if module else []
    for name in names:
        # There it may be named from the folder that it was not uploaded to.
        parts = [part for part in Path(name).parts if part not in ("/", "..")]
        for path in (Path(*parts[at:]) for at in range(len(parts))):
            for folder in (*(Path(app).parent for app in apps), Path()):
                if (folder / path).exists():
                    return folder / path.parts[0]
    return None
