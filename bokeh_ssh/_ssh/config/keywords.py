"""The keywords of ssh_config(5): how the value of each is read, and which are not followed.

Each is read to its final type once. What is in none of these lists is a keyword that we do not know:
misspelt, another program's, or a later release's. It is ignored, with a warning, unless ``IgnoreUnknown``
names it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from bokeh_ssh._core.errors import UsageError
from bokeh_ssh._core.host import hide_secrets, parse_target
from bokeh_ssh._core.patterns import lower
from bokeh_ssh._ssh.config import syntax

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True)
class Keyword(Generic[T_co]):
    """A keyword that is followed.

    :ivar name: as the manual writes it
    :ivar read: makes its value from the rest of a line; ValueError says what is wrong with it
    """

    name: str
    read: Callable[[str], T_co]


@dataclass(frozen=True)
class Setting(Generic[T_co]):
    """A value, and the file and line that gave it; empty where the caller did."""

    value: T_co
    where: str


@dataclass(frozen=True)
class Jump:
    """A machine of ProxyJump as it is written: ssh takes it apart, and a shell reads its quotes later."""

    host: str
    user: str | None
    port: str | None


def _port(text: str) -> int:
    return syntax.port(syntax.one_word(text))


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
    """Read a command, quotes and all; ``none`` in lower case."""
    if not text.lstrip(syntax.SPACE + "="):
        msg = "a value is missing"
        raise ValueError(msg)
    syntax.split_words(text)  # its quotes must be closed
    text = text.lstrip(syntax.SPACE + "=")
    return "none" if text.lower() == "none" else text


def _jumps(text: str) -> tuple[Jump, ...]:
    jumps = _raw(text)
    if jumps != "none":
        jumps = jumps.partition("#")[0].rstrip()
    return () if jumps.lower() == "none" else tuple(_jump(word) for word in jumps.split(","))


def _jump(word: str) -> Jump:
    """Take a machine apart as ssh's parse_user_host_port() and parse_ssh_uri() do.

    Unlike there, an IPv6 address needs no brackets, and the port may be ``%p``.
    """
    word = word.strip()
    if word.startswith("ssh://"):
        try:
            target = parse_target(word)
        except UsageError as exc:
            raise ValueError(exc.message) from exc
        user = target.user and target.user.replace("%", "%%")  # no tokens
        return Jump(target.host, user, str(target.port) if target.port else None)
    user, at, rest = word.rpartition("@")
    host, colon, port = rest.partition(":")
    if rest.startswith("["):
        host, bracket, port = rest[1:].partition("]")
        colon, port = port[:1], port[1:]
        host = host if bracket and colon in ("", ":") else ""
    elif rest.count(":") > 1:
        host, port = rest, ""
    if not host or (at and not user):
        msg = f"{hide_secrets(word[:100])!r} is not a machine to jump to" if word else "a place is empty"
        raise ValueError(msg)
    if port and "%" not in port:
        try:
            syntax.port(port)
        except ValueError:
            msg = f"{hide_secrets(word[:100])!r} has no valid port"
            raise ValueError(msg) from None
    return Jump(host, user if at else None, port or None)


def _canonicalize(text: str) -> str:
    word = syntax.one_word(text).lower()
    return "always" if word == "always" else "yes" if syntax.flag(text) else "no"


def _cnames(text: str) -> tuple[tuple[str, str], ...]:
    """Read CanonicalizePermittedCNAMEs: pairs of pattern lists, of a name and of what it may become."""
    pairs = []
    for word in syntax.all_words(text):
        source, colon, target = ("*", ":", "*") if word == "*" else lower(word).partition(":")
        if not colon or not target:
            msg = f"{word!r} is not a pair of patterns"
            raise ValueError(msg)
        pairs.append((source, target))
    return tuple(pairs)


def _domains(text: str) -> tuple[str, ...]:
    return tuple(syntax.domain(word) for word in syntax.all_words(text))


def _agent(text: str) -> str:
    word = syntax.one_word(text)
    if word.startswith("$") and not word.startswith("${") and not syntax.is_variable(word[1:]):
        msg = f"{word!r} names no environment variable"
        raise ValueError(msg)
    return word


def _methods(text: str) -> tuple[str, ...]:
    return tuple(syntax.one_word(text).split(","))


def _command(text: str) -> tuple[str, ...]:
    """Read a command that no shell runs; ``()`` for none."""
    command = _raw(text)
    return () if command == "none" else tuple(syntax.split_words(command, comments=False))


def _choice(known: Mapping[str, T]) -> Callable[[str], T]:
    return lambda text: syntax.choice(text, known)


_FAMILIES = {"any": socket.AF_UNSPEC, "inet": socket.AF_INET, "inet6": socket.AF_INET6}
_MASTERS = {"yes": "true", "true": "true", "no": "false", "false": "false"} | {
    name: name for name in ("auto", "ask", "autoask")
}
#: Whether an unknown host key is refused for good; nothing else of it is followed.
_CHECKINGS = {**syntax.FLAGS, **dict.fromkeys(("off", "ask", "accept-new"), False)}
_SESSIONS = {"none": "none", "subsystem": "subsystem", "default": ""}

ADD_KEYS_TO_AGENT = Keyword("AddKeysToAgent", _add_keys)
ADDRESS_FAMILY = Keyword("AddressFamily", _choice(_FAMILIES))
BATCH_MODE = Keyword("BatchMode", syntax.flag)
BIND_ADDRESS = Keyword("BindAddress", syntax.one_word)
BIND_INTERFACE = Keyword("BindInterface", syntax.one_word)
CANONICAL_DOMAINS = Keyword("CanonicalDomains", _domains)
CANONICALIZE_FALLBACK_LOCAL = Keyword("CanonicalizeFallbackLocal", syntax.flag)
CANONICALIZE_HOSTNAME = Keyword("CanonicalizeHostname", _canonicalize)
CANONICALIZE_MAX_DOTS = Keyword("CanonicalizeMaxDots", syntax.number)
CANONICALIZE_PERMITTED_CNAMES = Keyword("CanonicalizePermittedCNAMEs", _cnames)
CA_SIGNATURE_ALGORITHMS = Keyword("CASignatureAlgorithms", _algorithms)
CERTIFICATE_FILE = Keyword("CertificateFile", syntax.one_word)
CHECK_HOST_IP = Keyword("CheckHostIP", syntax.flag)
CIPHERS = Keyword("Ciphers", _algorithms)
COMPRESSION = Keyword("Compression", _choice({"yes": True, "no": False}))
CONTROL_MASTER = Keyword("ControlMaster", _choice(_MASTERS))
CONTROL_PATH = Keyword("ControlPath", syntax.one_word)
CONNECTION_ATTEMPTS = Keyword("ConnectionAttempts", syntax.number)
CONNECT_TIMEOUT = Keyword("ConnectTimeout", syntax.seconds)
GLOBAL_KNOWN_HOSTS_FILE = Keyword("GlobalKnownHostsFile", syntax.all_words)
GSSAPI_AUTHENTICATION = Keyword("GSSAPIAuthentication", syntax.flag)
GSSAPI_CLIENT_IDENTITY = Keyword("GSSAPIClientIdentity", syntax.one_word)
GSSAPI_DELEGATE_CREDENTIALS = Keyword("GSSAPIDelegateCredentials", syntax.flag)
GSSAPI_KEY_EXCHANGE = Keyword("GSSAPIKeyExchange", syntax.flag)
GSSAPI_SERVER_IDENTITY = Keyword("GSSAPIServerIdentity", syntax.one_word)
GSSAPI_TRUST_DNS = Keyword("GSSAPITrustDns", syntax.flag)
HASH_KNOWN_HOSTS = Keyword("HashKnownHosts", syntax.flag)
HOST_KEY_ALGORITHMS = Keyword("HostKeyAlgorithms", _algorithms)
HOST_KEY_ALIAS = Keyword("HostKeyAlias", syntax.one_word)
HOSTNAME = Keyword("HostName", syntax.one_word)
IDENTITIES_ONLY = Keyword("IdentitiesOnly", syntax.flag)
IDENTITY_AGENT = Keyword("IdentityAgent", _agent)
IDENTITY_FILE = Keyword("IdentityFile", syntax.one_word)
IGNORE_UNKNOWN = Keyword("IgnoreUnknown", syntax.one_word)
KBD_INTERACTIVE_AUTHENTICATION = Keyword("KbdInteractiveAuthentication", syntax.flag)
KEX_ALGORITHMS = Keyword("KexAlgorithms", _algorithms)
KNOWN_HOSTS_COMMAND = Keyword("KnownHostsCommand", _command)
MACS = Keyword("MACs", _algorithms)
NO_LOCALHOST_CHECK = Keyword("NoHostAuthenticationForLocalhost", syntax.flag)
NUMBER_OF_PASSWORD_PROMPTS = Keyword("NumberOfPasswordPrompts", syntax.number)
PASSWORD_AUTHENTICATION = Keyword("PasswordAuthentication", syntax.flag)
PKCS11_PROVIDER = Keyword("PKCS11Provider", syntax.one_word)
PORT = Keyword("Port", _port)
PREFERRED_AUTHENTICATIONS = Keyword("PreferredAuthentications", _methods)
PROXY_COMMAND = Keyword("ProxyCommand", _raw)
PROXY_JUMP = Keyword("ProxyJump", _jumps)
PROXY_USE_FDPASS = Keyword("ProxyUseFdpass", syntax.flag)
PUBKEY_ACCEPTED_ALGORITHMS = Keyword("PubkeyAcceptedAlgorithms", _algorithms)
#: The two kinds of signature that it can also ask for differ only in a lent agent's chain.
PUBKEY_AUTHENTICATION = Keyword(
    "PubkeyAuthentication", _choice({**syntax.FLAGS, "unbound": True, "host-bound": True})
)
REFUSE_CONNECTION = Keyword("RefuseConnection", syntax.one_word)
REQUIRED_RSA_SIZE = Keyword("RequiredRSASize", syntax.number)
REVOKED_HOST_KEYS = Keyword("RevokedHostKeys", syntax.all_words)
SERVER_ALIVE_COUNT_MAX = Keyword("ServerAliveCountMax", syntax.number)
SERVER_ALIVE_INTERVAL = Keyword("ServerAliveInterval", syntax.seconds)
SESSION_TYPE = Keyword("SessionType", _choice(_SESSIONS))
STRICT_HOST_KEY_CHECKING = Keyword("StrictHostKeyChecking", _choice(_CHECKINGS))
TAG = Keyword("Tag", syntax.one_word)
USER = Keyword("User", syntax.one_word)
USER_KNOWN_HOSTS_FILE = Keyword("UserKnownHostsFile", syntax.all_words)
VERIFY_HOST_KEY_DNS = Keyword("VerifyHostKeyDNS", _choice({**syntax.FLAGS, "ask": True}))

#: Those whose value is read, by name in lower case.
KEYWORDS: dict[str, Keyword[Any]] = {
    value.name.lower(): value for value in list(globals().values()) if isinstance(value, Keyword)
}
#: Those that say what other lines count.
BLOCKS = ("Host", "Match", "Include")
#: Those that add to a list.
LISTS = (CERTIFICATE_FILE, IDENTITY_FILE)
#: Those that name algorithms.
ALGORITHMS = (
    *(CA_SIGNATURE_ALGORITHMS, CIPHERS, HOST_KEY_ALGORITHMS, KEX_ALGORITHMS, MACS),
    PUBKEY_ACCEPTED_ALGORITHMS,
)
#: Those that say no when they matter: what they ask for would change who is trusted or how one gets there.
TOLD = (
    *(GSSAPI_KEY_EXCHANGE, GSSAPI_TRUST_DNS, NO_LOCALHOST_CHECK, PKCS11_PROVIDER, PROXY_USE_FDPASS),
    *(REFUSE_CONNECTION, VERIFY_HOST_KEY_DNS),
)
#: Older names.
ALIASES = {
    "challengeresponseauthentication": "kbdinteractiveauthentication",
    "dsaauthentication": "pubkeyauthentication",
    "identityfile2": "identityfile",
    "protocolkeepalives": "serveraliveinterval",  # Debian's
    "pubkeyacceptedkeytypes": "pubkeyacceptedalgorithms",
    "rsaminsize": "requiredrsasize",  # Red Hat's
    "smartcarddevice": "pkcs11provider",
    "skeyauthentication": "kbdinteractiveauthentication",
    "tisauthentication": "kbdinteractiveauthentication",
}
#: Those of OpenSSH 10.6, and of the distributions' for GSSAPI, that are not followed, since nothing that a
#: tunnel promises hangs on them.
HARMLESS = frozenset(
    {
        *("ChannelTimeout", "ClearAllForwardings", "ControlPersist"),
        *("DynamicForward", "EnableEscapeCommandline", "EnableSSHKeysign"),
        *("EscapeChar", "ExitOnForwardFailure", "FingerprintHash", "ForkAfterAuthentication"),
        *("ForwardAgent", "ForwardX11", "ForwardX11Timeout", "ForwardX11Trusted", "GatewayPorts"),
        *("GSSAPIKexAlgorithms", "GSSAPIRenewalForcesRekey", "HostbasedAcceptedAlgorithms"),
        *("HostbasedAuthentication", "IPQoS"),
        *("KbdInteractiveDevices", "LocalCommand", "LocalForward", "LogLevel"),
        *("LogVerbose", "ObscureKeystrokeTiming", "PermitLocalCommand", "PermitRemoteOpen"),
        *("RekeyLimit", "RemoteCommand", "RemoteForward"),
        *("RequestTTY", "SecurityKeyProvider", "SendEnv", "SetEnv", "StdinNull"),
        *("StreamLocalBindMask", "StreamLocalBindUnlink", "SyslogFacility"),
        *("TCPKeepAlive", "Tunnel", "TunnelDevice", "UpdateHostKeys"),
        *("VersionAddendum", "VisualHostKey", "WarnWeakCrypto", "XAuthLocation"),
    }
)
#: Those that are no keywords of OpenSSH 10.6 either, and yet no mistakes: of the past, which ssh passes over,
#: of Apple's ssh, of Red Hat's, and of HPN-SSH. In lower case.
FOREIGN = frozenset(
    {
        *("afstokenpassing", "cipher", "compressionlevel", "fallbacktorsh", "globalknownhostsfile2"),
        *("hostbasedkeytypes", "keepalive", "kerberosauthentication", "kerberostgtpassing", "protocol"),
        *("rhostsauthentication", "rhostsrsaauthentication", "rsaauthentication", "setuptimeout"),
        *("useblacklistedkeys", "useprivilegedport", "userknownhostsfile2", "useroaming", "usersh"),
        *("askpassgui", "usekeychain"),
        *("disablemtaes", "hpnbuffersize", "hpndisabled", "noneenabled", "nonemacenabled", "noneswitch"),
        *("tcprcvbuf", "tcprcvbufpoll"),
    }
)
