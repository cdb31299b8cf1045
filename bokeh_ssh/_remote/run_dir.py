"""The private directory where the servers of an account are found again, on the machine that they run on.

::

    /tmp/bokeh-ssh-UID/     ours, 0700; ~/.bokeh-ssh-NODE where that is not possible
        1f2e3d4c/           one server
            control         the supervisor's socket
            record          what is known of it, as JSON
            server          the server's own socket, where it has one
            packed          leads there too; what comes back is packed, for a slow line
            apps            what its client has brought

Who may enter the directory may do with the servers what their owner may; nobody else can even see them. Not
XDG_RUNTIME_DIR, which goes away with the last login; nor TMPDIR, which may differ from one login to the next.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

CONTROL = "control"
RECORD = "record"
SERVER = "server"
PACKED = "packed"
APPS = "apps"
#: Says to what a server starts, in its environment, which one that was; the supervisors of others among it.
WITHIN = "BOKEH_SSH_WITHIN"
#: And which process that is, as :func:`identity` has it.
HOLDER = "BOKEH_SSH_SUPERVISOR"
#: Names it as the only place where it is set; for machines where neither /tmp nor the home will do.
SETTING = "BOKEH_SSH_DIR"
LONGEST = 100  # bytes of a socket's path: 103 on macOS, 107 on Linux
TOUCH = 1200.0  # seconds; what cleans /tmp by age leaves what is younger than some days
KEEP = 86400.0  # seconds that a record says how a server ended when nobody was there

_ID = re.compile(r"[0-9a-f]{8}")


def node() -> str:
    """Return the machine's name; a home may be shared by many."""
    return os.uname().nodename


def candidates() -> list[str]:
    """List the directories that may be used, the preferred one first; there is no link on the way to one."""
    given = os.environ.get(SETTING)
    if given:
        return [_straight(given)]
    name = re.sub(r"[^\w.-]", "_", node())[:32]
    home = os.path.expanduser("~")
    shared = f"/tmp/bokeh-ssh-{os.getuid()}"  # noqa: S108 - what is found there is looked at: see usable()
    return [_straight(shared)] + ([_straight(f"{home}/.bokeh-ssh-{name}")] if home[:1] == "/" else [])


def _straight(path: str) -> str:
    """Follow the links on the way to a path once, so that nobody's link counts later."""
    folder, name = os.path.split(path.rstrip("/"))
    return os.path.join(os.path.realpath(folder), name) if path[:1] == "/" and name else path


def replaceable(folder: str) -> str:
    """Say who else could put another directory in the place of one in ``folder``; empty if nobody could.

    All that is above counts, as for OpenSSH's StrictModes: who may rename one of those has what is below.

    :raises OSError: if it cannot be looked at
    """
    # Whoever owns the root has it all; in a user namespace that need not be the number 0.
    owners = (0, os.geteuid(), os.stat("/").st_uid)
    while True:
        found = os.lstat(folder)
        if found.st_uid not in owners:
            return f"can be replaced by user {found.st_uid}, who owns {folder}"
        if found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
            return f"can be replaced by other users, who may write to {folder}"
        if folder in ("/", "//"):
            return ""
        folder = os.path.dirname(folder)


@contextlib.contextmanager
def private() -> Iterator[None]:
    """Make what is made in the block readable for us, and for us alone, whatever the umask is."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def unsafe(path: str) -> str:
    """Say why a directory may not be trusted; empty where it is ours alone."""
    if path[:1] != "/" or path == "/":
        return "is no absolute path"
    try:
        found = os.lstat(path)
        above = replaceable(os.path.dirname(path))
    except OSError as exc:
        return exc.strerror or "cannot be looked at"
    if not stat.S_ISDIR(found.st_mode):
        return "is no directory"
    if found.st_uid != os.geteuid():
        return "belongs to another user"
    if stat.S_IMODE(found.st_mode) & 0o777 != 0o700:
        return f"has mode {stat.S_IMODE(found.st_mode):o}, not 700"
    return above


def usable(path: str) -> str:
    """Say why a directory may not be used; empty where it is ours alone and a socket in it can be named."""
    fault = unsafe(path)
    if fault:
        return fault
    if len(os.fsencode(path)) + 1 + 8 + 1 + len(CONTROL) > LONGEST:
        return "has too long a name for sockets"
    return ""


class RunDir:
    """The directory of one server.

    :ivar fault: why nobody can find the server there any more, as far as it was looked
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.fault = ""
        self.id = os.path.basename(path)
        self.touched = time.monotonic()

    @property
    def mark(self) -> bytes:
        """What stands in the environment of all that its server has started."""
        return f"{WITHIN}={self.id}".encode()

    def at(self, name: str) -> str:
        """Return the path of a file in it."""
        return os.path.join(self.path, name)

    def write(self, record: dict[str, Any]) -> None:
        """Write the record; whoever reads meanwhile gets the old one or the new one, whole.

        Nothing is written where another user's directory is by now, or to where a link of theirs leads.
        """
        with contextlib.suppress(OSError), private():  # a full disk must not take the server away
            folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(folder).st_uid != os.geteuid():
                    return
                new, how = RECORD + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
                with os.fdopen(os.open(new, how, 0o600, dir_fd=folder), "w", encoding="ascii") as file:
                    json.dump(record, file)
                os.replace(new, RECORD, src_dir_fd=folder, dst_dir_fd=folder)
            finally:
                os.close(folder)

    def read(self) -> dict[str, Any]:
        """Read the record; empty where there is none that can be read."""
        try:
            with open(self.at(RECORD), encoding="ascii") as file:
                record = json.load(file)
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    def touch(self) -> None:
        """Touch it every now and then, so that it looks used."""
        if time.monotonic() - self.touched > TOUCH:
            self.touched = time.monotonic()
            for path in (self.path, *map(self.at, (CONTROL, RECORD, SERVER, PACKED))):
                with contextlib.suppress(OSError):
                    os.utime(path)

    def exists(self) -> bool:
        """Return whether it is there: a server that ends takes it along, and anybody may have removed it."""
        return os.path.isdir(self.path)

    def age(self) -> float:
        """Return how many seconds ago it was touched, or something in it made or removed; 0 without it."""
        try:
            return time.time() - os.lstat(self.path).st_mtime
        except OSError:
            return 0.0

    def clear(self) -> None:
        """Remove all but the record."""
        names: set[str] = set()
        with contextlib.suppress(OSError):
            names.update(os.listdir(self.path))
        for name in names - {RECORD}:
            remove_tree(self.at(name))

    def remove(self) -> None:
        """Remove it, and the directory above if no other is in it."""
        self.clear()
        with contextlib.suppress(OSError):
            os.unlink(self.at(RECORD))
        with contextlib.suppress(OSError):
            os.rmdir(self.path)
        with contextlib.suppress(OSError):
            os.rmdir(os.path.dirname(self.path))


