"""Logging in: the order of OpenSSH, one connection, no question without a prompt, no secret in any text."""

from __future__ import annotations

import asyncio
import base64
import builtins
import contextlib
import functools
import getpass
import hashlib
import logging
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import asyncssh
import paramiko
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from auth_servers import (
    USER,
    Bed,
    Client,
    FakeAgent,
    Rules,
    SshAgent,
    Sshd,
    banner,
    client,
    failure,
    info_request,
    make_key,
)
from beds import Machine, until
from bokeh_ssh._core.errors import (
    AuthenticationError,
    BokehSSHError,
    ConnectionLostError,
    ConnectTimeoutError,
    PromptRequiredError,
    TooManyKeysError,
    UsageError,
)
from bokeh_ssh._core.events import Question
from bokeh_ssh._core.host import Host
from bokeh_ssh._core.text import clean
from bokeh_ssh._ssh.auth import agent as agent_module
from bokeh_ssh._ssh.auth import identities, userauth
from bokeh_ssh._ssh.auth import login as login_module
from bokeh_ssh._ssh.auth.login import login
from bokeh_ssh._ssh.config.lookup import HostConfig
from bokeh_ssh._ssh.crypto import security_key
from bokeh_ssh._ssh.messages import string, strings
from skips import missing

#: What an ssh config says about logging in.
Config = functools.partial(HostConfig, "localhost")


class Person:
    """Answers questions from a list, and remembers them and the threads that they came on."""

    def __init__(self, *answers: str | None) -> None:
        self.answers = list(answers)
        self.questions: list[Question] = []
        self.threads: set[threading.Thread] = set()

    def __call__(self, question: Question) -> str | None:
        self.questions.append(question)
        self.threads.add(threading.current_thread())
        return self.answers.pop(0)


def enter(
    port: int, config: HostConfig | None = None, timeout: float = 10, **keywords: Any
) -> tuple[str, ...]:
    """Log in over one connection."""
    with client(port) as transport:
        return _enter(transport, config, timeout, **keywords)


def _enter(
    transport: paramiko.Transport, config: HostConfig | None = None, timeout: float = 10, **keywords: Any
) -> tuple[str, ...]:
    host = Host("far.example", **keywords)
    return login(transport, host, config or Config(), user=USER, timeout=timeout)


@pytest.fixture
def make_sshd(tmp_path: Path) -> Iterator[Callable[..., Sshd]]:
    """Start real sshds: ``make_sshd([keys], "Option value")``."""
    with contextlib.ExitStack() as stack:

        def make(authorized: list[Any], *options: str, newest: str = "") -> Sshd:
            folder = tmp_path / f"sshd{len(list(tmp_path.iterdir()))}"
            folder.mkdir()
            return stack.enter_context(contextlib.closing(Sshd(folder, authorized, *options, newest=newest)))

        yield make


@pytest.fixture
def make_agent() -> Iterator[Callable[..., SshAgent]]:
    """Start real SSH agents that hold the given key files."""
    with contextlib.ExitStack() as stack:
        yield lambda *keys, **kw: stack.enter_context(contextlib.closing(SshAgent(*keys, **kw)))


@pytest.fixture
def fake_agent() -> Iterator[Callable[..., FakeAgent]]:
    """Start agents that do what a script says."""
    with contextlib.ExitStack() as stack:
        yield lambda script: stack.enter_context(contextlib.closing(FakeAgent(script)))


@pytest.fixture(autouse=True)
def nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make each test fail that reads the terminal."""

    def refuse(*args: object, **kwargs: object) -> None:
        pytest.fail("the library asked the terminal")

    monkeypatch.setattr(builtins, "input", refuse)
    monkeypatch.setattr(getpass, "getpass", refuse)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(read=refuse, readline=refuse, fileno=refuse))


# Keys.


@pytest.mark.parametrize(
    ("kind", "form", "passphrase"),
    [
        ("ssh-ed25519", "openssh", None),
        ("ssh-ed25519", "openssh", "open sesame"),
        ("ssh-ed25519", "pkcs8-pem", None),
        ("ecdsa-sha2-nistp256", "openssh", "open sesame"),
        ("ecdsa-sha2-nistp384", "pkcs1-pem", None),
        ("ecdsa-sha2-nistp521", "pkcs8-pem", "open sesame"),
        ("ssh-rsa", "openssh", None),
        ("ssh-rsa", "pkcs1-pem", "open sesame"),
    ],
)
def test_key_file_formats(
    make_sshd: Callable[..., Sshd], keys: Path, kind: str, form: str, passphrase: str | None
) -> None:
    """A key file in any format that ssh-keygen writes logs in, locked ones with their passphrase."""
    key = make_key(keys / "id", kind, form=form, passphrase=passphrase)
    server = make_sshd([key])
    assert enter(server.port, key_filename=keys / "id", passphrase=passphrase) == ("publickey",)
    assert "Accepted publickey" in server.log()
    assert server.connections == 1


def test_pkey(make_sshd: Callable[..., Sshd], keys: Path) -> None:
    """A key at hand logs in, and is tried before key files."""
    right, wrong = make_key(keys / "right"), make_key(keys / "wrong")
    server = make_sshd([right])
    pkey = paramiko.Ed25519Key.from_private_key_file(str(keys / "right"))
    assert enter(server.port, pkey=pkey, key_filename=keys / "wrong") == ("publickey",)
    assert "Failed publickey" not in server.log()
    assert wrong is not right


def test_wrong_key(make_sshd: Callable[..., Sshd], keys: Path) -> None:
    """A wrong key is a typed error with what was tried and what is allowed, over one connection."""
    right = make_key(keys / "right")
    make_key(keys / "wrong")
    server = make_sshd([right])
    with pytest.raises(AuthenticationError) as caught:
        enter(server.port, key_filename=keys / "wrong")
    error = caught.value
    assert error.tried == ("publickey wrong",)
    assert error.allowed == ("publickey",)
    assert str(error).startswith(f"far.example: login as {USER} was refused (tried publickey wrong;")
    assert "authorized_keys" in str(error)
    assert not isinstance(error, (PromptRequiredError, TooManyKeysError))
    assert server.connections == 1
    assert "Failed publickey" in server.log()
    assert enter(server.port, key_filename=keys / "right") == ("publickey",)  # the control


def test_several_keys_one_connection(make_sshd: Callable[..., Sshd], keys: Path) -> None:
    """Several keys are tried on one connection, in the order given."""
    made = [make_key(keys / name) for name in ("a", "b", "c")]
    server = make_sshd([made[2]])
    assert enter(server.port, key_filename=[keys / "a", keys / "b", keys / "c"]) == ("publickey",)
    assert server.connections == 1
    assert server.log().count("Failed publickey") == 2


@pytest.mark.parametrize("tries", [1, 3])
def test_key_files_of_others_as_many_as_with_ssh(
    make_sshd: Callable[..., Sshd], keys: Path, tries: int
) -> None:
    """Where sshd does not count the first questions (since 10.6), as many key files are tried as by ssh."""
    newest = os.environ.get("OPENSSH_NEWEST", "")
    if not newest:
        pytest.skip("there is no newer OpenSSH here")
    made = [make_key(keys / f"key{number}") for number in range(5)]
    server = make_sshd([made[-1]], f"MaxAuthTries {tries}", newest=newest)
    config = Config(identity_files=tuple(str(keys / f"key{number}") for number in range(5)))
    assert enter(server.port, config) == ("publickey",)


def test_default_keys_in_ssh_order(make_bed: Callable[..., Bed], account: Path) -> None:
    """The default keys are tried in the order of ssh, and only where nothing else was named."""
    made = {
        name: make_key(account / ".ssh" / name, kind)
        for name, kind in (
            ("id_ed25519", "ssh-ed25519"),
            ("id_ecdsa", "ecdsa-sha2-nistp256"),
            ("id_rsa", "ssh-rsa"),
        )
    }
    bed = make_bed({"publickey"}, keys=(made["id_ed25519"],))
    assert enter(bed.port) == ("publickey",)
    order = [made[name].public_data for name in ("id_rsa", "id_ecdsa", "id_ed25519")]
    assert list(dict.fromkeys(bed.seen[0].offered)) == order
    with pytest.raises(AuthenticationError) as caught:
        enter(bed.port, look_for_keys=False)
    assert caught.value.tried == ()
    make_key(account / "other")
    with pytest.raises(AuthenticationError) as caught:
        enter(bed.port, Config(identity_files=(str(account / "other"),)))
    assert caught.value.tried == ("publickey other",)


def test_order_of_sources(
    make_bed: Callable[..., Bed], make_agent: Callable[..., SshAgent], keys: Path
) -> None:
    """Explicit keys come first, then the agent's, configured ones in front, then other configured ones."""
    names = ("pkey", "explicit", "agent_other", "agent_configured", "configured", "never")
    made = {name: make_key(keys / name) for name in names}
    agent = make_agent(keys / "agent_other", keys / "agent_configured")
    (keys / "agent_configured").unlink()
    bed = make_bed({"publickey"}, keys=(made["never"],))
    config = Config(
        identity_files=(str(keys / "configured"), str(keys / "agent_configured")), identity_agent=agent.path
    )
    with pytest.raises(AuthenticationError) as caught:
        enter(
            bed.port,
            config,
            pkey=paramiko.Ed25519Key.from_private_key_file(str(keys / "pkey")),
            key_filename=keys / "explicit",
        )
    order = [
        made[name].public_data
        for name in ("pkey", "explicit", "agent_configured", "agent_other", "configured")
    ]
    assert bed.seen[0].offered == order
    assert caught.value.tried == (
        "publickey pkey",
        "publickey explicit",
        "publickey agent_configured",
        "publickey agent_other (agent)",
        "publickey configured",
    )


