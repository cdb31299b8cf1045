"""Ciphers and the other algorithms of a key exchange: what servers have, and what an ssh config wants."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import paramiko
import pytest
from asyncssh.crypto.chacha import ChachaCipher
from cryptography.exceptions import InvalidTag

import other_servers
from auth_servers import SshAgent, make_key
from beds import Key, Machine
from bokeh_ssh import AlgorithmError, AuthenticationError, BokehSSHError, ConfigError, Host
from bokeh_ssh._ssh import algorithms
from bokeh_ssh._ssh.algorithms import Algorithms, choose, signatures
from bokeh_ssh._ssh.config.lookup import load
from bokeh_ssh._ssh.connect import connect
from bokeh_ssh._ssh.connection import Connection
from bokeh_ssh._ssh.crypto.chacha20_poly1305 import NAME as CHACHA
from bokeh_ssh._ssh.crypto.chacha20_poly1305 import TAG, ChaCha20Poly1305
from bokeh_ssh._ssh.packetizer import Packetizer
from bokeh_ssh._ssh.transport import Transport
from rekeying import LIMIT, WAYS
from skips import missing

ETM = "hmac-sha2-512-etm@openssh.com"
SNTRUP = "sntrup761x25519-sha512@openssh.com"
UMAC = "umac-64-etm@openssh.com,umac-128-etm@openssh.com,umac-64@openssh.com,umac-128@openssh.com"


def ask_ssh(*words: str) -> list[str]:
    """Run ssh and return its lines; empty where it refuses."""
    if not shutil.which("ssh"):
        missing("there is no ssh here")
    done = subprocess.run(["ssh", *words], capture_output=True, text=True, timeout=20, check=False)
    return done.stdout.splitlines() if done.returncode == 0 else []


def ssh_g(keyword: str, line: str, tmp_path: Path) -> list[str] | None:
    """Return what ``ssh -G`` makes of a line; None where it refuses it."""
    (tmp_path / "config").write_text(f"{keyword} {line}\n" if line else "")
    lines = ask_ssh("-G", "-F", str(tmp_path / "config"), "--", "host")
    found = [said.partition(" ")[2].split(",") for said in lines if said.startswith(f"{keyword.lower()} ")]
    return found[0] if found else None


def enter(machine: Machine, lines: str = "", **changes: Any) -> Connection:
    """Log in with an ssh config of these lines."""
    config = Path(machine.key_path).with_name(f"config-{machine.port}")
    config.write_text(lines)
    host = Host(machine.host, machine.user, **{**machine.login, "ssh_config": config, **changes})
    return connect(host)


# What a line means.

KINDS = [
    ("Ciphers", "cipher"),
    ("MACs", "mac"),
    ("KexAlgorithms", "kex"),
    ("HostKeyAlgorithms", "HostKeyAlgorithms"),
    ("PubkeyAcceptedAlgorithms", "PubkeyAcceptedAlgorithms"),
]


@pytest.mark.parametrize(("keyword", "query"), KINDS)
def test_lines_mean_what_they_mean_to_ssh(keyword: str, query: str, tmp_path: Path) -> None:
    """Of ssh's own lists, random lines leave what they leave with ssh, in its order."""
    chance = random.Random(keyword)
    usual, every = ssh_g(keyword, "", tmp_path), ask_ssh("-Q", query)
    assert usual
    taken = 0
    for _ in range(60):
        names = chance.sample(every, chance.randint(1, 3))
        sign = chance.choice(["", "+", "-", "^"])
        if sign == "-" or "Algorithms" in keyword[6:]:
            names = [
                chance.choice([name, name[:-3] + "*", f"*{name[3:]}", name[:4] + "?" + name[5:]])
                for name in names
            ]
        line = sign + ",".join(names)
        said = ssh_g(keyword, line, tmp_path)
        if said is not None and said != [""]:
            taken += 1
            assert list(choose(line, usual, every)) == said, line
    assert taken > 20


