"""What ``--dry-run`` prints: the commands of ``ssh`` that do what a command of ours would do. Text only.

They are near to it, and no more: what ``ssh`` cannot do is in a comment. No value of a variable is shown.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from bokeh_ssh._server.launch_spec import is_packaged, is_plain, place_texts, split

_PORT = 5006
_SOCKET = "SOCKET"


def ssh_words(target: str, keywords: Mapping[str, Any], *more: str, program: str = "ssh") -> str:
    """Write a command of ``ssh`` that logs in as these keywords do.

    >>> ssh_words("me@host", {"port": 22, "jump": ("a", "b"), "ssh_config": None}, "-N")
    'ssh -F none -p 22 -J a,b -N me@host'
    """
    words = [program]
    if "ssh_config" in keywords:
        words += ["-F", str(keywords["ssh_config"] or "none")]
    if keywords.get("port"):
        words += ["-P" if program == "scp" else "-p", str(keywords["port"])]
    if keywords.get("user"):
        words += ["-o", f"User={keywords['user']}"] if program == "scp" else ["-l", keywords["user"]]
    for key in keywords.get("key_filename") or ():
        words += ["-i", str(key)]
    jump = keywords.get("jump")
    if jump is not None:
        words += ["-J", ",".join(map(str, jump)) or "none"]
    if keywords.get("compression"):
        words.append("-C")
    options = {
        "UserKnownHostsFile": keywords.get("known_hosts"),
        "StrictHostKeyChecking": {"strict": "yes", "accept-new": "accept-new"}.get(
            str(keywords.get("host_keys"))
        ),
        "ConnectTimeout": keywords.get("timeout") and f"{keywords['timeout']:g}",
        "GSSAPIAuthentication": _yes_or_no(keywords.get("gss_auth")),
        "GSSAPIDelegateCredentials": _yes_or_no(keywords.get("gss_deleg_creds")),
    }
    for name, value in options.items():
        words += ["-o", f"{name}={value}"] if value else []
    return shlex.join([*words, *more, target])


def _yes_or_no(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "no"


def plan(command: str, target: str, keywords: Mapping[str, Any]) -> list[str]:
    """List what would be done, as commands and comments.

    :param command: ``"direct"``, ``"attach"``, ``"gateway"``, ``"publish"`` or ``"forward"``
    :param target: the machine that is logged in to first
    :param keywords: those of the class, and ``app``
    """
    makes = {"direct": _direct, "attach": _attach, "gateway": _gateway, "publish": _publish}
    return makes.get(command, _forward)(target, keywords)


def _server(keywords: Mapping[str, Any], port: int) -> str:
    """Write the shell line that starts the server."""
    command, environment = split(keywords.get("command", "bokeh serve")), dict(keywords.get("env") or {})
    words = [shlex.quote(_fill(word, port)) for word in command]
    if keywords.get("python") and is_packaged(command):
        words[:0] = [_quote(str(keywords["python"])), "-m"]
    apps = [str(app) for app in keywords.get("app") or ()]
    if keywords.get("upload") or keywords.get("bring"):
        apps = [app.rstrip("/").rpartition("/")[2] for app in apps]
    plain = is_plain(place_texts(command, environment))
    own = [] if plain else ["--port", str(port)]
    here = keywords.get("local_port") or _PORT
    if not plain and here != port:
        own += ["--allow-websocket-origin", f"localhost:{here}"]
    line = " ".join(
        [*words, *map(_quote, apps), shlex.join([*own, *map(str, keywords.get("args") or ())])]
    ).rstrip()
    names = "".join(
        f"{name}={_fill(value, port) if value in ('{port}', '{socket}') else '...'} "
        for name, value in environment.items()
    )
    steps = list(keywords.get("setup") or ())
    if keywords.get("cwd"):
        steps.append(f"cd {_quote(str(keywords['cwd']))}")
    return " && ".join([*map(str, steps), names + line])


def _fill(word: str, port: int) -> str:
    return word.replace("{port}", str(port)).replace("{socket}", _SOCKET)


def _quote(word: str) -> str:
    """Quote a word for the shell there, which is to find the home that it begins with."""
    home, slash, rest = word.partition("/") if word.startswith("~") else ("", "", word)
    return home + slash + (shlex.quote(rest) if rest else "")


def _end(keywords: Mapping[str, Any], port: int) -> str:
    """Return where the server listens, for the end of ``-L``."""
    return _SOCKET if "{socket}" in str(keywords.get("command")) else f"localhost:{port}"


def _start(target: str, keywords: Mapping[str, Any], port: int) -> list[str]:
    lines, stays = [], bool(keywords.get("detach"))
    end = "with the server" if stays else "at the end"
    apps = [str(app) for app in keywords.get("app") or ()]
    if keywords.get("upload") or keywords.get("bring"):
        files = [*apps, *map(str, keywords.get("bring") or ())]
        lines.append(f"# upload, without what git ignores, into a private folder that is removed {end}")
        lines.append(ssh_words(f"{target}:", keywords, "-r", *files, program="scp"))
    if keywords.get("batch") or keywords.get("job"):
        lines.append("# in a batch job: with sbatch, and from the login node to the job's machine with srun")
    else:
        how = "left running at the end" if stays else "ended with the tunnel"
        lines.append(f"# started on a private socket there, and {how}; with ssh, on a port:")
    return [*lines, f"{ssh_words(target, keywords)} {shlex.quote(_server(keywords, port))}"]


def _get(target: str, keywords: Mapping[str, Any], port: int) -> list[str]:
    """Write how the server is started, or looked for first; as the options of the tunnels decide that."""
    words, launch = split(keywords.get("command", "bokeh serve")), keywords.get("launch")
    own = len(words) > 2 or not is_packaged(words)
    if keywords.get("app") or launch or (own and launch is None):
        return _start(target, keywords, port)
    if launch is False:
        return [f"# attach to the server on port {port} there; none is started"]
    look = f"# attach to the server on port {port} there; only if none answers, start one:"
    return [look, *(line if line.startswith("#") else f"# {line}" for line in _start(target, keywords, port))]


def _direct(target: str, keywords: Mapping[str, Any]) -> list[str]:
    port = keywords.get("remote_port") or _PORT
    here = keywords.get("local_port") or _PORT
    if keywords.get("server"):
        return _attach(target, keywords)
    lines = _get(target, keywords, port)
    extra = [word for spec in keywords.get("forwards") or () for word in ("-L", str(spec))]
    return [*lines, ssh_words(target, keywords, "-N", "-L", f"{here}:{_end(keywords, port)}", *extra)]


def _attach(target: str, keywords: Mapping[str, Any]) -> list[str]:
    here = keywords.get("local_port") or _PORT
    return [
        f"# bokeh-ssh ls {shlex.quote(target)} shows where your server listens: a port or a private socket",
        ssh_words(target, keywords, "-N", "-L", f"{here}:{_SOCKET}"),
    ]


def _gateway(target: str, keywords: Mapping[str, Any]) -> list[str]:
    port = keywords.get("gateway_port") or _PORT
    here = keywords.get("local_port") or _PORT
    lines = []
    host = keywords.get("host")
    if host:
        login = {**keywords, "jump": (*(keywords.get("jump") or ()), target)}
        lines += _get(str(host), login, keywords.get("remote_port") or _PORT)
        back = f"{port}:localhost:{keywords.get('remote_port') or _PORT}"
        address = str(keywords.get("gateway_address") or target)
        lines.append(f"# on {host}, or through this machine (--reverse relay):")
        lines.append(shlex.join(["ssh", "-N", "-R", back, address]))
    else:
        lines.append("# what was published there: under a name on a private socket, or on a port")
    return [*lines, ssh_words(target, keywords, "-N", "-L", f"{here}:localhost:{port}")]


def _publish(target: str, keywords: Mapping[str, Any]) -> list[str]:
    local = keywords.get("local_port") or _PORT
    there = keywords.get("remote_socket") or keywords.get("remote_port") or _PORT
    lines = [_server(keywords, local) + " &"] if keywords.get("app") else []
    if not keywords.get("remote_port") and not keywords.get("remote_socket"):
        lines.append("# under a name, on a private socket of your account there; as a port:")
    to = keywords.get("local_socket") or f"{keywords.get('local_host') or 'localhost'}:{local}"
    return [*lines, ssh_words(target, keywords, "-N", "-R", f"{there}:{to}")]


def _forward(target: str, keywords: Mapping[str, Any]) -> list[str]:
    for flag in ("-L", "-R"):
        for spec in keywords.get(flag, ()):
            return [ssh_words(target, keywords, "-N", flag, spec)]
    bind = f"{keywords['bind_address']}:" if keywords.get("bind_address") else ""
    port = keywords.get("local_port") or keywords.get("remote_port") or _PORT
    here = keywords.get("local_socket") or f"{bind}{port}"
    to = keywords.get("remote_host") or "localhost"
    there = keywords.get("remote_socket") or f"{to}:{keywords.get('remote_port')}"
    return [ssh_words(target, keywords, "-N", "-L", f"{here}:{there}")]
