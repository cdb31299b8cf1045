"""Every error this package raises, in one tree.

    BokehSSHError
    ├── UsageError                  the caller's input cannot work (also a ValueError)
    │   └── ConfigError             a line of an ssh config that we may not skip
    ├── ConnectError                the machine was not reached
    │   ├── ResolveError            its name has no address
    │   ├── RefusedError            nothing listens there
    │   ├── ConnectTimeoutError     nothing answered before the deadline
    │   ├── ProtocolError           something answered that is no SSH server we know
    │   └── AlgorithmError          it is one, with no algorithm in common with us
    ├── HostKeyError                the machine was reached, but is it the right one?
    │   ├── UnknownHostKeyError
    │   ├── ChangedHostKeyError
    │   └── RevokedHostKeyError
    ├── AuthenticationError         the login was refused
    │   ├── TooManyKeysError        the server hung up before the right key's turn
    │   ├── SecurityKeyAbsentError  the key's device was not plugged in, or not touched
    │   ├── KDCUnreachableError     no KDC could be asked for a Kerberos ticket
    │   └── PromptRequiredError     there is a question, and nobody to ask
    ├── SessionError                logged in, but no command may be run
    ├── ForwardError
    │   ├── PortInUseError          local or remote, see ``.side``
    │   ├── SocketInUseError        the same for the path of a Unix socket
    │   ├── ForwardingRefusedError  the SSH server forbids it
    │   ├── GatewayExposedError     the gateway would open the port to its network
    │   └── TargetUnreachableError  the SSH server cannot connect to the target
    ├── LaunchError                 the remote Bokeh server did not start
    │   ├── PythonNotFoundError
    │   ├── BokehNotFoundError
    │   ├── LaunchTimeoutError
    │   └── UploadError             the app could not be uploaded
    ├── JobError                    a cluster's scheduler and its batch job
    │   ├── SubmitError             the scheduler refused the job
    │   ├── JobNeverStartsError     it accepted the job, which can never start
    │   ├── QueueTimeoutError       the job waited for longer than it was to
    │   └── JobEndedError           the job has ended
    ├── ServerNotFoundError         nothing to attach to
    │   └── ServerGoneError         the server that was there has ended
    ├── ServerTakenError            another client holds the server
    ├── ForeignServerError          somebody else's server listens there
    ├── ServerExitedError           the remote Bokeh server ended by itself
    ├── AppAccessError              the Bokeh server does not let this program in
    ├── ConnectionLostError         the SSH connection was lost
    ├── ResourceError               this program may open no more files, or start no more threads
    └── TunnelClosedError           used before it was opened, or after it was closed

Who is to blame is in the branch: ``UsageError`` and ``TunnelClosedError`` are the caller's fault, the others
are not, and have the cause in ``__cause__``. Errors that may pass by themselves have ``temporary`` set: a
tunnel that reconnects tries again after one of them, and ends with any other.
"""

from __future__ import annotations

import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from bokeh_ssh._core.settings import Wording, as_keyword, first_setting, setting, word


