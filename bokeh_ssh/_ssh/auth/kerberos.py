"""Kerberos tickets, by the system's GSS-API library (RFC 2743, RFC 4121): for logins, and to be shown.

paramiko 5 has no GSSAPI. The ``gssapi`` package is used where it is installed, and else the library itself:
the package has no wheel for Linux, and building it takes a compiler.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from bokeh_ssh._core.text import clean
from bokeh_ssh._core.waiting import in_time

_T = TypeVar("_T")

#: The mechanism Kerberos V5 (RFC 1964), as the bytes of its object identifier, and as a login names it.
_KRB5 = bytes.fromhex("2a864886f712010202")
MECHANISM = bytes((6, len(_KRB5))) + _KRB5
_HOST_NAME = bytes.fromhex("2a864886f71201020104")
_USER_NAME = bytes.fromhex("2a864886f71201020101")
_DELEGATE, _MUTUAL, _INTEGRITY = 1, 2, 32
_CONTINUE = 1
_INITIATE = 1
_NO_CREDENTIALS = 7
_EXPIRED = 11
#: MIT Kerberos on Linux and BSD, and Heimdal.
_LIBRARIES = ("libgssapi_krb5.so.2", "libgssapi.so.3", "libgssapi.so.10")
#: The first of Kerberos' own error numbers (krb5.h, KRB5KDC_ERR_NONE).
_FIRST = -1765328384
_MOST_TEXT = 300


class KerberosError(Exception):
    """Why a ticket cannot be used. Never leaves the package.

    :ivar hint: the next step
    :ivar temporary: whether it may work a little later, with nothing done about it
    :ivar has_run_out: whether there is a ticket that was good until some time ago
    """

    def __init__(self, text: str, hint: str, *, temporary: bool = False, has_run_out: bool = False) -> None:
        super().__init__(text)
        self.hint = hint
        self.temporary = temporary
        self.has_run_out = has_run_out


class _GSSError(Exception):
    def __init__(self, major: int, minor: int, text: str) -> None:
        super().__init__(text)
        self.routine = major >> 16 & 0xFF
        self.number = (minor - _FIRST) & 0xFFFFFFFF  # as Kerberos counts its errors


@dataclass(frozen=True)
class Ticket:
    """Who the account's ticket is for, and for how many seconds it is still good."""

    principal: str
    seconds: float


class Context(Protocol):
    """A security context with a machine, from our side, of one of the two libraries.

    :ivar complete: whether both sides have proved who they are
    :ivar principal: who we are, once it is complete
    :ivar delegated: whether the machine has got a ticket to act with
    """

    @property
    def complete(self) -> bool: ...

    @property
    def principal(self) -> str: ...

    @property
    def delegated(self) -> bool: ...

    def step(self, token: bytes) -> bytes:
        """Take the machine's token, and return the next one for it; empty where there is none."""

    def sign(self, data: bytes) -> bytes:
        """Return the check sum (MIC) that proves that ``data`` is ours."""


class _Library(Protocol):
    def begin(self, service: str, client: str | None, delegate: bool) -> Context: ...

    def find_ticket(self, client: str | None) -> Ticket: ...


@contextlib.contextmanager
def explained(host: str = "") -> Iterator[None]:
    """Turn the errors of a library about a machine of that name into :class:`KerberosError`."""
    try:
        yield
    except _GSSError as exc:
        raise _explain(exc, host) from exc


def begin_context(host: str, *, client: str | None, delegate: bool, timeout: float) -> tuple[Context, bytes]:
    """Begin a security context; return its first token too, which is made before anything is sent.

    :param host: the machine's name, as its keytab has it
    :param client: the principal whose ticket is used; None leaves that to Kerberos' own settings
    :param delegate: whether the machine gets a ticket of its own to act with; only a ticket that may be
        forwarded gives one
    :param timeout: seconds for the KDC, which is asked for a ticket for the machine
    :raises KerberosError: if there is no ticket, or none for that machine
    """
    library = _find_library()

    def begin() -> tuple[Context, bytes]:
        context = library.begin(f"host@{host}", client, delegate)
        return context, context.step(b"")

    with explained(host):
        return _within(timeout, begin)


def find_ticket(*, client: str | None = None, timeout: float) -> Ticket:
    """Return the account's ticket (``klist``).

    :param client: the principal whose ticket is wanted; None takes the one that is used by default
    :param timeout: seconds; what keeps the tickets may be a service
    :raises KerberosError: if there is none, or it has run out
    """
    library = _find_library()
    with explained():
        return _within(timeout, lambda: library.find_ticket(client))


def _find_library() -> _Library:
    try:
        import gssapi
    except (ImportError, OSError):  # OSError: it is there, and the library that it wants is not
        pass
    else:
        return _Package(gssapi)
    for name in _LIBRARIES:
        with contextlib.suppress(OSError):
            return _Native(ctypes.CDLL(name))
    hint = "install libgssapi-krb5-2 (Debian), krb5-libs (Fedora), or: pip install gssapi"
    msg = "there is no Kerberos library"
    raise KerberosError(msg, hint)


