"""The words of an ssh config: lines, quotes, times, flags, tokens and criteria. No files."""

from __future__ import annotations

import contextlib
import getopt
import glob
import os
import re
import shlex
import socket
from collections import deque
from collections.abc import Mapping
from typing import TypeVar

from bokeh_ssh._core.patterns import lower
from bokeh_ssh._core.this_machine.home import expand_home

_T = TypeVar("_T")

SPACE = " \t\r\n"
FLAGS = {"yes": True, "true": True, "no": False, "false": False}
_DELIMITER = re.compile(r'[ \t\r\n"=]')
_QUOTE = re.compile(r"""['"\\#]""")
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_TIME = re.compile(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)([smhdwSMHDW]?)")
_MOST = 1 << 31
_SUBSTITUTE = re.compile(r"%(.?)|\$\{([^}]*)(\}?)", re.DOTALL)


class UnsetError(ValueError):
    """A variable of the environment is not set."""


def split_keyword(line: str) -> tuple[str, str] | None:
    """Split a line into its keyword, in lower case, and the rest; None where it is empty or a comment.

    ``Keyword value``, ``Keyword=value``, ``Keyword = value`` and ``"Keyword" value`` are the same.
    """
    keyword, rest = _delimit(line.partition("\0")[0].rstrip(SPACE + "\f"))
    if not keyword:
        keyword, rest = _delimit(rest)
    return (lower(keyword), rest) if keyword and not keyword.startswith("#") else None


def _delimit(text: str) -> tuple[str, str]:
    """Cut off the first word, as OpenSSH's strdelim() does; where a quote is not closed there is none."""
    found = _DELIMITER.search(text)
    if found is None:
        return text, ""
    at = found.start()
    if text[at] == '"':
        quoted, closed, rest = text[at + 1 :].partition('"')
        return (text[:at] + quoted if closed else ""), (rest.lstrip(SPACE) if closed else "")
    rest = text[at + 1 :].lstrip(SPACE)
    if text[at] != "=" and rest.startswith("="):
        rest = rest[1:].lstrip(SPACE)
    return text[:at], rest


def split_words(text: str, *, comments: bool = True) -> list[str]:
    r"""Split at blanks; ``"a b"``, ``'a b'`` and ``a\ b`` are one word.

    :param comments: whether a word that begins with ``#`` ends it
    :raises ValueError: if a quote is not closed
    """
    if not _QUOTE.search(text):  # nearly all lines, of which some configs have a hundred thousand
        return [word for word in text.replace("\t", " ").split(" ") if word]
    words: list[str] = []
    i = 0
    while i < len(text):
        if text[i] in " \t":
            i += 1
            continue
        if comments and text[i] == "#":
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
    written = "".join(number + unit for number, unit in parts)
    plain = [unit in ("", "s", "S") for _, unit in parts]
    fraction = any("." in number and not is_plain for (number, _), is_plain in zip(parts, plain, strict=True))
    total = sum(float(number) * _UNITS[unit.lower()] for number, unit in parts) if len(word) < 100 else _MOST
    if not word or written != word or fraction or sum(plain) > 1 or total >= _MOST:
        msg = f"{word[:100]!r} is not a time"
        raise ValueError(msg)
    return float(int(total))


def number(text: str) -> int:
    """Read a whole number from 0 to 2,147,483,647.

    :raises ValueError: if it is not one
    """
    word = one_word(text)
    if not re.fullmatch(r"[+-]?[0-9]{1,20}", word.lstrip(SPACE)) or not 0 <= int(word) < _MOST:
        msg = f"{word[:100]!r} is not a number from 0"
        raise ValueError(msg)
    return int(word)


def port(word: str) -> int:
    """Read a port, by its number or by the name of a service (``getservbyname``).

    :raises ValueError: if it is neither
    """
    value = 0
    if re.fullmatch(r"\+?[0-9]{1,20}", word.lstrip(SPACE)):
        value = int(word)
    elif word:
        with contextlib.suppress(OSError, UnicodeError):
            value = socket.getservbyname(word, "tcp")
    if not 0 < value < 65536:
        msg = f"{word[:100]!r} is not a port"
        raise ValueError(msg)
    return value


