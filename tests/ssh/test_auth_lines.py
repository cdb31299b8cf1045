"""The lines of an ssh config about logging in: what a server sees of us is what it sees of ``ssh``."""

from __future__ import annotations

import contextlib
import itertools
import random
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from auth_servers import USER, Bed, FakeAgent, Rules, SshAgent, SshClient, Sshd, make_key
from beds import PASSWORD, Knobs, until
from bokeh_ssh._core.errors import AuthenticationError, BokehSSHError, TooManyKeysError
from bokeh_ssh._core.events import Question
from bokeh_ssh._core.host import Host
from bokeh_ssh._ssh.connect import connect

QUESTION = (("", "", (("Code: ", False),), ("right",)),)
EVERYTHING = {"publickey", "keyboard-interactive", "password"}


@pytest.fixture
def bed(account: Path) -> Iterator[Bed]:
    """A server that takes a password or a code, and refuses all keys."""
    server = Bed(lambda: Rules(EVERYTHING, rounds=QUESTION))
    with contextlib.closing(server):
        yield server


@pytest.fixture
def agent(keys: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SshAgent]:
    """A real agent with two keys: one of them is ``keys/listed``, which is there too, the other not."""
    make_key(keys / "listed")
    make_key(keys / "held")
    with contextlib.closing(SshAgent(keys / "held", keys / "listed")) as agent:
        (keys / "held").unlink()
        monkeypatch.setenv("SSH_AUTH_SOCK", agent.path)
        yield agent


def enter(
    port: int, config: Path, known: Path, answer: str | None, questions: list[Question], **keywords: Any
) -> tuple[str, ...]:
    """Log in as a program of ours does."""

    def prompt(question: Question) -> str | None:
        questions.append(question)
        return answer

    keywords = {"prompt": None if answer is None else prompt, "host_keys": "accept-new"} | keywords
    host = Host("127.0.0.1", USER, port=port, ssh_config=config, known_hosts=known, timeout=20, **keywords)
    connection = connect(host)
    connection.close()
    return connection.methods


def stripped(texts: Iterable[str]) -> list[str]:
    """Leave out the blanks at the end of each, which a shell's variable has not."""
    return [text.strip() for text in texts]


def compare(bed: Bed, folder: Path, lines: str, answer: str) -> tuple[bool, Rules, str]:
    """Have ssh and us log in with the same config and the same answers; return what the server saw."""
    client = SshClient(folder, lines, answer=answer)
    before = len(bed.seen)
    ours_in, error, questions = True, "", list[Question]()
    try:
        enter(bed.port, client.config, folder / "ours", answer, questions)
    except AuthenticationError as exc:
        ours_in, error = False, str(exc)
    (ours,) = bed.seen[before:]
    ssh_in, said = client.enter(bed.port)
    (theirs,) = bed.seen[before + 1 :]
    seen = (ours_in, ours.tried, ours.offered, ours.passwords, ours.answers)
    assert seen == (ssh_in, theirs.tried, theirs.offered, theirs.passwords, theirs.answers), lines + said
    assert len(questions) == len(client.questions), lines
    return ours_in, ours, error


CASES = [
    "",
    "PreferredAuthentications password\n",
    "PreferredAuthentications keyboard-interactive,password\n",
    "PreferredAuthentications gssapi-with-mic,hostbased,password,publickey\n",
    "PreferredAuthentications publickey\n",
    "PreferredAuthentications nothing\n",
    "PreferredAuthentications ,password,,\n",
    "PreferredAuthentications none\n",
    "PreferredAuthentications Password\n",
    "PasswordAuthentication no\n",
    "KbdInteractiveAuthentication no\n",
    "ChallengeResponseAuthentication no\n",
    "SKeyAuthentication no\nPasswordAuthentication no\n",
    "TISAuthentication no\n",
    "KbdInteractiveAuthentication yes\nChallengeResponseAuthentication no\n",
    "PubkeyAuthentication no\n",
    "PubkeyAuthentication unbound\n",
    "PubkeyAuthentication host-bound\n",
    "DSAAuthentication no\n",
    "PubkeyAuthentication no\nPreferredAuthentications publickey,password\n",
    "NumberOfPasswordPrompts 1\n",
    "NumberOfPasswordPrompts 2\nPreferredAuthentications password\n",
    "NumberOfPasswordPrompts 0\n",
    "BatchMode yes\n",
    "BatchMode yes\nPreferredAuthentications password\n",
    "IdentitiesOnly yes\n",
    "IdentitiesOnly yes\nIdentityFile {keys}/listed\n",
    "IdentityFile {keys}/listed\n",
    "IdentitiesOnly yes\nIdentityFile none\n",
    "PubkeyAcceptedAlgorithms -ssh-ed25519\n",
    "PubkeyAcceptedAlgorithms ecdsa-*,rsa-*\n",
    "PubkeyAcceptedAlgorithms ^rsa-sha2-256\n",
    "PubkeyAcceptedKeyTypes ssh-ed25519\n",
    "PubkeyAcceptedKeyTypes -*\n",
    "Host 127.0.0.1\n PasswordAuthentication no\nHost *\n PasswordAuthentication yes\n",
    "PasswordAuthentication no\nKbdInteractiveAuthentication no\nPubkeyAuthentication no\n",
]