def _within(timeout: float, work: Callable[[], _T]) -> _T:
    """Do what may ask a KDC."""
    try:
        return in_time(work, timeout, "bokeh-ssh kerberos")
    except TimeoutError as exc:
        msg = f"no KDC answered within {timeout:g} s"
        raise KerberosError(msg, "check the network, a VPN, and krb5.conf", temporary=True) from exc


def _explain(error: _GSSError, host: str) -> KerberosError:
    number, said = error.number, clean(str(error), _MOST_TEXT)
    if number == 32 or error.routine == _EXPIRED:
        return KerberosError("the ticket has run out", "run kinit", has_run_out=True)
    if number == 7:  # KRB5KDC_ERR_S_PRINCIPAL_UNKNOWN
        hint = "check HostName in your ssh config, or name the machine in GSSAPIServerIdentity"
        return KerberosError(f"the KDC knows no machine of the name {host} ({said})", hint)
    if number in (154, 156, 220):  # KRB5_REALM_UNKNOWN, KRB5_KDC_UNREACH, KRB5_REALM_CANT_RESOLVE
        return KerberosError(said, "check the network, a VPN, and krb5.conf", temporary=True)
    if number in (37, 148):  # KRB5KRB_AP_ERR_SKEW, KRB5_KDCREP_SKEW
        return KerberosError(said, "set the clocks of both machines")
    if error.routine == _NO_CREDENTIALS:
        return KerberosError(f"there is no ticket ({said})", "run kinit")
    return KerberosError(said or "it failed, and nothing says why", "see what klist says")


class _Package:
    """The ``gssapi`` package."""

    def __init__(self, module: Any) -> None:
        self._gssapi = module

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except self._gssapi.exceptions.GSSError as exc:
            raise _GSSError(exc.maj_code, exc.min_code, exc.gen_message()) from exc

    def _find(self, client: str | None) -> Any:
        gssapi = self._gssapi
        name = None if client is None else gssapi.Name(client, gssapi.NameType.user)
        return gssapi.Credentials(name=name, mechs=[gssapi.MechType.kerberos], usage="initiate")

    def begin(self, service: str, client: str | None, delegate: bool) -> Context:
        gssapi = self._gssapi
        with self._translated():
            return _PackageContext(
                gssapi.SecurityContext(
                    name=gssapi.Name(service, gssapi.NameType.hostbased_service),
                    creds=self._find(client),  # first: where there is no ticket, no name is looked up
                    mech=gssapi.MechType.kerberos,
                    flags=_MUTUAL | _INTEGRITY | (_DELEGATE if delegate else 0),
                    usage="initiate",
                ),
                self._translated,
            )

    def find_ticket(self, client: str | None) -> Ticket:
        with self._translated():
            found = self._find(client)
            return Ticket(str(found.name), float(found.lifetime))


class _PackageContext:
    def __init__(
        self, context: Any, translated: Callable[[], contextlib.AbstractContextManager[None]]
    ) -> None:
        self._context = context
        self._translated = translated

    @property
    def complete(self) -> bool:
        return bool(self._context.complete)

    @property
    def principal(self) -> str:
        with self._translated():
            return str(self._context.initiator_name)

    @property
    def delegated(self) -> bool:
        return bool(int(self._context.actual_flags) & _DELEGATE)

    def step(self, token: bytes) -> bytes:
        with self._translated():
            return self._context.step(token or None) or b""

    def sign(self, data: bytes) -> bytes:
        with self._translated():
            return bytes(self._context.get_signature(data))


class _Buffer(ctypes.Structure):
    _fields_ = (("length", ctypes.c_size_t), ("value", ctypes.c_void_p))


class _OID(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint32), ("elements", ctypes.c_void_p))


class _OIDSet(ctypes.Structure):
    _fields_ = (("count", ctypes.c_size_t), ("elements", ctypes.POINTER(_OID)))


class _Held:
    """Bytes of ours that the library reads; they live as long as this does."""

    def __init__(self, data: bytes) -> None:
        self._data = ctypes.create_string_buffer(data, len(data))
        at = ctypes.cast(self._data, ctypes.c_void_p)
        self.oid, self.buffer = _OID(len(data), at), _Buffer(len(data), at)


