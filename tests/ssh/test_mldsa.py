"""OpenSSH 10.6's keys with ML-DSA (``mldsa/`` was made by its ssh-keygen): as ours, and as a host's."""

from __future__ import annotations

import base64
import hashlib
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import paramiko
import pytest

from bokeh_ssh import AlgorithmError, ChangedHostKeyError, Host, UnknownHostKeyError
from bokeh_ssh._ssh.auth import identities, private_keys
from bokeh_ssh._ssh.auth.identities import KeyFile
from bokeh_ssh._ssh.connect import connect
from bokeh_ssh._ssh.crypto import mldsa
from bokeh_ssh._ssh.messages import string, strings

FILES = Path(__file__).with_name("mldsa")
PASSPHRASE = "open sesame"
PUBLIC = FILES.joinpath("key.pub").read_text(encoding="ascii").rsplit(" ", 4)[0]
needs_mldsa = pytest.mark.skipif(not mldsa.AVAILABLE, reason="this cryptography has no ML-DSA")


class Server(paramiko.Transport):
    """A server with such a host key, and another one where ``both`` is set; it lets the same key in."""

    def __init__(self, sock: socket.socket, key: mldsa.CompositeKey, both: bool) -> None:
        super().__init__(sock)
        self._key_info = {**self._key_info, mldsa.NAME: mldsa.CompositeKey}
        self._preferred_keys = (mldsa.NAME, "rsa-sha2-256")
        self._preferred_pubkeys = (mldsa.NAME, "rsa-sha2-256")
        self.server_key_dict = {mldsa.NAME: key}
        if both:
            self.server_key_dict["rsa-sha2-256"] = self.server_key_dict["ssh-rsa"] = RSA

    def get_server_key(self) -> paramiko.PKey:
        return self.server_key_dict[self.host_key_type]


RSA = paramiko.RSAKey.generate(2048)


class Rules(paramiko.ServerInterface):
    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        return paramiko.AUTH_SUCCESSFUL if key.get_name() == mldsa.NAME else paramiko.AUTH_FAILED

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"


@pytest.fixture
def key() -> mldsa.CompositeKey:
    """The key, opened."""
    opened = private_keys.load(FILES.joinpath("key").read_bytes(), PASSPHRASE, "key")
    assert opened.comment == "made by OpenSSH 10.6"
    made = opened.for_paramiko
    assert isinstance(made, mldsa.CompositeKey)
    return made


