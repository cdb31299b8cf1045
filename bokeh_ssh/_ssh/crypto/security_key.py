"""Private keys that stay in a security key (FIDO): what their files say, and a signature by the device.

OpenSSH's PROTOCOL.u2f, and the FIDO Alliance's CTAP 2 and 1 (U2F). Yubico's ``fido2``, where it is installed,
talks to the device.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from bokeh_ssh._ssh.messages import string, strings

if TYPE_CHECKING:
    from paramiko import PKey as _Key
else:
    _Key = object  # what is trusted is found out without paramiko; it asks for these methods alone

#: How many strings follow the type of such a key, before the application.
NAMES = {"sk-ssh-ed25519@openssh.com": 1, "sk-ecdsa-sha2-nistp256@openssh.com": 2}
_TOUCH, _VERIFY = 0x01, 0x04  # flags of the key: SSH_SK_USER_PRESENCE_REQD, SSH_SK_USER_VERIFICATION_REQD
#: Seconds for which a person may look for the device; most devices give up earlier.
_PATIENCE = 60.0
_POLL = 0.2
_UNTOUCHED = "nobody touched the security key in time"
#: Of ISO 7816, as U2F uses them: nobody has touched it yet; the key is not of this device.
_NOT_TOUCHED, _NOT_MINE = 0x6985, 0x6A80
_HEAD = 32  # of what is signed: a hash of the application


class DeviceError(Exception):
    """The device gave no signature; the text says why. Never leaves the package.

    :ivar locked: it only lacks its PIN
    :ivar absent: it was not plugged in, or nobody touched it
    """

    def __init__(self, message: str, *, locked: bool = False, absent: bool = False) -> None:
        super().__init__(message)
        self.locked = locked
        self.absent = absent


def is_available() -> bool:
    """Return whether there is what talks to devices."""
    return importlib.util.find_spec("fido2") is not None


def split(private: bytes) -> tuple[bytes, bytes]:
    """Take apart a decrypted key of a file: what an agent takes of it, and its comment.

    :raises ValueError: if it is cut off
    """
    kind, rest = strings(private, 1)
    *_, rest = strings(rest, NAMES[kind.decode("ascii", "replace")] + 1)
    *_, rest = strings(rest[1:], 2)  # flags; the handle, and a field that is reserved
    return private[: len(private) - len(rest)], strings(rest, 1)[0]


class SecurityKey(_Key):
    """A key in a security key, as paramiko has others; it signs in its own way.

    :param fields: type, public key, application, flags and handle, as an agent and key files have them
    :raises ValueError: if it is cut off
    """

    def __init__(self, fields: bytes) -> None:
        self.fields = fields
        kind, rest = strings(fields, 1)
        self._kind = kind.decode("ascii", "replace")
        *public, application, rest = strings(rest, NAMES[self._kind] + 1)
        self._flags = rest[0] if rest else 0
        self._handle = strings(rest[1:], 1)[0]
        self._blob = b"".join(map(string, (kind, *public, application)))
        self._application = application.decode("utf-8")
        self.public_blob = None

    def asbytes(self) -> bytes:
        return self._blob

    def get_name(self) -> str:
        return self._kind

    def can_sign(self) -> bool:
        return True

    def sign(
        self,
        data: bytes,
        pins: Callable[[], Iterator[str]],
        touch: Callable[[], object],
        ended: Callable[[], bool],
    ) -> bytes:
        """Let the device sign, which waits for a touch; return the signature as sent.

        :param pins: yields what may be its PIN; asks a person where there is one
        :param touch: called when it waits for a touch
        :param ended: whether nobody waits for it any more
        :raises DeviceError: if there is no signature within a minute
        """
        from fido2.ctap import CtapError
        from fido2.hid import ConnectionFailure, CtapHidDevice

        wait = _Touch(touch, ended)
        hashed = hashlib.sha256(data).digest()
        devices = []
        try:
            with contextlib.ExitStack() as stack:
                for device in CtapHidDevice.list_devices():
                    stack.callback(device.close)
                    devices.append(device)
                for device in devices:
                    found = self._sign_with(device, hashed, pins, wait, probe=len(devices) > 1)
                    if found:
                        return string(self._kind) + found
        except (OSError, ConnectionFailure, CtapError, ValueError, TypeError) as exc:
            # ValueError: it has no PIN at all, or says what is no answer; as does TypeError
            msg = f"the security key cannot be used ({exc})"
            raise DeviceError(msg) from exc
        msg = "it was made with another security key than is plugged in"
        if not devices:
            msg = "no security key is plugged in, or this account may not use it"
        raise DeviceError(msg, absent=True)

    def _sign_with(
        self, device: Any, hashed: bytes, pins: Callable[[], Iterator[str]], wait: _Touch, *, probe: bool
    ) -> bytes:
        """Let this device sign; empty if the key is not of it."""
        from fido2.ctap import CtapError
        from fido2.ctap1 import Ctap1
        from fido2.ctap2.base import Ctap2

        try:
            ctap = Ctap2(device)
        except ValueError:  # it only speaks U2F
            return self._sign_u2f(Ctap1(device), hashed, wait)
        errors = CtapError.ERR
        try:
            if probe:
                self._assert(ctap, hashed, {"up": False})
            signed = self._verified(ctap, hashed, pins, wait)
        except CtapError as exc:
            if exc.code in (errors.NO_CREDENTIALS, errors.INVALID_CREDENTIAL):
                return b""
            late = (errors.KEEPALIVE_CANCEL, errors.USER_ACTION_TIMEOUT, errors.ACTION_TIMEOUT)
            if exc.code in late:
                raise DeviceError(_UNTOUCHED, absent=True) from exc
            why = {
                errors.OPERATION_DENIED: "the security key refused, or its touch was declined",
                errors.PIN_NOT_SET: "the key wants a PIN, and the security key has none yet",
                errors.PIN_AUTH_BLOCKED: "too many wrong PINs: unplug the security key and plug it in again",
                errors.PIN_BLOCKED: "its PIN is blocked after too many wrong ones: only a reset helps",
            }
            msg = why.get(exc.code, f"the security key answers {exc}")
            raise DeviceError(msg) from exc
        about = bytes(signed.auth_data)[_HEAD:][:5]  # flags, counter
        return string(self._plain(signed.signature)) + about

    def _verified(self, ctap: Any, hashed: bytes, pins: Callable[[], Iterator[str]], wait: _Touch) -> Any:
        """Let the device sign, after a finger or a PIN if the key or the device wants that."""
        from fido2.ctap import CtapError

        touched = bool(self._flags & _TOUCH)
        options = {"up": touched}
        if not self._flags & _VERIFY:
            try:
                return self._assert(ctap, hashed, options, event=wait.begin(needed=touched))
            except CtapError as exc:
                if exc.code != CtapError.ERR.PUAT_REQUIRED:
                    raise
        if ctap.info.options.get("uv"):
            return self._assert(ctap, hashed, {**options, "uv": True}, event=wait.begin())
        proof = self._prove(ctap, hashed, pins)
        return self._assert(ctap, hashed, options, event=wait.begin(needed=touched), **proof)

    def _prove(self, ctap: Any, hashed: bytes, pins: Callable[[], Iterator[str]]) -> dict[str, Any]:
        """Open the device with its PIN; return the proof of that."""
        from fido2.ctap import CtapError
        from fido2.ctap2.pin import ClientPin

        client = ClientPin(ctap)
        for pin in pins():
            try:
                token = client.get_pin_token(pin, ClientPin.PERMISSION.GET_ASSERTION, self._application)
            except CtapError as exc:
                if exc.code != CtapError.ERR.PIN_INVALID:
                    raise
                continue
            proof = client.protocol.authenticate(token, hashed)
            return {"pin_uv_param": proof, "pin_uv_protocol": client.protocol.VERSION}
        msg = "its PIN was not given"
        raise DeviceError(msg, locked=True)

    def _assert(self, ctap: Any, hashed: bytes, options: dict[str, bool], **more: Any) -> Any:
        known = [{"type": "public-key", "id": self._handle}]
        return ctap.get_assertion(self._application, hashed, known, options=options, **more)

    def _sign_u2f(self, ctap: Any, hashed: bytes, wait: _Touch) -> bytes:
        from fido2.ctap1 import ApduError

        application = hashlib.sha256(self._application.encode()).digest()
        asked = False  # one that has not made the key is not to be touched
        while not wait.is_set():
            try:
                signed = ctap.authenticate(hashed, application, self._handle)
            except ApduError as exc:
                if exc.code == _NOT_MINE:
                    return b""
                if exc.code != _NOT_TOUCHED:
                    msg = f"the security key answers {exc.code:#x}"
                    raise DeviceError(msg) from exc
                if not asked:
                    wait.begin()
                    asked = True
                time.sleep(_POLL)
                continue
            about = struct.pack(">BI", signed.user_presence, signed.counter)
            return string(self._plain(signed.signature)) + about
        raise DeviceError(_UNTOUCHED, absent=True)

    def _plain(self, signature: bytes) -> bytes:
        """Return a device's signature in SSH's form."""
        if self._kind.startswith("sk-ssh-"):
            return signature
        return b"".join(string(_mpint(number)) for number in decode_dss_signature(signature))


class _Touch(threading.Event):
    """A touch that a device waits for; set when it is to wait no longer."""

    def __init__(self, announce: Callable[[], object], ended: Callable[[], bool]) -> None:
        super().__init__()
        self._announce = announce
        self._ended = ended
        self._deadline = time.monotonic() + _PATIENCE

    def begin(self, *, needed: bool = True) -> _Touch:
        """Say that the device waits from now on, if it does; a person may have looked for a PIN before."""
        if needed:
            self._announce()
        self._deadline = time.monotonic() + _PATIENCE
        return self

    def is_set(self) -> bool:
        return super().is_set() or time.monotonic() > self._deadline or self._ended()


def _mpint(number: int) -> bytes:
    return number.to_bytes(number.bit_length() // 8 + 1, "big")
