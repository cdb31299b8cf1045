"""What the ssh config says about one host (``ssh -G``).

First value wins, as with ssh. A line that changes who we connect to, or whom we trust, and that we cannot
follow is told; other keywords that we do not know are passed over. ``StrictHostKeyChecking`` is one of
those on purpose: whether unknown host keys are taken is said by our own ``host_keys``, so that a forgotten
``StrictHostKeyChecking no`` in some ``Host *`` block cannot switch verification off.

``~`` and ``%d`` are Python's home directory (``$HOME`` first); ssh takes the account database's only.
"""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, cast

from bokeh_ssh._core.errors import ConfigError, UsageError
from bokeh_ssh._core.host import format_target, parse_target
from bokeh_ssh._core.patterns import lower
from bokeh_ssh._ssh.config import syntax
from bokeh_ssh._ssh.config.parser import Reader, Setting

_T = TypeVar("_T")

USER_CONFIG = "~/.ssh/config"
_ALGORITHMS = ("ciphers", "hostkeyalgorithms", "kexalgorithms", "macs", "pubkeyacceptedalgorithms")
_WINDOWS = Path(os.environ.get("PROGRAMDATA", r"C:\ProgramData"), "ssh")
_SYSTEM = _WINDOWS if os.name == "nt" else Path("/etc/ssh")
SYSTEM_CONFIG = str(_SYSTEM / "ssh_config")
#: Where ssh looks for host keys when the config does not say (ssh(1), FILES).
USER_KNOWN_HOSTS = ("~/.ssh/known_hosts", "~/.ssh/known_hosts2")
GLOBAL_KNOWN_HOSTS = tuple(str(_SYSTEM / name) for name in ("ssh_known_hosts", "ssh_known_hosts2"))


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
    :param preferred_authentications: the methods to try, in this order
    :param password_prompts: how often a person is asked for one password, passphrase or round of questions
    :param add_keys_to_agent: whether a key that was read from a file is added to the agent ("yes", "no",
        "ask" or "confirm"), and for how many seconds (0 has no end)
    :param batch_mode: nobody is asked anything
    :param algorithms: the lines Ciphers, MACs, KexAlgorithms, HostKeyAlgorithms and PubkeyAcceptedAlgorithms
        as they are written, by their names in lower case
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
    preferred_authentications: tuple[str, ...] | None = None
    password_prompts: int | None = None
    add_keys_to_agent: tuple[str, float] | None = None
    batch_mode: bool | None = None
    algorithms: Mapping[str, str] = field(default_factory=dict)
    lines: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)


def load(
    path: str | os.PathLike[str] | None,
    alias: str,
    *,
    user: str | None = None,
    port: int | None = None,
    jump_given: bool = False,
    system: str | None = SYSTEM_CONFIG,
) -> HostConfig:
    """Look ``alias`` up in an ssh config.

    :param path: ``~/.ssh/config`` may be missing and is followed by the system's config; any other file is
        read alone (``ssh -F``); None or ``"none"`` reads none
    :param user: the user name given by the caller, who is asked before the config is (``ssh -l``)
    :param port: the port given by the caller (``ssh -p``)
    :param jump_given: the caller said how to get there (``ssh -J``), so that ProxyJump and ProxyCommand do
        not count
    :param system: the system's config; None reads none
    :raises ConfigError: naming file and line, if a line cannot be read or may not be passed over
    """
    lookup = _Lookup(alias, user, port, jump_given)
    files = list(_files(path, system, alias))
    lookup.read(files, final=False)
    lookup.host = syntax.canonical_host(lookup.hostname())
    renames = lookup.check_canonical()
    if renames or lookup.reader.wants_final:
        lookup.read(files, final=True)
    lookup.check_proxy()
    lookup.check_refused()
    return lookup.result()


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
        raise ConfigError(msg, host=alias, hint="check ssh_config=, or give None to read none")
    yield str(wanted), True, False


def _place(path: str) -> Path | None:
    """Put in the home directory; None if there is none."""
    try:
        return Path(syntax.home(path))
    except ValueError:
        return None


