"""Folders for what this account keeps on this machine; one that others could write into is not used."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from pathlib import Path

from bokeh_ssh._core.this_machine.home import find_home


class FolderError(Exception):
    """There is no folder that may be used; its text says why."""


def find_folder(name: str) -> Path:
    """Return where a folder of the cache belongs, whether it is there or not.

    :param name: its last part
    :raises FolderError: if the account has no home
    """
    if sys.platform == "win32":
        top = os.environ.get("LOCALAPPDATA", "")
        parts: tuple[str, ...] = ("bokeh-ssh", "Cache", name)
        home_parts: tuple[str, ...] = ("AppData", "Local")
    else:
        top = os.environ.get("XDG_CACHE_HOME", "")
        parts = ("bokeh-ssh", name)
        home_parts = ("Library", "Caches") if sys.platform == "darwin" else (".cache",)
    if not Path(top).is_absolute():  # the specification has one that is not ignored
        home = find_home()
        if home is None:
            msg = "this account has no home directory"
            raise FolderError(msg)
        top = str(Path(home, *home_parts))
    return Path(top, *parts)


def open_folder(name: str, *, make: bool = False) -> Path:
    """Return a folder of the cache, which nobody else can put files into.

    :param name: its last part
    :param make: whether it is made where it is missing
    :raises OSError: if it is not there, or cannot be made
    :raises FolderError: if it is not the account's own
    """
    folder = find_folder(name)
    if make:
        make_folder(folder)
    else:
        check_folder(folder)
    return folder


def check_folder(folder: Path) -> None:
    """Check that nobody else can put files into a folder.

    :raises OSError: if it is not there
    :raises FolderError: if somebody can
    """
    for path in (folder.parent, folder):
        status = os.lstat(path)
        if not stat.S_ISDIR(status.st_mode):
            msg = f"{path} is a link, or no folder"
            raise FolderError(msg)
        if not hasattr(os, "geteuid"):  # Windows
            continue
        if status.st_uid != os.geteuid():
            msg = f"{path} belongs to another user"
            raise FolderError(msg)
        if status.st_mode & (0o077 if path == folder else 0o022):
            path.chmod(0o700)


def make_folder(folder: Path) -> None:
    """Make a folder where it is missing.

    :raises OSError: if that does not work
    :raises FolderError: if it would not be the account's own
    """
    top = folder.parent.parent
    if hasattr(os, "geteuid"):
        there = next(each for each in (top, *top.parents) if each.exists())
        status = there.stat()
        # Root with the HOME of another user would leave folders that the user cannot write into.
        if status.st_uid != os.geteuid() and not status.st_mode & stat.S_ISVTX:
            msg = f"{there} belongs to another user"
            raise FolderError(msg)
    top.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in (folder.parent, folder):
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
    check_folder(folder)
