"""ML-DSA-44 and Ed25519 put together as one kind of key, as OpenSSH 10.6 has it (``ssh-mldsa44-ed25519``).

The composite of draft-ietf-lamps-pq-composite-sigs: both keys sign the same hash, and both must be right. The
two are cryptography's; one that is older than ML-DSA leaves this kind out.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ed25519

from bokeh_ssh._ssh.messages import string, strings

if TYPE_CHECKING:
    import paramiko
    from paramiko import PKey as _Key
else:
    _Key = object  # what is trusted is found out without paramiko; it asks for these methods alone

NAME = "ssh-mldsa44-ed25519"
_LABEL = b"COMPSIG-MLDSA44-Ed25519-SHA512"
_PREFIX = b"CompositeAlgorithmSignatures2025" + _LABEL + b"\0"
#: How long are the first's public key and signature, and both private keys.
_PUBLIC = 1312
_SIGNATURE = 2420
_PRIVATE = 32
_ED25519 = 32

_mldsa: Any = None
try:
    from cryptography.hazmat.primitives.asymmetric import mldsa as _mldsa
except ImportError:  # cryptography before 47
    pass


def _is_available() -> bool:
    try:
        return bool(_mldsa and _mldsa.MLDSA44PrivateKey.from_seed_bytes(bytes(_PRIVATE)))
    except UnsupportedAlgorithm:
        return False


#: Whether cryptography and what it is built on have ML-DSA.
AVAILABLE = _is_available()


def is_public(blob: bytes) -> bool:
    """Return whether a public key that names this kind has the right length."""
    return len(blob) == len(string(NAME.encode())) + 4 + _PUBLIC + _ED25519


class CompositeKey(_Key):
    """A key of this kind, as paramiko has others.

    :param data: what a server sends as its key (``paramiko.Message``)
    :param private: both private keys
    :raises ValueError: if it is not one
    """

    def __init__(self, data: paramiko.Message | None = None, private: bytes = b"") -> None:
        if private:
            if len(private) != _PRIVATE + _ED25519:
                msg = "it is cut off"
                raise ValueError(msg)
            seeds = private[:_PRIVATE], private[_PRIVATE:]
            self._keys: tuple[Any, ...] = (
                _mldsa.MLDSA44PrivateKey.from_seed_bytes(seeds[0]),
                ed25519.Ed25519PrivateKey.from_private_bytes(seeds[1]),
            )
            raw = b"".join(key.public_key().public_bytes_raw() for key in self._keys)
            self._blob = string(NAME.encode()) + string(raw)
        else:
            self._keys = ()
            self._blob = data.asbytes() if data else b""
        if not is_public(self._blob):
            msg = "it is cut off"
            raise ValueError(msg)
        self._private = private
        self._raw = strings(self._blob, 2)[1]
        self.public_blob = None

    @property
    def fields(self) -> bytes:
        """Type, public and private key, as an agent takes them."""
        return self._blob + string(self._private)

    def asbytes(self) -> bytes:
        return self._blob

    def get_name(self) -> str:
        return NAME

    def get_bits(self) -> int:
        return 8 * len(self._raw)

    def can_sign(self) -> bool:
        return bool(self._keys)

    def sign_ssh_data(self, data: bytes, algorithm: str | None = None) -> Any:
        first, second = self._keys
        hashed = _PREFIX + hashlib.sha512(data).digest()
        return string(NAME.encode()) + string(first.sign(hashed, _LABEL) + second.sign(hashed))

    def verify_ssh_sig(self, data: bytes, msg: paramiko.Message) -> bool:
        if msg.get_text() != NAME:
            return False
        signed, hashed = msg.get_binary(), _PREFIX + hashlib.sha512(data).digest()
        try:
            first = _mldsa.MLDSA44PublicKey.from_public_bytes(self._raw[:_PUBLIC])
            first.verify(signed[:_SIGNATURE], hashed, _LABEL)
            second = ed25519.Ed25519PublicKey.from_public_bytes(self._raw[_PUBLIC:])
            second.verify(signed[_SIGNATURE:], hashed)
        except (InvalidSignature, ValueError):
            return False
        return True
