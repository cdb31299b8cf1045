"""Which files of a folder git would not look at: ``.gitignore``, as git reads it.

The patterns are pathspec's, which is what black and mypy leave them to; which file's count where is here. The
person's own ``core.excludesFile`` is not read: what is brought must not depend on whose machine it is.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

#: Never an app's, with or without git.
_NEVER = frozenset(
    {".git", ".hg", ".svn", "__pycache__", ".ipynb_checkpoints", ".DS_Store", ".mypy_cache", ".ruff_cache"}
)


class Ignored:
    """Says what is left out below a folder, while that is walked from the top.

    :param top: the folder; it is never left out itself, whatever is said above it
    :raises OSError: if a ``.gitignore`` cannot be read
    """

    def __init__(self, top: Path) -> None:
        self._rules: list[tuple[Path, GitIgnoreSpec]] = []
        above = list(_above(top))
        for folder in above:
            self._read(folder, folder / ".git" / "info" / "exclude")
            self._read(folder, folder / ".gitignore")
        if above and any(self._says(path, True) for path in (top, *top.parents) if above[0] in path.parents):
            self._rules = []  # who names it wants it

    def enter(self, folder: Path) -> None:
        """Take note of a folder's own rules, before anything in it is asked about."""
        self._read(folder, folder / ".gitignore")

    def __call__(self, path: Path, is_folder: bool) -> bool:
        """Whether to leave this out; nothing in a folder that is left out is asked about."""
        return path.name in _NEVER or self._says(path, is_folder)

    def _says(self, path: Path, is_folder: bool) -> bool:
        for folder, spec in reversed(self._rules):  # the closest file counts, and in it the last line
            if folder in path.parents:
                name = path.relative_to(folder).as_posix() + "/" * is_folder
                found = spec.check_file(name).include
                if found is not None:
                    return found
        return False

    def _read(self, folder: Path, file: Path) -> None:
        try:
            if not stat.S_ISREG(file.stat().st_mode):  # a FIFO would be waited for
                return
            text = file.read_text(encoding="utf-8", errors="surrogateescape")
        except (FileNotFoundError, NotADirectoryError):
            return
        from pathspec import GitIgnoreSpec  # most tunnels bring nothing

        self._rules.append((folder, GitIgnoreSpec.from_lines(text.splitlines())))


def _above(top: Path) -> Iterator[Path]:
    """List the folders above, from that of the repository down; none outside of one."""
    if (top / ".git").exists():
        return
    for number, folder in enumerate(top.parents):
        if (folder / ".git").exists():
            yield from reversed(top.parents[: number + 1])
            return
