"""Private keys as the text of a key file: looked at, opened, and put as an agent takes them. No files.

OpenSSH's own format (its PROTOCOL.key), PEM and PKCS#8. cryptography reads all three, but opens three of the
ciphers that ``ssh-keygen -Z`` knows, and leaves the comment out: OpenSSH's format is opened here, with
cryptography's ciphers, and read there.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
from dataclasses import dataclass
from typing import Any

import bcrypt
import paramiko
from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from paramiko.pkey import OPENSSH_AUTH_MAGIC

from bokeh_ssh._core.text import clean
from bokeh_ssh._ssh.auth.public_keys import LEAST_RSA_BITS
from bokeh_ssh._ssh.crypto import mldsa, security_key
from bokeh_ssh._ssh.crypto.chacha20_poly1305 import TAG, ChaCha20Poly1305
from bokeh_ssh._ssh.messages import string, strings

#: The cipher's name, the key's length, the IV's, and the block's: what is encrypted is padded to that.
_CIPHERS = {
    "3des-cbc": (24, 8, 8),
    **{f"aes{bits}-{mode}": (bits // 8, 16, 16) for bits in (128, 192, 256) for mode in ("cbc", "ctr")},
    "aes128-gcm@openssh.com": (16, 12, 16),
    "aes256-gcm@openssh.com": (32, 12, 16),
    "chacha20-poly1305@openssh.com": (64, 0, 8),
}
#: How many strings follow the type of a private key, before its comment.
_FIELDS = {
    "ssh-ed25519": 2,
    "ecdsa-sha2-nistp256": 3,
    "ecdsa-sha2-nistp384": 3,
    "ecdsa-sha2-nistp521": 3,
    "ssh-rsa": 6,
    **({mldsa.NAME: 2} if mldsa.AVAILABLE else {}),
}
_BEGIN = b"-----BEGIN OPENSSH PRIVATE KEY-----"
_PLAIN_BLOCK = 8
_PPK = "it is in PuTTY's format: convert it with `puttygen {} -O private-openssh -o NEWFILE`"
_TECTIA = "it is in the format of SSH Communications: convert it with `ssh-keygen -i -f {} > NEWFILE`"
_CONVERT = "convert it with `ssh-keygen -p -f {}`"
_CIPHER = "write it with another cipher: `ssh-keygen -p -Z aes256-ctr -f {}`"


class UnusableKeyError(Exception):
    """A key cannot be used; the text says why. Never leaves the package.

    :ivar locked: it only lacks its passphrase
    :ivar absent: it is in a security key that was not plugged in, or not touched
    :ivar unsigned: it is in an agent that did not sign with it
    """

    def __init__(
        self, message: str, *, locked: bool = False, absent: bool = False, unsigned: bool = False
    ) -> None:
        super().__init__(message)
        self.locked = locked
        self.absent = absent
        self.unsigned = unsigned


class WrongPassphraseError(Exception):
    """The passphrase does not open the key. Never leaves the package."""


@dataclass(frozen=True)
class PrivateKey:
    """A private key that was read.

    :ivar key: as cryptography has it; a ``CompositeKey`` or a ``SecurityKey``, which that does not have
    :ivar for_paramiko: it as paramiko has it
    :ivar comment: what the file calls it; empty where it has no name
    """

    key: Any
    for_paramiko: paramiko.PKey
    comment: str = ""

    def sign(self, data: bytes, algorithm: str) -> bytes:
        """Sign; return the signature as sent (RFC 4253, section 6.6)."""
        if algorithm == "ssh-rsa":  # paramiko 5 does it no more
            signed = self.key.sign(data, padding.PKCS1v15(), hashes.SHA1())  # noqa: S303  # the user's config asks for it
            return string(b"ssh-rsa") + string(signed)
        return signature(self.for_paramiko, data, algorithm)

    def for_agent(self) -> bytes:
        """Return type and numbers, as an agent takes them (draft-ietf-sshm-ssh-agent, section 3.2.2 on)."""
        if isinstance(self.key, (mldsa.CompositeKey, security_key.SecurityKey)):
            return self.key.fields
        text = self.key.private_bytes(*_OPENSSH_FORM)
        _, private = _split(_armoured(text))
        return _fields(private)[0]


_OPENSSH_FORM = (
    serialization.Encoding.PEM,
    serialization.PrivateFormat.OpenSSH,
    serialization.NoEncryption(),
)


@dataclass(frozen=True)
class _Head:
    """What stands in the clear before a private key in OpenSSH's format."""

    cipher: str
    kdf: bytes
    kdf_options: bytes
    public: bytes


