"""Which algorithms there are, in which order they are asked for, and what an ssh config changes of that.

A line replaces the usual list, adds to its end (``+``), takes out of it (``-``) or puts to its beginning
(``^``), as OpenSSH's kex_assemble_names does it. What OpenSSH has and we do not is ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import paramiko
from paramiko.kex_group16 import KexGroup16SHA512

from bokeh_ssh._core.errors import ConfigError
from bokeh_ssh._core.patterns import matches, matches_list
from bokeh_ssh._core.text import clean
from bokeh_ssh._ssh.crypto import chacha20_poly1305, mldsa
from bokeh_ssh._ssh.messages import CERTIFICATE

_PARAMIKO: Any = paramiko.Transport
#: Names of a server's list that an error shows.
_MOST_SHOWN = 50

#: The 8192-bit group of RFC 3526, section 7 (RFC 8268), which paramiko does not have.
_GROUP18 = (
    "FFFFFFFFFFFFFFFFC90FDAA22168C234C4C6628B80DC1CD129024E088A67CC74020BBEA63B139B22514A08798E3404DDEF95"
    "19B3CD3A431B302B0A6DF25F14374FE1356D6D51C245E485B576625E7EC6F44C42E9A637ED6B0BFF5CB6F406B7EDEE386BFB"
    "5A899FA5AE9F24117C4B1FE649286651ECE45B3DC2007CB8A163BF0598DA48361C55D39A69163FA8FD24CF5F83655D23DCA3"
    "AD961C62F356208552BB9ED529077096966D670C354E4ABC9804F1746C08CA18217C32905E462E36CE3BE39E772C180E8603"
    "9B2783A2EC07A28FB5C55DF06F4C52C9DE2BCBF6955817183995497CEA956AE515D2261898FA051015728E5A8AAAC42DAD33"
    "170D04507A33A85521ABDF1CBA64ECFB850458DBEF0A8AEA71575D060C7DB3970F85A6E1E4C7ABF5AE8CDB0933D71E8C94E0"
    "4A25619DCEE3D2261AD2EE6BF12FFA06D98A0864D87602733EC86A64521F2B18177B200CBBE117577A615D6C770988C0BAD9"
    "46E208E24FA074E5AB3143DB5BFCE0FD108E4B82D120A92108011A723C12A787E6D788719A10BDBA5B2699C327186AF4E23C"
    "1A946834B6150BDA2583E9CA2AD44CE8DBBBC2DB04DE8EF92E8EFC141FBECAA6287C59474E6BC05D99B2964FA090C3A2233B"
    "A186515BE7ED1F612970CEE2D7AFB81BDD762170481CD0069127D5B05AA993B4EA988D8FDDC186FFB7DC90A6C08F4DF435C9"
    "3402849236C3FAB4D27C7026C1D4DCB2602646DEC9751E763DBA37BDF8FF9406AD9E530EE5DB382F413001AEB06A53ED9027"
    "D831179727B0865A8918DA3EDBEBCF9B14ED44CE6CBACED4BB1BDB7F1447E6CC254B332051512BD7AF426FB8F401378CD2BF"
    "5983CA01C64B92ECF032EA15D1721D03F482D7CE6E74FEF6D55E702F46980C82B5A84031900B1C9E59E7C97FBEC7E8F323A9"
    "7A7E36CC88BE0F1D45B7FF585AC54BD407B22B4154AACC8F6D7EBF48E1D814CC5ED20F8037E0A79715EEF29BE32806A1D58B"
    "B7C5DA76F550AA3D8A1FBFF0EB19CCB1A313D55CDA56C9EC2EF29632387FE8D76E3C0468043E8F663F4860EE12BF2D5B0B74"
    "74D6E694F91E6DBE115974A3926F12FEE5E438777CB6A932DF8CD8BEC4D073B931BA3BC832B68D9DD300741FA7BF8AFC47ED"
    "2576F6936BA424663AAB639C5AE4F5683423B4742BF1C978238F16CBE39D652DE3FDB8BEFC848AD922222E04A4037C0713EB"
    "57A81A23F0C73473FC646CEA306B4BCBC8862F8385DDFA9D4B7FA2C087E879683303ED5BDD3A062B3CF5B3A278A66D2A13F8"
    "3F44F82DDF310EE074AB6A364597E899A0255DC164F31CC50846851DF9AB48195DED7EA1B1D510BD7EE74D73FAF36BC31ECF"
    "A268359046F4EB879F924009438B481C6CD7889A002ED5EE382BC9190DA6FC026E479558E4475677E9AA9E3050E2765694DF"
    "C81F56E880B96E7160C980DD98EDD3DFFFFFFFFFFFFFFFFF"
)


class KexGroup18SHA512(KexGroup16SHA512):
    """paramiko's key exchange with another prime; the generator and the hash are the same."""

    name = "diffie-hellman-group18-sha512"
    P = int(_GROUP18, 16)


