"""What is brought to another machine: files and folders of this one, looked at again each time."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bokeh_ssh._core.errors import UploadError, UsageError
from bokeh_ssh._core.file_reader import Reading
from bokeh_ssh._core.settings import setting
from bokeh_ssh._core.this_machine.home import expand
from bokeh_ssh._server.gitignore import Ignored


@dataclass(frozen=True)
class Item:
    """A file, or a link to another one in the bundle.

    :ivar name: its name there, with slashes
    :ivar path: where it is here
    :ivar size: bytes
    :ivar runs: whether its owner may execute it
    :ivar changed: when it was last written, in nanoseconds
    :ivar link: the name there that it leads to; empty for a file
    :ivar top: what was named, here, and has it
    """

    name: str
    path: Path
    size: int = 0
    runs: bool = False
    changed: int = 0
    link: str = ""
    top: Path | None = None

    def open(self) -> Reading:
        """Open the file, as far as it was looked at.

        :raises NotAFileError: if it is no file any more
        :raises OSError: if it cannot be opened
        """
        return Reading(self.path, self.top or self.path, self.size, self.changed)


@dataclass
class Contents:
    """What was found: the items by name, and what was left out and why."""

    items: dict[str, Item] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(item.size for item in self.items.values())


class Bundle:
    """Apps, and what they need, that lie side by side there under their last names.

    What git would ignore stays here, and so do version control's own folders. A link to something in the
    same folder is brought as a link; one that leads elsewhere, and what is no file, is left out.

    :param apps: paths here; relative ones count from the current directory, now
    :param more: likewise, for what else is brought
    :raises UsageError: if something is not there, or two have the same last name
    """

    def __init__(self, apps: Sequence[str], more: Sequence[str] = ()) -> None:
        self.roots = [*(_found(path, "upload") for path in apps), *(_found(path, "bring") for path in more)]
        self.names = tuple(root.name for root in self.roots[: len(apps)])
        for number, root in enumerate(self.roots):
            for other in self.roots[:number]:
                if root.name == other.name:
                    msg = f"{other} and {root} would both be {root.name!r} there"
                    raise UsageError(msg, hint="rename one, or bring the folder that both are in")

    def scan(self) -> Contents:
        """Look at what is there now.

        :raises UploadError: if something cannot be read
        """
        found = Contents()
        try:
            for root in self.roots:
                if root.is_dir():
                    _walk(root, root, Ignored(root), found)
                else:
                    _add(root, root, root.stat(), found)
        except OSError as exc:
            msg = f"{exc.filename} cannot be read ({exc.strerror})"
            raise UploadError(msg, hint="name the files that the app needs, or have them ignored") from exc
        return found


def _found(path: str, name: str) -> Path:
    try:
        # Not resolved: a link keeps the name it was given.
        root = Path(os.path.abspath(expand(path)))  # noqa: PTH100
    except OSError as exc:
        msg = f"{path!r} cannot be looked for: the current directory cannot be looked at ({exc.strerror})"
        raise UsageError(msg, hint="go to another one, or give the whole path") from exc
    if not root.exists():
        msg = f"there is no {path!r} on this machine to upload"
        raise UsageError(msg, hint=f"give a path of this machine, or leave out {setting(name)}")
    if not root.is_dir() and not root.is_file():
        msg = f"{path!r} is neither a file nor a folder"
        raise UsageError(msg, hint="only those can be uploaded")
    return root


def _walk(root: Path, folder: Path, ignored: Ignored, found: Contents) -> None:
    ignored.enter(folder)
    for path in _sorted(root, folder):
        try:
            facts = path.lstat()
        except FileNotFoundError:  # it has gone since the folder was read
            continue
        if ignored(path, stat.S_ISDIR(facts.st_mode)):
            continue
        if stat.S_ISDIR(facts.st_mode):
            _walk(root, path, ignored, found)
        else:
            _add(root, path, facts, found)


def _sorted(root: Path, folder: Path) -> Iterator[Path]:
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries)
    except (FileNotFoundError, NotADirectoryError):
        if folder == root:
            raise
        names = []  # it has gone since the one above was read
    return (folder / name for name in names)


def _add(root: Path, path: Path, facts: os.stat_result, found: Contents) -> None:
    name = path.relative_to(root.parent).as_posix()
    if stat.S_ISLNK(facts.st_mode):
        to = _inside(root, path)
        if to is None:
            found.left_out.append(f"{name} (a link that leads elsewhere)")
        else:
            found.items[name] = Item(name, path, link=to)
    elif stat.S_ISREG(facts.st_mode):
        runs = bool(facts.st_mode & stat.S_IXUSR)
        found.items[name] = Item(name, path, facts.st_size, runs, facts.st_mtime_ns, top=root)
    else:
        found.left_out.append(f"{name} (no file)")


def _inside(root: Path, link: Path) -> str | None:
    """Return the name there of what a link leads to; None if that is not brought."""
    try:
        real, top = link.resolve(strict=True), root.resolve(strict=True)
    except (OSError, RuntimeError):  # to nothing, or in a circle
        return None
    if top not in real.parents:
        return None
    return f"{root.name}/{real.relative_to(top).as_posix()}"