@dataclass(kw_only=True, eq=False, repr=False)
class BokehSSHError(Exception):
    """Anything that goes wrong in bokeh_ssh.

    :param message: what failed, as a sentence without a full stop
    :param host: the machine on which it failed, as the user named it; None if no machine is involved
    :param hint: the next step, as a sentence without a full stop
    :ivar setting: the setting that it names, such as ``"launch_timeout"``: a keyword, and so a flag of the
        command line and a setting in a project's file; None if it names none

    The text is ``host: message; hint``. No attribute ever holds a secret.
    """

    #: The stage at which it failed; a word for programs and for the progress display.
    stage: ClassVar[str] = "use"
    #: Whether the same may work a little later without any change.
    temporary: ClassVar[bool] = False

    message: str = field(kw_only=False)
    host: str | None = None
    hint: str | None = None
    setting: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.sentences = (self.message, self.hint or "")
        self.setting = first_setting(*self.sentences)
        self.message, hint = self.in_words(as_keyword)
        self.hint = hint or self.hint
        super().__init__(self.message)

    def advise(self, hint: str) -> None:
        """Replace the hint, and with it the setting that is named."""
        self.sentences = (self.sentences[0], hint)
        self.setting = first_setting(*self.sentences)
        self.hint = self.in_words(as_keyword)[1]

    def in_words(self, wording: Wording) -> tuple[str, str]:
        """Return message and hint as ``wording`` words settings; without a hint, that is empty."""
        message, hint = self.sentences
        return word(message, wording), word(hint, wording)

    def __str__(self) -> str:
        text = f"{self.host}: {self.message}" if self.host else self.message
        return f"{text}; {self.hint}" if self.hint else text

    def _render_traceback_(self) -> list[str]:
        """Return a sentence and the cell's line, which IPython shows in place of the traceback.

        After ``%xmode Plain``, or any other than the default, ``%tb`` shows the traceback, with that of a
        child process. ``Verbose`` is not what is advised: it shows the values of arguments.
        """
        shell: Any = sys.modules["IPython"].get_ipython()
        if shell.InteractiveTB.mode != "Context":
            whole: list[str] = shell.InteractiveTB.structured_traceback(
                type(self), self, self.__traceback__, tb_offset=1
            )
            return whole
        # The last line outside of this package: what the person has written, or what that has called.
        own = str(Path(__file__).parent.parent)
        steps = [step for step in traceback.extract_tb(self.__traceback__) if step.line]
        steps = [
            step for step in steps if not step.filename.startswith(own) and "IPython" not in step.filename
        ]
        where = [f"  in line {steps[-1].lineno}: {(steps[-1].line or '')[:100]}"] if steps else []
        return [
            f"{type(self).__name__}: {self}",
            *where,
            "  (all of it: %xmode Plain, then %tb)",
        ]


class UsageError(BokehSSHError, ValueError):
    """The caller's input cannot work; nothing was started."""


class ConfigError(UsageError):
    """A line of an ssh config changes who we connect to, and is not supported."""

    stage = "config"


class ConnectError(BokehSSHError):
    """The machine was not reached."""

    stage = "connect"
    temporary = True


class ResolveError(ConnectError):
    """The name has no address."""


class RefusedError(ConnectError):
    """No SSH server listens there: the connection was refused or reset."""


class ConnectTimeoutError(ConnectError):
    """Nothing answered before the deadline."""


class ProtocolError(ConnectError):
    """Something answered, but it is not an SSH server that we can talk to."""


@dataclass(kw_only=True, eq=False, repr=False)
class AlgorithmError(ConnectError):
    """The server and we have no cipher, MAC, key exchange or kind of host key in common.

    :ivar kind: which of these: ``"cipher"``, ``"MAC"``, ``"key exchange"`` or ``"kind of host key"``
    :ivar theirs: what the server has
    :ivar ours: what we have: everything that is supported, or what the ssh config leaves of that
    """

    temporary = False

    kind: str = ""
    theirs: tuple[str, ...] = ()
    ours: tuple[str, ...] = ()


@dataclass(kw_only=True, eq=False, repr=False)
class HostKeyError(BokehSSHError):
    """The machine's identity could not be verified. No credential was sent.

    :ivar key_type: such as ``"ssh-ed25519"``
    :ivar fingerprint: such as ``"SHA256:…"``, as ``ssh-keygen -l`` prints it
    """

    stage = "host key"

    key_type: str = ""
    fingerprint: str = ""


class UnknownHostKeyError(HostKeyError):
    """No known_hosts file has a key for this machine."""


class ChangedHostKeyError(HostKeyError):
    """The machine's key is not the one in known_hosts: somebody may be intercepting the connection."""


class RevokedHostKeyError(HostKeyError):
    """The machine's key is marked ``@revoked`` in known_hosts."""