@pytest.fixture(params=[False, True], ids=["alone", "beside another"])
def server(request: pytest.FixtureRequest, key: mldsa.CompositeKey) -> Iterator[tuple[int, bool]]:
    """A server that answers any number of connections: its port, and whether it has an RSA key too."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        served: list[Server] = []

        def serve() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                served.append(Server(sock, key, request.param))
                served[-1].start_server(event=threading.Event(), server=Rules())

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1], request.param
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)
        for each in served:
            each.close()


def host_at(port: int, known_hosts: Path, **keywords: object) -> Host:
    """The server, with a key file of the same key."""
    folder = known_hosts.parent
    for name in ("key", "key.pub"):
        shutil.copy(FILES / name, folder)
    folder.joinpath("key").chmod(0o600)
    return Host(
        "127.0.0.1",
        "joe",
        port=port,
        key_filename=folder / "key",
        passphrase=PASSPHRASE,
        known_hosts=known_hosts,
        ssh_config=None,
        allow_agent=False,
        look_for_keys=False,
        **keywords,  # type: ignore[arg-type]
    )


@needs_mldsa
def test_signature_of_openssh() -> None:
    """What OpenSSH signs is right for us; not for other data, nor with a bit of either half changed."""
    armour = FILES.joinpath("message.sig").read_text(encoding="ascii").split("-----")[2]
    _, name, _, how, signature, _ = strings(base64.b64decode(armour)[10:], 5)
    digest = hashlib.new(how.decode(), b"a message\n").digest()
    data = b"SSHSIG" + string(name) + string(b"") + string(how) + string(digest)
    key = mldsa.CompositeKey(paramiko.Message(base64.b64decode(PUBLIC.split()[1])))
    assert key.verify_ssh_sig(data, paramiko.Message(signature))
    assert not key.verify_ssh_sig(data + b"x", paramiko.Message(signature))
    kind, signed, _ = strings(signature, 2)
    for at in (0, len(signed) - 1):
        bad = bytearray(signed)
        bad[at] ^= 1
        assert not key.verify_ssh_sig(data, paramiko.Message(string(kind) + string(bytes(bad))))
    for cut in (b"", signed[:2420], signed[2420:]):
        assert not key.verify_ssh_sig(data, paramiko.Message(string(kind) + string(cut)))


@needs_mldsa
def test_key_file(key: mldsa.CompositeKey) -> None:
    """Its key file is read with its passphrase, and what it signs is right."""
    assert key.asbytes() == base64.b64decode(PUBLIC.split()[1])
    assert key.verify_ssh_sig(b"data", paramiko.Message(key.sign_ssh_data(b"data")))
    with pytest.raises(private_keys.WrongPassphraseError):
        private_keys.load(FILES.joinpath("key").read_bytes(), "wrong", "key")
    kind, public, private, _ = strings(key.fields, 3)
    assert (kind, len(public), len(private)) == (mldsa.NAME.encode(), 1344, 64)


@needs_mldsa
def test_login(server: tuple[int, bool], tmp_path: Path) -> None:
    """It logs in, at a host that has such a key too: unknown, known, beside another, and in its place."""
    port, both = server
    known = tmp_path / "known_hosts"
    with pytest.raises(UnknownHostKeyError, match=mldsa.NAME):
        connect(host_at(port, known))
    with connect(host_at(port, known, host_keys="accept-new")) as connection:
        assert connection.methods == ("publickey",)
    assert known.read_text() == f"[127.0.0.1]:{port} {PUBLIC}\n"
    for line in (PUBLIC, f"ssh-rsa {RSA.get_base64()}"):
        known.write_text(f"[127.0.0.1]:{port} {line}\n")
        if both or line == PUBLIC:
            with connect(host_at(port, known)) as connection:
                assert connection.transport.host_key_blob[4:].startswith(line.split()[0].encode())
        else:
            with pytest.raises(ChangedHostKeyError, match="has ssh-rsa"):
                connect(host_at(port, known, host_keys="accept-new"))
        assert known.read_text() == f"[127.0.0.1]:{port} {line}\n"


@needs_mldsa
def test_cryptography_without_it(
    server: tuple[int, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without ML-DSA, another key is not added beside one of this kind, and the error says why."""
    monkeypatch.setattr(mldsa, "AVAILABLE", False)
    port, both = server
    known = tmp_path / "known_hosts"
    known.write_text(f"[127.0.0.1]:{port} {PUBLIC}\n")
    kind = UnknownHostKeyError if both else AlgorithmError
    with pytest.raises(kind, match="not supported here, ssh-mldsa" if both else "the server has ssh-mldsa"):
        connect(host_at(port, known, host_keys="accept-new"))
    assert known.read_text() == f"[127.0.0.1]:{port} {PUBLIC}\n"


def test_it_is_a_default_key(account: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked for as OpenSSH 10.6 does; where it cannot be read, it is left to the agent, in words."""
    assert "id_mldsa44_ed25519" in identities.DEFAULT_KEYS
    path = account / ".ssh" / "id_mldsa44_ed25519"
    shutil.copy(FILES / "key", path)
    path.chmod(0o600)
    monkeypatch.delitem(private_keys._FIELDS, mldsa.NAME, raising=False)
    file = KeyFile(
        str(path), explicit=False, agent=None, passphrases=lambda _: iter(()), used=lambda *_: None
    )
    with pytest.raises(private_keys.UnusableKeyError, match="only the SSH agent can use one of its kind"):
        file.public()
