"""ChaCha20 and Poly1305 as OpenSSH puts them together (its PROTOCOL.chacha20poly1305).

The two are cryptography's. What is put together is not RFC 8439's: the nonce is a packet's number, with
64 bits, as the block count has; a packet's length is encrypted with a key of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.poly1305 import Poly1305

if TYPE_CHECKING:
    from typing_extensions import Buffer

KEY = 64
TAG = 16
_HALF = 32
_BLOCK = bytes(64)


def _keystream(key: bytes, number: int) -> Any:
    """Make what encrypts, from the first block on: the count, then the nonce."""
    nonce = bytes(8) + number.to_bytes(8, "big")
    return Cipher(algorithms.ChaCha20(key, nonce), None).encryptor()


class ChaCha20Poly1305:
    """Both directions of the cipher under one key.

    :param key: of 64 bytes; the second half is for lengths alone
    """

    def __init__(self, key: bytes) -> None:
        self._main = key[:_HALF]
        self._lengths = key[_HALF:]

    def seal(self, number: int, length: bytes, plain: bytes) -> bytes:
        """Encrypt a packet with its length, and sign both."""
        stream = _keystream(self._main, number)
        tag_key = stream.update(_BLOCK)[:_HALF]
        sealed = _keystream(self._lengths, number).update(length) + stream.update(plain)
        return bytes(sealed + Poly1305.generate_tag(tag_key, sealed))

    def length(self, number: int, sealed: Buffer) -> bytes:
        """Decrypt a packet's length, which nothing vouches for yet."""
        return bytes(_keystream(self._lengths, number).update(sealed))

    def open(self, number: int, sealed: Buffer, tag: Buffer, *, skip: int = 0) -> bytes:
        """Decrypt what was signed, but for the length's ``skip`` bytes at its beginning.

        :raises InvalidTag: if the signature is not right
        """
        stream = _keystream(self._main, number)
        tag_key = stream.update(_BLOCK)[:_HALF]
        signed = memoryview(sealed)
        try:
            Poly1305.verify_tag(tag_key, signed, bytes(tag))
        except InvalidSignature as exc:
            raise InvalidTag from exc
        return bytes(stream.update(signed[skip:]))
