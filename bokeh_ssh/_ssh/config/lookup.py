"""What the ssh config says about one host (``ssh -G``).

First value wins, as with ssh 10.6. A line that changes who we connect to, or whom we trust, and that we
cannot follow is reported; keywords that nobody knows are ignored, with a warning. ``StrictHostKeyChecking``
is followed where it says ``yes``: whether unknown host keys are taken is said by our own ``host_keys``, so
that a forgotten ``StrictHostKeyChecking no`` in some ``Host *`` block cannot switch verification off.

``~`` and ``%d`` are Python's home directory (``$HOME`` first); ssh takes the account database's only.
"""

from __future__ import annotations

import dataclasses
import difflib
import getpass
import glob
import hashlib
import ipaddress
import os
import re
import shlex
import socket
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from bokeh_ssh._core.errors import BokehSSHError, ConfigError, UsageError
from bokeh_ssh._core.host import Target, format_target, hide_secret, parse_target
from bokeh_ssh._core.patterns import lower, matches, matches_host, matches_list
from bokeh_ssh._core.settings import setting
from bokeh_ssh._core.text import clean
from bokeh_ssh._core.this_machine.home import expand_home, find_home
from bokeh_ssh._core.this_machine.interfaces import list_addresses
from bokeh_ssh._ssh.config import keywords, syntax
from bokeh_ssh._ssh.config.canonical import Rules
from bokeh_ssh._ssh.config.keywords import Jump, Keyword, Setting
from bokeh_ssh._ssh.config.match_exec import holds
from bokeh_ssh._ssh.config.release import find_release

USER_CONFIG = "~/.ssh/config"
_WINDOWS = Path(os.environ.get("PROGRAMDATA", r"C:\ProgramData"), "ssh")
#: Where the system's config is.
SYSTEM = _WINDOWS if os.name == "nt" else Path("/etc/ssh")
SYSTEM_CONFIG = str(SYSTEM / "ssh_config")
#: Where ssh looks for host keys when the config does not say (ssh(1), FILES).
USER_KNOWN_HOSTS = ("~/.ssh/known_hosts", "~/.ssh/known_hosts2")
GLOBAL_KNOWN_HOSTS = tuple(str(SYSTEM / name) for name in ("ssh_known_hosts", "ssh_known_hosts2"))
#: What ssh refuses in a user name that it has put together itself (ssh_valid_ruser()): it may reach a shell.
_BAD_USER = re.compile(r"^-|[\x00-\x1f\x7f'`\";&<>|(){}]|\s-|\\$")
#: How deep files may include each other (READCONF_MAX_DEPTH).
_MAX_DEPTH = 16
#: What is run on the other machine, for ``Match command``; the script itself goes over standard input.
COMMAND = "exec /bin/sh -c"
_PASSED_OVER = keywords.FOREIGN | {lower(name) for name in keywords.HARMLESS}
#: What is asked of the connection: to run commands, or nothing but forwards (``ssh -N``).
Session = Literal["exec", "none"]
_T = TypeVar("_T")


@dataclass(frozen=True)
class HostKeysCommand:
    """A command that writes known_hosts lines (``KnownHostsCommand``); no shell runs it.

    :ivar words: the program and its arguments, their tokens not yet expanded
    :ivar tokens: what the tokens stand for, save for those that say which key is asked for
    :ivar where: file and line of the config
    """

    words: tuple[str, ...]
    tokens: Mapping[str, str]
    where: str

    def expand(self, **more: str) -> list[str]:
        """Return program and arguments with all tokens expanded.

        :param more: what ``%H``, ``%I``, ``%t``, ``%f`` and ``%K`` stand for
        :raises ValueError: if one cannot be
        """
        program, *arguments = self.words
        return [program, *(syntax.expand(each, {**self.tokens, **more}, os.environ) for each in arguments)]