class _Lookup:
    """One alias being looked up."""

    def __init__(self, alias: str, user: str | None, port: int | None, jump_given: bool) -> None:
        self.alias = alias
        self.host = alias
        self.jump_given = jump_given
        self.local_user = _local_user()
        self.reader = Reader(alias, self.tokens, self.local_user)
        given: dict[str, object] = {"user": user, "port": port}
        self.settings: dict[str, Setting] = self.reader.settings
        self.settings.update({key: Setting(value, "") for key, value in given.items() if value is not None})

    def read(self, files: list[tuple[str, bool, bool]], *, final: bool) -> None:
        """Read the files; ``final`` is the second time, for ``Match final`` (ssh_config(5))."""
        self.reader.begin(self.host, final=final)
        for path, mine, checked in files:
            self.reader.read(path, mine=mine, checked=checked)

    def value(self, keyword: str, kind: type[_T]) -> _T | None:
        """Return what was said for a keyword; None where nothing was."""
        said = self.settings.get(keyword)
        return said.value if said and isinstance(said.value, kind) else None

    def hostname(self) -> str:
        """``HostName`` applied, with its ``%h``."""
        return self.reader.hostname()

    def tokens(self, host: str) -> dict[str, str]:
        """List what ``%h`` and the others stand for (ssh_config(5), TOKENS); not ``%C`` and ``%j``."""
        here = socket.gethostname()
        return {
            **({"d": str(home)} if (home := _place("~")) else {}),
            "h": host,
            "i": str(os.getuid()) if hasattr(os, "getuid") else "",
            "k": lower(self.value("hostkeyalias", str) or "") or self.alias,
            "L": here.partition(".")[0],
            "l": here,
            "n": self.alias,
            "p": str(self.value("port", int) or 22),
            "r": self.value("user", str) or self.local_user,
            "u": self.local_user,
        }

    def path(self, raw: object, where: str) -> str:
        """Expand ``~``, tokens and ``${NAME}`` in a path, in ssh's order."""
        try:
            return syntax.expand(syntax.home(str(raw)), self.tokens(self.host), os.environ)
        except ValueError as exc:
            raise self.error(where, str(exc)) from exc

    def error(self, where: str, what: str, hint: str = "correct the line") -> ConfigError:
        return ConfigError(f"{where}: {what}", host=self.alias, hint=hint)

    def check_canonical(self) -> bool:
        """Return whether the config wants to be read again with the canonical name.

        :raises ConfigError: if the name could become another one: that takes DNS look-ups we do not do
        """
        said = self.settings.get("canonicalizehostname")
        mode = said.value if said else "no"
        cnames = self.settings.get("canonicalizepermittedcnames")
        direct = self.jump_given or not (self._jumps() or self._command())
        dots, domains = self.value("canonicalizemaxdots", int), self.value("canonicaldomains", tuple)
        applies = said is not None and mode != "no" and (direct or mode == "always")
        by_domain = applies and (
            self.host.endswith(".")
            or (self.host.count(".") <= (1 if dots is None else dots) and bool(domains))
            or self.value("canonicalizefallbacklocal", bool) is False
        )
        by_cname = bool(cnames and cnames.value) and (direct or applies)
        guilty = said if by_domain else cnames if by_cname else None
        if guilty and not syntax.is_address(self.host):
            what = f"{guilty.keyword} may give {self.host} another name, and is not supported"
            hint = "write the full name as HostName, or exempt this host with CanonicalizeHostname no"
            raise self.error(guilty.where, what, hint)
        return mode != "no"

    def _jumps(self) -> tuple[str, ...] | None:
        """Return what the first of ProxyJump and ProxyCommand says, if that is ProxyJump or none."""
        said = self.settings.get("proxyjump")
        command = self.settings.get("proxycommand")
        if said is None or said.value == ():
            return () if said or command else None
        return cast("tuple[str, ...]", said.value)

    def _command(self) -> Setting | None:
        """Return the ProxyCommand that makes the connection, if one does.

        OpenSSH before 10.3 took an earlier ``ProxyJump none`` as the end of it; later ones do not.
        """
        said = self.settings.get("proxycommand")
        return said if said and said.value != "none" and not self.jump_given and not self._jumps() else None

    def check_proxy(self) -> None:
        """Refuse a command that would hand a descriptor over instead of copying.

        :raises ConfigError: if the config has one
        """
        fdpass = self.settings.get("proxyusefdpass")
        if fdpass and fdpass.value and (self._command() or self._is_direct()):
            raise self.error(fdpass.where, "ProxyUseFdpass is not supported", "remove it, or use ProxyJump")

    def _is_direct(self) -> bool:
        return not self.jump_given and self._jumps() is None

    def check_refused(self) -> None:
        """Refuse what the config itself refuses, and a list of revoked keys that we cannot read.

        :raises ConfigError: if the config has one
        """
        if said := self.settings.get("refuseconnection"):
            raise self.error(said.where, f"RefuseConnection: {said.value}", "choose another host")
        if (said := self.settings.get("revokedhostkeys")) and said.value:
            hint = "put the keys into known_hosts as @revoked, and exempt this host with RevokedHostKeys none"
            raise self.error(said.where, "RevokedHostKeys is not supported", hint)

    def result(self) -> HostConfig:
        """Put together what was said."""
        alias, timeout = self.value("hostkeyalias", str), self.value("connecttimeout", float)
        jump, command = self._proxy()
        return HostConfig(
            hostname=self.host,
            user=self.value("user", str),
            port=self.value("port", int),
            identity_files=self._identity_files(),
            certificate_files=self._paths("certificatefile"),
            identities_only=bool(self.value("identitiesonly", bool)),
            identity_agent=self._identity_agent(),
            user_known_hosts=self._known_hosts(),
            global_known_hosts=self.value("globalknownhostsfile", tuple),
            host_key_alias=lower(alias) if alias else None,
            connect_timeout=timeout or None,  # 0 is ssh's word for the system's own time-out
            server_alive_interval=self.value("serveraliveinterval", float),
            server_alive_count=self.value("serveralivecountmax", int),
            proxy_jump=jump,
            proxy_command=command,
            compression=self.value("compression", bool),
            pubkey_authentication=self.value("pubkeyauthentication", bool),
            password_authentication=self.value("passwordauthentication", bool),
            kbd_interactive_authentication=self.value("kbdinteractiveauthentication", bool),
            preferred_authentications=self._preferred(),
            password_prompts=self.value("numberofpasswordprompts", int),
            add_keys_to_agent=self.value("addkeystoagent", tuple),
            batch_mode=self.value("batchmode", bool),
            algorithms={key: str(self.settings[key].value) for key in _ALGORITHMS if key in self.settings},
            lines={keyword: said.where for keyword, said in self.settings.items() if said.where},
        )

    def _preferred(self) -> tuple[str, ...] | None:
        said = self.value("preferredauthentications", str)
        return None if said is None else tuple(said.split(","))

    def _identity_files(self) -> tuple[str, ...]:
        files = self._paths("identityfile")
        return files if files or not self.reader.files["identityfile"] else ("none",)

    def _paths(self, keyword: str) -> tuple[str, ...]:
        every = self.reader.files[keyword]
        return tuple(self.path(said.value, said.where) for said in every if str(said.value).lower() != "none")

    def _identity_agent(self) -> str | None:
        said = self.settings.get("identityagent")
        if said is None or said.value in ("none", "SSH_AUTH_SOCK"):
            return "none" if said and said.value == "none" else None
        path = self.path(said.value, said.where)
        if path.startswith("$"):  # the older way to name a variable
            return os.environ.get(path[1:]) or "none"
        return path

    def _known_hosts(self) -> tuple[str, ...] | None:
        said = self.settings.get("userknownhostsfile")
        if said is None:
            return None
        return tuple(self.path(raw, said.where) for raw in cast("tuple[str, ...]", said.value))

    def _proxy(self) -> tuple[tuple[str, ...] | None, str | None]:
        """Return the machines to go through, and the command that makes the connection."""
        if self.jump_given:
            return None, None
        said, keyword, jumps = self.settings.get("proxyjump"), "ProxyJump", self._jumps()
        command = self._command()
        # ssh makes a ProxyCommand of it, and so has tokens here.
        few = {key: value for key, value in self.tokens(self.host).items() if key in "hnpr"}
        try:
            if command:
                keyword = "ProxyCommand"
                jump = syntax.as_jump(str(command.value))
                if jump is None:
                    return None, syntax.expand(str(command.value), few)
                said, jumps = command, (jump,)
            if said is None or not jumps:
                return jumps, None
            expanded = tuple(syntax.expand(_as_target(jump), few) for jump in jumps)
            for jump in expanded:
                parse_target(jump)
        except (UsageError, ValueError) as exc:
            reason = exc.message if isinstance(exc, UsageError) else str(exc)
            where = (command or said or Setting("", "")).where
            raise self.error(where, f"{keyword}: {reason}") from exc
        return expanded, None


def _as_target(jump: str) -> str:
    # The percent signs of an ssh:// address are no tokens.
    return format_target(parse_target(jump)) if jump.startswith("ssh://") else jump


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