#: As paramiko's tables: what it has, and what takes one line more.
CIPHERS: dict[str, dict[str, Any]] = dict(_PARAMIKO._cipher_info)
if chacha20_poly1305.is_available():
    CIPHERS[chacha20_poly1305.NAME] = {
        "class": chacha20_poly1305.ChaCha20Poly1305,
        "block-size": 8,
        "iv-size": 0,  # the number of the packet takes its place
        "key-size": chacha20_poly1305.KEY,
        "is_aead": True,
    }
MACS: dict[str, dict[str, Any]] = {
    **_PARAMIKO._mac_info,
    "hmac-sha1-etm@openssh.com": _PARAMIKO._mac_info["hmac-sha1"],
}
KEX: dict[str, Any] = {**_PARAMIKO._kex_info, KexGroup18SHA512.name: KexGroup18SHA512}
if "curve25519-sha256@libssh.org" in KEX:
    KEX["curve25519-sha256"] = KEX["curve25519-sha256@libssh.org"]  # its name since RFC 8731

#: Those that our own packetizer speaks, the fastest first; AES-CTR takes half as much time again. Of a server
#: without strict key exchange, somebody in between can take out the packets that come first
#: (CVE-2023-48795); none of them is one that we need.
_FIRST_CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com", chacha20_poly1305.NAME)
#: The kinds of keys that log in, and of their signatures (PubkeyAcceptedAlgorithms of ssh_config(5)).
_PUBLIC_KEYS = (
    *("ssh-ed25519", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521", mldsa.NAME),
    *("sk-ssh-ed25519@openssh.com", "sk-ecdsa-sha2-nistp256@openssh.com", "rsa-sha2-512", "rsa-sha2-256"),
)
#: The last is with SHA-1: only where a line asks for it.
_RSA_SIGNATURES = ("rsa-sha2-512", "rsa-sha2-256", "ssh-rsa")


def choose(line: str | None, usual: Sequence[str], every: Iterable[str]) -> tuple[str, ...]:
    """Return the algorithms that a line of an ssh config leaves, best first; the usual ones without a line.

    :param usual: those that are asked for without it
    :param every: those that there are
    """
    if not line:
        return tuple(usual)
    sign, rest = (line[0], line[1:]) if line[0] in "+-^" else ("", line)
    if sign == "-":
        return tuple(name for name in usual if not matches_list(name, rest))
    wanted = rest.split(",")
    patterns = [*usual, *wanted] if sign == "+" else [*wanted, *usual] if sign == "^" else wanted
    every = tuple(every)
    found = (name for pattern in patterns for name in every if matches(name, pattern))
    return tuple(dict.fromkeys(found))


def _usual_ciphers() -> tuple[str, ...]:
    first = [name for name in _FIRST_CIPHERS if name in CIPHERS]
    return (*first, *(name for name in _PARAMIKO._preferred_ciphers if name not in first))


def _usual_macs() -> tuple[str, ...]:
    return _beside(_PARAMIKO._preferred_macs, "hmac-sha1", before="hmac-sha1-etm@openssh.com")


def _usual_kex() -> tuple[str, ...]:
    older, newer = "curve25519-sha256@libssh.org", "curve25519-sha256"
    usual = _beside(_PARAMIKO._preferred_kex, older, before=newer)
    return _beside(usual, "diffie-hellman-group16-sha512", after=KexGroup18SHA512.name)


def _beside(names: Sequence[str], name: str, *, before: str = "", after: str = "") -> tuple[str, ...]:
    """Put one more into a list, beside ``name``, if that is in it."""
    found: list[str] = []
    for each in names:
        found += [before, each, after] if each == name else [each]
    return tuple(filter(None, found))


def _usual_host_keys() -> tuple[str, ...]:
    plain: tuple[str, ...] = tuple(_PARAMIKO._preferred_keys)
    if mldsa.AVAILABLE:
        plain = _beside(plain, "ssh-ed25519", after=mldsa.NAME)
    return (*plain, *(name + CERTIFICATE for name in plain if name != mldsa.NAME))


@dataclass(frozen=True)
class Algorithms:
    """What is asked for in a key exchange, best first.

    :ivar keep_host_keys: the host keys stay in this order, whichever are in known_hosts
    """

    ciphers: tuple[str, ...] = field(default_factory=_usual_ciphers)
    macs: tuple[str, ...] = field(default_factory=_usual_macs)
    kex: tuple[str, ...] = field(default_factory=_usual_kex)
    host_keys: tuple[str, ...] = field(default_factory=_usual_host_keys)
    keep_host_keys: bool = False


#: What each keyword is about, in words, and what there is of it.
_KEYWORDS: dict[str, tuple[str, Callable[[], Iterable[str]]]] = {
    "KexAlgorithms": ("key exchange", lambda: KEX),
    "HostKeyAlgorithms": ("kind of host key", _usual_host_keys),
    "Ciphers": ("cipher", lambda: CIPHERS),
    "MACs": ("MAC", lambda: MACS),
}


def select(lines: Mapping[str, str], where: Mapping[str, str], host: str) -> Algorithms:
    """Apply the lines of an ssh config.

    :param lines: what they say, by their keywords in lower case
    :param where: the file and line that each stands in
    :raises ConfigError: if a line leaves nothing that there is
    """
    usual = Algorithms()

    def chosen(keyword: str, names: tuple[str, ...]) -> tuple[str, ...]:
        line = lines.get(keyword.lower())
        what, every = _KEYWORDS[keyword]
        found = choose(line, names, (*names, *(name for name in every() if name not in names)))
        if not found:
            msg = f"{where.get(keyword.lower(), '')}: {keyword} {line} leaves no {what} that is supported"
            raise ConfigError(msg, host=host, hint=f"name one of {', '.join(every())}")
        return found

    host_keys, ciphers = lines.get("hostkeyalgorithms", ""), chosen("Ciphers", usual.ciphers)
    alone = tuple(name for name in ciphers if CIPHERS[name].get("is_aead"))
    if alone and "umac-" in lines.get("macs", "") and not choose(lines["macs"], usual.macs, MACS):
        ciphers, lines = alone, {**lines, "macs": ""}  # those that need no MAC
    return Algorithms(
        ciphers=ciphers,
        macs=chosen("MACs", usual.macs),
        kex=chosen("KexAlgorithms", usual.kex),
        host_keys=chosen("HostKeyAlgorithms", usual.host_keys),
        # As OpenSSH's order_hostkeyalgs: known_hosts decides the order unless the line does.
        keep_host_keys=bool(host_keys) and host_keys[0] not in "+-",
    )


def signatures(kind: str, line: str | None) -> tuple[str, ...]:
    """Return how a public key or certificate of this type may sign, best first (RFC 8332).

    :param line: PubkeyAcceptedAlgorithms of the ssh config
    """
    bare = kind.removesuffix(CERTIFICATE)
    ending = kind[len(bare) :]
    names = [name + ending for name in _RSA_SIGNATURES] if bare == "ssh-rsa" else [kind]
    usual = [*(name.removesuffix("@openssh.com") + CERTIFICATE for name in _PUBLIC_KEYS), *_PUBLIC_KEYS]
    every = [*usual, *(name for name in names if name not in usual)]
    usual = [name for name in every if not name.startswith("ssh-rsa")]
    return tuple(name for name in choose(line, usual, every) if name in names)


def ca_signatures(line: str) -> tuple[str, ...]:
    """Return what a CA may sign certificates with, as CASignatureAlgorithms says."""
    return choose(line, _PUBLIC_KEYS, _PUBLIC_KEYS)


@dataclass(frozen=True)
class Mismatch:
    """What a server and we have nothing in common of.

    :ivar keyword: of the ssh config
    """

    keyword: str
    theirs: tuple[str, ...]
    ours: tuple[str, ...]

    @property
    def what(self) -> str:
        """What it is, in words."""
        return _KEYWORDS[self.keyword][0]

    @property
    def has_others(self) -> bool:
        """Whether there is one that the server has too, which our list does not name."""
        return any(name in self.theirs for name in _KEYWORDS[self.keyword][1]())


class Offer:
    """What a server has, from its KEXINIT message (RFC 4253, section 7.1).

    :param lists: its name-lists, by paramiko's names for them
    """

    def __init__(self, lists: Mapping[str, Sequence[str]]) -> None:
        self._lists = {key: names for key, names in lists.items() if isinstance(names, list)}

    def macs_implied(self, ours: Algorithms, way: str) -> bool:
        """Return whether the cipher for this way ("client" or "server") authenticates by itself."""
        theirs = self._lists.get(f"{way}_encrypt_algo_list", ())
        agreed = next((name for name in ours.ciphers if name in theirs), "")
        return bool(CIPHERS.get(agreed, {}).get("is_aead"))

    def mismatch(self, ours: Algorithms) -> Mismatch | None:
        """Return the first list with nothing in common, in the order in which they are agreed on."""
        ways = ("client", "server")
        open_ways = [way for way in ways if not self.macs_implied(ours, way)]
        for keyword, key, names in (
            ("KexAlgorithms", "kex_algo_list", ours.kex),
            ("HostKeyAlgorithms", "server_key_algo_list", ours.host_keys),
            *(("Ciphers", f"{way}_encrypt_algo_list", ours.ciphers) for way in ways),
            *(("MACs", f"{way}_mac_algo_list", ours.macs) for way in open_ways),
        ):
            theirs = self._lists.get(key)
            if theirs is not None and not set(theirs) & set(names):
                shown = (name for name in theirs if not name.startswith(("kex-strict-", "ext-info-")))
                return Mismatch(keyword, tuple(clean(name, 100) for name in shown)[:_MOST_SHOWN], names)
        return None
