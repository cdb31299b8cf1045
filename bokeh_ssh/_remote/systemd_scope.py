"""Whether the system ends all that a login has started, whichever process and session it is, with that login.

systemd knows what belongs to a login by its control group, which no process gets out of by itself.
"""

from __future__ import annotations

import glob
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_FOLDERS = ("etc", "run", "usr/local/lib", "usr/lib", "lib")
_YES = ("1", "yes", "y", "true", "t", "on")


def doom(root: str = "/") -> str:
    """Say what ends all of this login's processes with it; empty where nothing is known to.

    :param root: where ``proc``, ``etc`` and the others are
    """
    unit = _unit(root)
    if unit.startswith("session-") and unit.endswith(".scope"):
        setting = _logind_kills(root)
        return f"{setting} of systemd-logind" if setting else ""
    # One for each connection ends with that.
    if unit.endswith(".service") and "@" in unit and not unit.startswith("user@"):
        mode = _kill_mode(unit)
        return f"KillMode={mode} of {unit}" if mode in ("control-group", "mixed") else ""
    return ""


def _unit(root: str) -> str:
    """Return the unit of systemd's that we belong to; empty where it does not run."""
    try:
        with open(os.path.join(root, "proc/self/cgroup"), encoding="utf-8", errors="replace") as rows:
            for row in rows:
                _, kind, path = row.rstrip("\n").split(":", 2)
                if kind in ("", "name=systemd"):
                    units = [part for part in path.split("/") if part.endswith((".scope", ".service"))]
                    if units:
                        return units[-1]
    except (OSError, ValueError):
        pass
    return ""


def _logind_kills(root: str) -> str:
    """Return the setting by which logind ends what this account's session has left; empty if it does not.

    As it decides, which is not quite what logind.conf(5) says: root is spared where no list spares anybody,
    and a list of those who are not spared counts whatever KillUserProcesses says.
    """
    kills = False
    only: list[str] = []
    spared: list[str] = []
    for name, value in _settings(root):
        words = value.split()
        if name == "KillUserProcesses":
            kills = value.lower() in _YES
        elif name == "KillOnlyUsers":
            only = only + words if words else []
        elif name == "KillExcludeUsers":
            spared = spared + words if words else []
    if not kills and not only:
        return ""
    import pwd  # as long as nobody asks, a launch does not pay for it

    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        user = ""
    if user in (spared or ["root"]) or (only and user not in only):
        return ""
    return "KillOnlyUsers" if only else "KillUserProcesses=yes"


def _settings(root: str) -> Iterator[tuple[str, str]]:
    """Read logind's settings, those that count more later; what is commented out there is built in."""
    main = [os.path.join(root, folder, "systemd/logind.conf") for folder in _FOLDERS]
    parts: dict[str, str] = {}
    for folder in reversed(_FOLDERS):
        for path in glob.glob(os.path.join(root, folder, "systemd/logind.conf.d/*.conf")):
            parts[os.path.basename(path)] = path
    first = [path for path in main if os.path.exists(path)][:1]
    for path in first + [parts[name] for name in sorted(parts)]:
        try:
            with open(path, encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    words, equals, value = line.partition("=")
                    name = words.strip().lstrip("#").strip()
                    if equals and ("#" not in words or name == "KillUserProcesses"):
                        yield name, value.strip()
        except OSError:
            continue


def _kill_mode(unit: str) -> str:
    """Ask systemd what it ends of a unit."""
    import subprocess  # as long as the rest of a launch's imports

    words = ["systemctl", "show", "--property=KillMode", "--value", unit]
    try:
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=2)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("utf-8", "replace").strip()
