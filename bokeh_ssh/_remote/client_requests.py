"""What clients ask of the supervisor: on their line (``do_``), or at the control socket (``ask_``)."""

from __future__ import annotations

import binascii
import contextlib
import os

from bokeh_ssh._remote.control_socket import MOST_CLIENTS, ControlClient
from bokeh_ssh._remote.process_group import PATIENCE
from bokeh_ssh._remote.server import Server, encode
from bokeh_ssh._remote.server_process import Stage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class ClientRequests:
    """The requests; what another version of the client asks for is skipped, or refused.

    :param server: what they are about
    :ivar waiters: those who want to know when all is over
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self.client = server.client
        self.waiters: list[ControlClient] = []

    def run(self) -> None:
        """Do what the client has said."""
        for message in self.client.stream.take_messages():
            method = getattr(self, "do_" + message["do"], None)
            if method:
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    method(message)

    def do_lease(self, message: dict[str, Any]) -> None:
        """Go on; ``grace`` and ``lease``, in seconds, where they are to change from now on."""
        self.client.lease.change(message)
        self.client.send("beat")

    def do_stop(self, message: dict[str, Any]) -> None:
        """End the server now, with ``patience`` seconds between TERM and KILL."""
        self.server.process.end(float(message.get("patience", PATIENCE)), requested=True)

    def do_detach(self, message: dict[str, Any]) -> None:
        """Hold the server until somebody wants it to end, whoever comes and goes; or no longer."""
        if message.get("keep") is False:
            self.client.lease.keep = False
        elif self.server.is_findable() and self.server.process.stage is Stage.READY:
            self.client.lease.keep = True
            self.client.send("detached")

    def do_accompany(self, message: dict[str, Any]) -> None:
        """Run a program beside the server, unless one runs; ``along`` has what it says of itself."""
        server, sidecar = self.server, self.server.sidecar
        if sidecar.pid:
            if sidecar.status:  # else it is to come
                self.client.send("along", word=sidecar.status)
            return
        with contextlib.suppress(OSError):
            if server.process.stage is Stage.READY:
                argv = [encode(word) for word in message["argv"]]
                out, err = sidecar.start(argv, server.environment(message["env"]), server.process.group)
                server.output.add(along=out, err=err)
                return
        self.client.send("along", word={})

    def store(self, method: str, *args: Any) -> None:
        """Change what was brought."""
        if self.server.upload_dir:
            self.server.upload_dir.attempt(method, *args)

    def do_put(self, message: dict[str, Any]) -> None:
        """Store a part of a file; ``last`` makes it whole, and ``runs`` executable."""
        data, skip = binascii.a2b_base64(message["data"]), int(message.get("skip", 0))
        self.store("put", message["name"], data, message["last"], message["runs"], skip)

    def do_place(self, message: dict[str, Any]) -> None:
        """Rename a file that the client has written by itself, as ``part``."""
        self.store("finish_file", message["name"], message["part"], message["runs"])

    def do_link(self, message: dict[str, Any]) -> None:
        """Store a symbolic link to another name."""
        self.store("link", message["name"], message["to"])

    def do_drop(self, message: dict[str, Any]) -> None:
        """Remove what was stored."""
        self.store("drop", message["name"])

    def do_sync(self, message: dict[str, Any]) -> None:
        """Say how far we are, and ``go`` on if that is all; what could not be stored is reported once."""
        upload_dir = self.server.upload_dir
        if upload_dir:
            fault, upload_dir.fault = upload_dir.fault, ""
            self.client.send("stored", number=int(message["number"]), fault=fault)
            if message.get("go") and not fault:
                self.do_go(message)

    def do_go(self, _: dict[str, Any]) -> None:
        """Start the server: all is here."""
        if self.server.upload_dir and self.server.process.stage is Stage.PREPARING:
            self.server.spawn()

    def do_seen(self, _: dict[str, Any]) -> None:
        """Take note that the client knows of the end."""
        self.client.seen = True

    # --- who comes later

    def serve(self, control: ControlClient | None) -> None:
        """Do what one who knocked asks for, or say why not."""
        if control is None or control.request is None:
            return
        try:
            method = getattr(self, "ask_" + str(control.request.get("do")), None)
            refusal = method(control, control.request) if method else "unknown"
        except (ValueError, TypeError, KeyError):
            refusal = "unknown"
        if refusal:
            control.answer(error=refusal, **self.server.record())
            control.close()

    def ask_status(self, control: ControlClient, _: dict[str, Any]) -> str:
        """Send the record."""
        control.answer(**self.server.record())
        control.close()
        return ""

    def ask_stop(self, control: ControlClient, request: dict[str, Any]) -> str:
        """End the server; the guest gets an answer when all is over."""
        self.do_stop(request)
        return self.wait_for_end(control, stopping=True)

    def wait_for_end(self, control: ControlClient, **answer: Any) -> str:
        """Note one who is to get an answer when all is over, unless too many wait for that."""
        if len(self.waiters) >= MOST_CLIENTS:
            return "busy"
        self.waiters.append(control)
        control.answer(**answer)
        return ""

    def ask_adopt(self, control: ControlClient, request: dict[str, Any]) -> str:
        """Change to another client, whose standard input and output come along.

        With the right token it is the same client again, which also ends a session that only seems to be
        there. Without it, it is another one; then the token changes, so that the first does not take the
        server back unasked.
        """
        process, client = self.server.process, self.client
        if process.ending:
            if process.status is None or process.stop_requested:
                return "gone"
            return self.wait_for_end(control, over=False)
        if process.stage is not Stage.READY:
            return "starting"
        mark, known = str(request["mark"]), request.get("token") == client.token
        if client.lease.is_held() and not known:
            return "attached"
        if len(control.fds) != 2:
            return "unknown"
        client.lease.change(request)
        if not known:
            client.token = os.urandom(16).hex()
        client.replace(control, mark)
        self.server.replay_state()
        return ""
