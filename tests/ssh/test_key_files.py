"""Key files as ssh-keygen writes them: opened, whatever their cipher; else the error says what to do."""

from __future__ import annotations

import base64
import contextlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paramiko
import pytest

from auth_servers import USER, Bed, Rules, SshAgent, SshClient, make_key
from bokeh_ssh._core.errors import AuthenticationError, PromptRequiredError, UsageError
from bokeh_ssh._core.events import Question
from bokeh_ssh._core.host import Host
from bokeh_ssh._ssh.auth.private_keys import UnusableKeyError, WrongPassphraseError, inspect_key, load
from bokeh_ssh._ssh.connect import connect
from skips import missing

PASSPHRASE = "öpen sesame"
CIPHERS = [
    *("3des-cbc", "aes128-cbc", "aes192-cbc", "aes256-cbc"),
    *("aes128-ctr", "aes192-ctr", "aes256-ctr", "aes128-gcm@openssh.com", "aes256-gcm@openssh.com"),
    "chacha20-poly1305@openssh.com",
]
KINDS = [("ed25519", ()), ("ecdsa", ("-b", "256")), ("ecdsa", ("-b", "521")), ("rsa", ("-b", "2048"))]
PPK = "PuTTY-User-Key-File-3: ssh-ed25519\nEncryption: none\nComment: me\nPublic-Lines: 2\n"
TECTIA = "---- BEGIN SSH2 ENCRYPTED PRIVATE KEY ----\nComment: me\nP2/56wAAA\n---- END SSH2"


def keygen(path: Path, *options: str, passphrase: str = PASSPHRASE) -> Path:
    """Have ssh-keygen make a key."""
    if not shutil.which("ssh-keygen"):
        missing("there is no ssh-keygen here")
    command = ["ssh-keygen", "-q", "-a", "1", "-N", passphrase, "-C", f"comment of {path.name}", *options]
    subprocess.run([*command, "-f", str(path)], check=True, timeout=60, stdin=subprocess.DEVNULL)
    return path


def public_half(path: Path, passphrase: str = PASSPHRASE) -> bytes:
    """Ask ssh-keygen for the public half of a private key."""
    command = ["ssh-keygen", "-y", "-P", passphrase, "-f", str(path)]
    done = subprocess.run(command, check=True, timeout=60, capture_output=True)
    return base64.b64decode(done.stdout.split()[1])


@pytest.fixture
def bed(keys: Path) -> Iterator[Bed]:
    """A server that takes the key ``keys/id``."""
    key = make_key(keys / "id")
    with contextlib.closing(Bed(lambda: Rules({"publickey", "password"}, keys=(key,)))) as server:
        yield server


def enter(bed: Bed, tmp_path: Path, **keywords: Any) -> tuple[str, ...]:
    """Log in."""
    keywords = {"host_keys": "accept-new", "ssh_config": None} | keywords
    connection = connect(Host("127.0.0.1", USER, port=bed.port, known_hosts=tmp_path / "known", **keywords))
    connection.close()
    return connection.methods


@pytest.mark.parametrize("cipher", CIPHERS)
@pytest.mark.parametrize(("kind", "bits"), KINDS)
def test_every_cipher_of_ssh_keygen(tmp_path: Path, cipher: str, kind: str, bits: tuple[str, ...]) -> None:
    """A key that ssh-keygen has encrypted opens with its passphrase: it is the same key, and has its comment;
    a wrong passphrase, an empty one and none do not open it."""
    path = keygen(tmp_path / "id", "-t", kind, *bits, "-Z", cipher)
    text = path.read_bytes()
    assert inspect_key(text) == (public_half(path), True, False)
    loaded = load(text, PASSPHRASE, "id")
    assert loaded.comment == "comment of id"
    assert loaded.for_paramiko.asbytes() == public_half(path)
    for wrong in ("open sesame", "", None):
        with pytest.raises(WrongPassphraseError):
            load(text, wrong, "id")


