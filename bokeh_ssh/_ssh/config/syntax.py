"""The words of an ssh config: lines, quotes, times, flags, tokens and criteria. No files."""

from __future__ import annotations

import getopt
import os
import re
import shlex
import socket
from collections import deque
from collections.abc import Mapping

from bokeh_ssh._core.patterns import lower

_SPACE = " \t\r\n"
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_TIME = re.compile(r"(\d+)([smhdw]?)", re.IGNORECASE)
_SUBSTITUTE = re.compile(r"%(.?)|\$\{([^}]*)(\}?)", re.DOTALL)


def split_keyword(line: str) -> tuple[str, str] | None:
    """Split a line into its keyword, in lower case, and the rest; None where it is empty or a comment.

    ``Keyword value``, ``Keyword=value``, ``Keyword = value`` and ``"Keyword" value`` are the same.
    """
    line = line.partition("\0")[0].rstrip(_SPACE + "\f").lstrip(_SPACE)
    if not line or line.startswith("#"):
        return None
    found = re.match(r'"([^"]*)"|([^ \t\r\n"=]+)', line)
    if not found:
        return line.lower(), ""
    rest = line[found.end() :].lstrip(_SPACE)
    return (found[1] or found[2] or "").lower(), rest.removeprefix("=").lstrip(_SPACE)


def split_words(text: str) -> list[str]:
    r"""Split at blanks, up to a word that begins with ``#``; ``"a b"``, ``'a b'`` and ``a\ b`` are one word.

    :raises ValueError: if a quote is not closed
    """
    words: list[str] = []
    i = 0
    while i < len(text):
        if text[i] in " \t":
            i += 1
            continue
        if text[i] == "#":
            break
        word: list[str] = []
        quote = ""
        while i < len(text) and (quote or text[i] not in " \t"):
            char, after = text[i], text[i + 1 : i + 2]
            if char == "\\" and after and (after in "'\"\\" or (after == " " and not quote)):
                word.append(after)
                i += 1
            elif char in "'\"" and quote in ("", char):
                quote = "" if quote else char
            else:
                word.append(char)
            i += 1
        if quote:
            msg = "a quote is not closed"
            raise ValueError(msg)
        words.append("".join(word))
    return words


def one_word(text: str) -> str:
    """Read the one argument of a keyword.

    :raises ValueError: if there is none, or more than one
    """
    words = split_words(text)
    if not words or not words[0]:
        msg = "a value is missing"
        raise ValueError(msg)
    if len(words) > 1:
        msg = f"there is more after {words[0]!r}"
        raise ValueError(msg)
    return words[0]


def all_words(text: str) -> tuple[str, ...]:
    """Read the arguments of a keyword that takes several; ``none`` stands alone and gives no argument.

    :raises ValueError: if there is none, or ``none`` among others
    """
    words = split_words(text)
    if not words or not all(words):
        msg = "a value is missing"
        raise ValueError(msg)
    if any(word.lower() == "none" for word in words):
        if len(words) > 1:
            msg = '"none" must stand alone'
            raise ValueError(msg)
        return ()
    return tuple(words)


def seconds(text: str) -> float | None:
    """Read a time such as ``90``, ``1m30s`` or ``2h``; None for ``none``.

    :raises ValueError: if it is not a time
    """
    word = one_word(text)
    return None if word == "none" else duration(word)


def duration(word: str) -> float:
    """Read a time, in seconds.

    :raises ValueError: if it is not one
    """
    parts = _TIME.findall(word)
    longest = max((len(number) for number, _ in parts), default=0)
    written = "".join(number + unit for number, unit in parts)
    if not word or written != word or not word.isascii() or longest > 12:
        msg = f"{word!r} is not a time"
        raise ValueError(msg)
    return float(sum(int(number) * _UNITS[unit.lower()] for number, unit in parts))


def number(text: str) -> int:
    """Read a whole number.

    :raises ValueError: if it is not one
    """
    word = one_word(text)
    if not re.fullmatch(r"-?[0-9]{1,9}", word):
        msg = f"{word!r} is not a number"
        raise ValueError(msg)
    return int(word)


def flag(text: str) -> bool:
    """Read yes or no.

    :raises ValueError: if it is neither
    """
    return choice(text, {"yes": True, "true": True, "no": False, "false": False})


