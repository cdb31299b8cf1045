"""Text from elsewhere, made fit to be shown in errors and questions."""

from __future__ import annotations

import unicodedata
from pathlib import Path

#: "Cc" moves the cursor and colours the terminal, "Cf" turns the reading direction, "Cs" cannot be printed,
#: "Zl" and "Zp" are line ends that no editor shows as such.
_UNFIT = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def clean(raw: bytes | str, limit: int, *, lines: bool = False, tail: bool = False) -> str:
    """Decode ``raw`` as UTF-8, drop what could act on a terminal, and cut it to ``limit`` characters.

    :param lines: keep line ends and tabs; otherwise any white space becomes one space
    :param tail: keep the end rather than the beginning where it is too long
    """
    # Cut first: a server may send megabytes, and only a little more than `limit` can matter.
    raw = raw[-8 * limit :] if tail else raw[: 8 * limit]
    text = raw.decode("utf-8", "replace") if isinstance(raw, bytes) else raw
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not lines:
        text = " ".join(text.split())
    kept = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in _UNFIT)
    if len(kept) <= limit:
        return kept
    return "…" + kept[-limit:] if tail else kept[:limit] + "…"


def app_name(app: str) -> str:
    """Return what people call an app: the last part of its path, without the ending.

    >>> app_name("apps/dashboard.py")
    'dashboard'
    """
    return Path(app.rstrip("/")).name.removesuffix(".py").removesuffix(".ipynb")


_SPANS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"))


def describe_age(seconds: float) -> str:
    """Say a number of seconds as people do."""
    for span, unit in _SPANS:
        if seconds >= span:
            return f"{seconds / span:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def describe_bytes(count: float) -> str:
    """Say a number of bytes as people do."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