def inspect_key(text: bytes | None) -> tuple[bytes | None, bool, bool]:
    """Look what a private key file has.

    :returns: its public half, where it is readable; whether the file is encrypted; whether it is of a type
        that is left to the agent, as those of security keys and those newer than this package are
    """
    if not text:
        return None, False, False
    if _BEGIN not in text:
        return None, b"ENCRYPTED" in text and not other_format(text, ""), False
    try:
        head, _ = _split(_armoured(text))
        kind = clean(strings(head.public, 1)[0], 100)
    except ValueError:
        return None, False, False
    left = bool(head.public) and not _is_supported(kind) and kind != "ssh-dss"  # which nobody uses any more
    return head.public, head.cipher != "none", left


def _is_supported(kind: str) -> bool:
    return kind in _FIELDS or (kind in security_key.NAMES and security_key.is_available())


def other_format(text: bytes, path: str) -> str:
    """Return what to do about a key file in a format that OpenSSH does not read; empty where it is none."""
    if text.startswith(b"PuTTY-User-Key-File"):
        return _PPK.format(path)
    return _TECTIA.format(path) if b"---- BEGIN SSH2 ENCRYPTED PRIVATE KEY ----" in text else ""


def check_supported(text: bytes, path: str) -> None:
    """Refuse a key whose cipher is not supported, before a person is asked for its passphrase.

    :raises UnusableKeyError: if it is such a key
    """
    with contextlib.suppress(ValueError):
        if _BEGIN in text:
            _check_cipher(_split(_armoured(text))[0], path)


def _check_cipher(head: _Head, path: str) -> None:
    if head.cipher not in _CIPHERS or head.kdf != b"bcrypt":
        msg = f"it is encrypted with {head.cipher}, which is not supported: {_CIPHER.format(path)}"
        raise UnusableKeyError(msg)


def load(text: bytes, passphrase: str | None, path: str) -> PrivateKey:
    """Read a private key of any format that OpenSSH reads.

    :param path: the file's name as a shell takes it, for the advice in errors
    :raises WrongPassphraseError: if the passphrase does not open it
    :raises UnusableKeyError: if it is damaged, or of a kind that is not supported
    """
    # An unencodable character must not raise: the error object would hold the passphrase.
    secret = None if passphrase is None else passphrase.encode("utf-8", "surrogatepass")
    comment = b""
    reader: Any = serialization.load_pem_private_key
    if _BEGIN in text:
        text, comment = _opened(text, secret, path)
        secret = None
        reader = _load_opened
    try:
        key = reader(text, secret)
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        if isinstance(exc, UnsupportedAlgorithm) or "unknown" in str(exc).lower():
            msg = f"it is of a kind that is not supported: {_CONVERT.format(path)}"
            raise UnusableKeyError(msg) from exc
        if secret is not None:
            raise WrongPassphraseError from exc
        msg = other_format(text, path) or "it is not a private key that can be read"
        raise UnusableKeyError(msg) from exc
    return PrivateKey(key, _as_paramiko(key), clean(comment, 200))


def _load_opened(text: bytes, _: None) -> Any:
    """Read a key in OpenSSH's format that is not encrypted."""
    kind, rest = strings(_split(_armoured(text))[1][8:], 1)
    if kind == mldsa.NAME.encode():
        return mldsa.CompositeKey(private=strings(rest, 2)[1])
    if clean(kind, 100) in security_key.NAMES:
        return security_key.SecurityKey(security_key.split(_split(_armoured(text))[1][8:])[0])
    return serialization.load_ssh_private_key(text, None)


def _armoured(text: bytes) -> bytes:
    return binascii.a2b_base64(text.partition(_BEGIN)[2].partition(b"-----END")[0])


def _split(body: bytes) -> tuple[_Head, bytes]:
    """Take a key in OpenSSH's format apart: what stands in the clear, and what may be encrypted.

    :raises ValueError: if it is none
    """
    if not body.startswith(OPENSSH_AUTH_MAGIC):
        msg = "it is not in OpenSSH's format"
        raise ValueError(msg)
    cipher, kdf, options, rest = strings(body[len(OPENSSH_AUTH_MAGIC) :], 3)
    if rest[:4] != b"\0\0\0\1":
        msg = "it has several keys"
        raise ValueError(msg)
    public, rest = strings(rest[4:], 1)
    private, tag = strings(rest, 1)
    return _Head(clean(cipher, 100), kdf, options, public), private + tag


