"""What ``bokeh-ssh cache`` does: the static files that are kept on this machine."""

from __future__ import annotations

from dataclasses import dataclass

from bokeh_ssh._core.errors import UsageError
from bokeh_ssh._core.this_machine.private_folder import FolderError, find_folder
from bokeh_ssh._forwarding.static_store import StaticStore
from bokeh_ssh._ssh.auth.key_memory import clear_keys


@dataclass(frozen=True)
class Kept:
    """What is kept, or was.

    :ivar folder: where
    :ivar size: of all files together, in bytes
    :ivar cleared: whether they were removed
    """

    folder: str
    files: int
    size: int
    cleared: bool


def examine(*, clear: bool) -> Kept:
    """Count what is kept, and remove it if ``clear``.

    :raises UsageError: if there is no folder for it, or it cannot be cleared
    """
    try:
        store = StaticStore(find_folder("static"))
        usage = store.clear() if clear else store.usage()
        if clear:
            clear_keys()
    except FolderError as exc:
        msg = f"no files are kept on this machine: {exc}"
        raise UsageError(
            msg, hint="set XDG_CACHE_HOME (on Windows LOCALAPPDATA) to a folder of yours"
        ) from exc
    except OSError as exc:
        msg = f"{exc.filename or store.folder} cannot be removed ({exc.strerror or exc})"
        raise UsageError(msg, hint="see to whom it belongs, and remove it yourself") from exc
    return Kept(str(store.folder), usage.files, usage.size, clear)