class _Native:
    """The library itself (RFC 2744)."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.krb5 = _Held(_KRB5)

    def call(self, name: str, *args: Any) -> int:
        """Call one of its functions; return what is no error of its result.

        :raises _GSSError: if it is one
        """
        function = self._library[f"gss_{name}"]
        function.restype = ctypes.c_uint32
        minor = ctypes.c_uint32()
        major: int = function(ctypes.byref(minor), *args)
        if major >> 16:
            # The first text is of its general errors, and says nothing more where there is a second.
            text = (minor.value and self._text(minor.value, 2)) or self._text(major, 1)
            raise _GSSError(major, minor.value, text)
        return major

    def release(self, name: str, held: Any) -> None:
        function = self._library[f"gss_{name}"]
        function(
            ctypes.byref(ctypes.c_uint32()), ctypes.byref(held), *[None] * (name == "delete_sec_context")
        )

    def _text(self, code: int, kind: int) -> str:
        minor, more, buffer = ctypes.c_uint32(), ctypes.c_uint32(), _Buffer()
        self._library.gss_display_status(
            *(ctypes.byref(minor), ctypes.c_uint32(code), kind, ctypes.byref(self.krb5.oid)),
            *(ctypes.byref(more), ctypes.byref(buffer)),
        )
        return self.take(buffer).decode("utf-8", "replace")

    def take(self, buffer: _Buffer) -> bytes:
        """Return the bytes of a buffer of the library's, and give that back."""
        data = ctypes.string_at(buffer.value, buffer.length) if buffer.value else b""
        self.release("release_buffer", buffer)
        return data

    def name(self, text: str, kind: bytes) -> ctypes.c_void_p:
        name, data, oid = ctypes.c_void_p(), _Held(text.encode("utf-8", "surrogateescape")), _Held(kind)
        self.call("import_name", ctypes.byref(data.buffer), ctypes.byref(oid.oid), ctypes.byref(name))
        return name

    def take_name(self, name: ctypes.c_void_p) -> str:
        """Return a name of the library's as text, and give that back."""
        buffer = _Buffer()
        try:
            self.call("display_name", name, ctypes.byref(buffer), None)
        finally:
            self.release("release_name", name)
        return self.take(buffer).decode("utf-8", "replace")

    def acquire(self, client: str | None) -> ctypes.c_void_p:
        """Return the credentials of a principal, to be given back; None takes the usual ones."""
        found = ctypes.c_void_p()
        mechanisms = _OIDSet(1, ctypes.pointer(self.krb5.oid))
        name = ctypes.c_void_p() if client is None else self.name(client, _USER_NAME)
        try:
            self.call(
                *("acquire_cred", name, ctypes.c_uint32(0), ctypes.byref(mechanisms), _INITIATE),
                *(ctypes.byref(found), None, None),
            )
        finally:
            self.release("release_name", name)
        return found

    def begin(self, service: str, client: str | None, delegate: bool) -> Context:
        return _NativeContext(self, service, client, delegate)

    def find_ticket(self, client: str | None) -> Ticket:
        found, name, seconds = self.acquire(client), ctypes.c_void_p(), ctypes.c_uint32()
        try:
            self.call("inquire_cred", found, ctypes.byref(name), ctypes.byref(seconds), None, None)
        finally:
            self.release("release_cred", found)
        return Ticket(self.take_name(name), float(seconds.value))


class _NativeContext:
    def __init__(self, library: _Native, service: str, client: str | None, delegate: bool) -> None:
        self._library = library
        self._context = ctypes.c_void_p()
        self._flags = _MUTUAL | _INTEGRITY | (_DELEGATE if delegate else 0)
        self._given = ctypes.c_uint32()
        self._name = self._credentials = ctypes.c_void_p()
        self.complete = False
        self._name = library.name(service, _HOST_NAME)
        self._credentials = library.acquire(client)  # first: where there is no ticket, no name is looked up

    def __del__(self) -> None:
        self._library.release("release_name", self._name)
        self._library.release("release_cred", self._credentials)
        self._library.release("delete_sec_context", self._context)

    @property
    def principal(self) -> str:
        name = ctypes.c_void_p()
        self._library.call("inquire_context", self._context, ctypes.byref(name), *[None] * 6)
        return self._library.take_name(name)

    @property
    def delegated(self) -> bool:
        return bool(self._given.value & _DELEGATE)

    def step(self, token: bytes) -> bytes:
        taken, made = _Held(token), _Buffer()
        try:
            result = self._library.call(
                *("init_sec_context", self._credentials, ctypes.byref(self._context), self._name),
                *(ctypes.byref(self._library.krb5.oid), ctypes.c_uint32(self._flags), ctypes.c_uint32(0)),
                *(None, ctypes.byref(taken.buffer), None),
                *(ctypes.byref(made), ctypes.byref(self._given), None),
            )
        finally:
            token = self._library.take(made)
        self.complete = not result & _CONTINUE
        return token

    def sign(self, data: bytes) -> bytes:
        message, made = _Held(data), _Buffer()
        self._library.call(
            *("get_mic", self._context, ctypes.c_uint32(0), ctypes.byref(message.buffer), ctypes.byref(made))
        )
        return self._library.take(made)
