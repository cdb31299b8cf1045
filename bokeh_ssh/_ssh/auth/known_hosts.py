"""known_hosts files: their lines, which lines are for a host, and what follows for a key. Text only.

Follows OpenSSH's ``hostfile.c`` and ``check_host_key()`` of its ``sshconnect.c``, with two exceptions, both
to the safe side: an unknown key that is ``@revoked`` for the host's bare name is not taken for another port
either (with ``accept-new`` ssh would), and a tab may follow ``@revoked``.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import hmac
import logging
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from bokeh_ssh._core.patterns import lower, matches_host
from bokeh_ssh._ssh.auth import public_keys
from bokeh_ssh._ssh.auth.public_keys import PublicKey
from bokeh_ssh._ssh.messages import CERTIFICATE

log = logging.getLogger("bokeh_ssh.hostkeys")

_SSH_PORT = 22
_SALT_BYTES = 20
Marker = Literal["", "cert-authority", "revoked"]
#: A line may name an RSA key by its signature algorithm.
_SAME = {"rsa-sha2-256": "ssh-rsa", "rsa-sha2-512": "ssh-rsa"}
#: Paths, and what stands there.
Files = Sequence[tuple[str, bytes]]
_CERTIFICATES = tuple(
    f"{kind}{CERTIFICATE}"
    for kind in (
        "ssh-ed25519",
        "ecdsa-sha2-nistp256",
        "ecdsa-sha2-nistp384",
        "ecdsa-sha2-nistp521",
        "rsa-sha2-512",
        "rsa-sha2-256",
    )
)


@dataclass(frozen=True)
class Entry:
    """A line of a known_hosts file.

    :ivar names: the host names as they stand there
    """

    marker: Marker
    names: str
    key: PublicKey
    path: str
    line: int

    def __str__(self) -> str:
        return f"{self.path} line {self.line}"


@dataclass(frozen=True)
class Verdict:
    """What known_hosts says about a key.

    :ivar entry: the line that decided; None where none did
    :ivar problem: why the key's certificate did not count, if a CA for the host had signed it
    """

    status: Literal["known", "unknown", "changed", "revoked"]
    entry: Entry | None = None
    problem: str = ""


def name_of(host: str, port: int | None) -> str:
    """Write a host as known_hosts does: ``host``, or ``[host]:port`` where the port is not 22.

    :param port: None for a HostKeyAlias, which stands alone
    """
    host = lower(host)
    return host if port in (None, _SSH_PORT) else f"[{host}]:{port}"


def find(files: Files, name: str) -> list[Entry]:
    """List the entries for a host, as :func:`name_of` writes it. Lines that cannot be read are skipped."""
    return [entry for path, text in files for entry in _entries(text, path, name)]


def find_key(text: bytes, path: str, key: PublicKey) -> list[Entry]:
    """List the entries that have a key, under whatever names."""
    return [e for e in _entries(text, path, None) if not e.marker and e.key.blob == key.blob]


def hash_name(name: str) -> str:
    """Write a host, as :func:`name_of` writes it, so that only who knows the name finds it."""
    salt = secrets.token_bytes(_SALT_BYTES)
    digest = hmac.new(salt, name.encode(), hashlib.sha1).digest()
    return f"|1|{base64.b64encode(salt).decode()}|{base64.b64encode(digest).decode()}"


def find_blobs(text: bytes) -> Iterator[bytes]:
    """Yield the keys of a list of public keys, one a line.

    :raises ValueError: if a line is none
    """
    for number, raw in enumerate(text.decode("latin-1").split("\n"), 1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        try:
            blob = _decode_key(line)
            known = _split(line)[0] in public_keys.KINDS
            if known and public_keys.count_rsa_bits(blob) is None:  # a short RSA key may stand there
                public_keys.read(blob)
        except ValueError as exc:
            msg = f"line {number}: {exc}"
            raise ValueError(msg) from exc
        with contextlib.suppress(ValueError):  # of a kind that we do not know, no host shows us one
            blob = public_keys.read(blob).blob
        yield blob


def _entries(text: bytes, path: str, name: str | None) -> Iterator[Entry]:
    # One byte, one character: comments may be in any encoding, and "?" stands for a byte in OpenSSH.
    wanted = None if name is None else name.encode().decode("latin-1")
    for number, raw in enumerate(text.decode("latin-1").split("\n"), 1):
        line = raw.partition("\0")[0].lstrip(" \t")
        if not line or line.startswith("#"):
            continue
        try:
            marker, rest = _split_marker(line)
            names, rest = _split(rest)
            if wanted is None or _is_for(wanted, names):
                yield Entry(marker, names, public_keys.read(_decode_key(rest)), path, number)
        except ValueError as exc:
            log.debug("%s line %d is skipped: %s", path, number, exc)


def _split_marker(line: str) -> tuple[Marker, str]:
    if not line.startswith("@"):
        return "", line
    word, rest = _split(line)
    # ssh takes a marker to end at the first space, even behind a tab. It so overlooks some lines; one that
    # takes trust away is better seen.
    as_ssh = line.partition(" " if " " in line else "\t")[0]
    if word == "@revoked" and not rest.startswith("@"):
        return "revoked", rest
    if word == as_ssh == "@cert-authority" and not rest.startswith("@"):
        return "cert-authority", rest
    msg = f"it has the marker {word[:40]!r}"
    raise ValueError(msg)


def _split(text: str) -> tuple[str, str]:
    words = text.replace("\t", " ").split(" ", 1)
    return words[0], text[len(words[0]) :].lstrip(" \t")


def _is_for(name: str, names: str) -> bool:
    if not names.startswith("|"):
        return matches_host(name, names)
    parts = names.split("|")
    if len(parts) != 4 or parts[1] != "1":
        msg = "its hash is of an unknown kind"
        raise ValueError(msg)
    salt = _decode(parts[2])
    if len(salt) != _SALT_BYTES:
        msg = "its hash has a bad salt"
        raise ValueError(msg)
    digest = hmac.new(salt, name.encode("latin-1"), hashlib.sha1).digest()
    return base64.b64encode(digest).decode() == parts[3]


def _decode_key(text: str) -> bytes:
    """Decode a public key behind the name of its type; what may follow is a comment."""
    kind, rest = _split(text)
    blob = _decode(_split(rest)[0].rstrip("\r\v\f"))  # a line end of Windows
    named = blob[4 : 4 + int.from_bytes(blob[:4], "big")]
    if named.decode("ascii", "replace") != _SAME.get(kind, kind):
        msg = f"it says {kind[:60]!r}, but has another kind of key"
        raise ValueError(msg)
    return blob


def _decode(text: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as exc:
        msg = "it has damaged base64"
        raise ValueError(msg) from exc
    if base64.b64encode(data).decode() != text:
        msg = "it has damaged base64"
        raise ValueError(msg)
    return data


def judge(
    files: Files, name: str, port: int | None, key: PublicKey, now: float, said: Sequence[Entry] = ()
) -> Verdict:
    """Decide about the key that a host presents.

    :param name: the HostKeyAlias, or the host name, which a certificate must be for
    :param port: None for a HostKeyAlias
    :param now: seconds since 1970
    :param said: entries for the host that are in no file
    """
    listed, bare = name_of(name, port), name_of(name, None)
    entries = [*find(files, listed), *said]
    return _judge(entries, [] if bare == listed else find(files, bare), key, bare, now)


def _judge(
    entries: Sequence[Entry], without_port: Sequence[Entry], key: PublicKey, principal: str, now: float
) -> Verdict:
    """Decide by the entries for a host.

    :param without_port: those for the host's bare name where it listens on another port than 22: they can
        vouch for a key, too, but not speak against one (unless they revoke it)
    """
    certificate = key.certificate
    bad = (key.blob, certificate.ca) if certificate else (key.blob,)
    for entry in entries:
        if entry.marker == "revoked" and entry.key.blob in bad:
            return Verdict("revoked", entry)
    problem = ""
    bare = Verdict("unknown")
    if certificate:
        found = [e for e in entries if e.marker == "cert-authority" and e.key.blob == certificate.ca]
        if found:
            problem = certificate.problem(principal, now)
            if not problem:
                return Verdict("known", found[0])
        elif without_port:
            bare = _judge(without_port, (), key, principal, now)
            if bare.status == "known":
                return bare
            problem = bare.problem
        key = PublicKey(key.kind, key.blob)  # the key alone may be known
    plain = [e for e in entries if not e.marker]
    for entry in plain:
        if entry.key == key:  # a certificate here, without @cert-authority, is another key
            return Verdict("known", entry)
    if bare.status == "revoked":
        return bare
    if plain:
        # Any other key makes it a changed one, of another type as well: an attacker has one of each.
        same_kind = [e for e in plain if e.key.kind == key.kind]
        return Verdict("changed", (same_kind or plain)[-1], problem)
    if without_port:
        bare = _judge(without_port, (), key, principal, now)
    return bare if bare.status in ("known", "revoked") else Verdict("unknown", None, problem)


def algorithms(files: Files, name: str, port: int | None, said: Sequence[Entry] = ()) -> tuple[str, ...]:
    """List the host key algorithms to ask a host for first, best first, so that it shows what is known.

    Certificates where there is a CA, then the types of the keys (``order_hostkeyalgs()``). A CA for the bare
    name of a host on another port than 22 counts where nothing is known with the port: ssh asks for
    certificates first by itself.

    :param port: None for a HostKeyAlias
    :param said: entries for the host that are in no file
    """
    listed, bare = name_of(name, port), name_of(name, None)
    entries = [*find(files, listed), *said]
    if not any(entry.marker != "revoked" for entry in entries) and listed != bare:
        entries += [entry for entry in find(files, bare) if entry.marker == "cert-authority"]
    wanted = list(_CERTIFICATES) if any(e.marker == "cert-authority" for e in entries) else []
    kinds = {e.key.kind for e in entries if not e.marker}
    for name in (*public_keys.KINDS, "rsa-sha2-512", "rsa-sha2-256"):
        if _SAME.get(name, name) in kinds and name != "ssh-rsa":
            wanted.append(name)
    return tuple(wanted)
