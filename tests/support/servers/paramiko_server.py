"""An SSH server on paramiko, with forwarding and commands around what it comes with; takes any key.

python paramiko_server.py HOST_KEY    prints its port
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

import paramiko


def copy(read: Callable[[int], bytes], write: Callable[[bytes], object], end: Callable[[], object]) -> None:
    """Carry bytes until they end or cannot go on, then say so."""
    with suppress(OSError, EOFError):
        while part := read(1 << 15):
            write(part)
    with suppress(OSError, EOFError):
        end()


def start(*work: object) -> threading.Thread:
    """Run a function in a thread of its own."""
    thread = threading.Thread(target=work[0], args=work[1:], daemon=True)  # type: ignore[arg-type]
    thread.start()
    return thread


def join(sock: socket.socket, channel: paramiko.Channel) -> None:
    """Carry bytes between the two until both have ended."""
    with sock:
        up = start(copy, channel.recv, sock.sendall, lambda: sock.shutdown(socket.SHUT_WR))
        copy(sock.recv, channel.sendall, channel.shutdown_write)
        up.join()
    channel.close()


def run(channel: paramiko.Channel, command: str) -> None:
    """Run a command for a session."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        ["/bin/sh", "-c", command], stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0
    ) as child:
        assert child.stdin
        assert child.stdout
        assert child.stderr
        start(copy, channel.recv, child.stdin.write, child.stdin.close)
        errors = start(copy, child.stderr.read, channel.sendall_stderr, int)
        copy(child.stdout.read, channel.sendall, int)
        errors.join()
        channel.send_exit_status(child.wait() & 255)
    channel.close()


class Interface(paramiko.ServerInterface):
    """What one client may do: anything."""

    def __init__(self, transport: paramiko.Transport) -> None:
        self.transport = transport
        self.targets: dict[int, socket.socket] = {}
        self.listeners: dict[int, socket.socket] = {}

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        return int(paramiko.AUTH_SUCCESSFUL)

    def check_channel_request(self, kind: str, chanid: int) -> int:
        known = kind == "session"
        return int(paramiko.OPEN_SUCCEEDED if known else paramiko.OPEN_FAILED_UNKNOWN_CHANNEL_TYPE)

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        start(run, channel, command.decode())
        return True

    def check_channel_direct_tcpip_request(
        self, chanid: int, origin: tuple[str, int], destination: tuple[str, int]
    ) -> int:
        try:
            self.targets[chanid] = socket.create_connection(destination, timeout=10)
        except OSError:
            return int(paramiko.OPEN_FAILED_CONNECT_FAILED)
        self.targets[chanid].settimeout(None)
        return int(paramiko.OPEN_SUCCEEDED)

    def check_port_forward_request(self, address: str, port: int) -> int | bool:
        try:
            listener = socket.create_server(("127.0.0.1", port), backlog=200)
        except OSError:
            return False
        number = int(listener.getsockname()[1])
        self.listeners[number] = listener
        start(self._accept, listener, address, number)
        return number

    def cancel_port_forward_request(self, address: str, port: int) -> None:
        self._end(self.listeners.pop(port, None))

    def close(self) -> None:
        """End what the client listened on."""
        for listener in self.listeners.values():
            self._end(listener)

    def _end(self, listener: socket.socket | None) -> None:
        if listener is not None:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def _accept(self, listener: socket.socket, address: str, port: int) -> None:
        with suppress(OSError, EOFError, paramiko.SSHException):
            while True:
                sock, origin = listener.accept()
                channel = self.transport.open_forwarded_tcpip_channel(origin, (address, port))
                start(join, sock, channel)


def serve(sock: socket.socket, key: paramiko.PKey) -> None:
    """Serve one client to its end."""
    transport = paramiko.Transport(sock)
    transport.add_server_key(key)
    interface = Interface(transport)
    held = []  # paramiko closes a channel that nobody holds
    with suppress(paramiko.SSHException, EOFError, OSError):
        transport.start_server(server=interface)
        while transport.is_active():
            channel = transport.accept(1)
            held.append(channel)
            if channel is not None and channel.get_id() in interface.targets:
                start(join, interface.targets.pop(channel.get_id()), channel)
    interface.close()
    transport.close()


def main() -> None:
    """Serve on a free port of loopback."""
    key = paramiko.Ed25519Key(filename=sys.argv[1])
    with socket.create_server(("127.0.0.1", 0), backlog=200) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            start(serve, listener.accept()[0], key)


if __name__ == "__main__":
    main()
