"""Who to connect to: what people write, as records. No sockets, files or prompts."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from bokeh_ssh._core.errors import UsageError
from bokeh_ssh._core.events import Prompt
from bokeh_ssh._core.keywords import StrPath, convert_keywords, is_time
from bokeh_ssh._core.settings import set_to, setting

HostKeys = Literal["strict", "ask", "accept-new"]

#: OpenSSH refuses these in a host or user name since they reach shells (readconf.c, ssh_valid_hostname and
#: ssh_valid_ruser); ours reach one only as the %r of a ProxyCommand, and logs, known_hosts lines and the
#: remote side. Beyond ASCII, terminals obey U+0080 to U+009F, some characters end a line or turn the reading
#: direction, and surrogates cannot be written at all.
_BAD_HOST = re.compile(r"[^A-Za-z0-9._:%\-\u00a1-\ud7ff\ue000-\U0010ffff]")
_BAD_USER = re.compile(
    r"""['`";&<>|(){}\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]|^-| -|\\$"""
)
#: Who copies with scp writes both in one.
_APART = "a path is given apart from the host"
#: What a percent sign is followed by in an ssh:// address.
_NO_CODE = re.compile(r"%(?![0-9A-Fa-f]{2})|%00")


@dataclass(frozen=True)
class Target:
    """``user@host:port`` taken apart; None where a part was not written."""

    host: str
    user: str | None = None
    port: int | None = None


def parse_target(text: str) -> Target:
    """Take apart ``host``, ``user@host``, ``host:port``, ``[v6]:port``, ``v6`` or ``ssh://user@host:port``.

    The user may contain ``@`` (the last one counts), as with ``ssh``; in an ``ssh://`` address the first
    counts, and other characters of the user stand there as in a web address: ``%40``, ``%5C``, ``+``.

    :raises UsageError: if it is empty, has a bad port, or has characters that no host or user name has
    """
    rest = text.strip() if isinstance(text, str) else ""
    user: str | None
    if rest.startswith("ssh://"):
        user, at, rest = _split_uri(rest[len("ssh://") :].rstrip("/"), text)
    else:
        user, at, rest = rest.rpartition("@")
    if at and not user:
        msg = f"{hide_secrets(text)!r} has no user before the @"
        raise UsageError(msg, hint="write user@host or host")
    host, port = _split_port(rest, text)
    check_host(host)
    if at:
        check_user(user)
    return Target(host, user if at else None, port)


def _split_uri(rest: str, text: str) -> tuple[str, str, str]:
    """Split an ``ssh://`` address, as OpenSSH reads it (misc.c, parse_uri), at the ``@``."""
    user, at, host = rest.partition("@")
    if not at:
        return "", "", rest
    user = user.partition(";")[0].replace("+", " ")  # what follows are parameters
    if _NO_CODE.search(user):
        msg = f"{hide_secrets(text)!r} has a % that begins no code"
        raise UsageError(msg, hint="write %25 for a percent sign in an ssh:// address")
    return urllib.parse.unquote(user, errors="surrogateescape"), at, host


def hide_secret(user: str) -> str:
    """Hide what follows a colon in a login name, for messages.

    A password that was typed before the ``@``, as in a web address, is part of the name for ``ssh``.

    >>> hide_secret("joe:hunter2"), hide_secret("joe")
    ('joe:***', 'joe')
    """
    name, colon, _ = user.partition(":")
    return f"{name}:***" if colon else user


def hide_secrets(targets: str) -> str:
    """Hide the same in one target, or several with commas between them."""
    shown = []
    for target in targets.split(","):
        scheme = "ssh://" * target.startswith("ssh://")
        user, at, host = target[len(scheme) :].rpartition("@")
        shown.append(f"{scheme}{hide_secret(user)}{at}{host}")
    return ",".join(shown)


def format_target(target: Target) -> str:
    """Write a target so that :func:`parse_target` reads it: ``user@host:port``."""
    host = target.host
    if target.port is not None:
        host = f"[{host}]:{target.port}" if ":" in host else f"{host}:{target.port}"
    return host if target.user is None else f"{target.user}@{host}"


def _split_port(rest: str, text: str) -> tuple[str, int | None]:
    if rest.startswith("["):
        host, bracket, tail = rest[1:].partition("]")
        if not bracket or (tail and not tail.startswith(":")):
            msg = f"{hide_secrets(text)!r} has unbalanced brackets"
            raise UsageError(msg, hint="write an IPv6 address with a port as [address]:port")
        digits = tail[1:] if tail else None
    elif rest.count(":") == 1 and "://" not in rest:
        host, _, digits = rest.partition(":")
    else:  # no colon: a name; several: a bare IPv6 address; a URL is no host
        host, digits = rest, None
    return host, None if digits is None else parse_port(digits, text)