def _opened(text: bytes, secret: bytes | None, path: str) -> tuple[bytes, bytes]:
    """Decrypt a key in OpenSSH's format: the same without encryption, and the comment."""
    try:
        head, private = _split(_armoured(text))
        if head.cipher != "none":
            private = _decrypt(head, private, secret, path)
        if len(private) < 8 or private[:4] != private[4:8]:
            raise WrongPassphraseError if head.cipher != "none" else ValueError
        kind = clean(strings(private[8:], 1)[0], 100)
        if not _is_supported(kind):
            msg = f"it is of a kind that is not supported ({kind})"
            raise UnusableKeyError(msg)
        fields, comment = _fields(private)
    except ValueError as exc:  # binascii's among them
        msg = "it is not a private key that can be read"
        raise UnusableKeyError(msg) from exc
    plain = private[:8] + fields + string(comment)
    plain += bytes(range(1, 1 + -len(plain) % _PLAIN_BLOCK))
    head_plain = OPENSSH_AUTH_MAGIC + string(b"none") * 2 + string(b"") + b"\0\0\0\1"
    whole = head_plain + string(head.public) + string(plain)
    armour = base64.encodebytes(whole)
    return _BEGIN + b"\n" + armour + b"-----END OPENSSH PRIVATE KEY-----\n", comment


def _fields(private: bytes) -> tuple[bytes, bytes]:
    """Return the type and the numbers of a decrypted key, and its comment."""
    kind, rest = strings(private[8:], 1)
    if clean(kind, 100) in security_key.NAMES:
        return security_key.split(private[8:])
    parts = strings(rest, _FIELDS[clean(kind, 100)] + 1)
    return b"".join(map(string, (kind, *parts[:-2]))), parts[-2]


def _decrypt(head: _Head, data: bytes, secret: bytes | None, path: str) -> bytes:
    _check_cipher(head, path)
    key_length, iv_length, block = _CIPHERS[head.cipher]
    salt, rest = strings(head.kdf_options, 1)
    rounds = int.from_bytes(rest[:4], "big")
    if not secret:
        raise WrongPassphraseError
    derived = bcrypt.kdf(secret, salt, key_length + iv_length, rounds, ignore_few_rounds=True)
    key, iv = derived[:key_length], derived[key_length:]
    tag = b""
    if head.cipher.startswith("chacha20") or "-gcm" in head.cipher:
        data, tag = data[:-TAG], data[-TAG:]
    if not data or len(data) % block:
        msg = "it is cut off"
        raise ValueError(msg)
    try:
        if head.cipher.startswith("chacha20"):
            return ChaCha20Poly1305(key).open(0, data, tag)
        opener = Cipher(_algorithm(head.cipher, key), _mode(head.cipher, iv, tag)).decryptor()
        return opener.update(data) + opener.finalize()
    except InvalidTag as exc:  # as with ssh: an integrity error here indicates an incorrect passphrase
        raise WrongPassphraseError from exc


def _algorithm(cipher: str, key: bytes) -> Any:
    if cipher != "3des-cbc":
        return algorithms.AES(key)
    try:
        from cryptography.hazmat.decrepit.ciphers.algorithms import TripleDES
    except ImportError:  # cryptography 42
        from cryptography.hazmat.primitives.ciphers.algorithms import TripleDES
    return TripleDES(key)


def _mode(cipher: str, iv: bytes, tag: bytes) -> Any:
    if "-gcm" in cipher:
        return modes.GCM(iv, tag)
    return modes.CTR(iv) if cipher.endswith("-ctr") else modes.CBC(iv)


def _as_paramiko(key: object) -> paramiko.PKey:
    cls: type[paramiko.PKey]
    if isinstance(key, (mldsa.CompositeKey, security_key.SecurityKey)):
        return key
    if isinstance(key, ed25519.Ed25519PrivateKey):
        cls = paramiko.Ed25519Key
    elif isinstance(key, ec.EllipticCurvePrivateKey):
        cls = paramiko.ECDSAKey
    elif isinstance(key, rsa.RSAPrivateKey):
        if key.key_size < LEAST_RSA_BITS:
            msg = f"it has {key.key_size} bits only, and OpenSSH takes {LEAST_RSA_BITS} or more"
            raise UnusableKeyError(msg)
        cls = paramiko.RSAKey
    else:
        msg = f"it is of a kind that is not supported ({type(key).__name__})"
        raise UnusableKeyError(msg)
    try:
        return cls.from_private_key(io.StringIO(key.private_bytes(*_OPENSSH_FORM).decode()))
    except (ValueError, paramiko.SSHException) as exc:
        msg = "it is of a kind that is not supported"  # a curve that SSH has no name for
        raise UnusableKeyError(msg) from exc


def signature(key: paramiko.PKey, data: bytes, algorithm: str) -> bytes:
    """Sign with a paramiko key, whichever way it gives its signature."""
    signature = key.sign_ssh_data(data, algorithm)
    return signature if isinstance(signature, bytes) else signature.asbytes()