@pytest.mark.parametrize("answer", ["right", "wrong"])
def test_server_sees_what_it_sees_of_ssh(
    bed: Bed, agent: SshAgent, keys: Path, tmp_path: Path, answer: str
) -> None:
    """Methods, keys, passwords and answers, in their order, are those of ssh with the same config; a person
    is asked as often."""
    for number, lines in enumerate(CASES):
        compare(bed, tmp_path / f"case{number}", lines.format(keys=keys), answer)


@pytest.mark.parametrize("bits", [2048, 2049, 3072])
def test_short_keys_of_ones_own_are_left_out(
    bed: Bed, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    """RequiredRSASize leaves out shorter keys, in files and the agent, as with ssh; others have no size."""
    for name, kind in (("file", "ssh-rsa"), ("held", "ssh-rsa"), ("other", "ecdsa-sha2-nistp256")):
        make_key(keys / name, kind)
    with contextlib.closing(SshAgent(keys / "held")) as agent:
        monkeypatch.setenv("SSH_AUTH_SOCK", agent.path)
        lines = f"IdentityFile {keys}/file\nIdentityFile {keys}/other\nRequiredRSASize {bits}\n"
        _, seen, error = compare(bed, tmp_path / "case", lines, "wrong")
    assert len(seen.offered) == (3 if bits == 2048 else 1)
    assert ("2048 bits" in error) == (bits > 2048)


def test_any_lines(bed: Bed, agent: SshAgent, keys: Path, tmp_path: Path) -> None:
    """Any mixture of such lines does what it does with ssh."""
    chance = random.Random(16)
    switches = ("PasswordAuthentication", "KbdInteractiveAuthentication", "PubkeyAuthentication")
    orders = map(",".join, itertools.permutations(sorted(EVERYTHING)))
    lines = [
        *(f"PreferredAuthentications {order}" for order in orders),
        "PreferredAuthentications password,nothing",
        *(f"{keyword} {value}" for keyword, value in itertools.product(switches, ("yes", "no"))),
        *(f"NumberOfPasswordPrompts {count}" for count in range(4)),
        "BatchMode yes",
        "BatchMode no",
        "IdentitiesOnly yes",
        f"IdentityFile {keys}/listed",
    ]
    for number in range(25):
        config = "\n".join(chance.sample(lines, chance.randint(1, 5))) + "\n"
        compare(bed, tmp_path / f"any{number}", config, chance.choice(["right", "wrong"]))


def test_full_agent_and_a_password(
    container: Callable[..., Any], keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With six keys in the agent and a server that takes three tries, `PreferredAuthentications password`
    gets in, and so does `PubkeyAuthentication no`; without such a line the keys use all tries up."""
    machine = container(Knobs(password=True), directives={"MaxAuthTries": "3"})
    names = [f"k{number}" for number in range(6)]
    for name in names:
        make_key(keys / name)
    host = {"known_hosts": machine.known_hosts, "password": PASSWORD, "ssh_config": tmp_path / "c"}
    with contextlib.closing(SshAgent(*(keys / name for name in names))) as agent:
        monkeypatch.setenv("SSH_AUTH_SOCK", agent.path)
        for lines in ("PreferredAuthentications password\n", "PubkeyAuthentication no\n"):
            (tmp_path / "c").write_text(lines)
            with connect(Host(machine.host, machine.user, port=machine.port, **host)) as connection:
                assert connection.methods[-1] in ("password", "keyboard-interactive")
        (tmp_path / "c").write_text("")
        with pytest.raises(TooManyKeysError):
            connect(Host(machine.host, machine.user, port=machine.port, **host))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("PasswordAuthentication no", "password was not tried: PasswordAuthentication no"),
        ("PreferredAuthentications publickey", "password was not tried: PreferredAuthentications publickey"),
        ("ChallengeResponseAuthentication no", "KbdInteractiveAuthentication no"),
        ("PubkeyAuthentication no", "publickey was not tried: PubkeyAuthentication no"),
        ("BatchMode yes", "nobody is asked: BatchMode yes"),
        ("PubkeyAcceptedKeyTypes rsa-*", "its kind is left out by PubkeyAcceptedAlgorithms rsa-*"),
        ("NumberOfPasswordPrompts 0", "nobody is asked: NumberOfPasswordPrompts 0"),
        ("PKCS11Provider /p.so", "the SSH agent only (ssh-add -s), and not by PKCS11Provider /p.so"),
    ],
)
def test_line_is_named(bed: Bed, agent: SshAgent, tmp_path: Path, line: str, said: str) -> None:
    """What the config kept from being tried stands in the error, with file and line."""
    config = tmp_path / "config"
    config.write_text(f"\n{line}\n")
    with pytest.raises(AuthenticationError) as caught:
        enter(bed.port, config, tmp_path / "known", "wrong", [])
    assert f"{said} ({config} line 2)" in str(caught.value)


def test_password_that_is_given_and_batch_mode(bed: Bed, tmp_path: Path) -> None:
    """`BatchMode yes` and `NumberOfPasswordPrompts 0` keep from asking; a password that is given is used."""
    for lines in ("BatchMode yes\n", "NumberOfPasswordPrompts 0\n"):
        (tmp_path / "config").write_text(lines)
        methods = enter(
            bed.port, tmp_path / "config", tmp_path / "known", "wrong", questions := [], password="right"
        )
        assert methods == ("password",)
        assert not questions


def test_batch_mode_asks_about_no_host_key(bed: Bed, tmp_path: Path) -> None:
    """With `BatchMode yes` nobody is asked whether an unknown host key is right."""
    (tmp_path / "config").write_text("BatchMode yes\n")
    with pytest.raises(BokehSSHError, match="nobody can be asked"):
        enter(bed.port, tmp_path / "config", tmp_path / "known", "yes", questions := [], host_keys="ask")
    assert not questions


def test_agent_is_left_alone_without_keys(bed: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`PubkeyAuthentication no` does not even connect to the agent: it may not answer."""
    with contextlib.closing(FakeAgent(None)) as silent:
        monkeypatch.setenv("SSH_AUTH_SOCK", silent.path)
        (tmp_path / "config").write_text("PubkeyAuthentication no\n")
        assert enter(bed.port, tmp_path / "config", tmp_path / "known", "right", [])
        assert silent.connections == 0


def test_passphrase_prompts(account: Path, keys: Path, tmp_path: Path) -> None:
    """NumberOfPasswordPrompts holds for passphrases too, as with ssh."""
    key = make_key(keys / "locked", passphrase="open sesame")
    server = Bed(lambda: Rules({"publickey"}, keys=(key,)))
    with contextlib.closing(server):
        for count in range(3):
            lines = f"IdentityFile {keys}/locked\nNumberOfPasswordPrompts {count}\n"
            client = SshClient(tmp_path / f"c{count}", lines, answer="wrong")
            questions: list[Question] = []
            with pytest.raises(AuthenticationError):
                enter(server.port, client.config, tmp_path / "known", "wrong", questions)
            assert not client.enter(server.port)[0]
            assert stripped(question.text for question in questions) == stripped(client.questions)
            assert len(questions) == count


# AddKeysToAgent.


@pytest.fixture
def empty_agent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], SshAgent]]:
    """Make real agents without keys, each in use as soon as it is made."""
    with contextlib.ExitStack() as stack:

        def make() -> SshAgent:
            agent = stack.enter_context(contextlib.closing(SshAgent()))
            monkeypatch.setenv("SSH_AUTH_SOCK", agent.path)
            return agent

        yield make


