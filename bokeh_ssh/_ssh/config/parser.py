"""Reading ssh config files: which lines count for a host, first value first."""

from __future__ import annotations

import glob
import ipaddress
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bokeh_ssh._core.errors import ConfigError
from bokeh_ssh._core.patterns import lower, matches, matches_host, matches_list
from bokeh_ssh._core.this_machine.interfaces import list_addresses
from bokeh_ssh._ssh.config import keywords, syntax
from bokeh_ssh._ssh.config.keywords import Keyword, Setting, Settings
from bokeh_ssh._ssh.config.match_exec import holds
from bokeh_ssh._ssh.config.release import find_release

#: How deep files may include each other (READCONF_MAX_DEPTH).
_MAX_DEPTH = 16
#: What is run on the other machine, for ``Match command``; the script itself goes over standard input.
COMMAND = "exec /bin/sh -c"
_PASSED_OVER = keywords.FOREIGN | {lower(name) for name in keywords.HARMLESS}
#: What is asked of the connection: to run commands, or nothing but forwards (``ssh -N``).
Session = Literal["exec", "none"]


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


class Reader:
    """Collects what config files say about one alias.

    :param alias: the host as the user named it
    :param tokens: gives the values of ``%h`` and the like, given ``%h``
    :param session: what the connection is for
    :param assumed: the lines with a Match that cannot be decided and is taken to hold; others are not
    :param outcomes: of the commands of ``Match exec``: none is run twice
    :ivar settings: what was said
    :ivar undecided: those lines, as far as they have come up, and the criterion that is not known
    :ivar unknown: keywords that nobody knows, by the file and line where they stand
    :ivar wants_final: a ``Match final`` was seen: the files are to be read again
    """

    def __init__(
        self,
        alias: str,
        tokens: Callable[[str], dict[str, str]],
        local_user: str,
        session: Session,
        assumed: Collection[str],
        outcomes: dict[str, bool],
    ) -> None:
        self.settings = Settings()
        self.undecided: dict[str, str] = {}
        self.unknown: dict[str, str] = {}
        self.wants_final = False
        self._alias = alias
        self._tokens = tokens
        self._local_user = local_user
        self._session = session
        self._assumed = assumed
        self._outcomes = outcomes
        self._host = alias
        self._final = False

    def begin(self, host: str, *, final: bool) -> None:
        """Start to read: the first time, or the ``final`` time with the name that the first gave."""
        self._host = host
        self._final = final

    def hostname(self) -> str:
        """Return the name so far: ``HostName`` with its ``%h``, else the alias."""
        if self._final:
            return self._host
        said = self.settings.get(keywords.HOSTNAME)
        if said is None:
            return self._alias
        try:
            return syntax.expand(said.value, {"h": self._alias})
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
                self._take(keywords.ALIASES.get(keyword, keyword), rest, position)
            except ValueError as exc:
                if isinstance(exc, ConfigError):
                    raise
                known = keywords.KEYWORDS.get(keywords.ALIASES.get(keyword, keyword))
                raise self._error(str(position), f"{known.name if known else keyword}: {exc}") from exc

    def _take(self, name: str, rest: str, position: _Position) -> None:
        if name in ("host", "match", "include") and not rest:
            msg = "a value is missing"
            raise ValueError(msg)
        if name == "host":
            position.active = self._hosts(syntax.split_words(rest)) and not position.never
        elif name == "match":
            position.active = self._match(syntax.split_words(rest), position) and not position.never
        elif name == "include":
            for pattern in syntax.split_words(rest):
                self._include(pattern, position)
        elif keyword := keywords.KEYWORDS.get(name):
            value = keyword.read(rest)
            if position.active:
                self._keep(keyword, Setting(value, str(position)), position)
        elif name not in _PASSED_OVER and not matches_list(
            name, lower(self.settings.value(keywords.IGNORE_UNKNOWN) or "")
        ):
            self.unknown[str(position)] = name  # in the block of another host too: ssh would read no further

    def _keep(self, keyword: Keyword[Any], said: Setting[Any], position: _Position) -> None:
        settings = self.settings
        jump = settings.get(keywords.PROXY_JUMP)
        if keyword in keywords.LISTS:
            settings.append(keyword, said, mine=position.mine)
        elif keyword is keywords.PROXY_COMMAND and jump and jump.value:
            pass  # whichever comes first counts
        elif keyword is keywords.PROXY_JUMP and said.value and settings.get(keywords.PROXY_COMMAND):
            pass
        else:
            settings.add(keyword, said)

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
        if "%" in pattern or "${" in pattern:
            pattern = syntax.expand(pattern, self._tokens(self.hostname()), os.environ)
        if not pattern or (pattern.startswith("~") and not position.mine):
            msg = f"{pattern!r} is not a path"
            raise ValueError(msg)
        if position.depth >= _MAX_DEPTH:
            msg = "files include each other too deeply"
            raise ValueError(msg)
        everything = str(Path(syntax.home(position.base), syntax.home(pattern)))
        for path in sorted(glob.glob(everything)):  # noqa: PTH207  # Path.glob takes no absolute pattern
            depth, never = position.depth + 1, not position.active
            inner = _Position(path, position.mine, position.base, depth, active=position.active, never=never)
            self._read(inner, checked=True)

    def _match(self, words: list[str], position: _Position) -> bool:
        """Return whether the criteria of a Match line hold."""
        if not words:
            msg = "a criterion is missing"
            raise ValueError(msg)
        result = True
        unknown = ""
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
                outcome = self._exec(argument)
            else:
                known = self._criterion(name, argument)
                if known is None:
                    unknown = unknown or name
                    continue
                outcome = known
            result = result and outcome != negated
        if result and unknown and not position.never:
            self.undecided.setdefault(str(position), unknown)
            return str(position) in self._assumed
        return result

    def _exec(self, argument: str) -> bool:
        command = syntax.expand(argument, self._tokens(self.hostname()))
        if command not in self._outcomes:
            self._outcomes[command] = holds(command)
        return self._outcomes[command]

    def _criterion(self, name: str, argument: str) -> bool | None:
        """Return whether one criterion holds; None for one that we do not know."""
        if name == "host":
            return matches_host(self.hostname(), argument)
        if name == "originalhost":
            return matches_host(self._alias, argument)
        if name == "user":
            return matches_list(self.settings.value(keywords.USER) or self._local_user, argument)
        if name == "localuser":
            return matches_list(self._local_user, argument)
        if name == "localnetwork":
            return _is_in_network(argument)
        if name == "tagged":
            return _matches_or_both_empty(self.settings.value(keywords.TAG) or "", argument)
        if name == "command":
            return _matches_or_both_empty(COMMAND if self._session == "exec" else "", argument)
        if name == "sessiontype":
            given = "none" if self._session == "none" else self.settings.value(keywords.SESSION_TYPE)
            return matches_list(given or self._session, argument)
        if name == "version":
            return matches_list(find_release(), argument)
        return None

    def _error(self, where: str, what: str, hint: str = "correct the line") -> ConfigError:
        return ConfigError(f"{where}: {what}", host=self._alias, hint=hint)


def _matches_or_both_empty(text: str, patterns: str) -> bool:
    return matches_list(text, patterns) if text else not patterns


def _is_in_network(networks: str) -> bool | None:
    """Return whether this machine has an address in one of the networks; None if that cannot be found out.

    :raises ValueError: if one of them is not a network: there are bits set that its length leaves out
    """
    wanted = [ipaddress.ip_network(network) for network in networks.split(",")]
    addresses = list_addresses()
    if addresses is None:
        return None
    # As with ssh, an address with a scope is in no network.
    mine = [ipaddress.ip_address(each.address) for each in addresses if not each.scope]
    return any(address in network for address in mine for network in wanted)


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