def test_lines_that_are_none(tmp_path: Path) -> None:
    """What ssh refuses in such a line, we refuse with the line named."""
    lines = ("Ciphers", 'Ciphers ""', "Ciphers +", "MACs -", "KexAlgorithms ^", "Ciphers a b", "Ciphers !a")
    for line in lines:
        (tmp_path / "config").write_text(f"{line}\n")
        assert ask_ssh("-G", "-F", str(tmp_path / "config"), "--", "host") == [] or line == "MACs -"
        with pytest.raises(ConfigError, match="line 1"):
            load(tmp_path / "config", "host")


@pytest.mark.parametrize(
    ("kind", "line", "found"),
    [
        ("ssh-ed25519", None, ("ssh-ed25519",)),
        ("ssh-ed25519", "-ssh-ed25519", ()),
        ("ssh-ed25519", "ecdsa*,rsa*", ()),
        ("ssh-ed25519", "^rsa-sha2-256", ("ssh-ed25519",)),
        ("ssh-rsa", None, ("rsa-sha2-512", "rsa-sha2-256")),
        ("ssh-rsa", "^rsa-sha2-256", ("rsa-sha2-256", "rsa-sha2-512")),
        ("ssh-rsa", "rsa-sha2-256", ("rsa-sha2-256",)),
        ("ssh-rsa", "-rsa-sha2-*", ()),
        ("ssh-rsa", "+ssh-rsa", ("rsa-sha2-512", "rsa-sha2-256", "ssh-rsa")),
        ("ssh-rsa", "ssh-*", ("ssh-rsa",)),
        ("ssh-rsa-cert-v01@openssh.com", "ssh-rsa-cert*", ("ssh-rsa-cert-v01@openssh.com",)),
        ("ssh-rsa-cert-v01@openssh.com", "-rsa-sha2-512*", ("rsa-sha2-256-cert-v01@openssh.com",)),
        ("sk-ssh-ed25519@openssh.com", "sk-*", ("sk-ssh-ed25519@openssh.com",)),
        ("sk-ssh-ed25519-cert-v01@openssh.com", "sk-*", ("sk-ssh-ed25519-cert-v01@openssh.com",)),
        ("ssh-mldsa-44@openssh.com", None, ("ssh-mldsa-44@openssh.com",)),
        ("ssh-mldsa-44@openssh.com", "-ssh-ed25519", ("ssh-mldsa-44@openssh.com",)),
        ("ssh-mldsa-44@openssh.com", "ssh-ed25519", ()),
    ],
)
def test_signatures(kind: str, line: str | None, found: tuple[str, ...]) -> None:
    """How a key may sign is what PubkeyAcceptedAlgorithms leaves of its ways, in the order of the line."""
    assert signatures(kind, line) == found


def test_what_is_weak_comes_last() -> None:
    """What we have put into paramiko's lists stands before what is weaker than it."""
    usual = Algorithms()
    assert usual.ciphers[:3] == ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com", CHACHA)
    assert "cbc" in usual.ciphers[-1]
    macs, kex = usual.macs, usual.kex
    assert macs.index("hmac-sha2-256") < macs.index("hmac-sha1-etm@openssh.com") < macs.index("hmac-md5")
    eighteen, older = (
        kex.index("diffie-hellman-group18-sha512"),
        [name for name in kex if name.endswith("sha1")],
    )
    assert kex.index("curve25519-sha256") < eighteen
    assert all(eighteen < kex.index(name) for name in older)
    assert set(kex) <= set(algorithms.KEX)


# ChaCha20-Poly1305.