@dataclass(frozen=True)
class HostConfig:
    """What the ssh config says about one host; None where it says nothing. Paths are expanded.

    :param hostname: what to look up and dial, in lower case: ``HostName``, else the alias itself
    :param identity_files: in the order to try; ``("none",)`` is ``IdentityFile none``: not even the defaults
    :param certificate_files: certificates for keys of the identity files or of the agent
    :param identity_agent: the agent's socket, or ``"none"`` for no agent; None takes ``SSH_AUTH_SOCK``
    :param user_known_hosts: ``()`` for none at all, as with ``UserKnownHostsFile none``
    :param host_key_alias: in lower case; it stands in known_hosts without a port
    :param connect_timeout: seconds
    :param server_alive_interval: seconds; 0 turns the questions off
    :param proxy_jump: the targets to go through, the first to dial first; ``()`` is ``ProxyJump none``. A
        ``ProxyCommand`` that is ``ssh -W %h:%p`` and no more is one too: it needs no program
    :param proxy_command: what the user's shell runs to be connected, its tokens expanded
    :param pubkey_authentication: whether keys are offered; the two that follow, for passwords and questions
    :param gssapi_authentication: whether a Kerberos ticket is used
    :param gssapi_delegate_credentials: whether the server gets a ticket of its own to act with
    :param gssapi_client_identity: the principal whose ticket is used; None for the one used by default
    :param gssapi_server_identity: the server's name in its keytab; None for ``hostname``
    :param gssapi_key_exchange: GSSAPIKeyExchange is yes, which we do not follow; nor ``gssapi_trust_dns``
    :param pkcs11_provider: the library of a token, which we do not follow; None for "none"
    :param verify_host_key_dns: VerifyHostKeyDNS is yes or ask, which we do not follow
    :param preferred_authentications: the methods to try, in this order
    :param password_prompts: how often a person is asked for one password, passphrase or round of questions
    :param add_keys_to_agent: whether a key that was read from a file is added to the agent ("yes", "no",
        "ask" or "confirm"), and for how many seconds (0 has no end)
    :param batch_mode: nobody is asked anything
    :param algorithms: the lines Ciphers, MACs, KexAlgorithms, HostKeyAlgorithms, PubkeyAcceptedAlgorithms and
        CASignatureAlgorithms as they are written, by their names in lower case
    :param control_path: the socket of a connection that ``ssh`` keeps open
    :param control_master: what that is for, as ``ssh -G`` says it; None for "false"
    :param address_family: the one family whose addresses are dialled; None for any
    :param bind_address: the name or address of ours to dial from
    :param bind_interface: the network interface to dial from, where no ``bind_address`` is said
    :param connection_attempts: how often to dial, a second apart
    :param known_hosts_command: a command that says more known_hosts lines
    :param hash_known_hosts: whether the names of new hosts are written as hashes
    :param check_host_ip: whether known_hosts may not have another key for the address that is dialled
    :param required_rsa_size: bits that an RSA key has at least, a host's or one's own
    :param revoked_host_keys: files with host keys that are never taken
    :param strict_host_key_checking: nobody is asked about an unknown host key (StrictHostKeyChecking yes)
    :param unchecked_localhost: NoHostAuthenticationForLocalhost is yes, which we do not follow
    :param warnings: about keywords that nobody knows, and includes that cannot be
    :param lines: the file and line that gave each keyword, by its name in lower case
    """

    hostname: str
    user: str | None = None
    port: int | None = None
    identity_files: tuple[str, ...] = ()
    certificate_files: tuple[str, ...] = ()
    identities_only: bool = False
    identity_agent: str | None = None
    user_known_hosts: tuple[str, ...] | None = None
    global_known_hosts: tuple[str, ...] | None = None
    host_key_alias: str | None = None
    connect_timeout: float | None = None
    server_alive_interval: float | None = None
    server_alive_count: int | None = None
    proxy_jump: tuple[str, ...] | None = None
    proxy_command: str | None = None
    compression: bool | None = None
    pubkey_authentication: bool | None = None
    password_authentication: bool | None = None
    kbd_interactive_authentication: bool | None = None
    gssapi_authentication: bool | None = None
    gssapi_delegate_credentials: bool | None = None
    gssapi_client_identity: str | None = None
    gssapi_server_identity: str | None = None
    gssapi_key_exchange: bool = False
    gssapi_trust_dns: bool = False
    pkcs11_provider: str | None = None
    verify_host_key_dns: bool = False
    preferred_authentications: tuple[str, ...] | None = None
    password_prompts: int | None = None
    add_keys_to_agent: tuple[str, float] | None = None
    batch_mode: bool | None = None
    algorithms: Mapping[str, str] = field(default_factory=dict)
    control_path: str | None = None
    control_master: str | None = None
    address_family: socket.AddressFamily | None = None
    bind_address: str | None = None
    bind_interface: str | None = None
    connection_attempts: int | None = None
    known_hosts_command: HostKeysCommand | None = None
    hash_known_hosts: bool | None = None
    check_host_ip: bool | None = None
    required_rsa_size: int | None = None
    revoked_host_keys: tuple[str, ...] = ()
    strict_host_key_checking: bool = False
    unchecked_localhost: bool = False
    warnings: tuple[str, ...] = field(default=(), compare=False, repr=False)
    lines: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)


