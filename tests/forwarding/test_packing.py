"""Over a slow line, what a server sends is packed there and unpacked here, and nobody at either end knows."""

from __future__ import annotations

import contextlib
import math
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import zlib
from array import array
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import apps
import conformance
import memory
from beds import Machine, until
from bokeh_ssh import DirectTunnel, Event, Launched
from bokeh_ssh._forwarding.unpacker import NotPackedError, UnpackingChannel
from bokeh_ssh._remote import process_tree
from bokeh_ssh._remote.packing import packer
from bokeh_ssh._tunnels import bokeh_client, tunnel_parts
from direct_tunnels import tunnel_to
from static_bed import Reader, request

#: What a page draws, and what it does not.
SAMPLES = {
    "smooth": array("d", map(math.sin, (n / 5_000 for n in range(60_000)))).tobytes(),
    "single": array("f", map(math.sin, (n / 5_000 for n in range(60_000)))).tobytes(),
    "counted": array("q", range(-9_000, 51_000)).tobytes(),
    "text": b"".join(b'{"id": "p%d", "attributes": {}}, ' % n for n in range(9_000)),
    "zeros": bytes(300_000),
    "random": random.Random(1).randbytes(300_000),
    "extreme": struct.pack("<8Q", 0, 1, 1 << 63, (1 << 64) - 1, 5, 1 << 63, (1 << 63) - 1, 0) * 3_000,
}
#: A web server on a socket; /NAME sends that sample, /flood zeros for as long as somebody takes them, and
#: POST sends back what came, or at once a sample, and closes. How much of the flood was taken is in a file
#: beside the socket.
SERVER = """
import http.server, os, socketserver, sys
path, samples = sys.argv[1], sys.argv[2]

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path == "/flood":
            self.send_response(200)
            self.send_header("Content-Length", str(1 << 40))
            self.end_headers()
            block, sent = bytes(1 << 16), 0
            while True:
                self.wfile.write(block)
                sent += len(block)
                with open(samples + "/sent", "w") as file:
                    file.write(str(sent))
        self.answer(open(samples + self.path, "rb").read() if self.path != "/" else b"")

    def do_POST(self):
        if self.path != "/":
            self.close_connection = True
            return self.do_GET()
        self.answer(self.rfile.read(int(self.headers["Content-Length"])))

    def answer(self, data):
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass

class Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    def get_request(self):
        return super().get_request()[0], ("", 0)

Server(path, Handler).serve_forever()
"""

#: An app with numbers.
NUMBERS = """
import numpy as np
from bokeh.models import ColumnDataSource, Div
from bokeh.plotting import curdoc
curdoc().title = "first"
x = np.arange(100_000) / 5000
data = ColumnDataSource({"x": x, "y": np.sin(x)}, name="data")
curdoc().add_root(Div(tags=[{"data": data}]))
"""

#: A packer that may have 33 descriptors, until the input ends; its number is written.
LIMITED = """
import os, resource, sys
from bokeh_ssh._remote import process_tree
from bokeh_ssh._remote.packing.packer import start_packer
resource.setrlimit(resource.RLIMIT_NOFILE, (33, 33))
start_packer(sys.argv[1], sys.argv[2], os.getpgrp())
print(*process_tree.below(os.getpid(), process_tree.table()), flush=True)
sys.stdin.read()
os.killpg(0, 9)
"""
EVENTS: list[Event] = []


class Credited:
    """A channel that counts the credit it gets."""

    def __init__(self) -> None:
        self.given = 0

    def writable(self) -> int: ...  # type: ignore[empty-body]
    def send(self, data: memoryview) -> None: ...
    def send_eof(self) -> None: ...
    def close(self) -> None: ...

    def credit(self, count: int) -> None:
        self.given += count


@pytest.mark.parametrize("name", SAMPLES)
def test_every_byte_comes_back(name: str) -> None:
    """Whatever is sent, in whichever pieces, comes out as it was, and all that travelled is credited; numbers
    get smaller than deflate alone makes them, wherever they begin."""
    chance, data = random.Random(2), b"{}" + SAMPLES[name]
    sizes = {"any": [1, 9, 100, 8_191, 8_192, 9_001, packer.MOST], "full": [packer.MOST]}
    for pieces in sizes.values():
        channel, packs = Credited(), packer.Packer()
        unpacks, came, travelled, begin = UnpackingChannel(channel), b"", 0, 0
        while begin < len(data):
            piece = data[begin : begin + chance.choice(pieces)]
            begin += len(piece)
            sent = memoryview(packs.pack(piece))
            travelled += len(sent)
            cut = chance.randrange(len(sent))
            for part in (sent[:cut], sent[cut:]):
                for found in unpack(unpacks, part):
                    came += found
                    unpacks.credit(1)
                    unpacks.credit(len(found) - 1)
        assert came == data
        assert channel.given == travelled
        assert travelled >= len(data) / packer.LEAST
    if name in ("smooth", "single", "counted"):
        assert travelled < 0.7 * len(zlib.compress(data))
    assert travelled < 1.01 * len(data)