def test_all_that_ssh_keygen_offers() -> None:
    """No cipher that this machine's ssh can encrypt a key file with is missing in the list above."""
    if not shutil.which("ssh"):
        missing("there is no ssh here")
    offered = subprocess.run(["ssh", "-Q", "cipher"], check=True, capture_output=True, text=True).stdout
    assert not set(offered.split()) - set(CIPHERS)


@pytest.mark.parametrize("form", ["PEM", "PKCS8", "RFC4716"])
@pytest.mark.parametrize(("kind", "bits"), KINDS[1:])
@pytest.mark.parametrize("passphrase", ["", PASSPHRASE])
def test_other_formats_of_ssh_keygen(
    tmp_path: Path, form: str, kind: str, bits: tuple[str, ...], passphrase: str
) -> None:
    """What ssh-keygen writes with ``-m`` opens too."""
    path = keygen(tmp_path / "id", "-t", kind, *bits, "-m", form, passphrase=passphrase)
    loaded = load(path.read_bytes(), passphrase or None, "id")
    assert loaded.for_paramiko.asbytes() == public_half(path, passphrase)


@pytest.mark.parametrize("cipher", ["-des3", "-aes128", "-aes256"])
@pytest.mark.parametrize("form", [(), ("-traditional",)])
def test_keys_of_openssl(tmp_path: Path, cipher: str, form: tuple[str, ...]) -> None:
    """PEM files that openssl has encrypted open, as they do with ssh."""
    if not shutil.which("openssl"):
        missing("there is no openssl here")
    path = tmp_path / "id"
    command = ["openssl", "genrsa", *form, cipher, "-passout", "pass:secret", "-out", str(path), "2048"]
    if subprocess.run(command, check=False, capture_output=True, timeout=60).returncode:
        pytest.skip("this openssl cannot")
    path.chmod(0o600)
    loaded = load(path.read_bytes(), "secret", "id")
    assert loaded.for_paramiko.asbytes() == public_half(path, "secret")
    with pytest.raises(WrongPassphraseError):
        load(path.read_bytes(), "wrong", "id")