#: The fields that are what their keywords say.
_PLAIN: dict[str, Keyword[Any]] = {
    each.name: keyword
    for each in dataclasses.fields(HostConfig)
    if isinstance(keyword := getattr(keywords, each.name.upper(), None), Keyword)
}


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


class Settings:
    """What was said for each keyword: the first value, and of those that add to a list, all."""

    def __init__(self) -> None:
        self._first: dict[str, Setting[Any]] = {}
        self._all: dict[str, list[Setting[Any]]] = {}
        self._seen: set[tuple[str, object, bool]] = set()

    def get(self, keyword: Keyword[_T]) -> Setting[_T] | None:
        """Return the first value with its place; None where nothing was said."""
        return self._first.get(keyword.name)

    def value(self, keyword: Keyword[_T]) -> _T | None:
        """Return the first value; None where nothing was said."""
        said = self._first.get(keyword.name)
        return said.value if said else None

    def every(self, keyword: Keyword[_T]) -> list[Setting[_T]]:
        """Return all values of a keyword that adds to a list (``LISTS``), in order."""
        return self._all.get(keyword.name, [])

    def add(self, keyword: Keyword[_T], said: Setting[_T]) -> None:
        """Note a value, unless there is an earlier one."""
        self._first.setdefault(keyword.name, said)

    def append(self, keyword: Keyword[_T], said: Setting[_T], *, mine: bool) -> None:
        """Add to a list, unless a file of the same kind (the user's or the system's) has done so."""
        if (keyword.name, said.value, mine) not in self._seen:
            self._seen.add((keyword.name, said.value, mine))
            self._all.setdefault(keyword.name, []).append(said)

    def lines(self) -> dict[str, str]:
        """Return the file and line that gave each keyword, by its name in lower case."""
        return {name.lower(): said.where for name, said in self._first.items() if said.where}


@dataclass(frozen=True)
class Request:
    """What the caller asks for, who comes before the config.

    :ivar user: ``ssh -l``
    :ivar port: ``ssh -p``
    :ivar jump: the host that the caller goes through, the last if there are several (``ssh -J``); ``""`` for
        none. Then ProxyJump and ProxyCommand do not count
    :ivar session: what the connection is for, for ``Match``
    """

    alias: str
    user: str | None = None
    port: int | None = None
    jump: str | None = None
    session: Session = "exec"


def load(
    path: str | os.PathLike[str] | None,
    alias: str,
    *,
    user: str | None = None,
    port: int | None = None,
    jump: str | None = None,
    session: Session = "exec",
    system: str | None = SYSTEM_CONFIG,
) -> HostConfig:
    """Look ``alias`` up in an ssh config.

    A Match with a criterion that is not known is an error where the host's config hangs on it.

    :param path: ``~/.ssh/config`` may be missing and is followed by the system's config; any other file is
        read alone (``ssh -F``); None or ``"none"`` reads none
    :param user: the user name given by the caller, who is asked before the config is (``ssh -l``)
    :param port: the port given by the caller (``ssh -p``)
    :param jump: the host that the caller goes through, the last if there are several (``ssh -J``); ``""`` for
        none. With either, ProxyJump and ProxyCommand do not count
    :param session: ``"exec"`` for a connection that runs commands, ``"none"`` for forwards alone (``ssh -N``)
    :param system: the system's config; None reads none
    :raises ConfigError: naming file and line, if a line cannot be read or may not be ignored
    :raises ResolveError: if the config asks for a canonical name, and there is none
    """
    request = Request(alias, user, port, jump, session)
    files = list(_files(path, system, alias))
    outcomes: dict[str, bool] = {}
    lookup = _Lookup(request, (), outcomes)
    config = lookup.run(files)
    for where, criterion in lookup.undecided.items():
        try:
            changes = _Lookup(request, (where,), outcomes).run(files) != config
        except BokehSSHError:
            changes = True
        if changes:
            what = f"Match {criterion} is not supported, and decides whether the lines below it count"
            hint = (
                f"write Match !originalhost {alias} before {criterion}, "
                f"or give {setting('ssh_config=')} another file"
            )
            raise lookup.error(where, what, hint)
    return config


