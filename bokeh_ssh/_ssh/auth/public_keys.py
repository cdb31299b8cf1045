"""Public keys and host certificates, as SSH sends them and as known_hosts has them. No files.

RFC 4253, section 6.6; RFC 5656, section 3.1; RFC 8709, section 4; OpenSSH's PROTOCOL.certkeys. What is
cryptography's: the keys themselves, what a certificate says, and its signature. It knows no certificates of
security keys or by them, and takes SHA-1 for good: such are distinguished here, and vouch for nobody.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    SSHCertificate,
    SSHCertificateType,
    load_ssh_public_identity,
    load_ssh_public_key,
)

from bokeh_ssh._core.patterns import matches
from bokeh_ssh._ssh.crypto import mldsa
from bokeh_ssh._ssh.messages import CERTIFICATE, string, strings

#: How many strings follow the name in a key of each type.
_FIELDS = {
    "ssh-ed25519": 1,
    mldsa.NAME: 1,
    "ecdsa-sha2-nistp256": 2,
    "ecdsa-sha2-nistp384": 2,
    "ecdsa-sha2-nistp521": 2,
    "sk-ssh-ed25519@openssh.com": 2,
    "sk-ecdsa-sha2-nistp256@openssh.com": 3,
    "ssh-rsa": 2,
}
#: All types, best first.
KINDS = tuple(_FIELDS)
_CERTIFIED = {name.removesuffix("@openssh.com") + CERTIFICATE: name for name in _FIELDS}
#: OpenSSH takes no smaller ones either (SSH_RSA_MINIMUM_MODULUS_SIZE).
LEAST_RSA_BITS = 1024
_TOO_LONG = "it has something after its end"


@dataclass(frozen=True)
class Certificate:
    """What a CA says about a host key.

    :ivar ca: the CA's public key
    :ivar algorithm: what it was signed with
    :ivar content: what the CA says; None where that is not supported, and the signature was not checked
    :ivar left_out: CASignatureAlgorithms does not name the algorithm
    """

    ca: bytes
    algorithm: str
    content: SSHCertificate | None
    left_out: bool = False

    def problem(self, name: str, now: float) -> str:
        """Return why it does not vouch for the host ``name`` at the time ``now``; empty where it does.

        As current OpenSSH: no principal at all means no host (older versions: any host), and a principal
        may be a pattern.
        """
        if self.content is None:
            return f"of a kind that is not supported (signed with {self.algorithm[:60]})"
        if self.left_out:
            return f"signed with {self.algorithm[:60]}, which CASignatureAlgorithms leaves out"
        if self.content.type is not SSHCertificateType.HOST:
            return "not a host certificate"
        if untimely := self.untimely(now):
            return untimely
        if not self.content.valid_principals:  # for any host, says OpenSSH 9; for none, says 10
            return "for no host's name; ssh-keygen -n gives it one"
        principals = (principal.decode("utf-8", "replace") for principal in self.content.valid_principals)
        if not any(matches(name, principal) for principal in principals):
            return "for other names"
        return "with critical options, which no host certificate has" if self.content.critical_options else ""

    def untimely(self, now: float) -> str:
        """Return what ``now`` has against it; empty where nothing, or where its days are not known.

        It is this machine's clock that may be wrong.
        """
        content = self.content
        if content and now < content.valid_after:
            return f"not valid before {_day(content.valid_after)}, and the clock here says {_day(now)}"
        if content and now >= content.valid_before:
            return f"expired since {_day(content.valid_before)}; the clock here says {_day(now)}"
        return ""


def _day(seconds: float) -> str:
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).strftime("%Y-%m-%d")
    except (OverflowError, ValueError, OSError):  # beyond what the system knows
        return "a time far away"


@dataclass(frozen=True)
class PublicKey:
    """A key.

    :ivar kind: its type, such as ``"ssh-ed25519"``; for a certificate, that of the key in it
    :ivar blob: the key itself, without certificate
    :ivar fingerprint: ``"SHA256:…"``, as ``ssh-keygen -l`` prints it, of the key without its certificate
    """

    kind: str
    blob: bytes
    certificate: Certificate | None = None
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        digest = base64.b64encode(hashlib.sha256(self.blob).digest()).decode()
        object.__setattr__(self, "fingerprint", f"SHA256:{digest.rstrip('=')}")

    @property
    def rsa_bits(self) -> int | None:
        """The size of an RSA key; None for another one."""
        return count_rsa_bits(self.blob) if self.kind == "ssh-rsa" else None


def count_rsa_bits(blob: bytes) -> int | None:
    """Return the size of an RSA key, or of that in a certificate; None for another one, or a damaged one."""
    at = {b"ssh-rsa": 2, b"ssh-rsa-cert-v01@openssh.com": 3}
    try:
        place = at.get(strings(blob, 1)[0])
        return int.from_bytes(strings(blob, place + 1)[place], "big").bit_length() if place else None
    except ValueError:
        return None


def read(blob: bytes) -> PublicKey:
    """Read a public key or a certificate, and check that it is a possible one.

    :raises ValueError: if it is damaged, of a type that we do not know, or with a wrong signature
    """
    kind = _CERTIFIED.get(_name(blob))
    if kind is None:
        return _read_key(blob)
    _, _, *own, rest = strings(blob, 2 + _FIELDS[kind])  # its type, a nonce, the key
    _, _, rest = strings(rest[8 + 4 :], 2)  # a number, the kind of certificate; an id, the principals
    _, _, _, ca, signature, rest = strings(rest[8 + 8 :], 5)  # the times; options, the CA
    if rest:
        raise ValueError(_TOO_LONG)
    key = _read_key(b"".join(map(string, (kind.encode(), *own))))
    authority = _read_key(ca)  # no certificate: those sign nothing
    algorithm = _name(signature)
    kinds = kind, authority.kind
    unsupported = (
        any(each.startswith("sk-") or each == mldsa.NAME for each in kinds) or algorithm == "ssh-rsa"
    )
    return PublicKey(kind, key.blob, Certificate(ca, algorithm, None if unsupported else _verify(blob)))


def is_supported(kind: str) -> bool:
    """Return whether a host can prove to have a key of this type."""
    return not kind.startswith("sk-") and (kind != mldsa.NAME or mldsa.AVAILABLE)


def _read_key(blob: bytes) -> PublicKey:
    kind = _name(blob)
    if kind not in _FIELDS:
        msg = f"its type {kind[:60]!r} is not known"
        raise ValueError(msg)
    if strings(blob, 1 + _FIELDS[kind])[-1]:
        raise ValueError(_TOO_LONG)
    key = PublicKey(kind, blob)
    if kind == mldsa.NAME:
        if not mldsa.is_public(blob):
            msg = "it is cut off"
            raise ValueError(msg)
    elif not kind.startswith("sk-"):
        try:
            loaded = load_ssh_public_key(to_text(key).encode())
        except NotImplementedError as exc:  # a compressed point, which RFC 5656 leaves open
            msg = "it is on a curve in a form that is not supported"
            raise ValueError(msg) from exc
        if isinstance(loaded, rsa.RSAPublicKey) and loaded.key_size < LEAST_RSA_BITS:
            msg = f"it is an RSA key of {loaded.key_size} bits only"
            raise ValueError(msg)
    return key


def _verify(blob: bytes) -> SSHCertificate:
    """Read all of a certificate and check its signature.

    :raises ValueError: if something in it is damaged, or its signature is wrong
    """
    content = load_ssh_public_identity(f"{_name(blob)} {base64.b64encode(blob).decode()}".encode())
    assert isinstance(content, SSHCertificate)
    try:
        content.verify_cert_signature()
    except InvalidSignature as exc:
        msg = "its certificate has a wrong signature"
        raise ValueError(msg) from exc
    return content


def _name(data: bytes) -> str:
    """Return the string at the head of a key or a signature: its type."""
    return data[4:][: int.from_bytes(data[:4], "big")].decode("ascii", "replace")


def to_text(key: PublicKey) -> str:
    """Write a key, without its certificate, as known_hosts and ``.pub`` files have it."""
    return f"{key.kind} {base64.b64encode(key.blob).decode()}"
