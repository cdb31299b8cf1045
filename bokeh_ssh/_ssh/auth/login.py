"""Logging in, in OpenSSH's order: a Kerberos ticket, keys, the server's questions, a password."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence

import paramiko

from bokeh_ssh._core.errors import (
    AuthenticationError,
    ConnectTimeoutError,
    PromptRequiredError,
)
from bokeh_ssh._core.events import Question
from bokeh_ssh._core.host import Host
from bokeh_ssh._core.text import clean
from bokeh_ssh._ssh.algorithms import signatures
from bokeh_ssh._ssh.auth import kerberos, public_keys
from bokeh_ssh._ssh.auth.agent import Agent, agent_address
from bokeh_ssh._ssh.auth.identities import PROMPTS, Identity, find_identities, key_type
from bokeh_ssh._ssh.auth.key_memory import KeyMemory, fingerprint
from bokeh_ssh._ssh.auth.login_record import CHANGE, MOST_WORDS, TOO_MANY, LoginRecord
from bokeh_ssh._ssh.auth.private_keys import UnusableKeyError
from bokeh_ssh._ssh.auth.userauth import (
    Accepted,
    EndedError,
    NoAnswerError,
    Questions,
    Refused,
    Reply,
    Token,
    UserAuth,
    Verdict,
)
from bokeh_ssh._ssh.config.lookup import HostConfig
from bokeh_ssh._ssh.messages import CERTIFICATE

log = logging.getLogger("bokeh_ssh.auth")

#: Rounds of questions in one try, and methods that may succeed without the login being complete: far more
#: than any server has use for, and an end for one that goes on for ever.
_MOST_ROUNDS = 100
_MOST_PARTIAL = 10

#: A question for the account's password: pam_unix and its translations, SSSD, Windows. What asks for a new
#: password, or for a one-time one, is none.
_PASSWORD = re.compile(r"passwor[dt]|passe\b|contrase|senha|пароль|密码|密碼|パスワード|암호", re.IGNORECASE)
_OTHER = re.compile(
    r"\b(new|again|re-?type|current|one[- ]?time|otp|oath|token|pin|code|passcode|duo|next)\b", re.IGNORECASE
)
#: ssh offers no such keys either.
_OUTDATED = ("ssh-dss", "ssh-dss-cert-v01@openssh.com")


def login(
    transport: paramiko.Transport,
    host: Host,
    config: HostConfig,
    *,
    user: str,
    timeout: float,
    warn: Callable[[str], None] = log.warning,
    touch: Callable[[str], None] = log.warning,
    memory: KeyMemory | None = None,
    ahead: Callable[[], None] | None = None,
) -> tuple[str, ...]:
    """Log in as ``user`` on a transport whose keys are exchanged and whose host key is verified.

    One connection, whatever is tried; only methods that the server allows are tried. Everything but the
    reading of the network happens on the calling thread, questions to ``host.prompt`` too, so Ctrl-C works
    at any moment. The transport stays open whatever happens: the caller closes it.

    :param transport: a plain ``paramiko.Transport`` or a subclass, not a ``ServiceRequestingTransport``; a
        ``disconnect_message`` attribute, where it has one, is taken for the server's last words
    :param timeout: seconds for each answer of the server; a person may take as long as the server waits,
        and the answer to a password or a code at least 120 s, since the server may be waiting for a phone;
        also for the KDC
    :param warn: gets what works, but not as it was asked for
    :param touch: gets the key that waits for a touch of its security key
    :param memory: knows which key has fitted last time, and learns which one did
    :param ahead: asks for what will be wanted once we are logged in; called with a login that is expected to
        succeed, so perhaps never
    :return: the methods that succeeded, in order
    :raises PromptRequiredError: if a person had to be asked, and there is no ``host.prompt``
    :raises TooManyKeysError: if the server hung up after too many keys
    :raises SecurityKeyAbsentError: if it was refused, and a security key was not plugged in or not touched
    :raises KDCUnreachableError: if it was refused, and a ticket might have helped had a KDC answered
    :raises AuthenticationError: if the login was refused, or a question declined
    :raises ConnectTimeoutError: if the server did not answer in time
    :raises ConnectionLostError: if the connection broke
    """
    address = agent_address(config.identity_agent) if host.allow_agent else None
    with contextlib.closing(Agent(address)) as agent:
        attempt = _Login(UserAuth(transport, user, timeout), host, config, agent, warn, touch, memory, ahead)
        try:
            return attempt.run()
        except NoAnswerError as exc:
            what = f" ({attempt.record.tried[-1]})" if attempt.record.tried else ""
            msg = f"the server did not answer within {exc} during login{what}"
            raise ConnectTimeoutError(msg, host=attempt.name, hint="try again, or raise timeout") from exc
        except EndedError as exc:
            cause = transport.get_exception() or exc.__cause__
            last_words = getattr(transport, "disconnect_message", "")
            if memory and TOO_MANY.search(last_words):
                memory.forget()  # the server has counted the key, and minds nothing else
            elif memory:
                memory.note_end(certain=bool(clean(last_words, MOST_WORDS)))
            raise attempt.record.ended(last_words, cause) from cause


class _Login:
    """How far one login has come."""

    def __init__(
        self,
        wire: UserAuth,
        host: Host,
        config: HostConfig,
        agent: Agent,
        warn: Callable[[str], None],
        touch: Callable[[str], None],
        memory: KeyMemory | None,
        ahead: Callable[[], None] | None,
    ) -> None:
        self._memory = memory
        self._ahead = ahead
        self._fitting: tuple[bytes, str] | None = None  # the first key that was taken, and its algorithm
        self.userauth = wire
        self.warn = warn
        self.config = config
        self.prompts = PROMPTS if config.password_prompts is None else config.password_prompts
        self._asks_nobody = config.batch_mode or not self.prompts  # so says the config
        self.host = dataclasses.replace(host, prompt=None) if self._asks_nobody else host
        self.name = host.target.host
        self._delegates, uses_kerberos = wants_kerberos(host, config)
        self._methods = self._enabled(uses_kerberos)
        self.record = LoginRecord(wire, host, config, agent, self._methods.keys(), uses_kerberos)
        self._fresh_notes: list[str] = []  # not yet shown to a person
        self._identities: Iterator[Identity] = find_identities(
            host, config, agent, touch, lambda: not wire.transport.is_active(), self.record.notes.append
        )
        self._seen: set[bytes] = set()  # keys that the server has judged
        self._rounds = 0  # tries of keyboard-interactive
        self._passwords = 0  # tries of password
        self._typed = False  # host.password has answered a question

    def run(self) -> tuple[str, ...]:
        method, reply = "publickey", self._try_known_key()
        if reply is None:
            method, reply = "none", self.userauth.ask_methods()
        while isinstance(reply, Refused):
            self.record.allowed = reply.allowed
            if reply.partial:
                self.record.passed.append(method)
                self._rounds = self._passwords = 0
                if len(self.record.passed) > _MOST_PARTIAL:
                    raise self.record.refused()
            log.debug(
                "%s: %s refused=%s; allowed: %s", self.name, method, not reply.partial, self.record.allowed
            )
            method, reply = self._next()
        log.debug("%s: logged in with %s", self.name, method)
        methods = (*self.record.passed, method)
        if self._memory and self._fitting and methods[0] == "publickey":
            self._memory.keep(*self._fitting, alone=len(methods) == 1)
        elif self._memory:
            self._memory.forget()
        return methods

    def _try_known_key(self) -> Verdict | None:
        """Begin with the key that fitted last time, if it is one that is to be offered; None without one.

        Which methods the server has is not asked first: it says so if it refuses the key.
        """
        memory = self._memory
        known = memory.recall() if memory and next(iter(self._methods), "") == "publickey" else None
        if memory is None or known is None:
            return None
        before: list[Identity] = []
        found = None
        for identity in self._identities:
            if identity.known is not None and fingerprint(identity.known) == known.key:
                found = identity
                break
            before.append(identity)
        self._identities = itertools.chain(before, self._identities)
        if found is None:
            return None
        try:
            self.userauth.begin()
            memory.unanswered = True
            memory.ahead = memory.may_ask_ahead and self._ahead is not None
            reply = self._offer(found, known.algorithm, self._ahead if memory.ahead else None)
        except UnusableKeyError as exc:
            memory.unanswered = False
            self._skip(found, exc)
            return None
        memory.unanswered = False
        memory.refused = not isinstance(reply, Accepted)
        if memory.refused and memory.ahead and not self.userauth.passes_over:
            raise EndedError  # soon, when somebody may have been asked something in vain
        return reply

    def _enabled(self, uses_kerberos: bool) -> dict[str, Callable[[], Verdict | None]]:
        """List the methods that the config leaves, in the order that it wants them in."""
        config = self.config
        usual: dict[str, tuple[bool | None, Callable[[], Verdict | None]]] = {
            "gssapi-with-mic": (uses_kerberos, self._kerberos),
            "publickey": (config.pubkey_authentication, self._publickey),
            "keyboard-interactive": (config.kbd_interactive_authentication, self._interactive),
            "password": (config.password_authentication, self._password),
        }
        if self._asks_nobody and self.host.password is None:
            usual = {name: usual[name] for name in ("gssapi-with-mic", "publickey")}
        preferred = config.preferred_authentications
        # As with ssh (match_list), an empty place ends the list.
        order = usual if preferred is None else itertools.takewhile(bool, preferred)
        return {name: usual[name][1] for name in order if name in usual and usual[name][0] is not False}

    def _next(self) -> tuple[str, Verdict]:
        for method, attempt in self._methods.items():
            if method in self.record.allowed:
                reply = attempt()
                if reply is not None:
                    return method, reply
        raise self.record.refused()

    def _note_try(self, what: str) -> None:
        tried = self.record.tried
        if not tried or tried[-1] != what:
            tried.append(what)
        log.debug("%s: trying %s", self.name, what)

    # Each method makes its next try; None means that it has none left.

    def _kerberos(self) -> Verdict | None:
        if self.record.kerberos_tried:
            return None
        self.record.kerberos_tried = True
        server = self.config.gssapi_server_identity or self.config.hostname
        try:
            with kerberos.explained(server):
                return self._prove_ticket(server)
        except kerberos.KerberosError as exc:
            log.debug("%s: Kerberos not used: %s", self.name, exc)
            self.record.no_ticket = exc
            self.record.notes.append(f"Kerberos: {exc}")
            return None

    def _prove_ticket(self, server: str) -> Verdict:
        """Log in with a ticket (RFC 4462, section 3).

        :param server: the name in the server's keytab
        :raises KerberosError: if there is none, which costs no try; or the server has proved to be another
        """
        context, token = kerberos.begin_context(
            server,
            client=self.config.gssapi_client_identity,
            delegate=self._delegates,
            timeout=self.userauth.timeout,
        )
        self._note_try("gssapi-with-mic")
        reply = self.userauth.offer_mechanism(kerberos.MECHANISM)
        if isinstance(reply, Refused):
            # sshd looks for a key of its own name first (GSSAPIStrictAcceptorCheck).
            self.record.notes.append(
                "Kerberos: the server has no key (keytab) for the name that it has itself"
            )
            return reply
        for _ in range(_MOST_ROUNDS):
            if context.complete:
                break
            reply = self.userauth.send_token(token)
            if not isinstance(reply, Token):
                return self._ticket_refused(reply, context, server)
            token = context.step(reply.data)
        else:
            msg = "the server would not come to an end"
            raise kerberos.KerberosError(msg, "ask the administrator")
        if self._delegates and not context.delegated:
            self.warn("the Kerberos ticket was not delegated: it cannot be forwarded (kinit -f)")
        reply = self.userauth.prove_context(context.sign)
        if isinstance(reply, Refused) and not reply.partial:
            user, principal = self.userauth.account, clean(context.principal, MOST_WORDS)
            self.record.notes.append(f"Kerberos: {principal} may not log in as {user} (see ~/.k5login there)")
        return reply

    def _ticket_refused(self, reply: Reply, context: kerberos.Context, server: str) -> Verdict:
        """Note why the server refuses our ticket: its last token says so, where there was one."""
        why = f"the server has no key (keytab) for host/{server}, or cannot read it"
        if self.userauth.error_token:
            try:
                with kerberos.explained(server):
                    context.step(self.userauth.error_token)
            except kerberos.KerberosError as exc:
                why = f"the server refused the ticket for host/{server}: {exc}"
        self.record.notes.append(f"Kerberos: {why}")
        assert isinstance(reply, (Accepted, Refused))  # no other can be under way
        return reply

    def _publickey(self) -> Verdict | None:
        for identity in self._identities:  # goes on where the last call stopped
            try:
                reply = self._offer(identity)
            except UnusableKeyError as exc:
                self._skip(identity, exc)
                continue
            if reply is not None:
                return reply
        return None

    def _offer(
        self, identity: Identity, prefer: str = "", then: Callable[[], None] | None = None
    ) -> Verdict | None:
        blob = identity.public()
        if blob in self._seen:
            return None
        kind = key_type(blob)
        if kind in _OUTDATED:
            msg = f"it is of a kind that is not supported ({kind})"
            raise UnusableKeyError(msg)
        least = self.config.required_rsa_size
        bits = public_keys.count_rsa_bits(blob) if least else None
        if least and bits and bits < least:
            msg = f"it has {bits} bits, which {self.record.line('RequiredRSASize', str(least))} leaves out"
            raise UnusableKeyError(msg)
        line = self.config.algorithms.get("pubkeyacceptedalgorithms")
        allowed = signatures(kind, line)
        if not allowed:
            msg = f"its kind is left out by {self.record.line('PubkeyAcceptedAlgorithms', line or '')}"
            raise UnusableKeyError(msg)
        algorithm = prefer if prefer in allowed else self.userauth.choose_algorithm(allowed)
        if algorithm is None:
            msg = "the server takes none of its signature algorithms"
            raise UnusableKeyError(msg)
        self._note_try(f"publickey {identity.label}")
        self.record.keys_tried += 1
        if not identity.ready or self.record.keys_tried > 1 or (self.userauth.has_free_offers and not prefer):
            # As with ssh, nobody is asked for a passphrase or a touch that would be in vain; and since 10.6,
            # sshd counts a refused signature towards MaxAuthTries, but not its first refused questions.
            reply = self.userauth.offer(algorithm, blob)
            if isinstance(reply, (Accepted, Refused)):
                self._seen.add(blob)
                self._note_dates(identity.label, blob)
                return reply
        reply = self.userauth.prove(algorithm, blob, identity.sign, then)
        self._seen.add(blob)
        if isinstance(reply, Refused) and not reply.partial:
            self._note_dates(identity.label, blob)
        if self._fitting is None and (isinstance(reply, Accepted) or reply.partial):
            self._fitting = (blob, algorithm)
        return reply

    def _note_dates(self, label: str, blob: bytes) -> None:
        """Note of a certificate that was refused whether it is out of date."""
        with contextlib.suppress(ValueError):
            certificate = public_keys.read(blob).certificate if key_type(blob).endswith(CERTIFICATE) else None
            if certificate and (untimely := certificate.untimely(time.time())):
                self.record.notes.append(f"certificate {label} is {untimely}")

    def _skip(self, identity: Identity, why: UnusableKeyError) -> None:
        log.debug("%s: key %s not used: %s", self.name, identity.label, why)
        self.record.notes.append(f"key {identity.label} was not used: {why}")
        self.record.absent = self.record.absent or why.absent
        if why.unsigned:
            self.record.unsigned = self.record.unsigned or identity.label
        if not why.locked:
            self._fresh_notes.append(self.record.notes[-1])
        if not why.locked or self.host.prompt is not None:
            return
        if not identity.explicit:
            self.record.unasked = self.record.unasked or f"the passphrase of {identity.label}"
            return
        kind: type[AuthenticationError] = PromptRequiredError
        if self.host.passphrase is not None:
            kind = AuthenticationError
        msg = f"key {identity.label} cannot be used to log in as {self.userauth.account}: {why}"
        hint = "give its passphrase=, a prompt= that can ask for it, or add it to the SSH agent"
        msg = "; ".join((msg, *self.record.left_out()))
        tried, allowed = tuple(self.record.tried), self.record.allowed
        raise kind(msg, host=self.name, hint=hint, tried=tried, allowed=allowed) from why

    def _interactive(self) -> Verdict | None:
        if self._rounds >= (self.prompts if self.host.prompt else 1):
            return None
        self._rounds += 1
        self._note_try("keyboard-interactive")
        reply: Reply = self.userauth.ask_questions()
        asked = False
        for _ in range(_MOST_ROUNDS):
            if not isinstance(reply, Questions):
                break
            answers = self._answers(reply)
            if answers is None:
                # The next request makes the server forget these questions (RFC 4256, section 3.1).
                self._rounds = max(self.prompts, 1)
                return None
            asked = asked or bool(answers)
            reply = self.userauth.answer(answers)
        if not asked:
            self._rounds = max(self.prompts, 1)  # it refuses without a question: asking again changes nothing
        if isinstance(reply, (Accepted, Refused)):
            return reply
        msg = f"the server asked {_MOST_ROUNDS} rounds of questions without an end"
        raise self.record.error(AuthenticationError, msg, "")

    def _answers(self, asked: Questions) -> list[str] | None:
        """Answer one round; None if a person is needed and there is none."""
        questions = asked.questions
        if self.host.password is not None and not self._typed and _asks_password(questions):
            self._typed = True
            return [self.host.password]
        if not questions:
            self.userauth.hear(asked.instructions)
            return []
        if self.host.prompt is None:
            self.record.unasked = f"{clean(questions[0][0], 200)!r}"
            return None
        answers = []
        said = asked.instructions
        reusable = _asks_password(questions)
        for text, echo in questions:
            answers.append(
                self._ask_person("interactive", text, echo=echo, instructions=said, reusable=reusable)
            )
            said = ""
        return answers

    def _password(self) -> Verdict | None:
        # One that was refused in answer to a question is not sent again if a person can give another.
        spent = self._typed and self.host.prompt is not None
        first = self._passwords == 0 and self.host.password is not None and not spent
        if first:
            password = self.host.password or ""
        elif self.host.prompt is None:
            if self.host.password is None:
                self.record.unasked = self.record.unasked or "a password"
            return None
        elif self._passwords >= self.prompts + (self.host.password is not None):
            return None
        else:
            again = "Permission denied, please try again." if self._passwords else ""
            text = f"{self.userauth.account}@{self.name}'s password: "
            password = self._ask_person("password", text, instructions=again, reusable=True)
        self._passwords += 1
        self._note_try("password")
        reply = self.userauth.send_password(password)
        if isinstance(reply, (Accepted, Refused)):
            return reply
        raise self.record.expired()

    def _ask_person(
        self, kind: str, text: str, *, echo: bool = False, instructions: str = "", reusable: bool = False
    ) -> str:
        notes, self._fresh_notes = self._fresh_notes, []
        instructions = "\n".join(part for part in (*notes, self.userauth.news(), instructions) if part)
        question = Question(
            kind=kind, host=self.name, text=text, echo=echo, instructions=instructions, reusable=reusable
        )
        answer = self.host.prompt(question) if self.host.prompt else None
        if answer is None and CHANGE.search(text):
            raise self.record.expired()
        if answer is None:
            raise self.record.error(AuthenticationError, f"{clean(text, 200)!r} was not answered", "")
        self.record.answered_late = not self.userauth.transport.is_active()
        return answer


def wants_kerberos(host: Host, config: HostConfig) -> tuple[bool, bool]:
    """Return whether the ticket is delegated, and whether it is used at all."""
    given = host.gss_deleg_creds
    delegates = bool(config.gssapi_delegate_credentials) if given is None else given
    if host.gss_auth is not None:
        return delegates, host.gss_auth
    return delegates, bool(given or config.gssapi_authentication)  # ssh -K turns both on


def _asks_password(questions: Sequence[tuple[str, bool]]) -> bool:
    if len(questions) != 1 or questions[0][1]:
        return False
    text = questions[0][0]
    return bool(_PASSWORD.search(text)) and not _OTHER.search(text)
