"""The client that holds a server: the line to it, and how long the server waits for it."""

from __future__ import annotations

import time

from bokeh_ssh._remote.client_stream import ClientStream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from bokeh_ssh._remote.control_socket import ControlClient


class Lease:
    """How long a server waits for its client.

    :ivar lease: seconds that the client may be silent
    :ivar grace: seconds that a server that can be found waits for one that is gone, or silent for too long
    :ivar keep: whether it waits for ever
    :ivar gone_since: when the client was seen to have gone; None while it is there
    """

    def __init__(self, lease: float, grace: float) -> None:
        self.lease = lease
        self.grace = grace
        self.keep = False
        self.gone_since: float | None = None
        self.renew()

    def renew(self) -> None:
        """Take note that the client was heard."""
        self._heard = time.monotonic()

    def change(self, message: dict[str, Any]) -> None:
        """Wait for ``lease`` and ``grace`` seconds from now on, where a message has them."""
        lease, grace = float(message.get("lease", self.lease)), float(message.get("grace", self.grace))
        self.lease, self.grace = lease, grace

    def is_held(self) -> bool:
        """Whether a client is there, as far as can be known."""
        return self.gone_since is None and time.monotonic() < self._heard + self.lease

    def deadline(self, found: bool) -> float:
        """Return when the server must end, unless the client is heard from before.

        :param found: whether one who comes back can find it
        """
        if self.keep and not self.is_held():
            return float("inf")
        since = self._heard + self.lease if self.gone_since is None else self.gone_since
        return since + (self.grace if found else 0.0)


class Client:
    """The client, or none; another one can take its place.

    :param spec: the ``start`` message
    :param inbox: what was read past that message
    :ivar token: what the client knows, and no other
    :ivar since: when it came or went, in seconds since 1970
    :ivar seen: whether it knows that the server has ended
    :ivar session: what holds the session of one that came later
    """

    def __init__(self, spec: dict[str, Any], inbox: bytes) -> None:
        self.stream = ClientStream(spec["mark"], inbox)
        self.lease = Lease(float(spec["lease"]), float(spec["grace"]))
        self.token = str(spec.get("token", ""))
        self.since = time.time()
        self.seen = False
        self.session: ControlClient | None = None

    def send(self, event: str, **more: Any) -> None:
        """Send it a message, without ever waiting for it."""
        self.stream.send(event, **more)
        if self.stream.output_closed:
            self.note_gone()

    def flush(self) -> None:
        """Write as much as it takes now."""
        self.stream.flush()
        if self.stream.output_closed:
            self.note_gone()

    def read(self) -> None:
        """Read what it says."""
        if self.stream.read():
            self.lease.renew()
        elif self.stream.input_closed:
            self.note_gone()

    def note_gone(self) -> None:
        """Take note that it is no longer there."""
        if self.lease.gone_since is None:
            self.lease.gone_since = time.monotonic()
            self.since = time.time()
        self.release()

    def note_session_ended(self) -> None:
        """Take note that the first client's session was ended around us."""
        if self.session is None:
            self.stream.hang_up()
            self.note_gone()

    def release(self) -> None:
        """Let what holds its session end."""
        session, self.session = self.session, None
        if session:
            session.answer(bye=True)
            session.close()

    def replace(self, session: ControlClient, mark: str) -> None:
        """Go on with another client, or the same one in another session.

        :param session: the one that has asked for it
        :param mark: stands before each message to it
        """
        self.stream.send_taken()
        self.release()
        fds, session.fds = session.fds, []
        self.stream.replace_client(fds, mark)
        session.answer(adopted=True)
        self.session, self.since = session, time.time()
        self.lease.renew()
        self.lease.gone_since = None
