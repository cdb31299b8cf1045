"""Reading ssh config files: which lines count for a host, first value first."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bokeh_ssh._core.errors import ConfigError
from bokeh_ssh._core.patterns import matches, matches_host, matches_list
from bokeh_ssh._ssh.config import syntax
from bokeh_ssh._ssh.config.match_exec import holds

#: How deep files may include each other (READCONF_MAX_DEPTH).
_MAX_DEPTH = 16
_YES_NO = {"yes": True, "no": False}
#: Older names of keywords.
_ALIASES = {
    "challengeresponseauthentication": "kbdinteractiveauthentication",
    "dsaauthentication": "pubkeyauthentication",
    "pubkeyacceptedkeytypes": "pubkeyacceptedalgorithms",
    "skeyauthentication": "kbdinteractiveauthentication",
    "tisauthentication": "kbdinteractiveauthentication",
}
#: The two kinds of signature that PubkeyAuthentication can also ask for differ only in a lent agent's chain.
_PUBKEY = {"yes": True, "true": True, "no": False, "false": False, "unbound": True, "host-bound": True}


@dataclass(frozen=True)
class Setting:
    """A value, and the file and line that gave it; empty where the caller did."""

    value: object
    where: str
    keyword: str = ""


@dataclass
class _Position:
    """Where reading is: the file's name, kind and depth, the line, and whether its lines count.

    :param base: where relative includes are, whatever file they stand in
    """

    path: str
    mine: bool
    base: str
    depth: int
    active: bool
    never: bool
    line: int = 0

    def __str__(self) -> str:
        return f"{self.path} line {self.line}"


def _port(text: str) -> int:
    word = syntax.one_word(text)
    if not (word.isascii() and word.isdigit() and 0 < int(word) < 65536):
        msg = f"{word!r} is not a port"
        raise ValueError(msg)
    return int(word)


def _count(text: str) -> int:
    word = syntax.one_word(text)
    if not (word.isascii() and word.isdigit() and int(word) < 1 << 31):
        msg = f"{word!r} is not a count"
        raise ValueError(msg)
    return int(word)


def _add_keys(text: str) -> tuple[str, float]:
    """Read AddKeysToAgent: "yes", "no", "ask" or "confirm", and how many seconds (0 has no end)."""
    words = syntax.split_words(text)
    how = {"true": "yes", "false": "no"}.get(words[0].lower(), words[0].lower()) if words else ""
    if how == "confirm" and len(words) == 2:
        return how, syntax.duration(words[1])
    if how in ("yes", "no", "ask", "confirm") and len(words) == 1:
        return how, 0.0
    return "yes", syntax.duration(syntax.one_word(text))


def _algorithms(text: str) -> str:
    word = syntax.one_word(text)
    names = word[1:] if word[0] in "+-^" else word
    if not names or names.startswith(",") or (word[0] != "-" and "!" in names):
        msg = f"{word!r} is not a list of algorithms"
        raise ValueError(msg)
    return word


def _raw(text: str) -> str:
    if not text:
        msg = "a value is missing"
        raise ValueError(msg)
    return "none" if text.lower() == "none" else text


def _jumps(text: str) -> tuple[str, ...]:
    jumps = _raw(text.partition("#")[0].rstrip())
    listed = [jump.strip() for jump in jumps.split(",")]
    if not all(listed):
        msg = f"{jumps!r} has an empty place"
        raise ValueError(msg)
    return () if jumps == "none" else tuple(listed)


def _canonicalize(text: str) -> str:
    word = syntax.one_word(text).lower()
    return "always" if word == "always" else "yes" if syntax.flag(text) else "no"


#: How the rest of a line is read, by keyword; what is not here changes nothing for us.
_READ: dict[str, Callable[[str], object]] = {
    "addkeystoagent": _add_keys,
    "batchmode": syntax.flag,
    "canonicaldomains": syntax.all_words,
    "canonicalizefallbacklocal": syntax.flag,
    "canonicalizehostname": _canonicalize,
    "canonicalizemaxdots": syntax.number,
    "canonicalizepermittedcnames": syntax.all_words,
    "certificatefile": syntax.one_word,
    "ciphers": _algorithms,
    "compression": lambda text: syntax.choice(text, _YES_NO),
    "connecttimeout": syntax.seconds,
    "globalknownhostsfile": syntax.all_words,
    "hostkeyalgorithms": _algorithms,
    "hostkeyalias": syntax.one_word,
    "hostname": syntax.one_word,
    "identitiesonly": syntax.flag,
    "identityagent": syntax.one_word,
    "identityfile": syntax.one_word,
    "kbdinteractiveauthentication": syntax.flag,
    "kexalgorithms": _algorithms,
    "macs": _algorithms,
    "numberofpasswordprompts": _count,
    "passwordauthentication": syntax.flag,
    "port": _port,
    "preferredauthentications": syntax.one_word,
    "proxycommand": _raw,
    "proxyjump": _jumps,
    "proxyusefdpass": syntax.flag,
    "pubkeyacceptedalgorithms": _algorithms,
    "pubkeyauthentication": lambda text: syntax.choice(text, _PUBKEY),
    "refuseconnection": syntax.one_word,
    "revokedhostkeys": syntax.all_words,
    "serveralivecountmax": syntax.number,
    "serveraliveinterval": syntax.seconds,
    "user": syntax.one_word,
    "userknownhostsfile": syntax.all_words,
}


class Reader:
    """Collects what config files say about one alias.

    :param alias: the host as the user named it
    :param tokens: gives the values of ``%h`` and the like, given ``%h``
    :ivar said: the first value of each keyword, in lower case
    :ivar files: all that was said for each keyword that adds to a list (``IdentityFile``,
        ``CertificateFile``), in order
    :ivar wants_final: a ``Match final`` was seen: the files are to be read again
    """

    def __init__(self, alias: str, tokens: Callable[[str], dict[str, str]], local_user: str) -> None:
        self.settings: dict[str, Setting] = {}
        self.files: dict[str, list[Setting]] = {"certificatefile": [], "identityfile": []}
        self.wants_final = False
        self._alias = alias
        self._tokens = tokens
        self._local_user = local_user
        self._host = alias
        self._final = False
        self._seen_files: set[tuple[str, object, bool]] = set()

    def begin(self, host: str, *, final: bool) -> None:
        """Start to read: the first time, or the ``final`` time with the name that the first gave."""
        self._host = host
        self._final = final

    def hostname(self) -> str:
        """Return the name so far: ``HostName`` with its ``%h``, else the alias."""
        if self._final:
            return self._host
        said = self.settings.get("hostname")
        if said is None:
            return self._alias
        try:
            return syntax.expand(str(said.value), {"h": self._alias})
        except ValueError as exc:
            raise self._error(said.where, f"HostName: {exc}") from exc

    def read(self, path: str, *, mine: bool, checked: bool) -> None:
        """Read a file.

        :param mine: whether it is the user's: relative includes are then in ``~/.ssh``
        :param checked: whether nobody else may be able to write it
        :raises ConfigError: if it cannot be read, or a line may not be passed over
        """
        base = "~/.ssh" if mine else str(Path(path).parent)
        self._read(_Position(path, mine, base, depth=0, active=True, never=False), checked=checked)

    def _read(self, position: _Position, *, checked: bool) -> None:
        try:
            with Path(position.path).open(
                encoding="utf-8-sig", errors="surrogateescape", newline="\n"
            ) as file:
                if checked and not _is_safe(os.fstat(file.fileno())):
                    msg = f"{position.path} can be written by others, so that it may lead anywhere"
                    raise ConfigError(msg, host=self._alias, hint=f"chmod go-w {position.path}")
                lines = file.read().split("\n")
        except IsADirectoryError:  # a glob's catch; ssh reads nothing from it either
            return
        except OSError as exc:
            msg = f"{position.path} cannot be read ({exc.strerror or exc})"
            raise ConfigError(msg, host=self._alias, hint="check its permissions") from exc
        for position.line, line in enumerate(lines, 1):
            split = syntax.split_keyword(line)
            if split is None:
                continue
            keyword, rest = split
            try:
                self._take(keyword, rest, position)
            except ValueError as exc:
                if isinstance(exc, ConfigError):
                    raise
                raise self._error(str(position), f"{keyword}: {exc}") from exc

    def _take(self, keyword: str, rest: str, position: _Position) -> None:
        keyword = _ALIASES.get(keyword, keyword)
        if keyword in ("host", "match", "include") and not syntax.split_words(rest):
            msg = "a value is missing"
            raise ValueError(msg)
        if keyword == "host":
            position.active = self._hosts(syntax.split_words(rest)) and not position.never
        elif keyword == "match":
            position.active = self._match(syntax.split_words(rest), position) and not position.never
        elif keyword == "include":
            for pattern in syntax.split_words(rest):
                self._include(pattern, position)
        elif keyword in _READ:
            value = _READ[keyword](rest)
            if position.active and value is not None:
                self._keep(keyword, Setting(value, str(position), keyword), position)

    def _keep(self, keyword: str, said: Setting, position: _Position) -> None:
        if keyword in self.files:
            if (keyword, said.value, position.mine) not in self._seen_files:
                self._seen_files.add((keyword, said.value, position.mine))
                self.files[keyword].append(said)
        elif keyword == "proxycommand" and "proxyjump" in self.settings and self.settings["proxyjump"].value:
            pass  # whichever comes first counts
        elif keyword == "proxyjump" and "proxycommand" in self.settings:
            pass
        else:
            self.settings.setdefault(keyword, said)

    def _hosts(self, patterns: list[str]) -> bool:
        if not all(patterns):
            msg = "a pattern is empty"
            raise ValueError(msg)
        # The name as it was given, upper case too: unlike Match, Host tells them apart.
        wanted = False
        for pattern in patterns:
            if matches(self._host, pattern.removeprefix("!")):
                if pattern.startswith("!"):
                    return False
                wanted = True
        return wanted

    def _include(self, pattern: str, position: _Position) -> None:
        if not pattern or (pattern.startswith("~") and not position.mine):
            msg = f"{pattern!r} is not a path"
            raise ValueError(msg)
        if position.depth >= _MAX_DEPTH:
            msg = "files include each other too deeply"
            raise ValueError(msg)
        if "%" in pattern or "${" in pattern:
            pattern = syntax.expand(pattern, self._tokens(self.hostname()), os.environ)
        everything = str(Path(syntax.home(position.base), syntax.home(pattern)))
        for path in sorted(glob.glob(everything)):  # noqa: PTH207  # Path.glob takes no absolute pattern
            depth, never = position.depth + 1, not position.active
            inner = _Position(path, position.mine, position.base, depth, active=position.active, never=never)
            self._read(inner, checked=True)

    def _match(self, words: list[str], position: _Position) -> bool:
        """Evaluate the criteria of a Match line.

        :raises ConfigError: if the outcome depends on a criterion that we do not know
        """
        result = True
        unknown: list[str] = []
        for at, (name, negated, argument) in enumerate(syntax.criteria(words)):
            if name == "all":
                if at > 1 or argument:
                    msg = '"all" stands alone'
                    raise ValueError(msg)
                outcome = True
            elif name in ("canonical", "final"):
                self.wants_final |= name == "final" and not negated and not self._final
                outcome = self._final
            elif name == "exec":
                if not result or position.never:  # nothing is run that decides nothing
                    continue
                command = syntax.expand(argument, self._tokens(self.hostname()))
                outcome = holds(command)
            else:
                known = self._criterion(name, argument)
                if known is None:
                    unknown.append(name)
                    continue
                outcome = known
            result = result and outcome != negated
        if result and unknown and not position.never:
            what = f"Match {unknown[0]} is not supported, and decides whether the lines below it count"
            hint = "put what this host needs into a Host block above it, or give ssh_config= another file"
            raise self._error(str(position), what, hint)
        return result

    def _criterion(self, name: str, argument: str) -> bool | None:
        if name == "host":
            return matches_host(self.hostname(), argument)
        if name == "originalhost":
            return matches_host(self._alias, argument)
        if name == "user":
            user = self.settings.get("user")
            return matches_list(str(user.value) if user else self._local_user, argument)
        if name == "localuser":
            return matches_list(self._local_user, argument)
        return None

    def _error(self, where: str, what: str, hint: str = "correct the line") -> ConfigError:
        return ConfigError(f"{where}: {what}", host=self._alias, hint=hint)


def _is_safe(status: os.stat_result) -> bool:
    """Return whether only the user and root can write a file; True on systems without POSIX permissions.

    A group that is the user's own private one may, as in Debian's ssh: there files are made so by default.
    """
    if not hasattr(os, "getuid"):
        return True
    if status.st_uid not in (0, os.getuid()) or status.st_mode & 0o002:
        return False
    return not status.st_mode & 0o020 or _is_private_group(status.st_gid)


def _is_private_group(gid: int) -> bool:
    import grp
    import pwd

    try:
        account = pwd.getpwuid(os.getuid())
        members = grp.getgrgid(gid).gr_mem
    except KeyError:
        return False
    return gid == account.pw_gid and all(member == account.pw_name for member in members)
