"""ChaCha20 and Poly1305 as OpenSSH puts them together (its PROTOCOL.chacha20poly1305).

The two are cryptography's. What is put together is not RFC 8439's: the nonce is a packet's number, with
64 bits, as the block count has; a packet's length is encrypted with a key of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cryptography.exceptions import InvalidSignature, InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.poly1305 import Poly1305

if TYPE_CHECKING:
    from typing_extensions import Buffer

NAME = "chacha20-poly1305@openssh.com"
KEY = 64
TAG = 16
_HALF = 32
_BLOCK = bytes(64)


class _Keystream:
    """What encrypts with one key, from the first block of a packet on."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._context: Any = None

    def begin(self, number: int) -> Any:
        nonce = bytes(8) + number.to_bytes(8, "big")  # the block count, then the nonce itself
        if self._context is None:
            made = Cipher(algorithms.ChaCha20(self._key, nonce), None).encryptor()
            if hasattr(made, "reset_nonce"):  # cryptography 43; saves half of a small packet's time
                self._context = made
            return made
        self._context.reset_nonce(nonce)
        return self._context


class ChaCha20Poly1305:
    """The cipher under one key; for one thread at a time.

    :param key: of 64 bytes; the second half is for lengths alone
    """

    def __init__(self, key: bytes) -> None:
        self._main = _Keystream(key[:_HALF])
        self._lengths = _Keystream(key[_HALF:])

    def seal(self, number: int, length: bytes, plain: Buffer) -> bytes:
        """Encrypt a packet with its length, and sign both."""
        stream = self._main.begin(number)
        tag_key = stream.update(_BLOCK)[:_HALF]
        sealed = self._lengths.begin(number).update(length) + stream.update(plain)
        return bytes(sealed + Poly1305.generate_tag(tag_key, sealed))

    def length(self, number: int, sealed: Buffer) -> bytes:
        """Decrypt a packet's length, which nothing vouches for yet."""
        return bytes(self._lengths.begin(number).update(sealed))

    def open(self, number: int, sealed: Buffer, tag: Buffer, *, skip: int = 0) -> bytes:
        """Decrypt what was signed, but for the length's ``skip`` bytes at its beginning.

        :raises InvalidTag: if the signature is not right
        """
        stream = self._main.begin(number)
        tag_key = stream.update(_BLOCK)[:_HALF]
        signed = memoryview(sealed)
        try:
            Poly1305.verify_tag(tag_key, signed, bytes(tag))
        except InvalidSignature as exc:
            raise InvalidTag from exc
        return bytes(stream.update(signed[skip:]))


def is_available() -> bool:
    """Return whether cryptography has both; one that keeps to FIPS has neither."""
    try:
        ChaCha20Poly1305(bytes(KEY)).seal(0, b"", b"")
    except UnsupportedAlgorithm:
        return False
    return True