@pytest.fixture
def make_sshd(tmp_path: Path) -> Iterator[Callable[..., Sshd]]:
    """Start real sshds: ``make_sshd([keys], "Option value")``."""
    with contextlib.ExitStack() as stack:

        def make(authorized: list[Any], *options: str) -> Sshd:
            folder = tmp_path / f"sshd{len(list(tmp_path.iterdir()))}"
            folder.mkdir()
            return stack.enter_context(contextlib.closing(Sshd(folder, authorized, *options)))

        yield make


@pytest.mark.parametrize("value", ["yes", "no", "ask", "confirm", "1h", "confirm 10m", "true", "false", ""])
@pytest.mark.parametrize("kind", ["ssh-ed25519", "ecdsa-sha2-nistp521", "ssh-rsa"])
def test_key_is_added_as_ssh_adds_it(
    make_sshd: Callable[..., Sshd],
    empty_agent: Callable[[], SshAgent],
    keys: Path,
    tmp_path: Path,
    value: str,
    kind: str,
) -> None:
    """After a login with a key file, the agent holds what it holds after the same login with ssh: the same
    key with the same comment, after a passphrase and without one, and the questions were the same."""
    lines = f"AddKeysToAgent {value}\n" if value else ""
    for passphrase in (None, "yes"):  # the answer to all questions
        key = make_key(keys / "id", kind, passphrase=passphrase)
        server = make_sshd([key])
        lines += f"IdentityFile {keys}/id\n"
        mine, theirs = empty_agent(), empty_agent()
        client = SshClient(tmp_path / f"c{passphrase}", lines, answer="yes", agent=theirs.path)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SSH_AUTH_SOCK", mine.path)
            enter(server.port, client.config, tmp_path / "known", "yes", questions := [])
        assert client.enter(server.port)[0]
        assert mine.keys() == theirs.keys()
        assert bool(mine.keys()) == (value not in ("no", "false", ""))
        assert [question.text.strip() for question in questions] == [
            text.strip() for text in client.questions
        ]
        (tmp_path / "known").unlink()


