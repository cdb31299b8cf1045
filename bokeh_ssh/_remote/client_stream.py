"""The client that holds a server: the stream to it, and its lease. Nothing here waits for it."""

from __future__ import annotations

import collections
import json
import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from bokeh_ssh._remote.control_socket import ControlClient

CHUNK = 1 << 16  # bytes read at once
OUTBOX = 1 << 20  # bytes that may wait for a slow client; log lines past that are dropped and counted
LONGEST = 4 << 20  # bytes of a message that comes in; what is longer is skipped
PAIRS = {"continued": "stopped", "answers": "busy"}  # only the last of the two is of interest


class ClientStream:
    """Both directions. Nothing raises: :attr:`input_closed` and :attr:`output_closed` say what is closed.

    :param mark: stands before each message, so that it is distinguished from what start files print
    :param inbox: what was read already
    :ivar input_closed: whether the client's end of standard input is closed
    :ivar output_closed: whether the client's end of standard output is closed
    """

    def __init__(self, mark: str, inbox: bytes = b"") -> None:
        self.mark = mark.encode()
        self.input_closed = False
        self.output_closed = False
        self._inbox = bytearray(inbox)
        self._seen = 0  # bytes of it without a line end
        self._skips = False  # a line that is too long is coming in
        self._deferred: dict[str, dict[str, Any]] = {}  # the last of each kind, for when there is room
        self._outbox: collections.deque[bytes] = collections.deque()
        self._size = 0  # bytes in the outbox
        self._dropped = 0  # log lines

    def sources(self) -> list[int]:
        """List what to read."""
        return [] if self.input_closed else [0]

    def sinks(self) -> list[int]:
        """List what to write, where something waits."""
        return [1] if self._outbox else []

    def send(self, event: str, **more: Any) -> None:
        """Send a message to the client."""
        if self.output_closed:
            return
        if self._size > OUTBOX or self._deferred:
            self._defer(event, more)
            return
        self._put(self.mark + json.dumps(dict(more, event=event)).encode("ascii") + b"\n")
        self.flush()

    def _defer(self, event: str, more: dict[str, Any]) -> None:
        """Keep what there is no room for now: of log lines how many, of all else the last of its kind."""
        if event == "log":
            self._dropped += len(more["lines"])
            return
        before = self._deferred.pop(PAIRS.get(event, event), {})
        if event == "stored":  # of faults the first
            more["fault"] = before.get("fault") or more["fault"]
        self._deferred[PAIRS.get(event, event)] = dict(more, event=event)

    def _put(self, data: bytes) -> None:
        self._outbox.append(data)
        self._size += len(data)

    def flush(self) -> None:
        """Write as much as the client takes now."""
        try:
            while self._outbox:
                sent = os.write(1, self._outbox[0])
                self._size -= sent
                if sent < len(self._outbox[0]):
                    self._outbox[0] = self._outbox[0][sent:]
                else:
                    self._outbox.popleft()
        except BlockingIOError:
            return
        except OSError:  # nobody reads any more
            self.output_closed = True
            self.discard()
            return
        late, self._deferred = self._deferred, {}
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            self.send("dropped", lines=dropped)
        for more in late.values():
            self.send(**more)

    def discard(self) -> None:
        """Forget what was still to be sent to the client."""
        self._outbox.clear()
        self._deferred.clear()
        self._size = self._dropped = 0

    def read(self) -> bool:
        """Read what the client says; False where it said nothing."""
        try:
            data = os.read(0, CHUNK)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        self.input_closed = not data
        self._inbox += data
        return bool(data)

    def take_messages(self) -> list[dict[str, Any]]:
        """Return the messages that have come in whole; what is none comes from another version."""
        end = self._inbox.rfind(b"\n", self._seen)
        self._seen = len(self._inbox)
        if end < 0:
            self._skips = self._skips or self._seen > LONGEST
            if self._skips:
                self._forget(self._seen)
            return []
        lines = bytes(self._inbox[:end]).split(b"\n")
        self._forget(end + 1)
        if self._skips:
            self._skips, lines = False, lines[1:]
        found = []
        for line in lines:
            try:
                message = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(message, dict) and isinstance(message.get("do"), str):
                found.append(message)
        return found

    def _forget(self, count: int) -> None:
        del self._inbox[:count]
        self._seen = len(self._inbox)

    def send_taken(self) -> None:
        """Send the client a message that it is one no more."""
        self.discard()
        if not self.output_closed:
            self._put(b"\n")  # after a line that was half out
            self.send("taken")

    def hang_up(self) -> None:
        """Let go of a session that has ended otherwise than by the end of its streams."""
        null = os.open(os.devnull, os.O_RDWR)
        for number in range(2):
            os.dup2(null, number)
        os.close(null)
        self.discard()
        self.input_closed = self.output_closed = True

    def replace_client(self, fds: list[int], mark: str) -> None:
        """Go on with another client.

        :param fds: to read from, and to write to; closed, since they become 0 and 1
        """
        for number, fd in enumerate(fds):
            os.dup2(fd, number)
            os.close(fd)
        os.set_blocking(1, False)
        self.discard()
        self.mark, self._skips = mark.encode(), False
        self._forget(len(self._inbox))
        self.input_closed = self.output_closed = False


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
        """Return whether a client is there, as far as can be known."""
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