@dataclass(kw_only=True, eq=False, repr=False)
class AuthenticationError(BokehSSHError):
    """The login was refused.

    :ivar tried: the methods tried, in order, such as ``("publickey id_ed25519", "password")``
    :ivar allowed: the methods that the server would still have accepted
    :ivar ended_by: the address of a server that ended the login and refused nothing, as one does that lets
        nobody in for now (``/etc/nologin``); empty where it was reached through another machine
    """

    stage = "login"

    tried: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()
    ended_by: str | None = None


class KDCUnreachableError(AuthenticationError):
    """No Kerberos server (KDC) could be asked for a ticket for the machine, and no other method logged in."""

    temporary = True


class SecurityKeyAbsentError(AuthenticationError):
    """A security key (FIDO) was not plugged in or not touched in time, and no other method logged in."""

    temporary = True


class TooManyKeysError(AuthenticationError):
    """The server ended the login after too many keys, before the right one's turn."""


class PromptRequiredError(AuthenticationError):
    """A password, passphrase or code had to be asked for, and there is no ``prompt`` to ask."""


class SessionError(BokehSSHError):
    """Logged in, but the server will not run a command (ForceCommand, nologin, MaxSessions 0)."""

    stage = "session"


class ForwardError(BokehSSHError):
    """A forward could not be set up."""

    stage = "forward"


@dataclass(kw_only=True, eq=False, repr=False)
class PortInUseError(ForwardError):
    """The port is taken.

    :ivar port: its number
    :ivar side: ``"local"`` (this machine) or ``"remote"``
    """

    temporary = True

    port: int = 0
    side: str = "local"


@dataclass(kw_only=True, eq=False, repr=False)
class SocketInUseError(ForwardError):
    """Another program listens on the Unix socket, or something else has its path.

    :ivar path: where it is
    :ivar side: ``"local"`` (this machine) or ``"remote"``
    """

    temporary = True

    path: str = ""
    side: str = "local"


class ForwardingRefusedError(ForwardError):
    """The SSH server forbids the forward.

    Its settings for ports are AllowTcpForwarding, PermitOpen and PermitListen; for Unix sockets it is
    AllowStreamLocalForwarding.
    """


class GatewayExposedError(ForwardError):
    """The gateway opened the port to its network, or the socket to its other users; it was closed again.

    The cause for a port is ``GatewayPorts yes``, for a socket a folder that everybody may write to.
    """


class TargetUnreachableError(ForwardError):
    """The SSH server could not connect to the forward's target."""

    temporary = True


@dataclass(kw_only=True, eq=False, repr=False)
class LaunchError(BokehSSHError):
    """The remote server did not start.

    :ivar log: the last lines that it wrote, standard output and error together
    :ivar exit_status: its exit status, negative for a signal; None if it did not exit
    :ivar command: what was run
    """

    stage = "launch"

    log: tuple[str, ...] = ()
    exit_status: int | None = None
    command: tuple[str, ...] = ()

    def __str__(self) -> str:
        tail = "".join(f"\n  | {line}" for line in self.log[-12:])
        return super().__str__() + tail


class PythonNotFoundError(LaunchError):
    """There is no usable Python where the server should run."""


class BokehNotFoundError(LaunchError):
    """That Python has no Bokeh (or not the package that ``command`` names), or one too old."""


class LaunchTimeoutError(LaunchError):
    """The server did not become ready before the launch deadline."""

    temporary = True


class UploadError(LaunchError):
    """The app to upload could not be read here, or could not be stored there."""

    stage = "upload"


@dataclass(kw_only=True, eq=False, repr=False)
class JobError(BokehSSHError):
    """Something is wrong with a cluster's scheduler or the batch job.

    :ivar job: the scheduler's number for it; empty if there is none
    """

    stage = "job"

    job: str = ""


@dataclass(kw_only=True, eq=False, repr=False)
class SubmitError(JobError):
    """The scheduler refused the job, or there is no scheduler: nothing is queued.

    :ivar said: what the scheduler said, line by line
    """

    said: tuple[str, ...] = ()


@dataclass(kw_only=True, eq=False, repr=False)
class JobNeverStartsError(JobError):
    """The scheduler accepted the job, but no waiting will start it; it was cancelled.

    :ivar reason: why it waits, in the scheduler's word
    """

    reason: str = ""