def test_pem_key_is_added(
    make_sshd: Callable[..., Sshd], empty_agent: Callable[[], SshAgent], keys: Path, tmp_path: Path
) -> None:
    """A key in PEM, which has no comment, is added under the name that ssh gives it."""
    key = make_key(keys / "id", "ssh-rsa", form="pkcs1-pem")
    (keys / "id.pub").unlink()
    server = make_sshd([key])
    lines = f"AddKeysToAgent yes\nIdentityFile {keys}/id\n"
    mine, theirs = empty_agent(), empty_agent()
    client = SshClient(tmp_path / "c", lines, agent=theirs.path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSH_AUTH_SOCK", mine.path)
        enter(server.port, client.config, tmp_path / "known", None, [])
    assert client.enter(server.port)[0]
    assert mine.keys() == theirs.keys() != []


def test_added_key_works(
    make_sshd: Callable[..., Sshd], empty_agent: Callable[[], SshAgent], keys: Path, tmp_path: Path
) -> None:
    """The next login needs no passphrase: the agent signs."""
    server = make_sshd([make_key(keys / "id", passphrase="open sesame")])
    (tmp_path / "c").write_text(f"AddKeysToAgent yes\nIdentityFile {keys}/id\n")
    empty_agent()
    for asked in (1, 0):
        enter(server.port, tmp_path / "c", tmp_path / "known", "open sesame", questions := [])
        assert len(questions) == asked


def test_lifetime_ends(
    make_sshd: Callable[..., Sshd], empty_agent: Callable[[], SshAgent], keys: Path, tmp_path: Path
) -> None:
    """A key that is added for a second is forgotten after it."""
    server = make_sshd([make_key(keys / "id")])
    (tmp_path / "c").write_text(f"AddKeysToAgent 1\nIdentityFile {keys}/id\n")
    agent = empty_agent()
    enter(server.port, tmp_path / "c", tmp_path / "known", None, [])
    until(lambda: not agent.keys(), what="the key to be forgotten")


@pytest.mark.parametrize("answer", ["no", "YES", "", "y"])
def test_who_declines_has_nothing_added(
    make_sshd: Callable[..., Sshd],
    empty_agent: Callable[[], SshAgent],
    keys: Path,
    tmp_path: Path,
    answer: str,
) -> None:
    """With `ask`, the answers that add a key are those of ssh; the login goes on either way. Where nobody can
    be asked, nothing is added, nor where the caller has said that there is to be no agent."""
    server = make_sshd([make_key(keys / "id")])
    lines = f"AddKeysToAgent ask\nIdentityFile {keys}/id\n"
    mine, theirs = empty_agent(), empty_agent()
    client = SshClient(tmp_path / "c", lines, answer=answer, agent=theirs.path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSH_AUTH_SOCK", mine.path)
        enter(server.port, client.config, tmp_path / "known", None, [])
        enter(server.port, client.config, tmp_path / "known", "yes", [], allow_agent=False)
        assert mine.keys() == []
        enter(server.port, client.config, tmp_path / "known", answer, questions := [])
    assert client.enter(server.port)[0]
    assert mine.keys() == theirs.keys()
    assert [question.kind for question in questions] == ["add_key"]


def test_agent_that_takes_no_key(
    make_sshd: Callable[..., Sshd], empty_agent: Callable[[], SshAgent], keys: Path, tmp_path: Path
) -> None:
    """A locked agent, or one that has gone, does not keep a login from going on."""
    server = make_sshd([make_key(keys / "id")])
    (tmp_path / "c").write_text(f"AddKeysToAgent yes\nIdentityFile {keys}/id\n")
    agent = empty_agent()
    askpass = tmp_path / "askpass"
    askpass.write_text("#!/bin/sh\necho secret\n")
    askpass.chmod(0o700)
    env = {"SSH_AUTH_SOCK": agent.path, "SSH_ASKPASS": str(askpass), "SSH_ASKPASS_REQUIRE": "force"}
    subprocess.run(["ssh-add", "-x"], env=env, check=True, timeout=10, capture_output=True)
    assert enter(server.port, tmp_path / "c", tmp_path / "known", None, []) == ("publickey",)
    Path(agent.path).unlink()
    assert enter(server.port, tmp_path / "c", tmp_path / "known", None, []) == ("publickey",)
