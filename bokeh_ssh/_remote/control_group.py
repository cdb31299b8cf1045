"""What the system does to all processes of a control group: ends them with a login, kills them for memory.

systemd knows what belongs to a login by its control group, which no process gets out of by itself. Schedulers
limit the memory of a job by it.
"""

from __future__ import annotations

import contextlib
import glob
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_FOLDERS = ("etc", "run", "usr/local/lib", "usr/lib", "lib")
#: Bytes that no machine has: what version 1 writes in place of no limit.
_NO_LIMIT = 1 << 60
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
    with contextlib.suppress(ValueError):
        for row in _rows(root, "proc/self/cgroup"):
            _, kind, path = row.split(":", 2)
            if kind in ("", "name=systemd"):
                units = [part for part in path.split("/") if part.endswith((".scope", ".service"))]
                if units:
                    return units[-1]
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


class MemoryGroup:
    """The control group that this process's memory counts in, of version 1 or 2.

    :param root: where ``proc`` is, and what mount points are below
    """

    def __init__(self, root: str = "/") -> None:
        self._mount = self._path = ""
        self._names = ("", "")
        with contextlib.suppress(OSError, ValueError, IndexError):
            self._find(root)

    def _find(self, root: str) -> None:
        paths = {}
        for row in _rows(root, "proc/self/cgroup"):
            _, kinds, path = row.split(":", 2)
            paths.update(dict.fromkeys(kinds.split(","), path))
        version = 1 if "memory" in paths else 2
        path = paths["memory"] if version == 1 else paths.get("", "")
        for row in _rows(root, "proc/self/mountinfo"):
            fields, _, rest = row.partition(" - ")
            top, mount = fields.split()[3:5]
            kind, _, options = rest.split(" ", 2)
            wanted = "memory" in options.split(",") if version == 1 else kind == "cgroup2"
            if not wanted or kind not in ("cgroup", "cgroup2"):
                continue
            # Where only a part is mounted, or in a namespace of its own, the path may begin elsewhere.
            below = path[len(top) :] if top != "/" and (path + "/").startswith(top + "/") else path
            found = os.path.join(root, mount.lstrip("/")), below.strip("/")
            if os.path.isdir(os.path.join(*found)):  # the last one mounted there counts
                self._mount, self._path = found
        self._names = (
            ("memory.oom_control", "memory.limit_in_bytes")
            if version == 1
            else ("memory.events", "memory.max")
        )

    def kills(self) -> int:
        """Return how many of its processes were killed for memory; 0 where that is not known."""
        if not self._mount:
            return 0
        for row in _rows(os.path.join(self._mount, self._path), self._names[0]):
            name, _, value = row.partition(" ")
            if name == "oom_kill" and value.isdigit():
                return int(value)
        return 0

    def limit(self) -> int:
        """Return the least memory that it and those above may use, in bytes; 0 where nothing limits it."""
        limits = []
        path = self._path
        while self._mount:
            rows = _rows(os.path.join(self._mount, path), self._names[1])
            # Version 1 writes the largest number of pages where there is none.
            limits += [int(row) for row in rows if row.isdigit() and int(row) < _NO_LIMIT]
            if not path:
                break
            path = os.path.dirname(path)
        return min(limits, default=0)


def _rows(folder: str, name: str) -> list[str]:
    try:
        with open(os.path.join(folder, name), encoding="utf-8", errors="replace") as file:
            return file.read().splitlines()
    except OSError:
        return []