def unpack(channel: UnpackingChannel, part: bytes | memoryview) -> list[memoryview]:
    """Receive something; gives what is complete."""
    channel.receive([memoryview(part)])
    return list(iter(channel.unpack, None))


def head(how: int, skip: int, size: int, packed: bytes) -> bytes:
    """Write a block by hand."""
    return packer.block(bytes(size), how, skip, packed)


@pytest.mark.parametrize(
    "bad",
    [
        packer.HEAD.pack(0, 0, packer.MOST + 1, 9),
        packer.HEAD.pack(0, 0, 100, 1 << 20),
        head(0, 0, 8, b"short"),
        head(1, 0, 100, b"not deflated at all"),
        head(1, 0, 100, zlib.compress(bytes(60_000))),
        head(1, 0, 60_000, zlib.compress(bytes(100))),
        head(9, 0, 80, zlib.compress(bytes(80))),
        head(2, 8, 80, zlib.compress(bytes(80))),
        head(0, 0, 0, b"") + head(0, 0, 1, b"x"),
    ],
)
def test_what_is_not_packed_is_refused(bad: bytes) -> None:
    """Sizes that are not those, more than a block may hold, unknown arrangements, and more after the end."""
    with pytest.raises(NotPackedError):
        unpack(UnpackingChannel(Credited()), bad + bytes(100))


