"""A security key in software: it speaks CTAP 2, or U2F alone, as a device on USB does."""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
import threading
from collections.abc import Callable, Mapping
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from fido2 import cbor
from fido2.ctap import CtapDevice, CtapError
from fido2.hid import CAPABILITY, CTAPHID

_GET_ASSERTION, _GET_INFO, _CLIENT_PIN = 2, 4, 6
_KEY_AGREEMENT, _PIN_TOKEN = 2, 5
_PRESENT, _VERIFIED = 1, 4
_ERR = CtapError.ERR
_NO_IV = bytes(16)


class SoftToken(CtapDevice):
    """A device. The handles of its keys are their private halves, as in OpenSSH's own tests.

    :param pin: its PIN; None if it has none yet
    :param touch: waits for a finger; false if none came
    :param u2f: it is an old one, which only speaks U2F
    :param foreign: it has made none of the keys
    :param info: what it answers in place of what it can
    :param pins: the protocols for its PIN that it knows
    """

    def __init__(
        self,
        *,
        pin: str | None = None,
        touch: Callable[[], bool] = lambda: True,
        u2f: bool = False,
        foreign: bool = False,
        info: bytes = b"",
        pins: tuple[int, ...] = (1,),
    ) -> None:
        self._pin, self._touch, self._u2f, self._foreign = pin, touch, u2f, foreign
        self._wrong_info, self._pins = info, pins
        self._counter = 0
        self._token = os.urandom(32)
        self._agreed = ec.generate_private_key(ec.SECP256R1())
        self.closed = False
        self.signed = 0

    @property
    def capabilities(self) -> int:
        return CAPABILITY(0) if self._u2f else CAPABILITY.CBOR

    def close(self) -> None:
        self.closed = True

    @classmethod
    def list_devices(cls) -> Any:
        return iter(())

    def call(
        self,
        cmd: int,
        data: bytes = b"",
        event: threading.Event | None = None,
        on_keepalive: Callable[[Any], None] | None = None,
    ) -> bytes:
        if cmd == CTAPHID.MSG:
            return self._u2f_answer(data)
        assert cmd == CTAPHID.CBOR, cmd
        words = cbor.decode(data[1:]) if data[1:] else {}
        try:
            if data[0] == _GET_INFO:
                if self._wrong_info:
                    return self._wrong_info
                return b"\0" + cbor.encode(self._info())
            if data[0] == _CLIENT_PIN:
                return b"\0" + cbor.encode(self._client_pin(words))
            assert data[0] == _GET_ASSERTION, data[0]
            return b"\0" + cbor.encode(self._assert(words, event or threading.Event()))
        except CtapError as exc:
            return bytes((exc.code,))

    def _info(self) -> dict[int, Any]:
        options = {"rk": True, "up": True, "clientPin": self._pin is not None}
        return {1: ["FIDO_2_0"], 3: bytes(16), 4: options, 6: list(self._pins)}

    def _client_pin(self, words: Mapping[int, Any]) -> dict[int, Any]:
        if words[2] == _KEY_AGREEMENT:
            numbers = self._agreed.public_key().public_numbers()
            x, y = (number.to_bytes(32, "big") for number in (numbers.x, numbers.y))
            return {1: {1: 2, 3: -25, -1: 1, -2: x, -3: y}}
        assert words[2] == _PIN_TOKEN, words
        if self._pin is None:
            raise CtapError(_ERR.PIN_NOT_SET)
        there = words[3]
        point = ec.EllipticCurvePublicNumbers(
            int.from_bytes(there[-2], "big"), int.from_bytes(there[-3], "big"), ec.SECP256R1()
        )
        shared = hashlib.sha256(self._agreed.exchange(ec.ECDH(), point.public_key())).digest()
        cipher = Cipher(algorithms.AES(shared), modes.CBC(_NO_IV))
        opener = cipher.decryptor()
        if opener.update(words[6]) + opener.finalize() != hashlib.sha256(self._pin.encode()).digest()[:16]:
            raise CtapError(_ERR.PIN_INVALID)
        writer = cipher.encryptor()
        return {2: writer.update(self._token) + writer.finalize()}

    def _assert(self, words: Mapping[int, Any], stop: threading.Event) -> dict[int, Any]:
        if self._foreign:
            raise CtapError(_ERR.NO_CREDENTIALS)
        flags = 0
        if 6 in words:
            if not hmac.compare_digest(words[6], hmac.digest(self._token, words[2], "sha256")[:16]):
                raise CtapError(_ERR.PIN_AUTH_INVALID)
            flags |= _VERIFIED
        if words.get(5, {}).get("up", True):
            while not self._touch():
                if stop.is_set():
                    raise CtapError(_ERR.KEEPALIVE_CANCEL)
            flags |= _PRESENT
        data = hashlib.sha256(words[1].encode()).digest() + self._flagged(flags)
        handle = words[3][0]["id"]
        return {1: {"id": handle, "type": "public-key"}, 2: data, 3: self._sign(handle, data + words[2])}

    def _u2f_answer(self, apdu: bytes) -> bytes:
        _, instruction, control, _, size = struct.unpack(">BBBBxH", apdu[:7])
        assert (instruction, control) == (2, 3), apdu[:7]
        body = apdu[7:][:size]
        challenge, application, handle = body[:32], body[32:64], body[65:][: body[64]]
        if self._foreign:
            return struct.pack(">H", 0x6A80)
        if not self._touch():
            return struct.pack(">H", 0x6985)
        about = self._flagged(_PRESENT)
        return about + self._sign(handle, application + about + challenge) + struct.pack(">H", 0x9000)

    def _flagged(self, flags: int) -> bytes:
        self._counter += 1
        return bytes((flags,)) + struct.pack(">I", self._counter)

    def _sign(self, handle: bytes, data: bytes) -> bytes:
        self.signed += 1
        if handle.startswith(b"-----BEGIN"):
            key = serialization.load_pem_private_key(handle, None)
            assert isinstance(key, ec.EllipticCurvePrivateKey)
            return key.sign(data, ec.ECDSA(hashes.SHA256()))
        return ed25519.Ed25519PrivateKey.from_private_bytes(handle[:32]).sign(data)
