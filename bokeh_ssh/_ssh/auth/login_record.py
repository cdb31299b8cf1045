"""What one login has tried and what came of it, and the errors that are made of that. Sends nothing."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from bokeh_ssh._core.errors import (
    AuthenticationError,
    BokehSSHError,
    ConnectionLostError,
    KDCUnreachableError,
    PromptRequiredError,
    SecurityKeyAbsentError,
    TooManyKeysError,
)
from bokeh_ssh._core.host import Host
from bokeh_ssh._core.settings import setting
from bokeh_ssh._core.text import clean
from bokeh_ssh._ssh.auth.agent import Agent
from bokeh_ssh._ssh.auth.kerberos import KerberosError
from bokeh_ssh._ssh.auth.userauth import UserAuth
from bokeh_ssh._ssh.config.lookup import HostConfig

#: Characters of what a server has said that go into an error: in all, and as its last words.
_MOST_SAID = 600
MOST_WORDS = 300
#: What pam_slurm_adopt, and others of its kind, say to those without a job.
_NO_JOB = re.compile(r"no active jobs|do not have (a|any) (running )?job|no running jobs", re.IGNORECASE)
#: What PAM says of a password that has run out, and of an account that has.
CHANGE = re.compile(r"change your password|password (has )?expired", re.IGNORECASE)
_CLOSED = re.compile(r"account (has|is) (been )?(expired|locked|disabled|suspended)", re.IGNORECASE)
_PLUG_IN = "plug in the security key and touch it"
TOO_MANY = re.compile(r"too many auth|max(imum)? auth", re.IGNORECASE)


@dataclass
class LoginRecord:
    """What one login has tried, and what came of it.

    :ivar methods: those that the ssh config leaves
    :ivar uses_kerberos: whether a ticket is used
    :ivar tried: what was tried, in order
    :ivar passed: the methods that the server has accepted
    :ivar allowed: the methods that it takes
    :ivar notes: what a person may want to know of what was not used, or in vain
    :ivar keys_tried: how many keys were offered
    :ivar kerberos_tried: whether a ticket was looked for
    :ivar no_ticket: why there was none
    :ivar absent: whether a security key was not there
    :ivar unsigned: the key that the server takes, with which the agent did not sign
    :ivar unasked: what a person had to be asked, had there been one
    :ivar answered_late: whether the server had hung up when a person answered
    """

    userauth: UserAuth
    host: Host
    config: HostConfig
    agent: Agent
    methods: Collection[str]
    uses_kerberos: bool
    tried: list[str] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)
    allowed: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    keys_tried: int = 0
    kerberos_tried: bool = False
    no_ticket: KerberosError | None = None
    absent: bool = False
    unsigned: str = ""
    unasked: str = ""
    answered_late: bool = False

    @property
    def name(self) -> str:
        """The machine's name."""
        return self.host.target.host

    def expired(self) -> AuthenticationError:
        """Make the error for a password that has to be changed."""
        account, user = self.userauth.account, self.userauth.user
        msg = f"the password of {account} has expired"
        # What is hidden of a name cannot be typed: then there is no command to copy.
        hint = f"change it with ssh {shlex.quote(f'{user}@{self.name}')}"
        if account != user:
            hint = f"log in to {self.name} once with ssh, as the same user, and change it"
        return self.error(AuthenticationError, msg, hint)

    def _with_notes(self, text: str) -> str:
        said = clean(self.userauth.said, _MOST_SAID, tail=True)
        hidden = "what follows the colon is part of the login name, and no password"
        trouble = self.agent.trouble
        parts = (
            text,
            hidden * (self.userauth.account != self.userauth.user),
            *self.notes,
            *self.left_out(),
            trouble * (not any(trouble in note for note in self.notes)),
            f"the server said: {said}" if said else "",
        )
        return "; ".join(part for part in parts if part)

    def error(self, kind: type[AuthenticationError], text: str, hint: str) -> AuthenticationError:
        """Make an error with all that was noted."""
        if _NO_JOB.search(self.userauth.said):
            hint = (
                "only who has a job on that node may log in: start "
                f"one with {setting('batch=')} on the login node"
            )
        elif _CLOSED.search(self.userauth.said):
            hint = "ask the administrator to open the account"
        message = self._with_notes(text)
        tried = tuple(self.tried)
        return kind(message, host=self.name, hint=hint or None, tried=tried, allowed=self.allowed)

    def left_out(self) -> Iterator[str]:
        """Yield what the ssh config kept from being tried, and the line that did."""
        config = self.config
        switches = {
            "gssapi-with-mic": ("GSSAPIAuthentication", self.uses_kerberos),
            "publickey": ("PubkeyAuthentication", config.pubkey_authentication),
            "keyboard-interactive": ("KbdInteractiveAuthentication", config.kbd_interactive_authentication),
            "password": ("PasswordAuthentication", config.password_authentication),
        }
        for method, (keyword, said) in switches.items():
            if method not in self.allowed or method in self.methods:
                continue
            preferred = config.preferred_authentications
            value = "no"
            if said is not False and (preferred is None or (method in preferred and "" not in preferred)):
                continue  # there is nobody to ask
            if said is not False:
                keyword, value = "PreferredAuthentications", ",".join(config.preferred_authentications or ())
            yield f"{method} was not tried: {self.line(keyword, value)}"
        wants_key = "publickey" in self.allowed and "publickey" in self.methods
        if wants_key and not self.keys_tried and self.agent.present and not self.agent.list_keys():
            yield "the SSH agent has no keys, or is locked"
        if config.pkcs11_provider and wants_key:
            line = self.line("PKCS11Provider", config.pkcs11_provider)
            yield f"keys of a token are used through the SSH agent only (ssh-add -s), and not by {line}"
        if config.gssapi_trust_dns and self.kerberos_tried:
            yield f"the DNS is not asked for the server's name: {self.line('GSSAPITrustDns', 'yes')}"
        if config.batch_mode:
            yield f"nobody is asked: {self.line('BatchMode', 'yes')}"
        if config.password_prompts == 0:
            yield f"nobody is asked: {self.line('NumberOfPasswordPrompts', '0')}"

    def line(self, keyword: str, value: str) -> str:
        """Return a line of the ssh config as words, with the place where it stands."""
        where = self.config.lines.get(keyword.lower(), "")
        return f"{keyword} {value}" + f" ({where})" * bool(where)

    def refused(self) -> AuthenticationError:
        """Make the error for a login that nothing is left to try for."""
        tried = f"tried {', '.join(self.tried)}" if self.tried else "nothing could be tried"
        allowed = f"the server {'still ' * bool(self.tried)}allows {', '.join(self.allowed) or 'nothing'}"
        passed = f"the server accepted {', '.join(self.passed)} but wants more; " * bool(self.passed)
        text = f"login as {self.userauth.account} was refused ({tried}; {passed}{allowed})"
        if CHANGE.search(self.unasked):
            return self.expired()
        if self.unasked:
            text = f"{text}; nobody was there to be asked for {self.unasked}"
            given = "password= or passphrase=, or " * (self.host.password is None)
            return self.error(PromptRequiredError, text, f"give {given}a prompt= that can ask")
        advice = _advice(self.allowed)
        if self.absent:
            return self.error(SecurityKeyAbsentError, text, f"{_PLUG_IN}, or {advice}")
        if self.unsigned:  # an agent's key is offered first: the server would have taken it
            hint = f"the server takes {self.unsigned}: have the agent sign (confirm it, or ssh-add it again)"
            return self.error(AuthenticationError, text, hint)
        if self.no_ticket is None:
            return self.error(AuthenticationError, text, advice)
        kind = KDCUnreachableError if self.no_ticket.temporary else AuthenticationError
        return self.error(kind, text, f"{self.no_ticket.hint}, or {advice}")

    def ended(self, last_words: str, cause: BaseException | None) -> BokehSSHError:
        """Return why the connection ended during the login."""
        words = clean(last_words, MOST_WORDS)
        hung_up = bool(words) or cause is None or isinstance(cause, EOFError)
        why = words or ("no reason was given" if hung_up else clean(str(cause), 300))
        if TOO_MANY.search(words) and self.keys_tried > 1:
            tried = ", ".join(self.tried)
            text = f"login as {self.userauth.account} was refused: too many keys ({tried}): {why}"
            hint = (
                f"name the right one with {setting('key_filename=')}, or by IdentityFile and IdentitiesOnly"
            )
            return self.error(TooManyKeysError, text, hint)
        tried = f" (tried {', '.join(self.tried)})" if self.tried else ""
        if self.answered_late and hung_up:
            text = f"the server did not wait for the answer of {self.userauth.account}{tried}: {why}"
            hint = "answer sooner, or ask the administrator for a longer LoginGraceTime"
            return self.error(AuthenticationError, text, hint)
        if self.absent:  # it has waited for no longer than we did
            text = f"the server ended the login of {self.userauth.account}{tried}: {why}"
            return self.error(SecurityKeyAbsentError, text, _PLUG_IN)
        if self.tried and hung_up:
            text = f"the server ended the login of {self.userauth.account}{tried}"
            text += f": {why}" if words or not self.userauth.said else ""
            hint = f"it may let nobody in for now, or not this account; if it does, {_advice(self.allowed)}"
            error = self.error(AuthenticationError, text, hint)
            error.ended_by = ""
            return error
        text = f"the connection ended during login{tried}: {why}"
        hint = "try again; if it always ends there, the SSH server's log says why (10.6: RefuseConnection)"
        return ConnectionLostError(self._with_notes(text), host=self.name, hint=hint)


def _advice(allowed: Sequence[str]) -> str:
    ways = []
    if "gssapi-with-mic" in allowed:
        ways.append(f"a Kerberos ticket (kinit, {setting('gss_auth=True')})")
    if "publickey" in allowed:
        ways.append("that the key is in the account's authorized_keys there")
    if "password" in allowed or "keyboard-interactive" in allowed:
        ways.append("the password")
    return f"check the user name{''.join(f', {way}' for way in ways)}"