def parse_port(digits: str, text: str) -> int:
    """Read a port number from 1 to 65535.

    :raises UsageError: for anything else
    """
    if digits.isascii() and digits.isdigit() and 0 < int(digits) < 65536:
        return int(digits)
    msg = f"{hide_secrets(text)!r} has no valid port"
    apart = "" if digits.isascii() and digits.isdigit() else f", and {_APART}"
    raise UsageError(msg, hint=f"a port is a number from 1 to 65535{apart}")


def check_host(host: str) -> None:
    """Refuse what cannot be a host name or address, before it reaches a log, a file or a remote shell.

    :raises UsageError: if it is empty, starts with ``-`` or has control characters, spaces or quotes
    """
    if not host or host.startswith("-") or _BAD_HOST.search(host):
        msg = f"{host!r} is not a host name"
        hint = "give a host name, an address or an alias of your ssh config"
        if "://" in host:
            hint += f"; the port of a server that runs there is {setting('remote_port=')}"
        elif "/" in host:
            hint += f"; {_APART}"
        raise UsageError(msg, hint=hint)


def check_user(user: str) -> None:
    """Refuse what cannot be a user name; what can is what ``ssh -l`` takes, ``joe doe`` and ``joe$`` too.

    :raises UsageError: if it is empty, starts with ``-``, ends with a backslash, or has control characters,
        quotes, or what begins or ends a command in a shell
    """
    if not user or _BAD_USER.search(user):
        msg = f"{hide_secret(user)!r} is not a user name"
        raise UsageError(msg, hint="give the login name as you would to ssh -l")


def check_port(port: object, name: str, *, zero: bool = True) -> None:
    """Refuse what is not a port number.

    :raises UsageError: if it is not an int from 0 (1 where ``zero`` is False) to 65535
    """
    if isinstance(port, bool) or not isinstance(port, int) or not (0 if zero else 1) <= port <= 65535:
        msg = f"{set_to(name, port)} is not a port number"
        raise UsageError(msg, hint=f"give a number from {0 if zero else 1} to 65535")


@dataclass(frozen=True, kw_only=True)
class Login:
    """The login keywords, which are documented at :class:`Host`."""

    port: int | None = None
    password: str | None = field(default=None, repr=False)
    pkey: Any = field(default=None, repr=False)
    key_filename: StrPath | Sequence[StrPath] | None = None
    passphrase: str | None = field(default=None, repr=False)
    allow_agent: bool = True
    look_for_keys: bool = True
    gss_auth: bool | None = None
    gss_deleg_creds: bool | None = None
    timeout: float | None = None
    known_hosts: StrPath | Sequence[StrPath] | None = None
    host_keys: HostKeys = "strict"
    ssh_config: StrPath | None = "~/.ssh/config"
    jump: str | Host | Sequence[str | Host] | None = None
    prompt: Prompt | None = field(default=None, repr=False)
    compression: bool = False


@dataclass(frozen=True)
class _Name:
    name: str
    user: str | None = None


