"""Key revocation lists as ``ssh-keygen -k`` writes them (OpenSSH's PROTOCOL.krl). No files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from bokeh_ssh._ssh.auth.public_keys import PublicKey
from bokeh_ssh._ssh.messages import strings

MAGIC = b"SSHKRL\n\0"
#: The version of the format, before the list's own, its time and its flags.
_FORMAT = b"\0\0\0\1"
_HEAD = len(MAGIC) + 4 + 3 * 8
_CERTIFICATES, _KEYS, _SHA1, _SIGNATURE, _SHA256, _EXTENSION = 1, 2, 3, 4, 5, 255
_SERIALS, _RANGE, _BITMAP, _IDS, _CERTIFICATE_EXTENSION = 0x20, 0x21, 0x22, 0x23, 0x39


def revokes(krl: bytes, key: PublicKey) -> bool:
    """Return whether a list has a key, the CA of its certificate, or the certificate.

    A signature of the list is not looked at, as by ``ssh``: whoever can write the file is trusted.

    :raises ValueError: if the list is damaged, or has a part that is not known and may not be skipped
    """
    if krl[len(MAGIC) :][:4] != _FORMAT:
        msg = "its version is not known"
        raise ValueError(msg)
    _, _, rest = strings(krl[_HEAD:], 2)
    blobs = [key.blob, *([key.certificate.ca] if key.certificate else [])]
    found = False
    for kind, section in _sections(rest):
        if kind == _CERTIFICATES:
            found |= _revokes_certificate(section, key)
        elif kind in (_KEYS, _SHA1, _SHA256):
            hashed = {_SHA1: hashlib.sha1, _SHA256: hashlib.sha256}.get(kind)
            wanted = {hashed(blob).digest() if hashed else blob for blob in blobs}
            found |= not wanted.isdisjoint(_all_strings(section))
        elif kind != _SIGNATURE:
            _skip(kind, _EXTENSION, section)
    return found


def _revokes_certificate(section: bytes, key: PublicKey) -> bool:
    """Return whether a section about one CA's certificates has that of a key."""
    ca, _, rest = strings(section, 2)
    certificate = key.certificate
    content = certificate.content if certificate and ca in (b"", certificate.ca) else None
    serial = content.serial if content else 0  # which is no number that a list could revoke
    found = False
    for kind, data in _sections(rest):
        if kind == _SERIALS:
            found |= serial > 0 and any(serial == _number(data[at : at + 8]) for at in range(0, len(data), 8))
        elif kind == _RANGE:
            found |= serial > 0 and _number(data[:8]) <= serial <= _number(data[8:16])
        elif kind == _BITMAP:
            at = serial - _number(data[:8])
            found |= serial > 0 and at >= 0 and bool(_number(strings(data[8:], 1)[0]) >> at & 1)
        elif kind == _IDS:
            found |= content is not None and content.key_id in list(_all_strings(data))
        else:
            _skip(kind, _CERTIFICATE_EXTENSION, data)
    return found


def _sections(data: bytes) -> Iterator[tuple[int, bytes]]:
    while data:
        section, rest = strings(data[1:], 1)
        yield data[0], section
        data = rest


def _all_strings(data: bytes) -> Iterator[bytes]:
    while data:
        one, data = strings(data, 1)
        yield one


def _skip(kind: int, extension: int, data: bytes) -> None:
    if kind != extension or strings(data, 1)[1][:1] != b"\0":
        msg = f"it has a part that is not known ({kind})"
        raise ValueError(msg)


def _number(data: bytes) -> int:
    return int.from_bytes(data, "big")