def flag(text: str) -> bool:
    """Read yes or no.

    :raises ValueError: if it is neither
    """
    return choice(text, FLAGS)


def choice(text: str, known: Mapping[str, _T]) -> _T:
    """Read one of the words in ``known``, upper case or lower.

    :raises ValueError: if it is another word
    """
    word = one_word(text)
    if lower(word) not in known:
        msg = f"{word!r} is not one of {', '.join(known)}"
        raise ValueError(msg)
    return known[lower(word)]


def domain(name: str) -> str:
    """Return a domain name in lower case, without a dot at its end.

    :raises ValueError: if it has characters that no name has
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name) or ".." in name:
        msg = f"{name[:100]!r} is not a domain name"
        raise ValueError(msg)
    return lower(name).removesuffix(".")


def is_variable(name: str) -> bool:
    """Return whether a name can be that of an environment variable."""
    return re.fullmatch(r"[A-Za-z0-9_]+", name) is not None


def home(path: str) -> str:
    """Put in the home directory for a leading ``~`` or ``~user``.

    :raises ValueError: if there is none
    """
    expanded = expand_home(path)
    if expanded.startswith("~"):
        msg = f"there is no home directory for {path}"
        raise ValueError(msg)
    return expanded


def expand(text: str, tokens: Mapping[str, str], env: Mapping[str, str] | None = None) -> str:
    """Put in the values of ``%h``-like tokens and, where ``env`` is given, of ``${NAME}``.

    :raises UnsetError: if a variable is not set
    :raises ValueError: if a token is not known
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
            raise UnsetError(msg) if closed else ValueError(msg)
        return env[name]

    return _SUBSTITUTE.sub(value, text)


def as_glob(pattern: str) -> str:
    r"""Write a pattern of glob(3) as one of Python's, which takes no ``\[`` for a bracket."""
    if os.name == "nt":  # where a backslash parts folders
        return pattern
    return re.sub(r"\\(.)", lambda found: glob.escape(found[1]), pattern)


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


#: Criteria whose argument may be empty: that stands for no tag, and no command.
_MAY_BE_EMPTY = ("tagged", "command")
_NEED_ARGUMENT = (
    *("host", "originalhost", "user", "localuser", "localnetwork", "exec", "version", "sessiontype"),
    *_MAY_BE_EMPTY,
)


def criteria(words: list[str]) -> list[tuple[str, bool, str]]:
    """Take apart the criteria of a Match line: name, whether negated, argument.

    :raises ValueError: if an argument is missing
    """
    found: list[tuple[str, bool, str]] = []
    rest = deque(words)
    while rest:
        name, equals, argument = rest.popleft().partition("=")
        negated = name.startswith("!")
        name = lower(name.removeprefix("!"))
        if name == "all":
            argument = argument or " ".join(rest)
            rest.clear()
        elif name not in ("canonical", "final") and not argument:
            missing = not equals and not rest
            if not equals or name not in _MAY_BE_EMPTY:
                argument = rest.popleft() if rest else ""
            if argument.startswith("="):
                argument = argument[1:] or (rest.popleft() if rest else "")
            if name in _NEED_ARGUMENT and (missing or (not argument and name not in _MAY_BE_EMPTY)):
                msg = f"{name} has no argument"
                raise ValueError(msg)
        found.append((name, negated, argument))
    return found


def is_address(host: str) -> bool:
    """Return whether a name can only be an address, by its characters."""
    return "%" in host or ":" in host or not host.strip("0123456789.")


def canonical_address(host: str, family: int = socket.AF_UNSPEC) -> str | None:
    """Write an address in the one way that known_hosts has it; None where it is none of that family.

    ``127.1`` and the like are IPv4 addresses too, as ``inet_aton`` reads them.
    """
    address, percent, scope = host.partition("%")
    try:
        if ":" in address and family != socket.AF_INET:
            packed = socket.inet_pton(socket.AF_INET6, address)
            return socket.inet_ntop(socket.AF_INET6, packed) + percent + scope
        if not percent and family != socket.AF_INET6:
            return socket.inet_ntoa(socket.inet_aton(host))
    except (OSError, ValueError):
        pass
    return None