def test_pem_that_cannot_be_read(tmp_path: Path) -> None:
    """A cipher of old PEM files that is not supported is told with the command that converts the file."""
    if not shutil.which("openssl"):
        missing("there is no openssl here")
    path = tmp_path / "id"
    command = ["openssl", "genrsa", "-traditional", "-aes192", "-passout", "pass:secret", "-out", str(path)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    advice = ""
    try:
        load(path.read_bytes(), "secret", "id")  # an older cryptography can
    except UnusableKeyError as exc:
        advice = str(exc)
    assert not advice or "`ssh-keygen -p -f id`" in advice


@pytest.mark.parametrize("form", ["-traditional", "-nocrypt"])
def test_short_rsa_key(tmp_path: Path, form: str) -> None:
    """An RSA key of fewer bits than OpenSSH takes is told, and not tried: some cannot even sign."""
    if not shutil.which("openssl"):
        missing("there is no openssl here")
    path = tmp_path / "id"
    command = ["openssl", "genrsa", *([form] if form == "-traditional" else []), "-out", str(path), "512"]
    if subprocess.run(command, check=False, capture_output=True, timeout=60).returncode:
        pytest.skip("this openssl cannot")
    path.chmod(0o600)
    asked = ["ssh-keygen", "-y", "-f", str(path)]
    assert subprocess.run(asked, check=False, capture_output=True, timeout=60).returncode
    with pytest.raises(UnusableKeyError, match="512 bits only"):
        load(path.read_bytes(), None, "id")


def test_unknown_cipher_is_no_wrong_passphrase(tmp_path: Path) -> None:
    """A PKCS#8 file with a cipher that is not supported is told so, with the command that converts it."""
    if not shutil.which("openssl"):
        missing("there is no openssl here")
    keygen(tmp_path / "plain", "-t", "rsa", "-b", "2048", "-m", "PKCS8", passphrase="")
    path = tmp_path / "id"
    command = ["openssl", "pkcs8", "-topk8", "-v2", "camellia-128-cbc", "-passout", "pass:secret"]
    command += ["-in", str(tmp_path / "plain"), "-out", str(path)]
    if subprocess.run(command, check=False, capture_output=True, timeout=60).returncode:
        pytest.skip("this openssl cannot")
    try:
        load(path.read_bytes(), "secret", "id")  # an older cryptography can
    except UnusableKeyError as exc:
        assert "`ssh-keygen -p -f id`" in str(exc)  # noqa: PT017  # where it is one


@pytest.mark.parametrize("cipher", ["chacha20-poly1305@openssh.com", "aes128-gcm@openssh.com", "3des-cbc"])
def test_login_with_such_a_key(bed: Bed, keys: Path, tmp_path: Path, cipher: str) -> None:
    """The whole way: the passphrase is asked for, given wrongly once, and the login works."""
    command = ["ssh-keygen", "-q", "-p", "-N", PASSPHRASE, "-a", "1", "-Z", cipher, "-f", str(keys / "id")]
    subprocess.run(command, check=True, timeout=60)
    answers = ["wrong", PASSPHRASE]

    def prompt(question: Question) -> str:
        assert question.kind == "passphrase"
        return answers.pop(0)

    assert enter(bed, tmp_path, key_filename=keys / "id", prompt=prompt) == ("publickey",)
    assert not answers
    assert enter(bed, tmp_path, key_filename=keys / "id", passphrase=PASSPHRASE) == ("publickey",)


def damage(path: Path, old: bytes, new: bytes) -> None:
    """Put other bytes into a key in OpenSSH's format."""
    lines = path.read_bytes().splitlines()
    body = base64.b64decode(b"".join(lines[1:-1]))
    assert old in body
    armour = base64.encodebytes(body.replace(old, new, 1))
    path.write_bytes(b"\n".join((lines[0], armour.strip(), lines[-1])) + b"\n")


@pytest.mark.parametrize("cipher", CIPHERS)
def test_any_damage_is_an_error_of_ours(tmp_path: Path, cipher: str) -> None:
    """However a key file is cut off or changed, it is a wrong passphrase or an unusable key, nothing else."""
    text = keygen(tmp_path / "id", "-t", "ed25519", "-Z", cipher).read_bytes()
    lines = text.splitlines()
    body = base64.b64decode(b"".join(lines[1:-1]))
    shorter = [body[:size] for size in range(0, len(body), 7)]
    end = body.index(b"bcrypt") + 14 + 16 + 4
    rounds = range(end - 4, end)  # they stay: more of them take their time
    places = [i for i in range(0, len(body), 3) if i not in rounds]
    changed = [body[:i] + bytes((body[i] ^ 0x41,)) + body[i + 1 :] for i in places]
    for other in (*shorter, *changed):
        armour = base64.encodebytes(other).strip()
        inspect_key(b"\n".join((lines[0], armour, lines[-1])))
        with contextlib.suppress(UnusableKeyError, WrongPassphraseError):
            load(b"\n".join((lines[0], armour, lines[-1])), PASSPHRASE, "id")


def test_cipher_that_nobody_knows(bed: Bed, keys: Path, tmp_path: Path) -> None:
    """A cipher that is not supported is told with the command that changes it, and nobody is asked for a
    passphrase in vain."""
    path = keys / "id"
    command = ["ssh-keygen", "-q", "-p", "-N", PASSPHRASE, "-a", "1", "-Z", "aes256-ctr", "-f", str(path)]
    subprocess.run(command, check=True, timeout=60)
    damage(path, b"aes256-ctr", b"newest-ctr")
    asked: list[str] = []
    with pytest.raises(AuthenticationError) as caught:
        enter(bed, tmp_path, key_filename=path, prompt=lambda question: asked.append(question.kind))
    assert asked == ["password"]
    assert "encrypted with newest-ctr, which is not supported" in str(caught.value)
    assert f"`ssh-keygen -p -Z aes256-ctr -f {path}`" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [(PPK, "puttygen {} -O private-openssh -o NEWFILE"), (TECTIA, "ssh-keygen -i -f {} > NEWFILE")],
)
def test_formats_of_other_programs(bed: Bed, keys: Path, tmp_path: Path, text: str, said: str) -> None:
    """A key of PuTTY's or of SSH Communications' is told with the command that converts it: at once where
    the caller names it, and in the refusal where the ssh config does."""
    path = keys / "my key"
    path.write_text(text)
    path.chmod(0o600)
    said = said.format(shlex.quote(str(path)))
    with pytest.raises(UsageError) as early:
        enter(bed, tmp_path, key_filename=path)
    assert said in str(early.value)
    (tmp_path / "config").write_text(f'IdentityFile "{path}"\nIdentityAgent none\n')
    with pytest.raises(PromptRequiredError) as late:
        enter(bed, tmp_path, ssh_config=tmp_path / "config")
    assert said in str(late.value)