def _files(
    path: str | os.PathLike[str] | None, system: str | None, alias: str
) -> Iterator[tuple[str, bool, bool]]:
    """Yield each file to read, whether it is the user's, and whether its owner is checked."""
    if path is None or os.fspath(path).lower() == "none":
        return
    wanted = _place(os.fspath(path))
    exists = wanted is not None and wanted.exists()
    if os.fspath(path) == USER_CONFIG or (wanted and wanted == _place(USER_CONFIG)):
        if exists:
            yield str(wanted), True, True
        if system is not None and Path(system).exists():
            yield system, False, False
        return
    if not exists:
        msg = f"there is no ssh config {wanted or os.fspath(path)}"
        raise ConfigError(msg, host=alias, hint=f"check {setting('ssh_config=')}, or give None to read none")
    yield str(wanted), True, False


def _place(path: str) -> Path | None:
    """Put in the home directory; None if there is none."""
    try:
        return Path(syntax.home(path))
    except ValueError:
        return None


class _Lookup:
    """One alias being looked up.

    :param assumed: the lines with a Match that cannot be decided and is taken to hold
    :param outcomes: of the commands of ``Match exec``, shared by all look-ups of one call: none is run twice
    :ivar settings: what was said
    :ivar undecided: those lines, as far as they have come up, and the criterion that is not known
    :ivar warnings: about keywords that nobody knows, and includes, by the file and line where they stand
    :ivar wants_final: a ``Match final`` was seen: the files are to be read again
    """

    def __init__(self, request: Request, assumed: Collection[str], outcomes: dict[str, bool]) -> None:
        self.request = request
        self.alias = request.alias
        self.host = request.alias
        self.local_user = _local_user()
        self.assumed = assumed
        self.outcomes = outcomes
        self.final = False
        self.settings = Settings()
        self.undecided: dict[str, str] = {}
        self.warnings: dict[str, str] = {}
        self.wants_final = False
        if request.user is not None:
            self.settings.add(keywords.USER, Setting(request.user, ""))
        if request.port is not None:
            self.settings.add(keywords.PORT, Setting(request.port, ""))

    def run(self, files: list[tuple[str, bool, bool]]) -> HostConfig:
        """Read the files, once or twice, and put together what they say."""
        self._read_all(files)
        renames = self.settings.value(keywords.CANONICALIZE_HOSTNAME) or "no"
        self.host = self._canonical(self.hostname(), renames)
        if renames != "no" or self.wants_final:
            self.final = True  # the second time, for Match final (ssh_config(5))
            self._read_all(files)
        self._check()
        return self._result()

    def _read_all(self, files: list[tuple[str, bool, bool]]) -> None:
        for path, mine, checked in files:
            base = "~/.ssh" if mine else str(Path(path).parent)
            self._read(_Position(path, mine, base, depth=0, active=True, never=False), checked=checked)

    def hostname(self) -> str:
        """Return the name so far: ``HostName`` with its ``%h``, else the alias."""
        if self.final:
            return self.host
        said = self.settings.get(keywords.HOSTNAME)
        if said is None:
            return self.alias
        try:
            return syntax.expand(said.value, {"h": self.alias})
        except ValueError as exc:
            raise self.error(said.where, f"HostName: {exc}") from exc

    def _read(self, position: _Position, *, checked: bool) -> None:
        """Read a file.

        :param checked: whether nobody else may be able to write it
        :raises ConfigError: if it cannot be read, or a line may not be ignored
        """
        try:
            with Path(position.path).open(
                encoding="utf-8-sig", errors="surrogateescape", newline="\n"
            ) as file:
                if checked and not _is_safe(os.fstat(file.fileno())):
                    msg = f"{position.path} can be written by others, so that it may lead anywhere"
                    raise ConfigError(msg, host=self.alias, hint=f"chmod go-w {position.path}")
                lines = file.read().split("\n")
        except IsADirectoryError:  # a glob's catch; ssh reads nothing from it either
            return
        except OSError as exc:
            if position.depth and isinstance(exc, FileNotFoundError):  # a link to nothing, as with ssh
                return
            msg = f"{position.path} cannot be read ({exc.strerror or exc})"
            raise ConfigError(msg, host=self.alias, hint="check its permissions") from exc
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
                raise self.error(str(position), f"{known.name if known else keyword}: {exc}") from exc

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
            # In the block of another host too: ssh would read no further.
            self.warnings[str(position)] = _warn(str(position), name)

    def _keep(self, keyword: Keyword[Any], said: Setting[Any], position: _Position) -> None:
        settings = self.settings
        jump = settings.get(keywords.PROXY_JUMP)
        if said.value is None:  # a time of "none", as with ssh: a later line counts
            return
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
        # The name as it was given, upper case too: unlike Match, Host distinguishes them.
        wanted = False
        for pattern in patterns:
            if matches(self.host, pattern.removeprefix("!")):
                if pattern.startswith("!"):
                    return False
                wanted = True
        return wanted

    def _include(self, pattern: str, position: _Position) -> None:
        if "%" in pattern or "${" in pattern:
            try:
                pattern = syntax.expand(pattern, self._tokens_so_far(self.hostname()), os.environ)
            except syntax.UnsetError as exc:  # as with ssh, which says so and reads on
                self.warnings[str(position)] = f"{position}: Include: {exc}, so nothing is read for it"
                return
        if not pattern or (pattern.startswith("~") and not position.mine):
            msg = f"{pattern!r} is not a path"
            raise ValueError(msg)
        if position.depth >= _MAX_DEPTH:
            msg = "files include each other too deeply"
            raise ValueError(msg)
        # A home of nobody matches no file.
        everything = str(Path(syntax.home(position.base), expand_home(syntax.as_glob(pattern))))
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
                self.wants_final |= name == "final" and not negated and not self.final
                outcome = self.final
            elif name == "exec":
                command = syntax.expand(argument, self._tokens_so_far(self.hostname()))
                if not result or position.never:  # nothing is run that decides nothing
                    continue
                if command not in self.outcomes:
                    self.outcomes[command] = holds(command)
                outcome = self.outcomes[command]
            else:
                known = self._criterion(name, argument)
                if known is None:
                    unknown = unknown or name
                    continue
                outcome = known
            result = result and outcome != negated
        if result and unknown and not position.never:
            self.undecided.setdefault(str(position), unknown)
            return str(position) in self.assumed
        return result

    def _criterion(self, name: str, argument: str) -> bool | None:
        """Return whether one criterion holds; None for one that we do not know."""
        if name == "host":
            return matches_host(self.hostname(), argument)
        if name == "originalhost":
            return matches_host(self.alias, argument)
        if name == "user":
            return matches_list(self.settings.value(keywords.USER) or self.local_user, argument)
        if name == "localuser":
            return matches_list(self.local_user, argument)
        if name == "localnetwork":
            return _is_in_network(argument)
        if name == "tagged":
            return _matches_or_both_empty(self.settings.value(keywords.TAG) or "", argument)
        if name == "command":
            return _matches_or_both_empty(COMMAND if self.request.session == "exec" else "", argument)
        if name == "sessiontype":
            given = "none" if self.request.session == "none" else self.settings.value(keywords.SESSION_TYPE)
            return matches_list(given or self.request.session, argument)
        if name == "version":
            return matches_list(find_release(), argument)
        return None

    def _canonical(self, host: str, mode: str) -> str:
        family = self.settings.value(keywords.ADDRESS_FAMILY) or socket.AF_UNSPEC
        if (address := syntax.canonical_address(host, family)) is not None:
            return address
        if syntax.is_address(host):  # by its looks; ssh goes on with it
            return lower(host)
        settings = self.settings
        most_dots = settings.value(keywords.CANONICALIZE_MAX_DOTS)
        rules = Rules(
            mode=mode,
            direct=self._is_direct(),
            family=family,
            domains=settings.value(keywords.CANONICAL_DOMAINS) or (),
            most_dots=1 if most_dots is None else most_dots,
            fallback=settings.value(keywords.CANONICALIZE_FALLBACK_LOCAL) is not False,
            cnames=settings.value(keywords.CANONICALIZE_PERMITTED_CNAMES) or (),
        )
        return rules.canonicalize(lower(host))

    def _is_direct(self) -> bool:
        """Return whether we dial the host ourselves."""
        if self.request.jump is not None:
            return not self.request.jump
        return not (self._jumps() or self._command())

    def _tokens_so_far(self, host: str) -> dict[str, str]:
        """List what ``%h`` and the others stand for while the config is read."""
        alias = self.settings.value(keywords.HOST_KEY_ALIAS)
        user = self.settings.value(keywords.USER) or self.local_user
        return self._with_user({**self._plain_tokens(host), "k": alias or host}, user)

    def _tokens(self) -> dict[str, str]:
        """List what ``%h`` and the others stand for (ssh_config(5), TOKENS)."""
        return self._with_user(self._plain_tokens(self.host), self._user() or self.local_user)

    def _plain_tokens(self, host: str) -> dict[str, str]:
        """List the tokens that do not hang on the user name."""
        here = socket.gethostname()
        jumps = self._jumps() if self.request.jump is None else None
        return {
            **({"d": str(home)} if (home := find_home()) else {}),
            "h": host,
            "i": str(os.getuid()) if hasattr(os, "getuid") else "",
            "j": jumps[-1].host if jumps else self.request.jump or "",
            "k": lower(self.settings.value(keywords.HOST_KEY_ALIAS) or "") or self.alias,
            "L": here.partition(".")[0],
            "l": here,
            "n": self.alias,
            "p": str(self.settings.value(keywords.PORT) or 22),
            "u": self.local_user,
        }

    @staticmethod
    def _with_user(tokens: dict[str, str], user: str) -> dict[str, str]:
        hashed = "".join((tokens["l"], tokens["h"], tokens["p"], user, tokens["j"]))
        raw = hashed.encode("utf-8", "surrogateescape")
        digest = hashlib.sha1(raw, usedforsecurity=False).hexdigest()  # ssh_connection_hash()
        return {**tokens, "r": user, "C": digest}

    def _user(self) -> str | None:
        """Return the user name: the caller's as it is, the config's with its tokens expanded (since 10.3)."""
        said = self.settings.get(keywords.USER)
        if said is None or not said.where:
            return said.value if said else None
        try:
            user = syntax.expand(said.value, self._plain_tokens(self.host), os.environ)
        except ValueError as exc:
            raise self.error(said.where, f"User: {exc}") from exc
        if not user or (user != said.value and _BAD_USER.search(user)):
            raise self.error(said.where, f"User: {hide_secret(user)!r} is not a user name")
        return user

    def _expand(self, said: Setting[str]) -> str:
        """Expand ``~``, tokens and ``${NAME}`` in a path, in ssh's order."""
        try:
            return syntax.expand(syntax.home(said.value), self._tokens(), os.environ)
        except ValueError as exc:
            raise self.error(said.where, str(exc)) from exc

    def error(self, where: str, what: str, hint: str = "correct the line") -> ConfigError:
        return ConfigError(f"{where}: {what}", host=self.alias, hint=hint)

    def _jumps(self) -> tuple[Jump, ...] | None:
        """Return what the first of ProxyJump and ProxyCommand says, if that is ProxyJump or none."""
        jumps = self.settings.value(keywords.PROXY_JUMP)
        if jumps is None and self.settings.get(keywords.PROXY_COMMAND):
            return ()
        return jumps

    def _command(self) -> Setting[str] | None:
        """Return the ProxyCommand that makes the connection, if one does.

        OpenSSH before 10.3 took an earlier ``ProxyJump none`` as the end of it; later ones do not.
        """
        said = self.settings.get(keywords.PROXY_COMMAND)
        if self.request.jump is not None or self._jumps():
            return None
        return said if said and said.value != "none" else None

    def _check(self) -> None:
        """Refuse what the config itself refuses, and what we cannot follow.

        :raises ConfigError: if the config has such a line
        """
        if refused := self.settings.get(keywords.REFUSE_CONNECTION):
            raise self.error(refused.where, f"RefuseConnection: {refused.value}", "choose another host")
        fdpass = self.settings.get(keywords.PROXY_USE_FDPASS)
        if fdpass and fdpass.value and self._command():
            # A command that would hand a descriptor over instead of copying.
            raise self.error(fdpass.where, "ProxyUseFdpass is not supported", "remove it, or use ProxyJump")
        command = self._command()
        if command and command.value == "-":  # ssh takes its own standard input for the connection
            what = "ProxyCommand - is not supported: a program has no connection on its standard input"
            raise self.error(command.where, what, "name a command, or use ProxyJump")
        attempts = self.settings.get(keywords.CONNECTION_ATTEMPTS)
        if attempts and not attempts.value:
            raise self.error(attempts.where, "ConnectionAttempts: 0 is no number of attempts")

    def _result(self) -> HostConfig:
        """Put together what was said."""
        value = self.settings.value
        alias = value(keywords.HOST_KEY_ALIAS)
        jump, command = self._proxy()
        said: dict[str, Any] = {
            **{name: value(keyword) for name, keyword in _PLAIN.items()},
            "hostname": self.host,
            "user": self._user(),
            "identity_files": self._identity_files(),
            "certificate_files": self._paths(keywords.CERTIFICATE_FILE),
            "identity_agent": self._identity_agent(),
            "user_known_hosts": self._files(keywords.USER_KNOWN_HOSTS_FILE),
            "global_known_hosts": value(keywords.GLOBAL_KNOWN_HOSTS_FILE),
            "host_key_alias": lower(alias) if alias else None,
            # 0 is ssh's word for the system's own.
            "connect_timeout": value(keywords.CONNECT_TIMEOUT) or None,
            "server_alive_count": value(keywords.SERVER_ALIVE_COUNT_MAX),
            "proxy_jump": jump,
            "proxy_command": command,
            "pkcs11_provider": self._unless_none(keywords.PKCS11_PROVIDER),
            "password_prompts": value(keywords.NUMBER_OF_PASSWORD_PROMPTS),
            "algorithms": {each.name.lower(): value(each) for each in keywords.ALGORITHMS if value(each)},
            "control_path": self._control_path(),
            "address_family": value(keywords.ADDRESS_FAMILY) or None,
            "known_hosts_command": self._known_hosts_command(),
            "revoked_host_keys": self._files(keywords.REVOKED_HOST_KEYS),
            "unchecked_localhost": value(keywords.NO_LOCALHOST_CHECK),
            "warnings": tuple(self.warnings.values()),
            "lines": self.settings.lines(),
        }
        return HostConfig(**{name: value for name, value in said.items() if value is not None})

    def _identity_files(self) -> tuple[str, ...]:
        files = self._paths(keywords.IDENTITY_FILE)
        return files if files or not self.settings.every(keywords.IDENTITY_FILE) else ("none",)

    def _paths(self, keyword: Keyword[str]) -> tuple[str, ...]:
        every = self.settings.every(keyword)
        return tuple(self._expand(said) for said in every if said.value.lower() != "none")

    def _files(self, keyword: Keyword[tuple[str, ...]]) -> tuple[str, ...] | None:
        said = self.settings.get(keyword)
        if said is None:
            return None
        return tuple(self._expand(Setting(path, said.where)) for path in said.value)

    def _control_path(self) -> str | None:
        said = self.settings.get(keywords.CONTROL_PATH)
        return None if said is None or said.value.lower() == "none" else self._expand(said)

    def _unless_none(self, keyword: Keyword[str]) -> str | None:
        value = self.settings.value(keyword)
        return None if value is None or value.lower() == "none" else value

    def _identity_agent(self) -> str | None:
        said = self.settings.get(keywords.IDENTITY_AGENT)
        if said is None or said.value in ("none", "SSH_AUTH_SOCK"):
            return "none" if said and said.value == "none" else None
        path = self._expand(said)
        if path.startswith("$"):  # the older way to name a variable
            return os.environ.get(path[1:]) or "none"
        return path

    def _known_hosts_command(self) -> HostKeysCommand | None:
        said = self.settings.get(keywords.KNOWN_HOSTS_COMMAND)
        if not said or not said.value:
            return None
        command = HostKeysCommand(said.value, self._tokens(), said.where)
        try:
            command.expand(H="", I="", t="", f="", K="")
        except ValueError as exc:
            raise self.error(said.where, f"KnownHostsCommand: {exc}") from exc
        return command

    def _proxy(self) -> tuple[tuple[str, ...] | None, str | None]:
        """Return the machines to go through, and the command that makes the connection."""
        if self.request.jump is not None:
            return None, None
        command, jumps = self._command(), self._jumps()
        if not (command or jumps):
            return None if jumps is None else (), None
        # ssh makes a ProxyCommand of ProxyJump, and so has tokens there.
        few = {key: value for key, value in self._tokens().items() if key in "hnpr"}
        said = self.settings.get(keywords.PROXY_JUMP)
        where, keyword = said.where if said else "", "ProxyJump"
        try:
            if command:
                where, keyword = command.where, "ProxyCommand"
                jump = syntax.as_jump(command.value)
                if jump is None:
                    return None, syntax.expand(command.value, few)
                targets = [syntax.expand(jump, few)]
            else:
                targets = [_target(jump, few) for jump in jumps or ()]
            for target in targets:
                parse_target(target)
        except (UsageError, ValueError) as exc:
            reason = exc.message if isinstance(exc, UsageError) else str(exc)
            raise self.error(where, f"{keyword}: {reason}") from exc
        return tuple(targets), None


