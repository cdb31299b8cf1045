"""Which files of a folder git would not look at: ``.gitignore``, as git reads it.

The patterns are pathspec's, which is what black and mypy leave them to; which file's count where is here. The
person's own ``core.excludesFile`` is not read: what is brought must not depend on whose machine it is.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bokeh_ssh._core.file_reader import NotAFileError, Reading

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

#: What pathspec makes of ``*``, and of ``**`` in the middle and at the beginning.
_STAR = "[^/]*"
_FOLDERS = "(?:/.+)?"
_TOP = "^(?:.+/)?"

#: Never an app's, with or without git.
_NEVER = frozenset(
    {".git", ".hg", ".svn", "__pycache__", ".ipynb_checkpoints", ".DS_Store", ".mypy_cache", ".ruff_cache"}
)

_CHUNK = 64 << 10
_PATH_MAX = 4096  # characters


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
        """Return whether to leave this out; nothing in a folder that is left out is asked about."""
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
            facts = file.stat()
            reading = Reading(file, file, facts.st_size, facts.st_mtime_ns)
        except (FileNotFoundError, NotADirectoryError, NotAFileError):
            return
        with contextlib.closing(reading):
            text = b"".join(data for _, data in reading.pieces(_CHUNK)).decode("utf-8", "surrogateescape")
        self._rules.append((folder, spec(text.splitlines())))


def spec(lines: Iterable[str]) -> GitIgnoreSpec:
    """Read patterns, without those that no name fits: git passes over them, and pathspec raises.

    A line longer than any path is ignored too: pathspec takes time with the square of its brackets.
    """
    from pathspec import GitIgnoreSpec  # most tunnels bring nothing

    patterns: list[Any] = []
    for line in lines:
        if len(line) > _PATH_MAX:
            continue
        with contextlib.suppress(ValueError, re.error):
            patterns += GitIgnoreSpec.from_lines([line]).patterns
    for pattern in patterns:
        if pattern.regex:
            pattern.regex = re.compile(_linear(pattern.regex.pattern))
    return GitIgnoreSpec(patterns)


def _linear(regex: str) -> str:
    """Make a regular expression of pathspec's try each place once for what follows a ``*`` or ``**``.

    Where it fits first leaves most to what comes after it, so nothing is lost if that place stays; otherwise
    each further star multiplies the time by the length of the name.
    """
    number = itertools.count()

    def first(text: str) -> str:  # an atomic group, for Pythons before 3.11
        name = f"first{next(number)}"
        return f"(?=(?P<{name}>{text}))(?P={name})"

    def stars(text: str) -> str:
        front, star, rest = text.partition(_STAR)
        *middle, last = rest.split(_STAR)
        return front + "".join(first(f"{_STAR}?{part}") for part in middle) + star + last

    top, *folders = map(stars, regex.split(_FOLDERS))
    if not folders:
        return top
    if top.startswith(_TOP):
        top = "^" + first(f"(?:.+?/)??{top.removeprefix(_TOP)}(?=/)")
    *between, last = folders
    return top + "".join(first(f"(?:/.+?)??{part}(?=/)") for part in between) + _FOLDERS + last


def _above(top: Path) -> Iterator[Path]:
    """List the folders above, from that of the repository down; none outside of one."""
    if (top / ".git").exists():
        return
    for number, folder in enumerate(top.parents):
        if (folder / ".git").exists():
            yield from reversed(top.parents[: number + 1])
            return