@pytest.mark.parametrize("size", [1, 8, 15, 64, 65, 1000, 35_000, 262_144])
def test_cipher_is_the_one_of_others(size: int) -> None:
    """What is encrypted is, byte for byte, what asyncssh's own cipher makes, and is opened again."""
    key, plain, number = random.Random(size).randbytes(64), random.Random(1).randbytes(size), size * 77_777
    length = (size).to_bytes(4, "big")
    ours, theirs = ChaCha20Poly1305(key), ChachaCipher(key)
    for nonce in (number, 0, 2**32 - 1, number):
        sealed = ours.seal(nonce, length, plain)
        body, tag = theirs.encrypt_and_sign(length, plain, nonce.to_bytes(8, "big"))
        assert sealed == body + tag
        assert ours.length(nonce, sealed[:4]) == length
        assert ours.open(nonce, sealed[:-TAG], sealed[-TAG:], skip=4) == plain


def test_cipher_takes_nothing_that_was_changed() -> None:
    """One bit anywhere, or another packet's number, and nothing is decrypted."""
    cipher = ChaCha20Poly1305(bytes(range(64)))
    sealed = cipher.seal(7, b"\0\0\0\x20", bytes(32))
    for at in range(len(sealed)):
        bent = bytearray(sealed)
        bent[at] ^= 1
        with pytest.raises(InvalidTag):
            cipher.open(7, bytes(bent[:-TAG]), bytes(bent[-TAG:]), skip=4)
    with pytest.raises(InvalidTag):
        cipher.open(8, sealed[:-TAG], sealed[-TAG:], skip=4)