@dataclass(kw_only=True, eq=False, repr=False)
class QueueTimeoutError(JobError):
    """The job still waited after ``queue_timeout`` seconds; it was cancelled.

    :ivar reason: why it waited, in the scheduler's word
    """

    reason: str = ""


@dataclass(kw_only=True, eq=False, repr=False)
class JobEndedError(JobError):
    """The job has ended, with everything that ran in it.

    :ivar state: how it ended: ``"TIMEOUT"``, ``"OUT_OF_MEMORY"``, ``"NODE_FAIL"``, ``"PREEMPTED"``,
        ``"CANCELLED"``, ``"FAILED"``, ``"COMPLETED"``, or ``"UNKNOWN"``
    :ivar log: the last lines that the job itself wrote
    """

    state: str = ""
    log: tuple[str, ...] = ()

    def __str__(self) -> str:
        return super().__str__() + "".join(f"\n  | {line}" for line in self.log[-12:])


class ServerNotFoundError(BokehSSHError):
    """No server to attach to answers on the port."""

    stage = "attach"
    temporary = True


class ServerGoneError(ServerNotFoundError):
    """The server that was there has ended: stopped, its grace time over, or the machine restarted."""

    temporary = False


class ServerTakenError(BokehSSHError):
    """Another client uses the server, and taking it over was not asked for."""

    stage = "attach"


@dataclass(kw_only=True, eq=False, repr=False)
class ForeignServerError(BokehSSHError):
    """The port belongs to another user of that machine.

    :ivar port: its number
    :ivar owner: the owner's numeric user id
    """

    stage = "attach"

    port: int = 0
    owner: int = -1


#: What to do about a server that was killed for memory.
MEMORY_HINT = f"give it more memory ({setting('memory=')} of a batch job), or have the app hold less data"


def describe_kill(limit: int) -> str:
    """Say that the system has killed a process for memory.

    :param limit: what it may use, in bytes; 0 where no limit is known
    """
    what = f"more memory than the {limit / (1 << 20):.0f} MiB that it may use" if limit else "too much memory"
    return f"it wanted {what}, and the system killed it"


@dataclass(kw_only=True, eq=False, repr=False)
class ServerExitedError(BokehSSHError):
    """The remote Bokeh server ended by itself.

    :ivar exit_status: negative for a signal; None if it is not known
    :ivar memory_limit: if it was killed because its machine, or its job, had no more memory: the limit in
        bytes, or 0 if that is not known; else None
    :ivar log: the last lines that it wrote
    """

    stage = "server"

    exit_status: int | None = None
    log: tuple[str, ...] = ()
    memory_limit: int | None = None

    @classmethod
    def of(
        cls, host: str, exit_status: int | None, log: tuple[str, ...], memory_limit: int | None = None
    ) -> ServerExitedError:
        """Say how it ended."""
        how = "" if exit_status is None else f" (exit status {exit_status})"
        if exit_status is not None and exit_status < 0:
            how = f" (signal {-exit_status})"
        msg, hint = f"the server ended by itself{how}", "see its log, and start it again"
        if memory_limit is not None:
            msg, hint = f"the server has ended: {describe_kill(memory_limit)}", MEMORY_HINT
        return cls(msg, host=host, hint=hint, exit_status=exit_status, log=log, memory_limit=memory_limit)


class AppAccessError(BokehSSHError):
    """The Bokeh server requires a login of its own, or a signed session, to open an app."""

    stage = "app"


class ConnectionLostError(BokehSSHError):
    """The SSH connection was lost: ended by the server, cut, or silent for too long."""

    stage = "connection"
    temporary = True


class ResourceError(BokehSSHError):
    """Nothing is wrong elsewhere: this program may open no more files, or start no more threads."""

    stage = "resources"
    temporary = True


class TunnelClosedError(BokehSSHError):
    """The tunnel was used before it was opened, or after it was closed."""