def choice(text: str, known: Mapping[str, bool]) -> bool:
    """Read one of the words in ``known``, upper case or lower.

    :raises ValueError: if it is another word
    """
    word = one_word(text)
    if word.lower() not in known:
        msg = f"{word!r} is not one of {', '.join(known)}"
        raise ValueError(msg)
    return known[word.lower()]


def home(path: str) -> str:
    """Put in the home directory for a leading ``~`` or ``~user``.

    :raises ValueError: if there is none
    """
    expanded = os.path.expanduser(path)  # noqa: PTH111  # a Path would rewrite the rest, too
    if expanded.startswith("~"):
        msg = f"there is no home directory for {path}"
        raise ValueError(msg)
    return expanded


def expand(text: str, tokens: Mapping[str, str], env: Mapping[str, str] | None = None) -> str:
    """Put in the values of ``%h``-like tokens and, where ``env`` is given, of ``${NAME}``.

    :raises ValueError: if a token is not known or a variable is not set
    """

    def value(found: re.Match[str]) -> str:
        letter, name, closed = found.groups()
        if letter is not None:
            if letter == "%":
                return "%"
            if letter not in tokens:
                msg = f"the token %{letter} is not supported here"
                raise ValueError(msg)
            return tokens[letter]
        if env is None:
            return found[0]
        if not closed or name not in env:
            msg = f"the environment variable ${{{name}}} is not set" if closed else "${ is not closed"
            raise ValueError(msg)
        return env[name]

    return _SUBSTITUTE.sub(value, text)


def as_jump(command: str) -> str | None:
    """Read a ProxyCommand that is ``ssh -W %h:%p`` and nothing else as the target to jump through.

    :returns: None if it is another command, or has options that a jump cannot follow
    """
    if set(command) & set("$`|;&<>(){}*?#\n"):
        return None
    try:
        words = shlex.split(command)
    except ValueError:
        return None
    words = words[1:] if words[:1] == ["exec"] else words
    if not words or words[0].rpartition("/")[2] not in ("ssh", "ssh.exe"):
        return None
    try:
        options, rest = getopt.gnu_getopt(words[1:], "qTxaknW:l:p:")
    except getopt.GetoptError:
        return None
    said = dict(options[::-1])  # the first counts, as everywhere in ssh
    if said.get("-W") not in ("%h:%p", "[%h]:%p") or len(rest) != 1 or rest[0].startswith("ssh://"):
        return None
    user, at, host = rest[0].rpartition("@")
    user = said.get("-l", "") if not at else user
    port = said.get("-p", "")
    host = f"[{host}]:{port}" if port and ":" in host else f"{host}:{port}" if port else host
    return f"{user}@{host}" if user else host


def criteria(words: list[str]) -> list[tuple[str, bool, str]]:
    """Take apart the criteria of a Match line: name, whether negated, argument.

    :raises ValueError: if an argument is missing
    """
    found: list[tuple[str, bool, str]] = []
    rest = deque(words)
    while rest:
        name, _, argument = rest.popleft().partition("=")
        negated = name.startswith("!")
        name = name.removeprefix("!").lower()
        if name == "all":
            argument = argument or " ".join(rest)
            rest.clear()
        elif name not in ("canonical", "final") and not argument:
            argument = rest.popleft() if rest else ""
            if argument.startswith("="):
                argument = argument[1:] or (rest.popleft() if rest else "")
            if not argument and name in ("host", "originalhost", "user", "localuser", "exec"):
                msg = f"{name} has no argument"
                raise ValueError(msg)
        found.append((name, negated, argument))
    return found


def _address_bytes(host: str) -> tuple[int, bytes] | None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return int(family), socket.inet_pton(family, host)
    except (OSError, ValueError):
        return None


def is_address(host: str) -> bool:
    """Return whether a name is an IPv4 or IPv6 address, with or without a scope."""
    return _address_bytes(host.partition("%")[0]) is not None


def canonical_host(host: str) -> str:
    """Write a name in lower case, and an address in the one way that known_hosts has it."""
    address, percent, scope = host.partition("%")
    if (found := _address_bytes(address)) is not None:
        return socket.inet_ntop(socket.AddressFamily(found[0]), found[1]) + percent + scope
    return lower(host)
