"""The login's messages, as questions and answers on the caller's thread (RFC 4252, RFC 4256, RFC 4462).

paramiko's own handler answers on the transport's thread: a person's thinking would count as the server's
silence, Ctrl-C would not reach the question, and one wrong byte in the server's text would end the
connection. All that is known here about paramiko's inside is in :class:`UserAuth`.
"""

from __future__ import annotations

import collections
import queue
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import paramiko
from paramiko.auth_handler import AuthHandler
from paramiko.common import (
    MSG_SERVICE_ACCEPT,
    MSG_SERVICE_REQUEST,
    MSG_USERAUTH_BANNER,
    MSG_USERAUTH_FAILURE,
    MSG_USERAUTH_INFO_REQUEST,
    MSG_USERAUTH_INFO_RESPONSE,
    MSG_USERAUTH_REQUEST,
    MSG_USERAUTH_SUCCESS,
)
from paramiko.message import Message

from bokeh_ssh._core.host import hide_secret
from bokeh_ssh._core.text import clean
from bokeh_ssh._core.waiting import SLICE, heed
from bokeh_ssh._ssh.messages import CERTIFICATE

#: Seconds for the answer to a password or a code, at least: the server may itself be waiting for a person
#: (a push to a phone). sshd's LoginGraceTime.
PERSON_TIMEOUT = 120.0
_MOST_QUESTIONS = 64
_MOST_TEXT = 4096
_MOST_SAID = 8
_RELEASE = re.compile(r"SSH-2\.0-OpenSSH_(\d{1,4})\.(\d{1,4})")
#: Messages of gssapi-with-mic (RFC 4462, section 3): a number beyond 60 means this method alone.
_GSS_TOKEN, _GSS_ERROR, _GSS_ERROR_TOKEN, _GSS_MIC = 61, 64, 65, 66


@dataclass(frozen=True)
class Accepted:
    """The request was taken; for a login method: logged in."""


@dataclass(frozen=True)
class Refused:
    """Not (yet) logged in.

    :param partial: the method succeeded, but the server wants another one as well
    """

    allowed: tuple[str, ...]
    partial: bool


@dataclass(frozen=True)
class KeyAccepted:
    """The server would take a signature by the key that was offered."""


@dataclass(frozen=True)
class PasswordExpired:
    """The password is right, or was, but must be changed before it works."""


@dataclass(frozen=True)
class Questions:
    """What a person is to answer; ``questions`` are (text, may be shown)."""

    instructions: str
    questions: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class Token:
    """A message of a security context for us; empty where the server has only taken the mechanism."""

    data: bytes = b""


Verdict = Accepted | Refused
Reply = Accepted | Refused | KeyAccepted | PasswordExpired | Questions | Token


class NoAnswerError(Exception):
    """The server did not answer in time; the text is the time. Never leaves the package."""


class EndedError(Exception):
    """The connection ended during the login. Never leaves the package."""