@pytest.fixture
def only_chacha(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask servers for nothing else."""
    only = Algorithms(ciphers=(CHACHA,))
    monkeypatch.setattr(algorithms, "select", lambda *_args: only)


@WAYS
def test_traffic_through_new_keys(
    way: Any,
    machine_with: Callable[..., Machine],
    key_changes: dict[Transport, int],
    only_chacha: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A storm of bytes and connections is right to the last byte, while both sides ask for new keys."""
    monkeypatch.setattr(Packetizer, "REKEY_BYTES", LIMIT)
    monkeypatch.setattr(Packetizer, "REKEY_PACKETS", 500)
    with way(machine_with(rekey=LIMIT)) as work:
        [transport] = key_changes
        assert (transport.local_cipher, transport.remote_cipher) == (CHACHA, CHACHA)
        work()
    [count] = key_changes.values()
    assert count > 5


@WAYS
def test_compressed_traffic(
    way: Any,
    machine_with: Callable[..., Machine],
    key_changes: dict[Transport, int],
    only_chacha: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same with compression in it."""
    monkeypatch.setattr(Packetizer, "REKEY_PACKETS", 100)
    machine = machine_with(rekey=LIMIT // 8)
    login = dict(machine.login)
    monkeypatch.setattr(type(machine), "login", property(lambda self: {**login, "compression": True}))
    with way(machine) as work:
        [transport] = key_changes
        assert (transport.remote_cipher, transport.remote_compression) == (CHACHA, "zlib@openssh.com")
        work()
    [count] = key_changes.values()
    assert count > 5


def test_packet_that_was_changed_ends_the_connection(sshd: Callable[..., Machine]) -> None:
    """What somebody in between has changed is noticed, and is no data of anybody's."""
    machine = sshd(Ciphers=CHACHA)
    connection = enter(machine)
    packetizer: Any = connection.transport.packetizer
    engine = packetizer._Packetizer__block_engine_in
    original = engine.open

    def bent(number: int, sealed: Any, tag: Any, *, skip: int = 0) -> bytes:
        data = bytearray(sealed)
        data[-1] ^= 1
        return bytes(original(number, bytes(data), tag, skip=skip))

    engine.open = bent
    reply = connection.transport.send_global_request(b"keepalive@openssh.com")
    assert reply.wait(20)
    assert reply.lost
    assert "Mismatched MAC" in str(connection.transport.get_exception())
    connection.close()


def test_tinyssh(key: Key, tmp_path: Path) -> None:
    """TinySSH, which has no other cipher, is logged in to, and runs a command."""
    try:
        with other_servers.tinyssh(key, tmp_path) as machine, enter(machine) as connection:
            assert connection.transport.remote_cipher == CHACHA
            reply = connection.transport.send_global_request(b"keepalive@openssh.com")
            assert reply.wait(20)
    except other_servers.MissingError as exc:  # not in every image
        pytest.skip(str(exc))


# Servers that have little.


@pytest.mark.parametrize(
    ("directives", "cipher"),
    [
        ({"Ciphers": CHACHA}, CHACHA),
        ({"Ciphers": CHACHA, "MACs": UMAC}, CHACHA),
        ({"Ciphers": "aes128-gcm@openssh.com", "MACs": UMAC}, "aes128-gcm@openssh.com"),
        ({"Ciphers": f"{CHACHA},aes256-gcm@openssh.com", "MACs": UMAC}, "aes256-gcm@openssh.com"),
        ({"Ciphers": "aes256-ctr", "MACs": "hmac-sha1-etm@openssh.com"}, "aes256-ctr"),
        ({"Ciphers": "aes192-ctr", "MACs": f"{UMAC},hmac-sha2-512-etm@openssh.com"}, "aes192-ctr"),
        ({"KexAlgorithms": "curve25519-sha256"}, "aes128-gcm@openssh.com"),
        ({"KexAlgorithms": "curve25519-sha256@libssh.org"}, "aes128-gcm@openssh.com"),
        ({"KexAlgorithms": "diffie-hellman-group16-sha512"}, "aes128-gcm@openssh.com"),
        ({"KexAlgorithms": "diffie-hellman-group18-sha512"}, "aes128-gcm@openssh.com"),
    ],
)
def test_narrow_server(sshd: Callable[..., Machine], directives: dict[str, str], cipher: str) -> None:
    """A server that allows one thing alone is reached; a cipher that vouches for its packets needs no MAC."""
    with enter(sshd(**directives)) as connection:
        assert connection.transport.remote_cipher == cipher
        assert connection.transport.send_global_request(b"keepalive@openssh.com").wait(20)


MISMATCHES = [
    ("Ciphers", "cipher", "aes128-ctr", "aes256-ctr"),
    ("MACs", "MAC", "hmac-sha2-256", "hmac-sha2-512"),
    ("KexAlgorithms", "key exchange", "ecdh-sha2-nistp256", "ecdh-sha2-nistp384"),
    ("HostKeyAlgorithms", "kind of host key", "ssh-ed25519", "ecdsa-sha2-nistp256"),
]


@pytest.mark.parametrize(("keyword", "what", "theirs", "ours"), MISMATCHES)
def test_nothing_in_common_because_of_a_line(
    sshd: Callable[..., Machine], keyword: str, what: str, theirs: str, ours: str
) -> None:
    """The error has both lists and the line that decided, and does not pass by itself."""
    machine = sshd(**{keyword: theirs, **({"Ciphers": "aes128-ctr"} if keyword == "MACs" else {})})
    enter(machine).close()  # the control
    with pytest.raises(AlgorithmError) as caught:
        enter(machine, f"\n{keyword} {ours}\n")
    error = caught.value
    assert (error.kind, error.theirs, error.ours) == (what, (theirs,), (ours,))
    assert f"no common {what} with 127.0.0.1 port {machine.port}: the server has {theirs};" in str(error)
    assert f"asked for were {ours} ({keyword} in " in str(error)
    assert "line 2" in str(error.hint)
    assert "too old" not in str(error)
    assert not error.temporary


@pytest.mark.parametrize(
    ("directives", "what", "theirs"),
    [
        (
            {"KexAlgorithms": "sntrup761x25519-sha512@openssh.com"},
            "key exchange",
            "sntrup761x25519-sha512@openssh.com",
        ),
        ({"Ciphers": "aes128-ctr", "MACs": UMAC}, "MAC", "umac-64-etm@openssh.com"),
    ],
)
def test_nothing_in_common_at_all(
    sshd: Callable[..., Machine], directives: dict[str, str], what: str, theirs: str
) -> None:
    """Where no line is to blame, the error says what the server could allow."""
    with pytest.raises(AlgorithmError) as caught:
        enter(sshd(**directives))
    error = caught.value
    assert error.kind == what
    assert error.theirs[0] == theirs
    assert len(error.ours) > 3
    assert not any("strict" in name for name in error.theirs)
    assert "sshd_config" in str(error.hint)
    assert "too old" not in str(error)
    assert not error.temporary


@pytest.mark.parametrize(("keyword", "what", "_theirs", "_ours"), MISMATCHES)
def test_line_that_leaves_nothing(
    sshd: Callable[..., Machine], keyword: str, what: str, _theirs: str, _ours: str
) -> None:
    """A line that names nothing that there is, is a ConfigError with what there is; for another host it is
    none."""
    machine = sshd()
    with pytest.raises(ConfigError) as caught:
        enter(machine, f"Host *\n {keyword} newest-2030,newest-2031\n")
    assert f"line 2: {keyword} newest-2030,newest-2031 leaves no {what} that is supported" in str(
        caught.value
    )
    assert "name one of " in str(caught.value.hint)
    enter(machine, f"Host other\n {keyword} newest-2030\n").close()


@pytest.mark.parametrize(
    ("lines", "cipher", "mac"),
    [
        ("Ciphers aes256-gcm@openssh.com\n", "aes256-gcm@openssh.com", None),
        (
            "Ciphers aes128-ctr,aes256-gcm@openssh.com\nMACs umac-64@openssh.com\n",
            "aes256-gcm@openssh.com",
            None,
        ),
        (f"Ciphers {CHACHA},aes128-ctr\n", CHACHA, None),
        (
            "Ciphers ^aes192-ctr\nMACs hmac-sha2-512-etm@openssh.com\n",
            "aes192-ctr",
            "hmac-sha2-512-etm@openssh.com",
        ),
        ("Ciphers -aes*-gcm*,chacha*\nMACs ^hmac-sha1\n", "aes128-ctr", "hmac-sha1"),
        (
            "Ciphers newest-2030,aes256-ctr\nMACs umac-64@openssh.com,hmac-sha2-256\n",
            "aes256-ctr",
            "hmac-sha2-256",
        ),
        ("Ciphers -aes*-gcm*\n", CHACHA, None),
        ("Host other\n Ciphers aes256-ctr\nHost *\n Ciphers +aes256-ctr\n", "aes128-gcm@openssh.com", None),
    ],
)
def test_lines_are_followed(sshd: Callable[..., Machine], lines: str, cipher: str, mac: str | None) -> None:
    """What a line puts first is what the connection has."""
    with enter(sshd(), lines) as connection:
        transport = connection.transport
        assert (transport.local_cipher, transport.remote_cipher) == (cipher, cipher)
        assert mac is None or transport.remote_mac == mac


def test_kex_line_is_followed(sshd: Callable[..., Machine], tmp_path: Path) -> None:
    """KexAlgorithms chooses the key exchange."""
    machine = sshd(LogLevel="DEBUG1")
    for name in ("curve25519-sha256", "ecdh-sha2-nistp521", "diffie-hellman-group14-sha256"):
        enter(machine, f"KexAlgorithms {name}\n").close()
        log = (tmp_path / "sshd.log").read_text()
        assert log.count(f"kex: algorithm: {name}") == 1


@pytest.mark.parametrize("line", ["+ssh-rsa", "^ssh-rsa", "ssh-rsa,ssh-ed25519", "ssh-r*"])
def test_server_that_takes_sha1_alone(
    sshd: Callable[..., Machine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    """An RSA key signs with SHA-1 where a line asks for that, from its file and in the agent; and only then.
    What a line adds at the end is used with servers that do not say what they take, as with ssh."""
    key = make_key(tmp_path / "rsa", "ssh-rsa")
    (tmp_path / "authorized").write_bytes(key.export_public_key())
    machine = sshd(AuthorizedKeysFile=f"{tmp_path}/authorized", PubkeyAcceptedAlgorithms="ssh-rsa")
    if line == "+ssh-rsa":
        monkeypatch.setattr(Transport, "_parse_ext_info", lambda _self, _message: None)
    named: dict[str, Any] = {"key_filename": str(tmp_path / "rsa")}
    with pytest.raises(AuthenticationError, match="refused"):
        enter(machine, **named)
    lines = f"PubkeyAcceptedAlgorithms {line}\n"
    enter(machine, lines, **named).close()
    ready = {"pkey": paramiko.RSAKey.from_private_key_file(str(tmp_path / "rsa")), "key_filename": None}
    with pytest.raises(AuthenticationError, match="cannot sign") if paramiko_5() else nullcontext():
        enter(machine, lines, **ready).close()
    with closing(SshAgent(tmp_path / "rsa")) as agent:
        monkeypatch.setenv("SSH_AUTH_SOCK", agent.path)
        (tmp_path / "rsa").unlink()
        enter(machine, lines, key_filename=None, allow_agent=True).close()


def paramiko_5() -> bool:
    """Return whether paramiko signs nothing with SHA-1 any more."""
    return "ssh-rsa" not in paramiko.RSAKey.HASHES


@pytest.fixture
def two_keys(sshd: Callable[..., Machine], tmp_path: Path) -> Machine:
    """A server with host keys of two kinds, both of which are in known_hosts."""
    made = {kind: make_key(tmp_path / kind, kind) for kind in ("ecdsa-sha2-nistp256", "ssh-rsa")}
    machine = sshd(HostKey=f"{tmp_path}/ecdsa-sha2-nistp256\nHostKey {tmp_path}/ssh-rsa")
    lines = [f"[127.0.0.1]:{machine.port} {key.export_public_key().decode()}" for key in made.values()]
    Path(machine.known_hosts).write_text("".join(lines))
    return machine


@pytest.mark.parametrize(
    "line",
    [
        *("", "rsa-sha2-512", "rsa-sha2-256,ecdsa-sha2-nistp256", "ecdsa-sha2-nistp256,rsa-sha2-512"),
        *("^rsa-sha2-512", "^ssh-ed25519", "-ecdsa*", "-rsa*", "+ecdsa-sha2-nistp256", "rsa-sha2-*", "*rsa*"),
    ],
)
@pytest.mark.parametrize("known", ["ssh-rsa", "ecdsa-sha2-nistp256", "both"])
def test_host_key_line_as_ssh(two_keys: Machine, line: str, known: str) -> None:
    """The server shows us the kind of key that it shows ssh with the same line and the same known_hosts; and
    where that one is not known to ssh, it is not to us."""
    path = Path(two_keys.known_hosts)
    kept = [said for said in path.read_text().splitlines(keepends=True) if known in said or known == "both"]
    path.write_text("".join(kept))
    lines = f"HostKeyAlgorithms {line}\n" if line else ""
    command = two_keys.ssh("true")
    command[1:3] = ["-v", "-F", str(path.with_name("ssh"))]
    path.with_name("ssh").write_text(lines)
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    [shown] = [said.split()[4] for said in done.stderr.splitlines() if "debug1: Server host key: " in said]
    try:
        with enter(two_keys, lines) as connection:
            ours, blob = True, connection.transport.host_key_blob
    except BokehSSHError:
        ours, blob = False, b""
    assert ours == (done.returncode == 0), done.stderr
    assert not ours or int.from_bytes(blob[:4], "big") == len(shown)
    assert not ours or blob[4 : 4 + len(shown)].decode() == shown
