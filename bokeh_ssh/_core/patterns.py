"""Patterns with ``*``, ``?`` and ``!``, as in ssh configs and known_hosts files (ssh_config(5), PATTERNS)."""

from __future__ import annotations

import string

# ASCII only, as in OpenSSH: str.lower() would make one name of "K" (Kelvin sign) and "k".
_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)


def lower(text: str) -> str:
    """Turn A to Z into a to z, and nothing else."""
    return text.translate(_LOWER)


def matches(text: str, pattern: str) -> bool:
    """Return whether the whole ``text`` fits one pattern: ``*`` is any text, ``?`` any character.

    Takes time proportional to the product of the lengths at worst, whatever the pattern.
    """
    at = in_pattern = 0
    star = -1
    retry = 0
    while at < len(text):
        wanted = pattern[in_pattern] if in_pattern < len(pattern) else ""
        if wanted == "*":
            star, retry = in_pattern, at
            in_pattern += 1
        elif wanted and wanted in ("?", text[at]):
            at += 1
            in_pattern += 1
        elif star >= 0:  # let the last star take one more character
            retry += 1
            at, in_pattern = retry, star + 1
        else:
            return False
    return pattern[in_pattern:].strip("*") == ""


def matches_list(text: str, patterns: str) -> bool:
    """Return whether ``text`` fits a comma-separated list in which ``!`` marks what must not fit."""
    found = False
    for pattern in patterns.split(","):
        if pattern.startswith("!"):
            if matches(text, pattern[1:]):
                return False
        elif matches(text, pattern):
            found = True
    return found


def matches_host(host: str, patterns: str) -> bool:
    """Return whether a host name fits a comma-separated list, upper case or lower."""
    return matches_list(lower(host), lower(patterns))