def test_dsa_key_is_told(bed: Bed, tmp_path: Path, keys: Path) -> None:
    """A DSA key, which no server of today takes, is told as not supported."""
    try:
        path = keygen(keys / "old", "-t", "dsa")
    except subprocess.CalledProcessError:
        pytest.skip("this ssh-keygen makes none")
    with pytest.raises(AuthenticationError, match=r"kind that is not supported \(ssh-dss\)"):
        enter(bed, tmp_path, key_filename=path, passphrase=PASSPHRASE)


# A key file that others can read.


@pytest.mark.parametrize(
    "mode", [0o640, 0o604, 0o644, 0o660, 0o610, 0o601, 0o777, 0o600, 0o400, 0o700, 0o500]
)
@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_key_that_others_can_read(bed: Bed, keys: Path, tmp_path: Path, mode: int) -> None:
    """It is refused where ssh refuses it, with the command that helps, whoever names it; the next login
    question shows why it comes."""
    (keys / "id").chmod(mode)
    client = SshClient(tmp_path / "c", f"IdentityFile {keys}/id\nPreferredAuthentications publickey\n")
    taken, said = client.enter(bed.port)
    assert taken == ("UNPROTECTED" not in said) == (not mode & 0o077)
    questions: list[Question] = []

    def prompt(question: Question) -> str:
        questions.append(question)
        return "right"

    config = tmp_path / "config"
    config.write_text(f"IdentityFile {keys}/id\n")
    for keywords in ({"key_filename": keys / "id"}, {"ssh_config": config}):
        methods = enter(bed, tmp_path, prompt=prompt, **keywords)
        assert methods == (("publickey",) if taken else ("password",))
    advice = f"others can read it (mode {mode:04o}): `chmod 600 {keys}/id`"
    assert [advice in question.instructions for question in questions] == [True] * (0 if taken else 2)
    if not taken:
        with pytest.raises(AuthenticationError) as caught:
            enter(bed, tmp_path, key_filename=keys / "id")
        assert advice in str(caught.value)


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_such_a_key_in_the_agent(
    bed: Bed, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent's copy is used, as with ssh: then nothing is read from the file but its public half."""
    with contextlib.closing(SshAgent(keys / "id")) as agent:
        monkeypatch.setenv("SSH_AUTH_SOCK", agent.path)
        (keys / "id").chmod(0o644)
        lines = f"IdentityFile {keys}/id\nIdentitiesOnly yes\nPreferredAuthentications publickey\n"
        client = SshClient(tmp_path / "c", lines, agent=agent.path)
        assert client.enter(bed.port)[0]
        assert enter(bed, tmp_path, ssh_config=client.config) == ("publickey",)
        assert enter(bed, tmp_path, key_filename=keys / "id") == ("publickey",)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
def test_such_a_key_of_somebody_else(bed: Bed, keys: Path, tmp_path: Path) -> None:
    """A file of another account's is taken as it is, as with ssh: its mode is not ours to judge."""
    (keys / "id").chmod(0o644)
    os.chown(keys / "id", 1, 1)
    client = SshClient(tmp_path / "c", f"IdentityFile {keys}/id\nPreferredAuthentications publickey\n")
    assert client.enter(bed.port)[0]
    assert enter(bed, tmp_path, ssh_config=client.config) == ("publickey",)
    assert paramiko.Ed25519Key.from_private_key_file(str(keys / "id"))