@dataclass(frozen=True)
class Host(Login, _Name):  # in this order: the fields of the last base come first
    """A machine and how to log in to it; accepted wherever a host name is.

    :param name: a host name, an address, ``user@host:port``, or a ``Host`` alias of the ssh config
    :param user: the login name (``ssh -l``); None uses that of ``name``, the ssh config, or this account
    :param port: the SSH server's port (``ssh -p``); None uses that of ``name``, the ssh config, or 22
    :param password: the password, also for a single hidden keyboard-interactive question
    :param pkey: a ``paramiko.PKey``, tried first
    :param key_filename: a private key file or several, tried next (``ssh -i``)
    :param passphrase: the passphrase of encrypted key files
    :param allow_agent: whether to ask the SSH agent
    :param look_for_keys: whether to try ``~/.ssh/id_*``
    :param gss_auth: whether to log in with a Kerberos ticket; None uses GSSAPIAuthentication of the ssh
        config, or False
    :param gss_deleg_creds: whether to delegate your Kerberos ticket to the machine, for file systems and
        other machines that require one there (``ssh -K``); turns ``gss_auth`` on. None uses
        GSSAPIDelegateCredentials of the ssh config, or False
    :param timeout: seconds for each stage of connecting: reaching the machine, and each answer of the login;
        None uses ConnectTimeout of the ssh config, or 15
    :param known_hosts: the file of known host keys, or several, the first of which gets new keys; None uses
        those of the ssh config, or ``~/.ssh/known_hosts``, and the system's (``-o UserKnownHostsFile``)
    :param host_keys: an unknown host key is refused ("strict"), asked about ("ask") or added
        ("accept-new"); a changed one is always refused (``-o StrictHostKeyChecking``)
    :param ssh_config: path of the ssh config; None reads none (``ssh -F``)
    :param jump: a target or a list of them to go through (``ssh -J``); None uses the ssh config's
        ProxyJump; ``()`` connects directly, whatever the ssh config says
    :param prompt: is called to ask for passwords, passphrases, codes and about unknown host keys; None asks
        nobody
    :param compression: SSH compression, for slow connections (``ssh -C``)
    """

    def __post_init__(self) -> None:
        convert_keywords(self)
        target = self.target
        if self.user is not None:
            check_user(self.user)
        if self.port is not None:
            check_port(self.port, "port", zero=False)
        if self.host_keys not in ("strict", "ask", "accept-new"):
            msg = f"{set_to('host_keys', self.host_keys)} is not known"
            raise UsageError(msg, host=target.host, hint='use "strict", "ask" or "accept-new"')
        if self.timeout is not None and not is_time(self.timeout, zero=False):
            msg = f"{set_to('timeout', self.timeout)} is not a time"
            raise UsageError(msg, host=target.host, hint="give seconds above 0, or leave it out")
        for name, paths in (("key_filename", self.key_files), ("known_hosts", self.known_hosts_files)):
            if "" in (paths or ()):
                msg = f"{setting(name)} has an empty path"
                raise UsageError(msg, host=target.host, hint="name the file, or leave it out")

    def __repr__(self) -> str:
        shown = {each.name: getattr(self, each.name) for each in dataclasses.fields(self) if each.repr}
        shown["name"] = hide_secrets(self.name)
        shown["user"] = self.user and hide_secret(self.user)
        if isinstance(self.jump, (str, tuple)):
            shown["jump"] = _hide_in_jumps(self.jump)
        return f"Host({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    def __reduce__(self) -> Any:
        # A pickle is a file before long, or goes to another program.
        secret = next((n for n in ("password", "passphrase", "pkey") if getattr(self, n) is not None), None)
        if secret:
            msg = (
                f"a Host with a {secret} cannot be pickled; make a new one where it is needed, or use prompt"
            )
            raise TypeError(msg)
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return _host, (fields,)

    def __deepcopy__(self, memo: object = None) -> Host:
        return self

    __copy__ = __deepcopy__

    @functools.cached_property
    def target(self) -> Target:
        """``name`` taken apart, with ``user`` and ``port`` where they were given."""
        parsed = parse_target(self.name)
        return Target(parsed.host, self.user or parsed.user, self.port or parsed.port)

    @functools.cached_property
    def key_files(self) -> tuple[str, ...]:
        """``key_filename`` as paths."""
        return as_paths(self.key_filename)

    @functools.cached_property
    def known_hosts_files(self) -> tuple[str, ...] | None:
        """``known_hosts`` as paths; None where it was not given."""
        return None if self.known_hosts is None else as_paths(self.known_hosts)


def _hide_in_jumps(jump: str | Sequence[str | Host]) -> str | tuple[str | Host, ...]:
    if isinstance(jump, str):
        return hide_secrets(jump)
    return tuple(hide_secrets(each) if isinstance(each, str) else each for each in jump)


def as_paths(given: StrPath | Sequence[StrPath] | None) -> tuple[str, ...]:
    """Return one path or several as texts."""
    if given is None:
        return ()
    if isinstance(given, (str, os.PathLike)):
        return (os.fspath(given),)
    return tuple(os.fspath(path) for path in given)


def _host(fields: dict[str, Any]) -> Host:
    return Host(**fields)


#: The names of the login keywords: what a public class passes on to :class:`Host`.
LOGIN_KEYWORDS = tuple(each.name for each in dataclasses.fields(Login))


def as_host(host: str | Host, user: str | None = None, **login: Any) -> Host:
    """Make a :class:`Host` of what the caller gave.

    :raises UsageError: if a ``Host`` comes with more login keywords
    """
    if isinstance(host, Host):
        if user is not None or login:
            msg = "a Host comes with its own user and login keywords"
            raise UsageError(msg, host=host.target.host, hint="give them to Host(...) instead")
        return host
    return Host(host, user, **login)
