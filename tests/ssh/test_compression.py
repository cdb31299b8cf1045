"""SSH compression: what a server's packets inflate to is bounded, and all that is right goes through."""

from __future__ import annotations

import os
import socket
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from paramiko.compress import ZlibDecompressor
from paramiko.message import Message

import beds
from beds import Key, Machine
from bokeh_ssh import BokehSSHError, ConnectionLostError, LocalForward
from bokeh_ssh._ssh.packetizer import MAX_PACKET_LENGTH, InflateError, Inflater, Packetizer
from bokeh_ssh._ssh.transport import MAX_PACKET, Transport
from cable import Cable
from conformance import pattern, read_all
from fake_forwards import check_alive, local_forward
from fakes import FakeSSH, Server
from memory import peak
from rekeying import LIMIT, WAYS
from targets import target_here

_MIB = 1 << 20
_ALGORITHMS = pytest.mark.parametrize("algorithm", ["zlib", "zlib@openssh.com"])


def bomb(size: int, stream: Any = None) -> bytes:
    """Compress as many zeros, for whom has followed the stream so far."""
    stream = stream or zlib.compressobj()
    parts = [stream.compress(bytes(_MIB)) for _ in range(size // _MIB)]
    return b"".join((*parts, stream.flush(zlib.Z_FULL_FLUSH)))


def test_packet_inflates_to_no_more_than_one_may_hold() -> None:
    """128 MiB of zeros in 130 KB are refused before they are there; the control, paramiko's, makes them."""
    data = bomb(128 * _MIB)
    assert len(data) < MAX_PACKET_LENGTH

    def ours() -> None:
        with pytest.raises(InflateError, match="inflates to more"):
            Inflater()(data)

    assert peak(ours) < 4 * _MIB
    assert peak(lambda: ZlibDecompressor()(data)) > 100 * _MIB


@pytest.mark.parametrize("size", [1, 100, 32768, MAX_PACKET + 9, MAX_PACKET_LENGTH])
@pytest.mark.parametrize("random", [False, True], ids=["zeros", "random"])
def test_packets_of_any_size_that_is_allowed_inflate(size: int, random: bool) -> None:
    """Payloads up to the longest packet come out as they went in; one more byte is refused."""
    deflate, inflate = zlib.compressobj(), Inflater()
    for _ in range(20):
        payload = os.urandom(size) if random else bytes(size)
        assert inflate(deflate.compress(payload) + deflate.flush(zlib.Z_PARTIAL_FLUSH)) == payload
    more = bytes(MAX_PACKET_LENGTH + 1)
    with pytest.raises(InflateError):
        inflate(deflate.compress(more) + deflate.flush(zlib.Z_SYNC_FLUSH))


@pytest.mark.parametrize(
    "data", [b"", b"nothing like it", zlib.compress(b"whole"), zlib.compress(b"") + bytes(1000)]
)
def test_what_is_no_compressed_stream_is_refused(data: bytes) -> None:
    """Neither what is none, nor one that ends, after which zlib would keep all that comes, is taken."""
    with pytest.raises(InflateError):
        Inflater()(data)


def hostile(tmp_path: Path, algorithm: str, monkeypatch: pytest.MonkeyPatch) -> FakeSSH:
    """Make a server that compresses, in this way only."""
    monkeypatch.setattr(Server, "_preferred_compression", (algorithm,))
    return FakeSSH(tmp_path)


@_ALGORITHMS
@pytest.mark.parametrize("what", ["bomb", "garbage", "ends"])
def test_server_that_inflates_without_end_is_cut_off(
    tmp_path: Path, algorithm: str, what: str, monkeypatch: pytest.MonkeyPatch, no_leaks: Any
) -> None:
    """The connection ends, with a typed error that says why; until then, the control, it works."""
    with no_leaks(), hostile(tmp_path, algorithm, monkeypatch) as fake:
        with local_forward(fake, compression=True) as forward:
            assert fake.session.remote_compression == algorithm
            check_alive(forward)
            packetizer: Any = fake.session.packetizer
            deflate = packetizer._Packetizer__compress_engine_out

            def compress(data: bytes) -> bytes:
                if data[0] != 2:  # a channel that closes may come in between
                    return bytes(deflate(data))
                if what == "bomb":
                    return bomb(64 * _MIB, deflate.z.copy())
                return b"\xff" * 100 if what == "garbage" else bytes(deflate.z.copy().flush(zlib.Z_FINISH))

            packetizer._Packetizer__compress_engine_out = compress
            fake.session.send(2, "")  # IGNORE, which all have to take
            with pytest.raises(ConnectionLostError, match=r"inflates to|compressed data"):
                forward.wait(20)


def test_server_that_does_so_before_the_login_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_leaks: Any
) -> None:
    """With ``zlib``, which begins with the first keys, it need not know who we are; that is a typed error."""
    original = Server._parse_newkeys

    def bend(self: Server, m: Message) -> None:
        original(self, m)
        packetizer: Any = self.packetizer
        deflate = packetizer._Packetizer__compress_engine_out
        packetizer._Packetizer__compress_engine_out = lambda data: bomb(64 * _MIB, deflate.z)
        self.send(2, "")

    monkeypatch.setattr(Server, "_parse_newkeys", bend)
    with no_leaks(), hostile(tmp_path, "zlib", monkeypatch) as fake:
        with pytest.raises(BokehSSHError, match="inflates to more"):
            local_forward(fake, compression=True, timeout=10).open()


@WAYS
def test_compressed_traffic_goes_through_new_keys(
    way: Any,
    machine_with: Callable[..., Machine],
    key_changes: dict[Transport, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Real servers' compression works while both sides ask for new keys all the time; every byte arrives."""
    monkeypatch.setattr(Packetizer, "REKEY_PACKETS", 100)  # it compresses well: bytes do not come so soon
    machine = machine_with(rekey=LIMIT // 8)
    monkeypatch.setattr(type(machine), "login", property(with_compression(type(machine).login)))
    with way(machine) as work:
        [transport] = key_changes
        assert transport.remote_compression == "zlib@openssh.com"
        work()
    [count] = key_changes.values()
    assert count > 5


def with_compression(login: Any) -> Callable[[Machine], dict[str, Any]]:
    return lambda machine: {**login.fget(machine), "compression": True}


@pytest.mark.parametrize("newest", [False, True])
def test_only_newer_servers_send_without_a_dictionary(key: Key, tmp_path: Path, newest: bool) -> None:
    """What repeats takes hardly any room, except in what OpenSSH 10.6 sends: docs/security.md says so."""
    folder = os.environ.get("OPENSSH_NEWEST", "")
    if newest and not folder:
        pytest.skip("there is no newer OpenSSH here")
    size = 1 << 18
    carried = {}
    with (
        target_here() as port,
        beds.local_sshd(key, tmp_path, {}, newest=folder if newest else "") as machine,
        Cable(machine.host, machine.port) as cable,
    ):
        login = cable.machine(machine, tmp_path).login | {"compression": True}
        with LocalForward(machine.host, remote_port=port, **login) as forward:
            for way, words, sent in (("there", b"hash", pattern(size)), ("back", b"send %d" % size, b"")):
                before = cable.carried
                with socket.create_connection(("127.0.0.1", forward.local_port), timeout=30) as sock:
                    sock.sendall(words + b"\n" + sent)
                    sock.shutdown(socket.SHUT_WR)
                    assert len(read_all(sock)) == (size if way == "back" else 32)
                carried[way] = cable.carried - before
    assert carried["there"] < size // 4
    assert carried["back"] > size if newest else carried["back"] < size // 4, carried