def test_certificate(make_sshd: Callable[..., Sshd], make_agent: Callable[..., SshAgent], keys: Path) -> None:
    """A certificate beside the key is used, whether the file or the agent signs."""
    authority, key = make_key(keys / "authority"), make_key(keys / "id", passphrase="open sesame")
    certificate = authority.generate_user_certificate(key, "test", principals=[USER])
    (keys / "id-cert.pub").write_bytes(certificate.export_certificate())
    server = make_sshd([], f"TrustedUserCAKeys {keys}/authority.pub")
    assert enter(server.port, key_filename=keys / "id", passphrase="open sesame") == ("publickey",)
    make_key(keys / "plain")
    (keys / "open").write_bytes(key.export_private_key())
    (keys / "open").chmod(0o600)
    agent = make_agent(keys / "open")
    assert enter(server.port, Config(identity_agent=agent.path), key_filename=keys / "id") == ("publickey",)
    assert server.log().count("Accepted publickey") == 2
    assert "ED25519-CERT" in server.log()


def test_named_certificate_stands_in_place_of_the_others(
    make_sshd: Callable[..., Sshd], keys: Path, tmp_path: Path
) -> None:
    """As with ssh, what lies beside a key file of the config is not offered once a CertificateFile is named:
    a server counts each offer."""
    authority, key = make_key(keys / "authority"), make_key(keys / "id")
    certificate = authority.generate_user_certificate(key, "test", principals=[USER])
    (keys / "id-cert.pub").write_bytes(certificate.export_certificate())
    other = authority.generate_user_certificate(make_key(keys / "other"), "test", principals=[USER])
    (keys / "others").write_bytes(other.export_certificate())
    server = make_sshd([], f"TrustedUserCAKeys {keys}/authority.pub")
    files = (str(keys / "id"),)
    assert enter(server.port, Config(identity_files=files)) == ("publickey",)
    named = (str(keys / "others"),)
    with pytest.raises(AuthenticationError):
        enter(server.port, Config(identity_files=files, certificate_files=named))
    if shutil.which("ssh") is None:
        missing("there is no ssh here")
    lines = [f"IdentityFile {files[0]}", f"CertificateFile {named[0]}", "StrictHostKeyChecking no"]
    lines += [f"UserKnownHostsFile {tmp_path}/known", "BatchMode yes", f"Port {server.port}", f"User {USER}"]
    (tmp_path / "config").write_text("\n".join(lines))
    ssh = ["ssh", "-F", str(tmp_path / "config"), "127.0.0.1", "true"]
    done = subprocess.run(ssh, capture_output=True, text=True, timeout=30, check=False)
    assert "Permission denied" in done.stderr


def test_certificate_out_of_date_is_told(make_sshd: Callable[..., Sshd], keys: Path) -> None:
    """One that was refused, and is over or not yet begun by the clock here, is named with its day."""
    authority, key = make_key(keys / "authority"), make_key(keys / "id")
    server = make_sshd([], f"TrustedUserCAKeys {keys}/authority.pub")
    for since, until_, why in (
        ("20010203", "20020304", "expired since 2002-03-04"),
        ("+1d", "+2d", r"not valid before 20\d\d-\d\d-\d\d, and the clock here says 20"),
    ):
        made = authority.generate_user_certificate(
            key, "test", principals=[USER], valid_after=since, valid_before=until_
        )
        (keys / "id-cert.pub").write_bytes(made.export_certificate())
        with pytest.raises(AuthenticationError, match=f"certificate id-cert is {why}"):
            enter(server.port, key_filename=keys / "id")


@pytest.mark.parametrize("kind", ["ssh-ed25519", "ssh-rsa"])
def test_certificate_that_is_named(
    make_sshd: Callable[..., Sshd], make_agent: Callable[..., SshAgent], keys: Path, kind: str
) -> None:
    """A certificate that the config names is used with the key that it is for, wherever that is: in a file,
    or in the agent only, with IdentitiesOnly too. One for another key, or none at all, is skipped, and
    named in the error of a login that fails, as is a key file that is not there."""
    authority, key = make_key(keys / "authority"), make_key(keys / "id", kind)
    certificate = authority.generate_user_certificate(key, "test", principals=[USER])
    (keys / "elsewhere").write_bytes(certificate.export_certificate())
    server = make_sshd([], f"TrustedUserCAKeys {keys}/authority.pub")
    other = authority.generate_user_certificate(make_key(keys / "other"), "test", principals=[USER])
    (keys / "others").write_bytes(other.export_certificate())
    (keys / "damaged").write_bytes(certificate.export_certificate()[:-20] + b"A" * 19 + b"\n")
    useless = (str(keys / "nothing"), str(keys / "id.pub"), str(keys / "others"), str(keys / "damaged"))
    listed = (*useless, str(keys / "elsewhere"))
    typo = str(keys / "typo")
    with pytest.raises(AuthenticationError) as caught:  # the control
        enter(server.port, Config(identity_files=(str(keys / "id"), typo), certificate_files=useless))
    assert f"IdentityFile {typo} is not there" in str(caught.value)
    for path, why in zip(useless, ("is not there", "is not there", "was not used", "is no"), strict=True):
        assert f"CertificateFile {path} {why}" in str(caught.value)
    assert enter(server.port, Config(identity_files=(str(keys / "id"),), certificate_files=listed)) == (
        "publickey",
    )
    agent = make_agent(keys / "id")
    for path in keys.glob("id*"):
        path.unlink()
    config = Config(identities_only=True, identity_agent=agent.path, certificate_files=listed)
    assert enter(server.port, config) == ("publickey",)
    assert server.log().count("Accepted publickey") == 2


def test_rsa_certificate(
    make_sshd: Callable[..., Sshd], make_agent: Callable[..., SshAgent], keys: Path
) -> None:
    """An RSA certificate is signed for with SHA-2, from the file and from the agent that holds both; of keys
    that nobody has named it comes first, as with ssh 10.6."""
    authority, key = make_key(keys / "authority"), make_key(keys / "id", "ssh-rsa")
    certificate = authority.generate_user_certificate(key, "test", principals=[USER])
    (keys / "id-cert.pub").write_bytes(certificate.export_certificate())
    server = make_sshd([], f"TrustedUserCAKeys {keys}/authority.pub", "MaxAuthTries 2")
    assert enter(server.port, key_filename=keys / "id") == ("publickey",)
    others = [keys / "other1", keys / "other2"]
    for path in others:
        make_key(path)
    agent = make_agent(*others, keys / "id")  # ssh-add takes the certificate along
    assert enter(server.port, Config(identity_agent=agent.path)) == ("publickey",)
    assert server.log().count("RSA-CERT") >= 2