@pytest.fixture
def tunnel(
    sshd: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[DirectTunnel]:
    """Open one as over a slow line; the samples are in tmp_path."""
    monkeypatch.setattr(tunnel_parts, "_FAR", -1.0)
    for name, data in SAMPLES.items():
        (tmp_path / name).write_bytes(data)
    machine = sshd()
    command = (machine.python, "-c", SERVER, "{socket}", str(tmp_path))
    with tunnel_to(machine, command=command, isolate=False, on_event=EVENTS.append) as opened:
        yield opened


def test_pages_are_the_same_and_less_travels(tunnel: DirectTunnel) -> None:
    """Answers and uploads of one connection are as without; a page with numbers takes half the bytes."""
    assert [event.compressed for event in EVENTS if isinstance(event, Launched)][-1]
    with Reader(tunnel.local_port) as reader:
        for name, data in SAMPLES.items():
            before = tunnel.status().received
            assert reader.ask(request(f"/{name}"))[2] == data, name
            if name == "smooth":
                assert tunnel.status().received - before < len(data) / 2
        upload = SAMPLES["random"] * 10
        asked = request("/", f"Content-Length: {len(upload)}", method="POST")
        assert reader.ask(asked + upload)[2] == upload


def test_who_reads_nothing_holds_the_server_back(tunnel: DirectTunnel, tmp_path: Path) -> None:
    """What is sent to a program that does not read waits here as it came: the window bounds it. All of it is
    there once the program reads on, in order, and the end behind it."""
    sent, size = tmp_path / "sent", 100 << 20
    (tmp_path / "long").write_bytes(b"".join(n.to_bytes(8, "big") * 512 for n in range(size // 4096)))

    def wait_until_held() -> None:
        taken: list[int] = []

        def is_held() -> bool:
            taken.append(int(sent.read_text() or 0) if sent.exists() else 0)
            return len(taken) > 20 and taken[-1] == taken[-10] > 0

        until(is_held, timeout=60, what="the server to be held back")
        # Two windows of 2 MiB may have been granted by then, each byte of which is 8; and systems keep some.
        assert taken[-1] < 48 << 20

    with Reader(tunnel.local_port) as slow:
        slow.sock.sendall(request("/flood"))
        assert memory.peak(wait_until_held) < 6 << 20
    with Reader(tunnel.local_port) as slow:
        slow.sock.sendall(request("/long", "Content-Length: 0", method="POST"))
        taken: list[int] = []

        def has_come() -> bool:
            taken.append(tunnel.status().received)
            return len(taken) > 20 and taken[-1] == taken[-10]

        until(has_come, timeout=60, what="the window to be full")
        status, _, body = slow.read()
        assert (status, len(body)) == (200, size)
        assert body == (tmp_path / "long").read_bytes()
        assert slow.sock.recv(1) == b""


def test_apps_of_all_workers_are_packed(
    sshd: Callable[..., Machine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What several apps of one server and of its workers send is packed, and also once they are restarted."""
    monkeypatch.setattr(tunnel_parts, "_FAR", -1.0)
    paths = [tmp_path / "one.py", tmp_path / "two.py"]
    for path in paths:
        path.write_text(NUMBERS)
    words: dict[str, Any] = {"args": ["--num-procs", "2"], "dev": True, "launch_timeout": 60}
    with tunnel_to(sshd(), list(map(str, paths)), **words) as tunnel:
        root = f"http://localhost:{tunnel.local_port}"

        def check(app: str) -> None:
            before = tunnel.status().received
            with closing(bokeh_client.pull(root + app, "")) as session:
                assert len(session.document.select_one({"name": "data"}).data["y"]) == 100_000
            assert tunnel.status().received - before < 600_000  # of 1.6 MB

        def is_restarted() -> bool:
            with contextlib.suppress(OSError):
                return "second" in apps.get(f"{root}/one")
            return False

        check("/one")
        check("/two")
        changed = tmp_path / "changed"
        changed.write_text(NUMBERS.replace("first", "second"))
        changed.replace(paths[0])
        until(is_restarted, timeout=60, what="the new text")
        check("/one")


def test_answer_arrives_though_the_upload_was_not_read(tunnel: DirectTunnel) -> None:
    """A server that refuses an upload, and closes over what it has not read, is heard to its end."""
    upload = bytes(1 << 20)
    with Reader(tunnel.local_port) as reader:
        reader.sock.sendall(request("/random", f"Content-Length: {len(upload)}", method="POST") + upload)
        assert reader.sock.makefile("rb").read().endswith(SAMPLES["random"])


def test_answer_that_is_cut_off_is_no_answer(tunnel: DirectTunnel) -> None:
    """Where what packs is killed, connections through it are reset, and new ones go without."""
    server = tunnel._lifecycle.session.server
    group = process_tree.members(server.pid, process_tree.table())
    (packs,) = group - {server.pid}
    with Reader(tunnel.local_port) as cut:
        cut.sock.sendall(request("/flood"))
        assert cut.sock.recv(100)
        os.kill(packs, signal.SIGKILL)
        with pytest.raises(ConnectionResetError):
            conformance.read_all(cut.sock)
    with Reader(tunnel.local_port) as reader:
        assert reader.ask(request("/text"))[2] == SAMPLES["text"]


def test_server_that_nobody_serves_is_no_empty_answer(tunnel: DirectTunnel, tmp_path: Path) -> None:
    """A connection that the server does not take is reset, as without."""
    (tmp_path / "none").touch()
    (tmp_path / "none").replace(tunnel._lifecycle.session.server.socket)
    conformance.expect_reset(("127.0.0.1", tunnel.local_port), request("/text"))


def test_limits_of_a_machine_are_kept(tmp_path: Path) -> None:
    """Where a limit lets no more connections in, the next are refused, so that they go to the server itself,
    and those before go on; and little memory is reserved for each, which batch systems may count."""
    path, served = str(tmp_path / "packed"), str(tmp_path / "server")
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket(socket.AF_UNIX))
        server.bind(served)
        server.listen()
        server.settimeout(20)
        process = subprocess.Popen(
            [sys.executable, "-c", LIMITED, path, served],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        stack.enter_context(process)
        assert process.stdin
        assert process.stdout
        stack.callback(process.stdin.close)
        number = int(process.stdout.readline())
        pairs, room = [], True
        while room:
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.settimeout(20)
            room = not client.connect_ex(path) and server in select.select([client, server], [], [], 20)[0]
            if room:
                pairs.append((client, stack.enter_context(server.accept()[0])))
        with socket.socket(socket.AF_UNIX) as late, pytest.raises(ConnectionRefusedError):
            late.connect(path)
        assert len(pairs) > 8
        for client, there in pairs:
            there.sendall(b"answer")
            (found,) = unpack(UnpackingChannel(Credited()), client.recv(packer.MOST))
            assert found == b"answer"
        status = Path(f"/proc/{number}/status")
        if status.exists():
            (size,) = (line.split()[1] for line in status.read_text().splitlines() if "VmSize" in line)
            assert int(size) < 300_000  # in KiB; it was 100 MB for each


def test_answer_that_memory_lacks_for_is_broken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory ends while an answer is packed, both ends see it, and nobody takes it for empty."""

    def fail(*_: object) -> bytes:
        raise MemoryError

    monkeypatch.setattr(packer.Packer, "pack", fail)
    near, client = socket.socketpair()
    with near, socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "server"))
        server.listen()
        near.settimeout(20)
        ways = client, socket.socket(socket.AF_UNIX), str(tmp_path / "server")
        carries = threading.Thread(target=packer.carry, args=ways)
        carries.start()
        with server.accept()[0] as there:
            there.settimeout(20)
            there.sendall(b"answer")
            channel = UnpackingChannel(Credited())
            assert unpack(channel, conformance.read_all(near)) == []
            assert channel.is_cut_off
            assert there.recv(1) == b""
        carries.join(20)
        assert not carries.is_alive()


def test_line_that_is_faster_than_packing_gets_it_as_it_is() -> None:
    """Where a line waits for the packing, it is tried without, and stays so only if more gets through."""

    def send(pace: packer.Pace, rate: float) -> None:
        """Send a round of numbers, of which a quarter is left, over a line of so many bytes a second."""
        share = 1.0 if pace.plain else 0.25
        for _ in range(packer.ROUND * 4 // packer.MOST):
            came = packer.MOST
            packing = 0.0 if pace.plain else came / 20e6
            pace.count(came, int(came * share), packing, max(0.0, came * share / rate - packing))

    for rate, plain in ((1e6, False), (3e6, False), (10e6, False), (100e6, True)):
        pace = packer.Pace()
        for _ in range(6):
            send(pace, rate)
        assert pace.plain is plain, rate
        pace.restart()
        assert not pace.plain