def make_run_dir(fill: Any) -> tuple[RunDir | None, Any, str]:
    """Make a place; nobody sees it before ``fill``, which is given its path, has made what belongs in it.

    :returns: the place and what ``fill`` gave; or None, None and why there is none
    """
    why = []
    for root in candidates():
        for _ in range(3):  # who removes the last place removes the directory above too
            fault = found(root)
            if fault:
                continue
            hidden = os.path.join(root, "." + os.urandom(4).hex())
            shown = os.path.join(root, os.urandom(4).hex())
            try:
                with private():
                    os.mkdir(hidden, 0o700)
                    _try_room(hidden)
                    filled = fill(hidden)
                os.rename(hidden, shown)
            except OSError as exc:
                fault = exc.strerror or "cannot be used"
                RunDir(hidden).remove()
                continue
            return RunDir(shown), filled, ""
        why.append(f"{root} {fault}")
    return None, None, ", ".join(why)


def _try_room(path: str) -> None:
    """Make all that a server will have there, and remove it: there may be room for a part only.

    :raises OSError: if it cannot be made
    """
    names = [os.path.join(path, name) for name in (CONTROL, SERVER, RECORD, RECORD + ".new")]
    for name in names:
        os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    for name in names:
        os.unlink(name)


def found(root: str) -> str:
    """Make a directory where there is none; return why it may not be used, and then leave none behind."""
    made, why = False, ""
    try:
        with private():
            os.mkdir(root, 0o700)
        made = True
    except OSError as exc:
        why = exc.strerror or ""
    fault = usable(root)
    if fault and not os.path.lexists(root):
        return why or fault
    if fault and made:
        with contextlib.suppress(OSError):
            os.rmdir(root)
    return fault


def repair_run_dir(run_dir: RunDir) -> str:
    """Make what was removed of a place, or opened to others, as it was; says why that is not possible.

    :raises OSError: if it is not possible for another reason
    """
    root = os.path.dirname(run_dir.path)
    fault = replaceable(os.path.dirname(root))
    for path in (root, run_dir.path) if not fault else ():
        with contextlib.suppress(FileExistsError), private():
            os.mkdir(path, 0o700)
        found = os.lstat(path)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            return f"{os.path.basename(path)} was replaced there"
        if found.st_mode & 0o777 != 0o700:
            os.chmod(path, 0o700)
    return fault or usable(root)


def identity(pid: int) -> str:
    """Return what distinguishes a process from others of the same number; empty where it has ended.

    Always empty where the system does not say it (/proc).
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()  # the name before may hold anything
        return "" if fields[0] in (b"Z", b"X") else f"{pid}:{int(fields[19])}"
    except (OSError, ValueError, IndexError):
        return ""


def remove_tree(path: str) -> None:
    """Remove a file, or a folder with all that is in it, also what nobody may enter or write to; quietly."""
    if not os.path.isdir(path) or os.path.islink(path):
        with contextlib.suppress(OSError):
            os.unlink(path)
        return
    import shutil  # as long as the rest of a launch's imports

    shutil.rmtree(path, ignore_errors=True)
    if os.path.isdir(path):
        with contextlib.suppress(OSError):
            os.chmod(path, 0o700)
        for folder, names, _ in os.walk(path):
            for name in names:
                if not os.path.islink(os.path.join(folder, name)):
                    with contextlib.suppress(OSError):
                        os.chmod(os.path.join(folder, name), 0o700)
        shutil.rmtree(path, ignore_errors=True)


def list_run_dirs() -> Iterator[RunDir]:
    """List the places of this account, those left by a supervisor that was killed too."""
    for root in candidates():
        if usable(root):
            continue
        names: list[str] = []
        with contextlib.suppress(OSError):  # it is removed with the last that is in it
            names = sorted(os.listdir(root))
        for name in names:
            run_dir = RunDir(os.path.join(root, name))
            if _ID.fullmatch(name):
                yield run_dir
            elif name[:1] == "." and run_dir.age() > 3600:  # killed while it was made
                run_dir.remove()
