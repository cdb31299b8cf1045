"""The home directory of this account, also where ``HOME`` is empty or missing."""

from __future__ import annotations

import os
from pathlib import Path


def expand_home(path: str) -> str:
    """Put the home directory for a leading ``~`` or ``~user``, which stays where none is known.

    ``$HOME`` counts if it is an absolute path, else the account database, which is all that ssh asks.
    """
    mine = path == "~" or path.startswith("~/")
    if os.name == "posix" and mine and not os.environ.get("HOME", "").startswith("/"):
        import pwd

        try:
            home = pwd.getpwuid(os.getuid()).pw_dir
        except KeyError:  # an account without an entry, as in some containers
            return path
        return home.rstrip("/") + path[1:] or "/"
    return os.path.expanduser(path)  # noqa: PTH111 - Path.expanduser() fails where there is none


def expand(path: str) -> Path:
    """Put it for ``~`` likewise, in a path to be used here."""
    return Path(expand_home(path))


def find_home() -> Path | None:
    """Return it; None where there is none."""
    home = Path(expand_home("~"))
    return home if home.is_absolute() else None
