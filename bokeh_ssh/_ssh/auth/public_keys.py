"""Public keys and host certificates, as SSH sends them and as known_hosts has them. No files.

RFC 4253, section 6.6; RFC 5656, section 3.1; RFC 8709, section 4; OpenSSH's PROTOCOL.certkeys.
"""

from __future__ import annotations

import base64
import hashlib
import struct
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, utils

from bokeh_ssh._core.patterns import matches

#: How many strings follow the name in a key of each type.
_FIELDS = {
    "ssh-ed25519": 1,
    "ecdsa-sha2-nistp256": 2,
    "ecdsa-sha2-nistp384": 2,
    "ecdsa-sha2-nistp521": 2,
    "sk-ssh-ed25519@openssh.com": 2,
    "sk-ecdsa-sha2-nistp256@openssh.com": 3,
    "ssh-rsa": 2,
}
#: All types, best first.
KINDS = tuple(_FIELDS)
_CERT = "-cert-v01@openssh.com"
_CERTIFIED = {name.removesuffix("@openssh.com") + _CERT: name for name in _FIELDS}
_CURVES: dict[bytes, tuple[ec.EllipticCurve, hashes.HashAlgorithm]] = {
    b"nistp256": (ec.SECP256R1(), hashes.SHA256()),
    b"nistp384": (ec.SECP384R1(), hashes.SHA384()),
    b"nistp521": (ec.SECP521R1(), hashes.SHA512()),
}
_RSA_HASHES: dict[bytes, hashes.HashAlgorithm] = {
    b"rsa-sha2-256": hashes.SHA256(),
    b"rsa-sha2-512": hashes.SHA512(),
}
#: OpenSSH takes no smaller ones either (SSH_RSA_MINIMUM_MODULUS_SIZE).
_LEAST_RSA_BITS = 1024
_HOST_CERTIFICATE = 2


@dataclass(frozen=True)
class Certificate:
    """What a CA says about a host key.

    :ivar unsupported: why its signature was not checked; empty where it was, and is good
    """

    kind: int
    principals: tuple[str, ...]
    valid_after: int
    valid_before: int
    critical: bytes
    ca: bytes
    unsupported: str = ""

    def problem(self, name: str, now: float) -> str:
        """Tell why it does not vouch for the host ``name`` at the time ``now``; empty where it does.

        As current OpenSSH: no principal at all means no host (older versions: any host), and a principal
        may be a pattern.
        """
        if self.kind != _HOST_CERTIFICATE:
            return "not a host certificate"
        if now < self.valid_after:
            return "not yet valid"
        if now >= self.valid_before:
            return "expired"
        if not any(matches(name, principal) for principal in self.principals):
            return "for other names"
        if self.critical:
            return "with critical options, which no host certificate has"
        return self.unsupported


@dataclass(frozen=True)
class PublicKey:
    """A key.

    :ivar kind: its type, such as ``"ssh-ed25519"``; for a certificate, that of the key in it
    :ivar blob: the key itself, without certificate
    """

    kind: str
    blob: bytes
    certificate: Certificate | None = None

    @property
    def fingerprint(self) -> str:
        """``"SHA256:…"``, as ``ssh-keygen -l`` prints it, of the key without its certificate."""
        digest = base64.b64encode(hashlib.sha256(self.blob).digest()).decode()
        return f"SHA256:{digest.rstrip('=')}"


def read(blob: bytes) -> PublicKey:
    """Read a public key or a certificate, and check that it is a possible one.

    :raises ValueError: if it is damaged, of a type that we do not know, or with a wrong signature
    """
    name, at = _string(blob, 0)
    kind = name.decode("ascii", "replace")
    if kind not in _CERTIFIED:
        if kind not in _FIELDS:
            msg = f"its type {kind[:60]!r} is not known"
            raise ValueError(msg)
        _check(kind, blob, at)
        return PublicKey(kind, blob)
    kind = _CERTIFIED[kind]
    _, at = _string(blob, at)  # a nonce
    start = at
    for _ in range(_FIELDS[kind]):
        _, at = _string(blob, at)
    plain = _join(kind.encode()) + blob[start:at]
    _check(kind, plain, len(_join(kind.encode())))
    return PublicKey(kind, plain, _certificate(blob, at))