def _target(jump: Jump, tokens: Mapping[str, str]) -> str:
    """Write a machine to jump through in one way, its tokens and the quotes of its host gone.

    :raises ValueError: if a shell, which ssh has read the host, would find more than one word
    """
    found = shlex.split(syntax.expand(jump.host, tokens))
    if len(found) != 1:
        msg = f"{jump.host!r} is not one word"
        raise ValueError(msg)
    user = None if jump.user is None else syntax.expand(jump.user, tokens)
    port = syntax.port(syntax.expand(jump.port, tokens)) if jump.port else None
    return format_target(Target(found[0], user, port))


def _warn(where: str, name: str) -> str:
    """Say that a keyword is not known, and which one may be meant."""
    known = {lower(each): each for each in (*keywords.HARMLESS, *keywords.BLOCKS)}
    known |= {each: keyword.name for each, keyword in keywords.KEYWORDS.items()}
    near = difflib.get_close_matches(name, known, 1, 0.7)
    meant = f"did you mean {known[near[0]]}?" if near else "IgnoreUnknown names those that may be"
    return f"{where}: {clean(name, 60)!r} is not a keyword of ssh_config(5), and is ignored; {meant}"


def _local_user() -> str:
    # The account database first, as ssh does: LOGNAME and USER can say anything.
    try:
        import pwd

        return pwd.getpwuid(os.getuid()).pw_name
    except (ImportError, KeyError):
        pass
    try:
        return getpass.getuser()
    except (ImportError, KeyError, OSError):  # no account database entry and no LOGNAME
        return ""


def _matches_or_both_empty(text: str, patterns: str) -> bool:
    return matches_list(text, patterns) if text else not patterns


def _is_in_network(networks: str) -> bool | None:
    """Return whether this machine has an address in one of the networks; None if that cannot be found out.

    :raises ValueError: if one of them is not a network: there are bits set that its length leaves out, or
        that is written as a mask
    """
    if re.search(r"/(?!\d+(?:,|$))", networks):
        msg = f"{networks!r} has a network without a length"
        raise ValueError(msg)
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