class UserAuth(AuthHandler):
    """Our side of the login on a transport that has exchanged keys.

    Each request waits for its one answer.

    :param transport: held weakly, as paramiko's handlers do: the caller keeps it
    :param timeout: seconds for each answer; that to a password or a code has at least ``PERSON_TIMEOUT``
    :ivar has_free_offers: whether the server does not count an offered key as a try: OpenSSH since 10.6, six
        of them
    :raises NoAnswerError: (each request) if none came in time
    :raises EndedError: (each request) if the connection ended
    """

    def __init__(self, transport: paramiko.Transport, user: str, timeout: float) -> None:
        super().__init__(transport)
        self.user = user
        self._said: collections.deque[str] = collections.deque(maxlen=_MOST_SAID)
        self._fresh: collections.deque[str] = collections.deque(maxlen=_MOST_SAID)
        self.timeout = timeout
        self._waiting = False
        self._requested = False  # whether the service was asked for
        self._served = False  # whether the server has accepted it
        self._offered = b""
        self.error_token = b""  # the last one of a security context that the server gave up
        self._in_context = False
        release = _RELEASE.match(transport.remote_version)
        self.has_free_offers = release is not None and (int(release[1]), int(release[2])) >= (10, 6)
        self._inbox: queue.SimpleQueue[Reply | None] = queue.SimpleQueue()
        transport.auth_handler = self

    def __repr__(self) -> str:
        return f"<UserAuth {self.account} {self.auth_method or 'not begun'}>"

    @property
    def account(self) -> str:
        """The login name, for messages."""
        return hide_secret(self.user)

    # What the server says beside its answers.

    @property
    def said(self) -> str:
        """The last banners (RFC 4252, section 5.4) and instructions without a question, fit to be shown."""
        return "\n".join(self._said)

    @property
    def passes_over(self) -> bool:
        """Whether the server is known to pass over what comes too early; others hang up."""
        return "OpenSSH" in self.transport.remote_version

    def news(self) -> str:
        """Return what has been said since this was last asked."""
        said = [self._fresh.popleft() for _ in range(len(self._fresh))]
        return "\n".join(said)

    def hear(self, text: str) -> None:
        """Keep ``text``, to be shown with the next question, or if there is none with the error."""
        if text:
            self._said.append(text)
            self._fresh.append(text)

    # Requests, on the caller's thread.

    def begin(self) -> None:
        """Ask for the login service, once; the first request follows at once.

        A server answers in order (RFC 4253, section 10), and one that refuses the service disconnects, so
        waiting for its leave would cost a round trip and change nothing.
        """
        if not self._requested:
            self._requested = True
            self._send(Message().add_byte(bytes((MSG_SERVICE_REQUEST,))).add_string("ssh-userauth"))

    def ask_methods(self) -> Verdict:
        """Ask for the methods that there are (``none``, RFC 4252, section 5.2)."""
        self.begin()
        return self._verdict(self._send_and_wait(self._request("none"), self.timeout))

    def offer(self, algorithm: str, blob: bytes) -> Reply:
        """Ask whether a key would be taken, without a signature."""
        message = self._request("publickey").add_boolean(False).add_string(algorithm).add_string(blob)
        self._offered = blob
        return self._send_and_wait(message, self.timeout)

    def prove(
        self,
        algorithm: str,
        blob: bytes,
        sign: Callable[[bytes, str], bytes],
        then: Callable[[], object] | None = None,
    ) -> Verdict:
        """Log in with a key; ``sign`` gets what to sign and the algorithm.

        :param then: sends what is to follow the request at once
        """
        message = self._request("publickey").add_boolean(True).add_string(algorithm).add_string(blob)
        signed = Message().add_string(self.transport.session_id or b"").asbytes() + message.asbytes()
        message.add_string(sign(signed, algorithm))
        return self._verdict(self._send_and_wait(message, self.timeout, then))

    def choose_algorithm(self, ours: Sequence[str]) -> str | None:
        """Choose one of the ways in which a key may sign.

        :return: None if the server says that it takes none of them (RFC 8308)
        """
        theirs = getattr(self.transport, "server_extensions", {}).get("server-sig-algs", b"")
        if not theirs:  # as ssh: then a server may be older than the others
            return next((name for name in ours if name.startswith("ssh-rsa")), ours[0])
        if not ours[0].startswith(("rsa-", "ssh-rsa")):
            return ours[0]
        names = clean(theirs, _MOST_TEXT).split(",")
        return next((name for name in ours if name.removesuffix(CERTIFICATE) in names), None)

    def send_password(self, password: str) -> Reply:
        """Log in with a password (RFC 4252, section 8)."""
        message = self._request("password").add_boolean(False).add_string(_encoded(password))
        return self._send_and_wait(message, max(self.timeout, PERSON_TIMEOUT))

    def ask_questions(self) -> Reply:
        """Ask the server for its questions (RFC 4256, section 3.1)."""
        message = self._request("keyboard-interactive").add_string("").add_string("")
        return self._send_and_wait(message, max(self.timeout, PERSON_TIMEOUT))

    def answer(self, answers: Sequence[str]) -> Reply:
        """Answer the questions, all of a round at once."""
        message = Message().add_byte(bytes((MSG_USERAUTH_INFO_RESPONSE,))).add_int(len(answers))
        for text in answers:
            message.add_string(_encoded(text))
        return self._send_and_wait(message, max(self.timeout, PERSON_TIMEOUT))

    def offer_mechanism(self, mechanism: bytes) -> Reply:
        """Ask whether the server takes a mechanism of GSS-API, by its identifier (RFC 4462, section 3.2).

        :return: an empty :class:`Token` if it does
        """
        self.error_token = b""
        message = self._request("gssapi-with-mic").add_int(1).add_string(mechanism)
        self._offered = mechanism
        return self._send_and_wait(message, self.timeout)

    def send_token(self, token: bytes) -> Reply:
        """Send a message of a security context, and return the server's, or its refusal."""
        message = Message().add_byte(bytes((_GSS_TOKEN,))).add_string(token)
        return self._send_and_wait(message, self.timeout)

    def prove_context(self, sign: Callable[[bytes], bytes]) -> Verdict:
        """Log in with a security context that is complete (RFC 4462, section 3.5).

        :param sign: makes the check sum of what it gets
        """
        signed = Message().add_string(self.transport.session_id or b"").asbytes()
        signed += self._request("gssapi-with-mic").asbytes()
        message = Message().add_byte(bytes((_GSS_MIC,))).add_string(sign(signed))
        return self._verdict(self._send_and_wait(message, self.timeout))

    def _request(self, method: str) -> Message:
        self.auth_method = method
        self.username = self.user
        self._offered = b""
        self._in_context = False
        message = Message().add_byte(bytes((MSG_USERAUTH_REQUEST,)))
        return message.add_string(_encoded(self.user)).add_string("ssh-connection").add_string(method)

    def _send_and_wait(
        self, message: Message, timeout: float, then: Callable[[], object] | None = None
    ) -> Reply:
        deadline = time.monotonic() + timeout
        self._waiting = True
        self._send(message)
        if then:
            then()
        while (left := deadline - time.monotonic()) > 0:
            heed()
            try:  # in slices, since paramiko lets nobody know that another thread has closed the transport
                reply = self._inbox.get(timeout=min(left, SLICE))
            except queue.Empty:
                if self.transport.is_active():
                    continue
                reply = None
            if reply is None:
                raise EndedError
            return reply
        msg = f"{timeout:g} s"
        raise NoAnswerError(msg)

    def _send(self, message: Message) -> None:
        try:
            self.transport._send_user_message(message)  # type: ignore[attr-defined]  # not in the stubs
        except (paramiko.SSHException, EOFError, OSError) as exc:
            # What the server said before it hung up may still be on its way to the transport's thread.
            self.transport.join(SLICE)
            raise EndedError from exc

    def _verdict(self, reply: Reply) -> Verdict:
        if isinstance(reply, (Accepted, Refused)):
            return reply
        raise EndedError  # not reached: such replies are refused where they arrive

    # Answers, on the transport's thread.

    @property
    def _client_handler_table(self) -> dict[int, Callable[[Message], None]]:
        return {
            MSG_SERVICE_ACCEPT: self._on_service,
            MSG_USERAUTH_SUCCESS: self._on_success,
            MSG_USERAUTH_FAILURE: self._on_failure,
            MSG_USERAUTH_BANNER: self._on_banner,
            MSG_USERAUTH_INFO_REQUEST: self._on_60,
            _GSS_TOKEN: self._on_token,
            _GSS_ERROR: self._on_gss_error,
            _GSS_ERROR_TOKEN: self._on_error_token,
        }

    def abort(self) -> None:
        """Wake whoever waits: the connection has ended."""
        self._inbox.put(None)

    def _put(self, reply: Reply) -> None:
        # One answer for each question: a server that says more cannot fill our memory.
        if not self._waiting:
            msg = "the server answered a login question that was not asked"
            raise paramiko.SSHException(msg)
        self._waiting = False
        self._inbox.put(reply)

    def _on_service(self, message: Message) -> None:  # all handlers get it
        if self._served:
            msg = "the server accepted a service out of turn"
            raise paramiko.SSHException(msg)
        self._served = True

    def _on_success(self, message: Message) -> None:
        if self.authenticated:
            return
        if not self._waiting or not self._served:
            msg = "the server accepted a login that was not asked for"
            raise paramiko.SSHException(msg)
        super()._parse_userauth_success(message)  # type: ignore[misc]  # not in the stubs
        self._put(Accepted())

    def _on_failure(self, message: Message) -> None:
        if self.authenticated:
            return
        names = clean(message.get_binary(), _MOST_TEXT).split(",")
        self._put(Refused(tuple(name for name in names if name), message.get_boolean()))

    def _on_banner(self, message: Message) -> None:
        self.hear(clean(message.get_binary(), _MOST_TEXT, lines=True, tail=True).strip())

    def _on_60(self, message: Message) -> None:
        # What number 60 means is up to the method under way (RFC 4252, section 6).
        if self.authenticated:
            return
        if self.auth_method == "keyboard-interactive":
            self._put(self._questions(message))
        elif self.auth_method == "password":
            self._put(PasswordExpired())
        elif self.auth_method == "publickey" and self._offered:
            message.get_binary()
            if message.get_binary() != self._offered:
                msg = "the server accepted a key that was not offered"
                raise paramiko.SSHException(msg)
            self._put(KeyAccepted())
        elif self.auth_method == "gssapi-with-mic" and not self._in_context:
            if message.get_binary() != self._offered:
                msg = "the server accepted a mechanism that was not offered"
                raise paramiko.SSHException(msg)
            self._in_context = True
            self._put(Token())
        else:
            self._refuse_message()

    def _on_token(self, message: Message) -> None:
        self._check_context()
        self._put(Token(message.get_binary()))

    def _on_gss_error(self, message: Message) -> None:
        self._check_context()
        message.get_int()
        message.get_int()
        self.hear(clean(message.get_binary(), _MOST_TEXT, lines=True).strip())

    def _on_error_token(self, message: Message) -> None:
        self._check_context()
        self.error_token = message.get_binary()

    def _check_context(self) -> None:
        """Refuse a message that only belongs to a security context under way."""
        if self.authenticated or not self._in_context:
            self._refuse_message()

    @staticmethod
    def _refuse_message() -> None:
        msg = "the server asked a question out of turn"
        raise paramiko.SSHException(msg)

    def _questions(self, message: Message) -> Questions:
        name = clean(message.get_binary(), _MOST_TEXT, lines=True).strip()
        instructions = clean(message.get_binary(), _MOST_TEXT, lines=True).strip()
        message.get_binary()
        count = message.get_int()
        if count > _MOST_QUESTIONS:
            msg = f"the server asked {count} questions at once"
            raise paramiko.SSHException(msg)
        asked = (
            (clean(message.get_binary(), _MOST_TEXT, lines=True), message.get_boolean()) for _ in range(count)
        )
        return Questions("\n".join(part for part in (name, instructions) if part), tuple(asked))


def _encoded(text: str) -> bytes:
    # Lone surrogates must not raise: the error object would hold the secret.
    return text.encode("utf-8", "surrogatepass")