def _certificate(blob: bytes, at: int) -> Certificate:
    _, kind = _numbers(">QI", blob, at)
    _, at = _string(blob, at + 12)  # the key id
    names, at = _string(blob, at)
    after, before = _numbers(">QQ", blob, at)
    critical, at = _string(blob, at + 16)
    _, at = _string(blob, at)  # extensions
    _, at = _string(blob, at)  # reserved
    ca, end = _string(blob, at)
    signature, at = _string(blob, end)
    if at != len(blob):
        msg = "its certificate has something after its end"
        raise ValueError(msg)
    authority = read(ca)
    if authority.certificate:
        msg = "its certificate was signed with a certificate"
        raise ValueError(msg)
    unsupported = _verify(authority, signature, blob[:end])
    principals: list[str] = []
    at = 0
    while at < len(names):
        principal, at = _string(names, at)
        principals.append(principal.decode("utf-8", "replace"))
    return Certificate(kind, tuple(principals), after, before, critical, ca, unsupported)


def _verify(authority: PublicKey, signature: bytes, data: bytes) -> str:
    """Check a signature; gives the reason if it is of a kind that we do not check.

    :raises ValueError: if it is wrong
    """
    algorithm, at = _string(signature, 0)
    if authority.kind.startswith("sk-") or algorithm == b"ssh-rsa":
        return f"signed with {algorithm.decode('ascii', 'replace')[:60]}, which is not supported"
    raw, _ = _string(signature, at)
    key = _load(authority.kind, authority.blob)
    try:
        if isinstance(key, rsa.RSAPublicKey):
            raw = raw.rjust(key.key_size + 7 >> 3, b"\0")
            key.verify(raw, data, padding.PKCS1v15(), _RSA_HASHES[algorithm])
            return ""
        if algorithm != authority.kind.encode():
            raise InvalidSignature
        if isinstance(key, ec.EllipticCurvePublicKey):
            r, at = _string(raw, 0)
            s, _ = _string(raw, at)
            pair = utils.encode_dss_signature(int.from_bytes(r, "big"), int.from_bytes(s, "big"))
            key.verify(pair, data, ec.ECDSA(_CURVES[authority.kind.rpartition("-")[2].encode()][1]))
        else:
            key.verify(raw, data)
    except (InvalidSignature, KeyError) as exc:
        msg = "its certificate has a wrong signature"
        raise ValueError(msg) from exc
    return ""


def _check(kind: str, blob: bytes, at: int) -> None:
    for _ in range(_FIELDS[kind]):
        _, at = _string(blob, at)
    if at != len(blob):
        msg = "it has something after its end"
        raise ValueError(msg)
    _load(kind, blob)


def _load(kind: str, blob: bytes) -> ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey | rsa.RSAPublicKey:
    """Make a key that can verify; this also finds points that are not on the curve."""
    _, at = _string(blob, 0)
    first, at = _string(blob, at)
    if kind.endswith("ed25519") or kind.startswith("sk-ssh-ed25519"):
        return ed25519.Ed25519PublicKey.from_public_bytes(first)
    second, _ = _string(blob, at)
    if kind == "ssh-rsa":
        numbers = rsa.RSAPublicNumbers(int.from_bytes(first, "big"), int.from_bytes(second, "big"))
        if numbers.n.bit_length() < _LEAST_RSA_BITS:
            msg = f"it is an RSA key of {numbers.n.bit_length()} bits only"
            raise ValueError(msg)
        return numbers.public_key()
    if first not in _CURVES or first.decode() not in kind:
        msg = f"it is on another curve than {kind}"
        raise ValueError(msg)
    return ec.EllipticCurvePublicKey.from_encoded_point(_CURVES[first][0], second)


def _string(data: bytes, at: int) -> tuple[bytes, int]:
    (length,) = _numbers(">I", data, at)
    end = at + 4 + length
    if end > len(data):
        msg = "it is cut short"
        raise ValueError(msg)
    return data[at + 4 : end], end


def _numbers(layout: str, data: bytes, at: int) -> tuple[int, ...]:
    try:
        return struct.unpack_from(layout, data, at)
    except struct.error as exc:
        msg = "it is cut short"
        raise ValueError(msg) from exc


def _join(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def to_text(key: PublicKey) -> str:
    """Write a key, without its certificate, as known_hosts and ``.pub`` files have it."""
    return f"{key.kind} {base64.b64encode(key.blob).decode()}"