def test_rsa_without_common_algorithm(
    make_sshd: Callable[..., Sshd], keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An RSA key whose signatures the server does not take is skipped, and the error says so."""
    rsa, other = make_key(keys / "rsa", "ssh-rsa"), make_key(keys / "other")
    server = make_sshd([rsa, other])
    assert enter(server.port, key_filename=keys / "rsa") == ("publickey",)  # the control

    def parse(self: Client, _message: paramiko.Message) -> None:
        self.server_extensions = {"server-sig-algs": b"ssh-ed25519,\xff"}

    monkeypatch.setattr(Client, "_parse_ext_info", parse)
    assert enter(server.port, key_filename=[keys / "rsa", keys / "other"]) == ("publickey",)
    with pytest.raises(AuthenticationError, match="takes none of its signature algorithms"):
        enter(server.port, key_filename=keys / "rsa")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda folder: folder / "missing", "No such file"),
        (lambda folder: _write(folder / "garbage", b"not a key\n"), "is not a private key"),
    ],
)
def test_bad_key_file(keys: Path, make: Callable[[Path], Path], text: str) -> None:
    """A key file named by the caller that cannot work is a usage error."""
    path = make(keys)
    with pytest.raises(UsageError, match=text) as caught:
        identities.check_keys(Host("far.example", key_filename=path))
    assert str(path) in str(caught.value)


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_bad_pkey(keys: Path) -> None:
    """A pkey that is none, or is only a public key, is a usage error."""
    public = paramiko.Ed25519Key(data=make_key(keys / "id").public_data)
    for pkey in ("id_rsa", public):
        with pytest.raises(UsageError, match="pkey"):
            identities.check_keys(Host("far.example", pkey=pkey))  # type: ignore[arg-type]


def test_unreadable_default_key(make_bed: Callable[..., Bed], account: Path) -> None:
    """A default key file that is no key is skipped, and the error says so."""
    (account / ".ssh" / "id_rsa").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END\n")
    (account / ".ssh" / "id_rsa").chmod(0o600)
    good = make_key(account / ".ssh" / "id_ed25519")
    bed = make_bed({"publickey"}, keys=(good,))
    assert enter(bed.port) == ("publickey",)
    other = make_bed({"publickey"})
    with pytest.raises(AuthenticationError, match="key id_rsa was not used: it is not a private key"):
        enter(other.port)


@pytest.mark.parametrize("name", [b"sk-ssh-ed25519@openssh.com", b"ssh-mldsa44-ed25519@openssh.com"])
def test_key_that_only_an_agent_can_use(
    make_bed: Callable[..., Bed], account: Path, name: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handle of a security key that nothing here can talk to, and a key of a newer type than we know, are
    skipped, with the command that gives them to the agent."""
    monkeypatch.setattr(security_key, "is_available", lambda: False)
    kind = struct.pack(">I", len(name)) + name
    parts = (b"none", b"none", b"")
    body = b"openssh-key-v1\x00" + b"".join(struct.pack(">I", len(part)) + part for part in parts)
    body += struct.pack(">II", 1, len(kind)) + kind + struct.pack(">I", 0)
    lines = ("-----BEGIN OPENSSH PRIVATE KEY-----", base64.b64encode(body).decode(), "-----END")
    path = account / ".ssh" / ("id_ed25519_sk" if name.startswith(b"sk-") else "id_mldsa44_ed25519")
    path.write_text("\n".join(lines))
    path.chmod(0o600)
    bed = make_bed({"publickey"})
    with pytest.raises(AuthenticationError) as caught:
        enter(bed.port)
    said = f"key {path.name} was not used: only the SSH agent can use one of its kind ({name.decode()})"
    assert f"{said}: `ssh-add {path}`" in str(caught.value)


class SecurityKey:
    """A security key in an agent, as OpenSSH's PROTOCOL.u2f has it, without the hardware."""

    KIND = b"sk-ssh-ed25519@openssh.com"
    APPLICATION = b"ssh:"

    def __init__(self) -> None:
        self._key = Ed25519PrivateKey.generate()
        self.blob = b"".join(
            map(string, (self.KIND, self._key.public_key().public_bytes_raw(), self.APPLICATION))
        )

    def sign(self, data: bytes) -> bytes:
        """Sign as one does that was touched."""
        touched = b"\x01" + struct.pack(">I", 7)
        signed = hashlib.sha256(self.APPLICATION).digest() + touched + hashlib.sha256(data).digest()
        return string(self.KIND) + string(self._key.sign(signed)) + touched

    def serve(self, conn: socket.socket) -> None:
        """Answer an agent's client."""
        with conn.makefile("rb") as file:
            while head := file.read(4):
                request = file.read(int.from_bytes(head, "big"))
                answer = b"\x0c" + struct.pack(">I", 1) + string(self.blob) + string(b"token")
                if request[0] == 13:
                    blob, data, _ = strings(request[1:], 2)
                    assert blob == self.blob
                    answer = b"\x0e" + string(self.sign(data))
                conn.sendall(string(answer))


def test_security_key_in_the_agent(
    make_sshd: Callable[..., Sshd], fake_agent: Callable[..., FakeAgent], keys: Path
) -> None:
    """A real sshd takes a security key's signature that the agent makes, with its file named and without."""
    token = SecurityKey()
    line = SecurityKey.KIND + b" " + base64.b64encode(token.blob) + b" token\n"
    server = make_sshd([SimpleNamespace(export_public_key=lambda: line)])
    agent = fake_agent(token.serve)
    assert enter(server.port, Config(identity_agent=agent.path)) == ("publickey",)
    (keys / "id_sk.pub").write_bytes(line)
    config = Config(identity_files=(str(keys / "id_sk"),), identities_only=True, identity_agent=agent.path)
    assert enter(server.port, config) == ("publickey",)
    assert server.log().count("Accepted publickey") == 2


# Encrypted keys.


@pytest.mark.parametrize(("form", "kind"), [("openssh", "ssh-ed25519"), ("pkcs1-pem", "ssh-rsa")])
def test_locked_key_and_nobody_to_ask(
    make_sshd: Callable[..., Sshd], keys: Path, form: str, kind: str
) -> None:
    """An encrypted key, no passphrase and no prompt are an error at once, stdin untouched."""
    server = make_sshd([make_key(keys / "id", kind, form=form, passphrase="open sesame")])
    (keys / "id.pub").unlink()
    with pytest.raises(PromptRequiredError, match="passphrase") as caught:
        enter(server.port, key_filename=keys / "id")
    assert "key id cannot be used" in str(caught.value)
    assert enter(server.port, key_filename=keys / "id", passphrase="open sesame") == (
        "publickey",
    )  # the control


def test_wrong_passphrase(make_sshd: Callable[..., Sshd], keys: Path) -> None:
    """A passphrase that does not open the key is told so."""
    server = make_sshd([make_key(keys / "id", passphrase="open sesame")])
    with pytest.raises(AuthenticationError, match="the passphrase does not open it") as caught:
        enter(server.port, key_filename=keys / "id", passphrase="wrong")
    assert not isinstance(caught.value, PromptRequiredError)


def test_passphrase_is_asked_for(make_sshd: Callable[..., Sshd], keys: Path) -> None:
    """A passphrase is asked for three times, on the caller's thread; the password does not serve as one."""
    server = make_sshd([make_key(keys / "id", passphrase="open sesame")])
    person = Person("wrong", "wrong again", "open sesame")
    assert enter(server.port, key_filename=keys / "id", prompt=person, password="open sesame") == (
        "publickey",
    )
    assert [q.kind for q in person.questions] == ["passphrase"] * 3
    assert person.questions[0].text == f"Enter passphrase for key '{keys / 'id'}': "
    assert (person.questions[0].host, person.questions[0].echo) == ("far.example", False)
    assert person.threads == {threading.current_thread()}


def test_passphrase_only_for_a_key_that_is_accepted(make_bed: Callable[..., Bed], account: Path) -> None:
    """As with ssh, nobody is asked for the passphrase of a key that the server does not take."""
    make_key(account / ".ssh" / "id_ecdsa", "ecdsa-sha2-nistp256", passphrase="one")
    right = make_key(account / ".ssh" / "id_ed25519", passphrase="two")
    bed = make_bed({"publickey"}, keys=(right,))
    person = Person("two")
    assert enter(bed.port, prompt=person) == ("publickey",)
    assert len(person.questions) == 1
    assert "id_ed25519" in person.questions[0].text


def test_declined_passphrase_goes_on(make_bed: Callable[..., Bed], account: Path) -> None:
    """As with ssh, an empty passphrase goes on to the next method."""
    key = make_key(account / ".ssh" / "id_ed25519", passphrase="open sesame")
    bed = make_bed({"publickey", "password"}, keys=(key,))
    person = Person("", "right")
    assert enter(bed.port, prompt=person) == ("password",)
    assert [q.kind for q in person.questions] == ["passphrase", "password"]


def test_locked_default_key_goes_on(make_bed: Callable[..., Bed], account: Path) -> None:
    """A locked default key is skipped for the next method; the error of a refusal mentions it."""
    key = make_key(account / ".ssh" / "id_ed25519", passphrase="open sesame")
    bed = make_bed({"publickey", "password"}, keys=(key,))
    assert enter(bed.port, password="right") == ("password",)
    alone = make_bed({"publickey"}, keys=(key,))
    with pytest.raises(PromptRequiredError, match="key id_ed25519 was not used: it is encrypted") as caught:
        enter(alone.port)
    assert caught.value.tried == ("publickey id_ed25519",)


def test_locked_key_in_the_agent(
    make_sshd: Callable[..., Sshd], make_agent: Callable[..., SshAgent], keys: Path
) -> None:
    """Nobody is asked for the passphrase of a key that the agent holds."""
    key = make_key(keys / "id")
    agent = make_agent(keys / "id")
    (keys / "id").write_bytes(
        key.export_private_key(passphrase="open sesame", rounds=4, ignore_few_rounds=True)
    )
    server = make_sshd([key])
    assert enter(server.port, Config(identity_agent=agent.path), key_filename=keys / "id") == ("publickey",)
    (keys / "id").unlink()  # only the .pub is left
    assert enter(server.port, Config(identity_agent=agent.path), key_filename=keys / "id") == ("publickey",)
    with pytest.raises(AuthenticationError, match="neither there nor in the SSH agent"):
        enter(server.port, key_filename=keys / "id")


# Many keys.


def test_too_many_keys(
    make_sshd: Callable[..., Sshd], make_agent: Callable[..., SshAgent], keys: Path
) -> None:
    """With ten agent keys and MaxAuthTries 6 the error names too many keys, and its advice helps."""
    made = [make_key(keys / f"key{number}") for number in range(10)]
    agent = make_agent(*(keys / f"key{number}" for number in range(10)))
    server = make_sshd([made[9]], "MaxAuthTries 6")
    config = Config(identity_agent=agent.path)
    with pytest.raises(TooManyKeysError, match="too many keys") as caught:
        enter(server.port, config)
    error = caught.value
    assert len(error.tried) == 6
    assert "key_filename" in str(error)
    assert "IdentitiesOnly" in str(error)
    assert server.connections == 1
    assert enter(server.port, config, key_filename=keys / "key9") == ("publickey",)
    assert enter(
        server.port,
        Config(identity_files=(str(keys / "key9.pub"),), identities_only=True, identity_agent=agent.path),
    ) == ("publickey",)
    log = server.log()
    assert "Too many authentication failures" in log
    assert log.count("Failed publickey") == 6


def test_identities_only(
    make_bed: Callable[..., Bed], make_agent: Callable[..., SshAgent], account: Path
) -> None:
    """IdentitiesOnly keeps the agent to the configured keys, also where only their .pub files are there."""
    folder = account / ".ssh"
    made = [make_key(folder / name) for name in ("id_ed25519", "work")]
    agent = make_agent(folder / "id_ed25519", folder / "work")
    (folder / "work").unlink()
    bed = make_bed({"publickey"}, keys=(made[1],))
    assert enter(
        bed.port,
        Config(identity_files=(str(folder / "work"),), identities_only=True, identity_agent=agent.path),
    ) == ("publickey",)
    assert set(bed.seen[0].offered) == {made[1].public_data}
    with pytest.raises(AuthenticationError):
        enter(bed.port, Config(identity_files=(), identities_only=True, identity_agent=agent.path))
    assert set(bed.seen[1].offered) == {made[0].public_data}  # the default key counts as configured
    assert enter(bed.port, Config(identity_agent=agent.path)) == ("publickey",)  # the control


# Agents.


def test_agent_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the config says is a path or "none"; without it SSH_AUTH_SOCK counts."""
    if sys.platform == "win32":
        pytest.skip("on Windows paramiko finds the agent")
    assert agent_module.agent_address(None) is None
    monkeypatch.setenv("SSH_AUTH_SOCK", "/run/agent")
    assert agent_module.agent_address(None) == "/run/agent"
    assert agent_module.agent_address("none") is None
    assert agent_module.agent_address("/run/other") == "/run/other"
    assert agent_module.agent_address("") is None  # a variable that is empty


def test_agent_from_environment(
    make_sshd: Callable[..., Sshd],
    make_agent: Callable[..., SshAgent],
    keys: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The agent of SSH_AUTH_SOCK is used unless forbidden, and its socket is closed again."""
    server = make_sshd([make_key(keys / "id")])
    agent = make_agent(keys / "id")
    monkeypatch.setenv("SSH_AUTH_SOCK", agent.path)
    before = dict(os.environ)
    with client(server.port) as transport:
        open_before = _descriptors()
        assert _enter(transport) == ("publickey",)
        assert _descriptors() == open_before
    assert dict(os.environ) == before
    with pytest.raises(AuthenticationError):
        enter(server.port, allow_agent=False)
    with pytest.raises(AuthenticationError):
        enter(server.port, Config(identity_agent="none"))


def _descriptors() -> set[str]:
    place = Path("/proc/self/fd")
    return {entry.name for entry in place.iterdir()} if place.is_dir() else set()


def _send(data: bytes) -> Callable[[socket.socket], None]:
    def script(conn: socket.socket) -> None:
        conn.recv(100)
        conn.sendall(data)
        conn.shutdown(socket.SHUT_RDWR)

    return script


@pytest.mark.parametrize(
    ("script", "told"),
    [
        (None, "did not answer within 0.2 s"),
        (lambda conn: conn.close(), "cannot be used"),
        (_send(b""), "hung up"),
        (_send(b"\x00\x00\x00\x09\x0c"), "hung up"),
        (_send(b"\xff\xff\xff\xff" + b"x" * 100), "message of 4294967295 bytes"),
        (_send(b"\x00\x00\x00\x01\x05"), "does not tell its keys"),
        (_send(b"\x00\x00\x00\x05\x0c\xff\xff\xff\xff"), ""),
    ],
    ids=["hangs", "closes", "hangs up", "cut short", "boasts", "refuses", "claims"],
)
def test_bad_agent(
    make_bed: Callable[..., Bed],
    fake_agent: Callable[..., FakeAgent],
    account: Path,
    script: Callable[[socket.socket], None] | None,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An agent that hangs or talks nonsense is given up soon, and the other methods go on."""
    assert agent_module.LIST_TIMEOUT <= 3
    if script is None:
        monkeypatch.setattr(agent_module, "LIST_TIMEOUT", 0.2)
    key = make_key(account / ".ssh" / "id_ed25519")
    agent = fake_agent(script)
    bed = make_bed({"publickey", "password"}, keys=(key,))
    assert enter(bed.port, Config(identity_agent=agent.path)) == ("publickey",)
    assert agent.connections == 1  # the fault fired
    with pytest.raises(AuthenticationError) as caught:
        enter(bed.port, Config(identity_agent=agent.path), look_for_keys=False, password="wrong")
    assert told in str(caught.value)


def test_dead_agent(make_bed: Callable[..., Bed], account: Path) -> None:
    """A socket path without an agent behind it does not keep the other methods from working."""
    key = make_key(account / ".ssh" / "id_ed25519")
    bed = make_bed({"publickey"}, keys=(key,))
    config = Config(identity_agent=str(account / "nothing"))
    assert enter(bed.port, config) == ("publickey",)
    with pytest.raises(AuthenticationError, match="SSH agent cannot be used"):
        enter(bed.port, config, look_for_keys=False)


def test_agent_without_keys_is_named(
    make_bed: Callable[..., Bed], make_agent: Callable[..., SshAgent], account: Path
) -> None:
    """Where no key was at hand, and the agent tells of none, that is said: it may be locked."""
    with pytest.raises(AuthenticationError, match="the SSH agent has no keys, or is locked"):
        enter(make_bed({"publickey"}).port, Config(identity_agent=make_agent().path))


def _listing(*keys: bytes) -> bytes:
    body = struct.pack(">BI", 12, len(keys))
    for key in keys:
        body += struct.pack(">I", len(key)) + key + struct.pack(">I", 4) + b"\xff\x1b[m"
    return struct.pack(">I", len(body)) + body


def test_agent_that_never_signs(
    make_bed: Callable[..., Bed],
    fake_agent: Callable[..., FakeAgent],
    keys: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A signature may take long (a person confirms it), but not for ever; then the next method is tried."""
    assert agent_module.SIGN_TIMEOUT >= 30
    monkeypatch.setattr(agent_module, "SIGN_TIMEOUT", 0.2)
    key = make_key(keys / "id")

    def script(conn: socket.socket) -> None:
        conn.recv(100)
        conn.sendall(_listing(key.public_data))

    agent = fake_agent(script)
    bed = make_bed({"publickey", "password"}, keys=(key,))
    with pytest.raises(AuthenticationError, match=r"did not answer within 0.2 s") as caught:
        enter(bed.port, Config(identity_agent=agent.path), password="wrong")
    assert "\x1b" not in str(caught.value)
    assert enter(bed.port, Config(identity_agent=agent.path), password="right") == ("password",)


def test_agent_that_refuses_to_sign(
    make_bed: Callable[..., Bed], fake_agent: Callable[..., FakeAgent], keys: Path
) -> None:
    """A key that the agent will not sign with is told, and the next one is tried."""
    first, second = make_key(keys / "first"), make_key(keys / "second")

    def script(conn: socket.socket) -> None:
        conn.recv(100)
        conn.sendall(_listing(first.public_data))
        conn.recv(5000)
        conn.sendall(b"\x00\x00\x00\x01\x05")

    agent = fake_agent(script)
    bed = make_bed({"publickey"}, keys=(first, second))
    config = Config(identity_files=(str(keys / "second"),), identity_agent=agent.path)
    assert enter(bed.port, config) == ("publickey",)
    with pytest.raises(AuthenticationError, match="the SSH agent refused to sign") as caught:
        enter(bed.port, Config(identity_agent=agent.path))
    assert "have the agent sign" in str(caught.value.hint)
    assert "authorized_keys" not in str(caught.value.hint)


def test_agent_without_unix_sockets(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Python has no Unix sockets, and no agent is found otherwise, there are no keys and a reason."""
    monkeypatch.delattr(socket, "AF_UNIX")
    agent = agent_module.Agent("/run/agent")
    assert agent.list_keys() == ()
    assert "cannot be used" in agent.trouble


class _Pipe:
    """An agent connection as paramiko makes it on Windows."""

    def __init__(self, *replies: bytes | None) -> None:
        self._replies = list(replies)
        self._buffer: bytes | None = b""
        self.released = threading.Event()
        self.closed = False

    def send(self, _data: bytes) -> None:
        self._buffer = self._replies.pop(0)

    def recv(self, count: int) -> bytes:
        if self._buffer is None:
            self.released.wait(30)
            return b""
        data, self._buffer = self._buffer[:count], self._buffer[count:]
        return data

    def close(self) -> None:
        self.closed = True


def test_agent_pipe_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent whose reads know no deadline is asked with one all the same, and closed."""
    monkeypatch.setattr(agent_module, "SIGN_TIMEOUT", 0.2)
    pipe = _Pipe(_listing(b"\x00\x00\x00\x01x"), b"\x00\x00\x00\x06\x0e\x00\x00\x00\x01s", None)
    monkeypatch.setattr(agent_module, "_connect", lambda *_: agent_module.AgentPipe(lambda: pipe))
    agent = agent_module.Agent("")
    assert [key.blob for key in agent.list_keys()] == [b"\x00\x00\x00\x01x"]
    assert agent.sign(b"x", b"data", "ssh-ed25519") == b"s"
    with pytest.raises(agent_module.AgentError, match="did not answer"):
        agent.sign(b"x", b"data", "ssh-ed25519")
    pipe.released.set()
    other = _Pipe(_listing())
    monkeypatch.setattr(agent_module, "_connect", lambda *_: agent_module.AgentPipe(lambda: other))
    second = agent_module.Agent("")
    assert second.list_keys() == ()
    second.close()
    second.close()
    assert other.closed
    monkeypatch.setattr(agent_module, "_connect", lambda *_: agent_module.AgentPipe(lambda: None))
    third = agent_module.Agent("")
    assert third.list_keys() == ()
    assert "none is running" in third.trouble


# Passwords.


def test_password(make_bed: Callable[..., Bed]) -> None:
    """The password given logs in, and nobody is asked."""
    bed = make_bed({"password"})
    assert enter(bed.port, password="right", prompt=Person()) == ("password",)


def test_wrong_password(make_bed: Callable[..., Bed]) -> None:
    """A wrong password is sent once, on one connection; the error tells what was tried and allowed."""
    bed = make_bed({"password"})
    with pytest.raises(AuthenticationError) as caught:
        enter(bed.port, password="wrong")
    error = caught.value
    assert (error.tried, error.allowed) == (("password",), ("password",))
    assert not isinstance(error, PromptRequiredError)
    assert "check the user name, the password" in str(error)
    assert bed.seen[0].passwords == ["wrong"]
    assert len(bed.seen) == 1


def test_wrong_password_and_a_person(make_bed: Callable[..., Bed]) -> None:
    """After a wrong password a person is asked up to three times, as by ssh, on one connection."""
    bed = make_bed({"password"})
    person = Person("no", "right")
    assert enter(bed.port, password="wrong", prompt=person) == ("password",)
    assert [q.text for q in person.questions] == [f"{USER}@far.example's password: "] * 2
    assert "try again" in person.questions[0].instructions
    with pytest.raises(AuthenticationError):
        enter(bed.port, prompt=Person("a", "b", "c"))
    assert [rules.passwords for rules in bed.seen] == [["wrong", "no", "right"], ["a", "b", "c"]]


def test_password_and_nobody_to_ask(make_bed: Callable[..., Bed]) -> None:
    """Without a password and without a prompt the error is immediate and says what is missing."""
    bed = make_bed({"password"})
    with pytest.raises(PromptRequiredError, match="nobody was there to be asked for a password") as caught:
        enter(bed.port)
    assert caught.value.allowed == ("password",)
    assert bed.seen[0].passwords == []


def test_declined_password(make_bed: Callable[..., Bed]) -> None:
    """A person who declines ends the login."""
    bed = make_bed({"password"})
    person = Person(None)
    with pytest.raises(AuthenticationError, match="was not answered"):
        enter(bed.port, prompt=person)
    assert len(person.questions) == 1


def test_expired_password(make_bed: Callable[..., Bed]) -> None:
    """A password that must be changed is told so, with how."""

    def expired() -> None:
        raise asyncssh.PasswordChangeRequired("change it")

    bed = make_bed({"password"}, on_answer=expired)
    with pytest.raises(AuthenticationError, match=f"has expired.*ssh {USER}@far.example"):
        enter(bed.port, password="right")
    with client(bed.port) as transport, pytest.raises(AuthenticationError) as caught:
        login(transport, Host("far.example", password="right"), Config(), user="joe:hunter2", timeout=10)
    assert caught.value.hint == "log in to far.example once with ssh, as the same user, and change it"
    assert "hunter2" not in str(caught.value)


def test_odd_characters_in_a_password(make_bed: Callable[..., Bed], keys: Path) -> None:
    """A password or passphrase may have any character: no Unicode error, which would hold it, comes of it."""
    bed = make_bed({"password"}, password="schlüssel 鍵")
    assert enter(bed.port, password="schlüssel 鍵") == ("password",)
    with pytest.raises(BokehSSHError):
        enter(bed.port, password="\udcff\ud800")
    locked = make_bed({"publickey"}, keys=(make_key(keys / "id", passphrase="open sesame"),))
    with pytest.raises(AuthenticationError, match="does not open it"):
        enter(locked.port, key_filename=keys / "id", passphrase="\udcff\ud800")


# Questions.

PASSWORD = ("", "", (("Password: ", False),), ("right",))
CODE = ("Two factors", "Look at your phone", (("Verification code: ", False),), ("123456",))


def test_question_is_asked(make_bed: Callable[..., Bed]) -> None:
    """A question goes to the prompt, on the caller's thread, as the server put it."""
    bed = make_bed({"keyboard-interactive"}, rounds=(CODE,))
    person = Person("123456")
    assert enter(bed.port, prompt=person) == ("keyboard-interactive",)
    assert person.questions == [
        Question(
            kind="interactive",
            host="far.example",
            text="Verification code: ",
            echo=False,
            instructions="Two factors\nLook at your phone",
        )
    ]
    assert person.threads == {threading.current_thread()}


def test_question_and_nobody_to_ask(make_bed: Callable[..., Bed]) -> None:
    """Without a prompt the error is immediate and names the question; stdin is not touched."""
    bed = make_bed({"keyboard-interactive"}, rounds=(CODE,))
    with pytest.raises(PromptRequiredError, match="Verification code") as caught:
        enter(bed.port)
    assert caught.value.tried == ("keyboard-interactive",)
    assert bed.seen[0].answers == []
    with pytest.raises(PromptRequiredError) as caught:  # a password is given, and is not what it wants
        enter(bed.port, password="right")
    assert caught.value.hint == "give a prompt= that can ask"


def test_password_answers_one_hidden_question(make_bed: Callable[..., Bed]) -> None:
    """The password given answers the first hidden question for a password; a code is asked for after it."""
    bed = make_bed({"keyboard-interactive"}, rounds=(PASSWORD, CODE))
    person = Person("123456")
    assert enter(bed.port, password="right", prompt=person) == ("keyboard-interactive",)
    assert [q.text for q in person.questions] == ["Verification code: "]
    with pytest.raises(PromptRequiredError, match="Verification code"):
        enter(bed.port, password="right")


@pytest.mark.parametrize(
    ("questions", "answered"),
    [
        ((("Password: ", False),), True),
        ((("me@far's password:", False),), True),
        ((("Passwort: ", False),), True),
        ((("Mot de passe : ", False),), True),
        ((("パスワード:", False),), True),
        ((("Password: ", True),), False),
        ((("Password: ", False), ("Code: ", False)), False),
        ((("Verification code: ", False),), False),
        ((("One-time password (OATH) for `me': ", False),), False),
        ((("New password: ", False),), False),
        ((("Passcode or option (1-2): ", False),), False),
    ],
)
def test_which_questions_a_password_answers(questions: tuple[tuple[str, bool], ...], answered: bool) -> None:
    """Only exactly one hidden question that asks for the account's password gets it."""
    assert login_module._asks_password(questions) is answered


def test_password_is_not_repeated_to_a_second_question(make_bed: Callable[..., Bed]) -> None:
    """The password given answers one question only: a second one that looks alike goes to the person."""
    bed = make_bed(
        {"keyboard-interactive"}, rounds=(PASSWORD, ("", "", (("Password: ", False),), ("other",)))
    )
    person = Person("other")
    assert enter(bed.port, password="right", prompt=person) == ("keyboard-interactive",)
    assert bed.seen[0].answers == [("right",), ("other",)]


def test_unanswerable_question_leaves_the_password(make_bed: Callable[..., Bed]) -> None:
    """A question that nobody can answer does not keep the password method from working."""
    bed = make_bed({"keyboard-interactive", "password"}, rounds=(CODE,))
    assert enter(bed.port, password="right") == ("password",)
    with pytest.raises(PromptRequiredError, match="Verification code"):
        enter(bed.port, password="wrong")


def test_several_questions_and_empty_rounds(make_bed: Callable[..., Bed]) -> None:
    """Several questions are asked one by one; a round without any is answered empty, its text kept."""
    rounds = (
        ("", "Sending a push to your phone", (), ()),
        ("", "", (("First: ", True), ("Second: ", False)), ("1", "2")),
        ("", "", (), ()),
    )
    bed = make_bed({"keyboard-interactive"}, rounds=rounds)
    person = Person("1", "2")
    assert enter(bed.port, prompt=person) == ("keyboard-interactive",)
    assert [(q.text, q.echo) for q in person.questions] == [("First: ", True), ("Second: ", False)]
    assert person.questions[0].instructions == "Sending a push to your phone"
    assert person.questions[1].instructions == ""
    assert bed.seen[0].answers == [(), ("1", "2"), ()]


def test_questions_are_asked_again(make_bed: Callable[..., Bed]) -> None:
    """A wrong answer is asked for again, three times in all, as by ssh."""
    bed = make_bed({"keyboard-interactive"}, rounds=(CODE,))
    assert enter(bed.port, prompt=Person("000000", "123456")) == ("keyboard-interactive",)
    with pytest.raises(AuthenticationError) as caught:
        enter(bed.port, prompt=Person("1", "2", "3"))
    assert caught.value.tried == ("keyboard-interactive",)
    assert len(bed.seen) == 2


def test_many_rounds(make_bed: Callable[..., Bed]) -> None:
    """Fifty rounds of questions are fine; a server that never stops asking is stopped."""
    empty = ("", "", (), ())
    bed = make_bed({"keyboard-interactive"}, rounds=(empty,) * 50)
    assert enter(bed.port) == ("keyboard-interactive",)
    endless = make_bed({"keyboard-interactive"}, rounds=(empty,) * 100_000)
    with pytest.raises(AuthenticationError, match="without an end"):
        enter(endless.port)
    assert len(endless.seen[0].answers) == 100


# Partial success.


def test_key_and_then_code(make_bed: Callable[..., Bed], keys: Path) -> None:
    """A key and then a code log in over one connection; without the code's prompt it is an error."""
    key = make_key(keys / "id")
    bed = make_bed(("publickey", "keyboard-interactive"), keys=(key,), rounds=(CODE,))
    person = Person("123456")
    assert enter(bed.port, key_filename=keys / "id", prompt=person) == ("publickey", "keyboard-interactive")
    assert len(bed.seen) == 1
    with pytest.raises(PromptRequiredError, match="the server accepted publickey but wants more") as caught:
        enter(bed.port, key_filename=keys / "id")
    assert caught.value.allowed == ("keyboard-interactive",)
    alone = make_bed(("publickey",), keys=(key,))
    assert enter(alone.port, key_filename=keys / "id") == ("publickey",)  # the control


def test_key_and_then_password(make_bed: Callable[..., Bed], keys: Path) -> None:
    """A key and then a password log in; a password and then a key, too."""
    key = make_key(keys / "id")
    for needs in (("publickey", "password"), ("password", "publickey")):
        bed = make_bed(needs, keys=(key,))
        assert enter(bed.port, key_filename=keys / "id", password="right") == needs


def test_two_keys(make_sshd: Callable[..., Sshd], keys: Path) -> None:
    """sshd that wants two different keys gets them, and no key is offered twice."""
    made = [make_key(keys / name) for name in ("a", "b", "c")]
    server = make_sshd([made[0], made[2]], "AuthenticationMethods publickey,publickey")
    files = [keys / "a", keys / "b", keys / "c"]
    assert enter(server.port, key_filename=files) == ("publickey", "publickey")
    assert server.connections == 1
    log = server.log()
    assert log.count("Partial publickey") == 1
    assert log.count("Failed publickey") == 1
    with pytest.raises(AuthenticationError, match="accepted publickey but wants more"):
        enter(server.port, key_filename=files[:2])


def test_methods_that_are_not_allowed_are_not_tried(make_bed: Callable[..., Bed], keys: Path) -> None:
    """Only what the server allows is tried: no key where it takes passwords only."""
    key = make_key(keys / "id")
    bed = make_bed({"password"}, keys=(key,))
    assert enter(bed.port, key_filename=keys / "id", password="right") == ("password",)
    assert bed.seen[0].offered == []


def test_no_login_needed() -> None:
    """A server that asks for nothing is entered with ``none``."""

    class Open(Rules):
        async def begin_auth(self, _username: str) -> bool:
            return False

    with contextlib.closing(Bed(Open)) as bed:
        assert enter(bed.port) == ("none",)


def test_endless_partial_success(make_bed: Callable[..., Bed]) -> None:
    """A server that is never satisfied is given up."""
    bed = make_bed(("keyboard-interactive",) * 50, rounds=(("", "", (), ()),))
    with pytest.raises(AuthenticationError, match="wants more"):
        enter(bed.port)


# What the server says.


def test_text_of_a_refusing_server(make_bed: Callable[..., Bed]) -> None:
    """What the server says about the refusal (nologin, an expired account) is in the error."""
    bed = make_bed(
        {"password"}, on_begin=banner(b"System is going down for maintenance.\r\nCome back later.\r\n")
    )
    with pytest.raises(AuthenticationError) as caught:
        enter(bed.port, password="wrong")
    assert "the server said: System is going down for maintenance. Come back later." in str(caught.value)
    quiet = make_bed({"password"})
    with pytest.raises(AuthenticationError) as caught:
        enter(quiet.port, password="wrong")
    assert "the server said" not in str(caught.value)


def test_node_that_wants_a_job_is_told_as_that(make_bed: Callable[..., Bed]) -> None:
    """A cluster's node lets in only who has a job there: the hint is a job, and not the key."""
    said = b"Access denied by pam_slurm_adopt: you have no active jobs on this node\n"
    bed = make_bed({"password"}, on_begin=banner(said))
    with pytest.raises(AuthenticationError) as caught:
        enter(bed.port, password="wrong")
    assert "no active jobs on this node" in caught.value.message
    assert "batch=" in (caught.value.hint or "")
    assert "check the user name" not in (caught.value.hint or "")


def test_banner_is_shown_with_the_first_question(make_bed: Callable[..., Bed]) -> None:
    """The server's banner comes with the first question, once, as ssh shows it."""
    bed = make_bed({"password"}, on_begin=banner(b"Use your token PIN.\n"))
    person = Person("wrong", "right")
    assert enter(bed.port, prompt=person) == ("password",)
    assert person.questions[0].instructions == "Use your token PIN."
    assert "token" not in person.questions[1].instructions


@pytest.mark.parametrize(
    "text",
    [
        b"\x1b[2J\x1b]0;owned\x07\x9b31m",
        b"\xff\xfe\x80",
        b"x" * 200_000,
        "\u202egnp.exe".encode(),
        b"\x00" * 1000,
    ],
    ids=["escapes", "not UTF-8", "long", "right to left", "NUL"],
)
def test_hostile_text(make_bed: Callable[..., Bed], text: bytes) -> None:
    """Hostile text neither breaks the login nor reaches a person unfiltered or at length."""

    def begin(conn: Any) -> None:
        for _ in range(20):
            banner(text)(conn)

    rounds = (
        (text.decode("latin-1"), text.decode("latin-1"), ((text.decode("latin-1")[:30000], True),), ("1",)),
    )
    bed = make_bed({"keyboard-interactive", "password"}, on_begin=begin, rounds=rounds)
    person = Person("1")
    assert enter(bed.port, prompt=person) == ("keyboard-interactive",)
    with pytest.raises(AuthenticationError) as caught:
        enter(bed.port, password="wrong")
    question = person.questions[0]
    for shown in (question.text, question.instructions, str(caught.value)):
        assert len(shown) < 50_000
        assert clean(shown, 10**6, lines=True) == shown
    assert len(str(caught.value)) < 2500


def _flood(conn: Any) -> None:
    for _ in range(1000):
        failure(b"password")(conn)


@pytest.mark.parametrize(
    "act",
    [
        info_request(b"Password: "),
        info_request(count=2**31),
        failure(b"password"),
        failure(b"\xff\xfe", partial=True),
        lambda conn: conn.send_packet(51),
        lambda conn: conn.send_packet(6, b"\x00\x00\x00\x0cssh-userauth"),
        lambda conn: conn.send_packet(61, b"\x00\x00\x00\x01x"),
        lambda conn: conn.send_packet(65, b"\x00\x00\x00\x01x"),
        _flood,
    ],
    ids=[
        "question",
        "questions",
        "refusal",
        "odd refusal",
        "cut short",
        "service",
        "token",
        "error token",
        "flood",
    ],
)
def test_messages_out_of_turn(make_bed: Callable[..., Bed], act: Callable[[Any], Any]) -> None:
    """A server that answers what was not asked ends in a typed error, not in a login or a hang."""
    late = make_bed({"password"}, on_answer=lambda: act(late.seen[-1].conn))
    early = make_bed({"password"}, on_begin=act)
    for bed in (late, early):
        with client(bed.port) as transport:
            with pytest.raises(BokehSSHError):
                _enter(transport, password="wrong", timeout=5)
            assert not transport.is_authenticated()
    calm = make_bed({"password"})
    assert enter(calm.port, password="right") == ("password",)  # the control


@pytest.mark.parametrize("number", [51, 52, 60, 61, 64, 65])
def test_answer_to_nothing(make_bed: Callable[..., Bed], number: int) -> None:
    """A refusal, a success or a question that comes while a person thinks ends the connection."""
    thinking = asyncio.Event()

    async def begin(conn: Any) -> None:
        async def later() -> None:
            await thinking.wait()
            conn.send_packet(number, b"\x00" * 20)

        tasks.append(asyncio.ensure_future(later()))

    def prompt(_: Question) -> str:
        tasks[0].get_loop().call_soon_threadsafe(thinking.set)
        transport.join(30)
        assert not transport.is_alive()
        return "right"

    tasks: list[asyncio.Future[None]] = []
    bed = make_bed({"password"}, on_begin=begin)
    with client(bed.port) as transport:
        with pytest.raises(ConnectionLostError, match=r"not asked|out of turn"):
            _enter(transport, prompt=prompt)
        assert transport.auth_handler is not None
        assert not transport.auth_handler.is_authenticated()


def test_too_many_questions_at_once(make_bed: Callable[..., Bed]) -> None:
    """A claim of two thousand million questions costs no memory: the connection is given up."""

    class Liar(Rules):
        def get_kbdint_challenge(self, _username: str, _lang: str, _submethods: str) -> Any:
            info_request(count=2**31)(self.conn)
            return asyncio.get_running_loop().create_future()

    bed = Bed(lambda: Liar({"keyboard-interactive"}))
    with contextlib.closing(bed), pytest.raises(ConnectionLostError, match="2147483648 questions"):
        enter(bed.port, prompt=Person())


# The connection ends.


def test_hang_up_before_anything_was_tried(make_bed: Callable[..., Bed]) -> None:
    """A server that hangs up before any credential was tried is a lost connection; its log is pointed at."""
    bed = make_bed({"password"}, on_begin=lambda conn: conn.abort())
    with pytest.raises(ConnectionLostError, match="during login") as caught:
        enter(bed.port, password="right")
    assert "RefuseConnection" in str(caught.value.hint)


def test_hang_up_at_the_password(make_bed: Callable[..., Bed]) -> None:
    """A server that hangs up in answer to a credential has refused the login, and the error says so."""
    bed = make_bed({"password"}, on_answer=lambda: bed.seen[-1].conn.abort())
    with pytest.raises((AuthenticationError, ConnectionLostError), match="password"):
        enter(bed.port, password="right")


def test_last_words(make_bed: Callable[..., Bed]) -> None:
    """What the server says when it hangs up is in the error."""
    bed = make_bed({"password"}, on_answer=lambda: bed.seen[-1].conn.disconnect(14, "Go \x1baway"))
    with pytest.raises(AuthenticationError, match="Go away") as caught:
        enter(bed.port, password="right")
    assert caught.value.tried == ("password",)
    assert not isinstance(caught.value, TooManyKeysError)


def test_transport_closed_from_elsewhere(make_bed: Callable[..., Bed]) -> None:
    """A transport that another thread closes ends the login soon, as a lost connection."""

    def begin(conn: Any) -> Any:
        transport.close()
        return asyncio.get_running_loop().create_future()

    async def wait(conn: Any) -> None:
        await begin(conn)

    bed = make_bed({"password"}, on_begin=wait)
    with client(bed.port) as transport:
        started = time.monotonic()
        with pytest.raises(ConnectionLostError):
            _enter(transport, password="right", timeout=60)
        assert time.monotonic() - started < 15


# Deadlines and Ctrl-C.


async def _never(*args: object) -> None:
    await asyncio.get_running_loop().create_future()


def test_silent_server(make_bed: Callable[..., Bed], keys: Path) -> None:
    """A server that does not answer is a typed timeout that names the stage, within the timeout given."""
    bed = make_bed({"publickey"}, on_begin=_never)
    started = time.monotonic()
    with pytest.raises(ConnectTimeoutError, match=r"did not answer within 0.3 s during login"):
        enter(bed.port, timeout=0.3)
    assert time.monotonic() - started < 15


def test_silent_server_after_the_password(
    make_bed: Callable[..., Bed], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer to a password may take as long as a push to a phone takes, but not for ever."""
    assert userauth.PERSON_TIMEOUT == 120
    monkeypatch.setattr(userauth, "PERSON_TIMEOUT", 3.0)
    bed = make_bed({"password"}, on_answer=_never)
    with pytest.raises(ConnectTimeoutError, match=r"within 3 s during login \(password\)"):
        enter(bed.port, password="right", timeout=2.5)


def test_endless_banner(make_bed: Callable[..., Bed]) -> None:
    """Banners do not put off the deadline."""

    async def begin(conn: Any) -> None:
        while True:
            banner(b"wait ")(conn)
            await asyncio.sleep(0.01)  # the server's pace: a thousand would come within the timeout

    bed = make_bed({"password"}, on_begin=begin)
    started = time.monotonic()
    with pytest.raises(ConnectTimeoutError):
        enter(bed.port, timeout=0.5)
    assert time.monotonic() - started < 15


def test_a_person_may_think_long(make_bed: Callable[..., Bed], monkeypatch: pytest.MonkeyPatch) -> None:
    """A person's thinking does not count against the timeout."""
    ahead = 0.0

    def monotonic() -> float:
        return time.monotonic() + ahead

    def prompt(question: Question) -> str:
        nonlocal ahead
        ahead += 3600
        return "123456" if question.kind == "interactive" else "right"

    monkeypatch.setattr(userauth, "time", SimpleNamespace(monotonic=monotonic))
    bed = make_bed(("keyboard-interactive", "password"), rounds=(CODE, CODE))
    assert enter(bed.port, prompt=prompt, timeout=5) == ("keyboard-interactive", "password")
    assert ahead == 3 * 3600


def test_password_to_be_changed_and_nobody_to_ask(make_bed: Callable[..., Bed]) -> None:
    """Where PAM takes the password that is given, and wants a new one, that is said; so it is to a person who
    does not answer."""
    change = "You are required to change your password immediately.\nCurrent password: "
    rounds = ((("Password: ", False), "right"), ((change, False), "right"))
    bed = make_bed(
        ("keyboard-interactive",), rounds=tuple(("", "", (ask,), (right,)) for ask, right in rounds)
    )
    for prompt in (None, Person(None)):
        with pytest.raises(AuthenticationError, match="has expired; change it with ssh"):
            enter(bed.port, password="right", prompt=prompt)


def test_server_that_does_not_wait_for_an_answer(sshd: Callable[..., Machine]) -> None:
    """Where it has hung up when a person answers, that is said, and nothing of a wrong password."""

    def prompt(_: Question) -> str:
        threads = [each for each in threading.enumerate() if isinstance(each, paramiko.Transport)]
        until(lambda: not any(each.is_active() for each in threads))
        return "right"

    server = sshd(LoginGraceTime="4", PasswordAuthentication="yes")
    with pytest.raises(AuthenticationError, match=r"did not wait for the answer.*LoginGraceTime"):
        enter(server.port, prompt=prompt)


@pytest.mark.skipif(sys.platform == "win32", reason="signals cannot be aimed at a thread there")
def test_ctrl_c_while_the_server_is_silent(make_bed: Callable[..., Bed]) -> None:
    """Ctrl-C while the server thinks ends the login at once, with nothing left behind."""
    main = threading.main_thread().ident
    assert main is not None

    async def begin(conn: Any) -> None:
        signal.pthread_kill(main, signal.SIGINT)
        await _never()

    bed = make_bed({"password"}, on_begin=begin)
    before = set(threading.enumerate())
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        enter(bed.port, timeout=60)
    assert time.monotonic() - started < 15
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("kind", ["password", "interactive", "passphrase"])
def test_ctrl_c_at_a_question(make_bed: Callable[..., Bed], keys: Path, kind: str) -> None:
    """Ctrl-C at a question reaches the caller as it is."""
    key = make_key(keys / "id", passphrase="open sesame")
    method = {"password": "password", "interactive": "keyboard-interactive", "passphrase": "publickey"}[kind]
    bed = make_bed({method}, keys=(key,), rounds=(CODE,))
    before = set(threading.enumerate())

    def prompt(question: Question) -> str:
        assert question.kind == kind
        signal.raise_signal(signal.SIGINT)
        return "never"

    with pytest.raises(KeyboardInterrupt):
        enter(bed.port, key_filename=keys / "id", prompt=prompt)
    assert set(threading.enumerate()) <= before


@pytest.mark.skipif(sys.platform == "win32", reason="there the agent is a pipe")
def test_ctrl_c_while_the_agent_is_silent(
    make_bed: Callable[..., Bed], fake_agent: Callable[..., FakeAgent]
) -> None:
    """Ctrl-C while an agent hangs ends the login at once."""
    main = threading.main_thread().ident
    assert main is not None
    agent = fake_agent(lambda _: signal.pthread_kill(main, signal.SIGINT))
    bed = make_bed({"publickey"})
    with pytest.raises(KeyboardInterrupt):
        enter(bed.port, Config(identity_agent=agent.path))


# Secrets.


def test_no_secret_in_any_text(
    make_bed: Callable[..., Bed], keys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No password, passphrase or answer is in an error, a repr, a traceback or a log line."""
    caplog.set_level(logging.DEBUG)
    canary = "canary-7f3a91"
    make_key(keys / "id", passphrase="another")
    texts = []
    beds = [
        make_bed({"password"}),
        make_bed({"keyboard-interactive", "password"}, rounds=(PASSWORD, CODE)),
        make_bed({"publickey", "keyboard-interactive"}, rounds=(CODE,)),
        make_bed({"password"}, on_answer=lambda: beds[3].seen[-1].conn.abort()),
    ]
    for bed in beds:
        for prompt in (None, lambda _: canary, lambda _: None):
            keywords = {
                "password": canary,
                "passphrase": canary,
                "key_filename": keys / "id",
                "prompt": prompt,
            }
            with client(bed.port) as transport:
                with pytest.raises(BokehSSHError) as caught:
                    _enter(transport, **keywords)
                texts.append(
                    repr(transport.auth_handler) + repr(transport) + repr(vars(transport.auth_handler))
                )
            texts.append(repr(Host("far.example", **keywords)))
            texts += "".join(traceback.format_exception(caught.value)).splitlines()
            texts += [str(caught.value), repr(caught.value), repr(vars(caught.value))]
    texts += [record.getMessage() for record in caplog.records]
    assert any(rules.passwords for bed in beds for rules in bed.seen)  # it was really sent
    assert any("login as" in text for text in texts)
    hidden = (canary, canary.encode().hex(), hashlib.sha256(canary.encode()).hexdigest())
    assert [text for text in texts for secret in hidden if secret in text] == []


def test_clean() -> None:
    """Text from elsewhere is cut, loses what acts on a terminal, and keeps line ends only if asked to."""
    assert clean(b"a\x1b[31m\x00b\r\nc\td", 100) == "a[31mb c d"
    assert clean(b"a\r\nb\rc\td\x9b", 100, lines=True) == "a\nb\nc\td\ufffd"
    assert clean("abcdef", 3) == "abc…"
    assert clean("abcdef", 3, tail=True) == "…def"
    assert clean("\u202eabc\u2028", 10) == "abc"
