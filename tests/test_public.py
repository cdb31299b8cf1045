"""What others rely on: names, errors, the cost of importing; and what we know of our dependencies."""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import os
import pickle
import re
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import paramiko
import pytest
import sshtunnel
from paramiko.auth_handler import AuthHandler
from paramiko.packet import Packetizer

import bokeh_ssh
import fakes
from beds import Key, Machine
from bokeh_ssh import (
    AuthenticationError,
    BokehSSHError,
    ConfigError,
    ConnectTimeoutError,
    DirectTunnel,
    ForwardingRefusedError,
    GatewayTunnel,
    Host,
    LocalForward,
    PortInUseError,
    ProtocolError,
    RefusedError,
    RemoteForward,
    ResolveError,
    TunnelClosedError,
    UnknownHostKeyError,
    UsageError,
)
from bokeh_ssh._core import errors as errors_module
from bokeh_ssh._version import DOCUMENTATION
from fakes import FakeSSH, Listener

pytestmark = pytest.mark.every_python

PACKAGE = Path(bokeh_ssh.__file__).parent
SECRET = "canary-5f1d3c"


def run(code: str, *args: str, timeout: float = 60, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a program of its own, that does not have pytest's logging and hooks."""
    return subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", textwrap.dedent(code), *args],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), *sys.path]), **env},
    )


# Names.


def test_all_is_sorted_and_complete() -> None:
    """``__all__`` is sorted, and has every public name and no other."""
    assert bokeh_ssh.__all__ == sorted(bokeh_ssh.__all__)
    assert len(set(bokeh_ssh.__all__)) == len(bokeh_ssh.__all__)
    errors = {
        name for name, thing in vars(errors_module).items() if inspect.isclass(thing) and name[0] != "_"
    }
    assert {name for name in errors if issubclass(getattr(errors_module, name), Exception)} <= set(
        bokeh_ssh.__all__
    )


@pytest.mark.parametrize("name", bokeh_ssh.__all__)
def test_public_names_can_be_imported(name: str) -> None:
    """Each public name is there, says that it is ours, and has a docstring."""
    thing = getattr(bokeh_ssh, name)
    assert name in dir(bokeh_ssh)
    if name != "__version__":
        assert thing.__module__ == "bokeh_ssh"
        assert thing.__doc__


def test_type_checkers_see_the_same_names() -> None:
    """What is imported for type checkers is what is loaded at run time."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    found = {}
    for node in block.body:
        if isinstance(node, ast.ImportFrom):
            home = importlib.import_module(str(node.module))
            for alias in node.names:
                for name in vars(home) if alias.name == "*" else (alias.name,):
                    if alias.name != "*" or name in bokeh_ssh.__all__:
                        found[name] = home
    assert {*found, "__version__"} == {*bokeh_ssh.__all__}
    for name, home in found.items():
        assert getattr(home, name) is getattr(bokeh_ssh, name)


def test_unknown_name_is_an_attribute_error() -> None:
    """A name that is not there is told as Python tells it."""
    with pytest.raises(AttributeError, match="no attribute 'Tunel'"):
        bokeh_ssh.Tunel  # noqa: B018


def test_error_tree_is_as_drawn() -> None:
    """The tree of errors is the one drawn at the top of its module."""
    drawn: dict[str, str] = {}
    path: list[str] = []
    for line in (errors_module.__doc__ or "").splitlines():
        found = re.match(r" {4}([│├└─ ]*)([A-Z]\w+Error)\b", line)
        if found:
            depth = len(found[1]) // 4
            path[depth:] = [found[2]]
            drawn[found[2]] = path[depth - 1] if depth else "Exception"
    real = {
        name: thing.__mro__[1].__name__
        for name, thing in vars(errors_module).items()
        if inspect.isclass(thing) and issubclass(thing, Exception)
    }
    assert drawn == real


# The cost of importing, and what importing leaves alone.


def test_conda_recipe_asks_for_what_the_package_asks_for() -> None:
    """The conda package has the version, the dependencies and the oldest Python of the one on the index."""
    root = Path(__file__).parents[1]
    recipe = root.joinpath("conda", "recipe.yaml").read_text(encoding="utf-8")
    project = root.joinpath("pyproject.toml").read_text(encoding="utf-8")
    asked = project.partition("\ndependencies = [")[2].partition("\n]")[0]
    wanted = dict(re.findall(r'^ +"([\w-]+)([^";]*)', asked, re.MULTILINE))
    run = recipe.partition("  run:\n")[2].partition("  run_constraints:")[0]
    assert dict(re.findall(r"- ([\w-]+) (>=[\d.,<]+)", run)) == wanted
    assert f'version: "{bokeh_ssh.__version__}"' in recipe
    oldest = re.search(r'requires-python = ">=([\d.]+)"', project)
    assert oldest
    assert f'python_min: "{oldest[1]}"' in recipe
    assert f'Documentation = "{DOCUMENTATION}"' in project, "the help and the index name one address"


def test_what_a_dependency_is_compiled_with_reaches_nobody(tmp_path: Path) -> None:
    """What sshtunnel's source is warned of, in newer Pythons, is on nobody's screen, and ends no program."""
    import sshtunnel

    source = Path(sshtunnel.__file__).read_text(encoding="utf-8")
    (tmp_path / "sshtunnel.py").write_text(source + "\nassert 1 is 1\n", encoding="utf-8")  # a SyntaxWarning
    code = "import sys; sys.path.insert(0, sys.argv[1]); import sshtunnel"
    words = ["-B", "-W", "error", "-c"]
    bare = subprocess.run([sys.executable, *words, code, str(tmp_path)], capture_output=True, check=False)
    assert b"SyntaxError" in bare.stderr  # the control
    ours = code.replace("import sshtunnel", "import bokeh_ssh._forwarding.listener")
    done = subprocess.run([sys.executable, *words, ours, str(tmp_path)], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_import_is_cheap() -> None:
    """Importing bokeh_ssh, or making a record of it, loads neither paramiko nor sshtunnel nor asyncssh."""
    done = run(
        """
        import sys
        import bokeh_ssh
        bokeh_ssh.Host("example.org", "me")
        bokeh_ssh.BokehSSHError
        others = {"asyncssh", "bokeh", "cryptography", "paramiko", "rich", "sshtunnel", "typer"}
        assert not others & set(sys.modules), others & set(sys.modules)
        from bokeh_ssh import DirectTunnel
        assert "paramiko" in sys.modules, "the control"
        assert not {"asyncssh", "typer", "rich", "bokeh"} & set(sys.modules)
        """
    )
    assert done.returncode == 0, done.stderr


def test_logging_is_left_alone(embedded: Callable[..., Machine]) -> None:
    """The library configures no logging, catches no warnings, and prints nothing, whatever goes wrong."""
    machine = embedded()
    with Listener(fakes.saying(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as web, Listener(fakes.hang_up) as full:
        done = run(
            """
            import json, logging, sys, warnings
            show = warnings.showwarning
            from bokeh_ssh import BokehSSHError, LocalForward, RemoteForward
            host, user, ports, login = json.loads(sys.argv[1])
            for port in ports:
                try:
                    LocalForward(host, user, remote_port=1, **{**login, "port": port}).open()
                except BokehSSHError as exc:
                    pass
                else:
                    raise AssertionError(port)
            with LocalForward(host, user, remote_port=1, **login):
                RemoteForward(host, user, remote_port=0, **login).open().close()
            assert warnings.showwarning is show
            assert logging.getLogger().handlers == []
            names = [name for name in logging.Logger.manager.loggerDict if not name.startswith("concurrent")]
            found = [name for name in names if logging.getLogger(name).handlers]
            assert not found, found
            assert all(logging.getLogger(name).level == 0 for name in names if name.startswith("bokeh_ssh"))
            """,
            dumped([machine.host, machine.user, [web.port, full.port, 1], {**machine.login, "timeout": 5}]),
        )
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")


def test_broken_line_prints_nothing(tmp_path: Path) -> None:
    """A connection that turns to garbage is a typed error, and not a word on standard error."""
    with FakeSSH(tmp_path) as fake:
        machine = fake.machine
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                textwrap.dedent(
                    """
                    import json, sys
                    from bokeh_ssh import ConnectionLostError, LocalForward
                    host, user, login = json.loads(sys.argv[1])
                    with LocalForward(host, user, remote_port=7, reconnect=False, **login) as forward:
                        print("open", flush=True)
                        try:
                            forward.wait(30)
                        except ConnectionLostError:
                            print("lost", flush=True)
                    """
                ),
                dumped([machine.host, machine.user, machine.login]),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        )
        with process:
            assert process.stdout
            assert process.stdout.readline() == "open\n", process.communicate()[1]
            fake.session.sock.sendall(bytes(range(256)) * 400)
            out, err = process.communicate(timeout=30)
    assert (out, err) == ("lost\n", "")


def dumped(value: object) -> str:
    """Make JSON of it."""
    import json

    return json.dumps(value)


# What we know of paramiko's and sshtunnel's inside.


def private_names(module: str, cls: str) -> set[str]:
    """List the private names of its bases that a class of ours uses: all that are not its own."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    [node] = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == cls]
    used: set[str] = set()
    own: set[str] = set()
    for part in ast.walk(node):
        if not isinstance(part, ast.Attribute) or not part.attr.startswith("_"):
            continue
        holder = ast.unparse(part.value)
        if holder == "super()":
            used.add(part.attr)
        elif holder == "self":
            (own if isinstance(part.ctx, ast.Store) else used).add(part.attr)
    for part in node.body:
        if isinstance(part, (ast.FunctionDef, ast.ClassDef)):
            own.add(part.name)
    return {name for name in used - own if not name.endswith("__")}


def declared_names(module: str) -> set[str]:
    """List the names in the ``_Base`` that a module declares for the type checker."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    [node] = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == "_Base"]
    names: set[str] = set()
    for part in node.body:
        if isinstance(part, ast.FunctionDef):
            names.add(part.name)
        elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            names.add(part.target.id)
    return names


@pytest.fixture
def stock() -> Any:
    """A stock ``paramiko.Transport`` that is connected to nothing."""
    here, there = socket.socketpair()
    transport = paramiko.Transport(here)
    yield transport
    transport.close()
    here.close()
    there.close()


def test_paramiko_has_the_names_that_the_transport_uses(stock: paramiko.Transport) -> None:
    """Every private name of ``paramiko.Transport`` that we use or override is there in this version."""
    names = declared_names("_ssh/transport") | private_names("_ssh/transport", "Transport")
    names |= {"_channel_handler_table", "_handler_table", "run", "preferred_keys", "banner_timeout", "active"}
    assert len(names) > 12
    assert not {name for name in names if not hasattr(stock, name)}


def test_paramiko_calls_what_the_transport_overrides() -> None:
    """paramiko still calls each method that we override: one that it renamed would never be called."""
    source = inspect.getsource(paramiko.transport) + inspect.getsource(paramiko.kex_curve25519)
    for name in declared_names("_ssh/transport"):
        if callable(getattr(paramiko.Transport, name, None)):
            assert re.search(rf"(self|transport)\.{name}\b", source), name
    for cls, pattern in (
        (paramiko.transport, r"_channel_handler_table\[ptype\]\(chan, m\)"),
        (paramiko.transport, r"self\._channels\.get\(chanid\)"),
        (paramiko.transport, r"chan\._unlink\(\)"),
        (paramiko.transport, r"self\.packetizer\.readline\("),
        (paramiko.transport, r"self\.packetizer\.complete_handshake\(\)"),
    ):
        assert re.search(pattern, inspect.getsource(cls)), pattern


def test_paramiko_has_the_names_that_the_packetizer_uses(stock: paramiko.Transport) -> None:
    """Every private name of ``paramiko.packet.Packetizer`` that we use is there, mangled ones too."""
    names = declared_names("_ssh/packetizer")
    tree = ast.parse((PACKAGE / "_ssh" / "packetizer.py").read_text(encoding="utf-8"))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {f"_Packetizer{name}" for name in used if name.startswith("__") and not name.endswith("__")}
    assert len(names) > 15
    assert not {name for name in names if not hasattr(stock.packetizer, name)}
    for name in ("read_all", "readline", "read_message", "send_message", "write_all", "handshake_timed_out"):
        assert callable(getattr(Packetizer, name))


def test_paramiko_has_the_names_that_the_login_uses(stock: paramiko.Transport) -> None:
    """Every private name of ``AuthHandler`` that we use or override is there."""
    handler = AuthHandler(stock)
    names = private_names("_ssh/auth/userauth", "UserAuth") | {
        "_client_handler_table",
        "_parse_userauth_success",
        "abort",
    }
    assert not {name for name in names if not hasattr(handler, name)}
    assert hasattr(stock, "_send_user_message")
    assert hasattr(stock, "preferred_pubkeys")
    assert hasattr(stock, "server_extensions")


def test_sshtunnel_has_the_names_that_the_forwarder_overrides() -> None:
    """Every name of ``SSHTunnelForwarder`` that our subclass overrides is there and is called."""
    tree = ast.parse((PACKAGE / "_forwarding" / "listener.py").read_text(encoding="utf-8"))
    [node] = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == "Forwarder"]
    ours = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
    ours |= {
        t.id for n in node.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)
    }
    assert "_make_ssh_forward_server_class" in ours
    missing = {name for name in ours if not hasattr(sshtunnel.SSHTunnelForwarder, name)}
    assert not missing
    source = inspect.getsource(sshtunnel.SSHTunnelForwarder)
    for name in ours - {"__init__", "__str__", "__repr__", "__del__", "_stop_transport"}:
        assert re.search(rf"(self|cls|SSHTunnelForwarder)\.{name}\b", source), name
    for name in private_names("_forwarding/listener", "Forwarder"):
        assert re.search(rf"self\.{name}\b", source), name


# Errors.


def some_errors() -> list[BokehSSHError]:
    """Make one error of each class, with all its attributes."""
    made = []
    for name in bokeh_ssh.__all__:
        cls = getattr(bokeh_ssh, name)
        if inspect.isclass(cls) and issubclass(cls, BokehSSHError):
            fields = [
                p for p in inspect.signature(cls.__init__).parameters.values() if p.kind == p.KEYWORD_ONLY
            ]
            values = {field.name: field.default for field in fields} | {"host": "example.org", "hint": "wait"}
            if "log" in values:
                values["log"] = ("last words",)
            made.append(cls("it failed", **values))
    return made


@pytest.mark.parametrize("error", some_errors(), ids=lambda error: type(error).__name__)
def test_errors_can_be_sent_to_another_process(error: BokehSSHError) -> None:
    """An error survives pickle and copy with all its attributes, and says host, message and hint."""
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(other) is type(error)
        assert vars(other) == vars(error)
        assert str(other) == str(error)
    assert str(error).startswith("example.org: it failed; wait")
    assert error.stage


def test_host_is_plain_data_without_secrets_in_its_repr() -> None:
    """A Host survives a copy, and a pickle if nothing secret is in it; no repr
    of it, or of what is made of it, holds a secret."""
    inner = Host("door", "me", password=SECRET, passphrase=SECRET)
    host = Host("example.org", "me", password=SECRET, passphrase=SECRET, jump=[inner], timeout=3)
    for other in (copy.copy(host), copy.deepcopy(host)):
        assert other == host
        assert other.password == SECRET
    for secret in (host, Host("example.org", jump=[inner])):
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(secret)
    things = [host, [host], LocalForward(host, remote_port=1), RemoteForward(host), DirectTunnel(host)]
    things += [GatewayTunnel(inner, host=host)]
    for thing in things:
        assert SECRET not in repr(thing) + str(thing)


def provoked(name: str, fake: Any, tmp_path: Path) -> None:
    """Cause one failure through the public API."""
    login: dict[str, Any] = {"ssh_config": None, "allow_agent": False, "look_for_keys": False, "timeout": 2}
    machine: Machine = fake
    if name == "no such host":
        LocalForward("no-such-host.invalid", "me", remote_port=1, **login).open()
    elif name == "label too long":
        LocalForward("a" * 70, "me", remote_port=1, **login).open()
    elif name == "closed port":
        with socket.create_server(("127.0.0.1", 0)) as gone:
            port = gone.getsockname()[1]
        LocalForward("127.0.0.1", "me", port=port, remote_port=1, **login).open()
    elif name == "silence":
        with Listener(fakes.stay) as silent:
            LocalForward(
                "127.0.0.1", "me", port=silent.port, remote_port=1, **{**login, "timeout": 0.5}
            ).open()
    elif name == "not SSH":
        with Listener(fakes.saying(b"HTTP/1.1 200 OK\r\n\r\n")) as web:
            LocalForward("127.0.0.1", "me", port=web.port, remote_port=1, **login).open()
    elif name == "unknown key":
        empty = str(tmp_path / "empty")
        LocalForward(machine.host, "me", remote_port=1, **{**machine.login, "known_hosts": empty}).open()
    elif name == "wrong key":
        key = Key.generate().write(tmp_path / "other")
        LocalForward(machine.host, "me", remote_port=1, **{**machine.login, "key_filename": str(key)}).open()
    elif name == "no key file":
        missing = str(tmp_path / "no-such-key")
        LocalForward(machine.host, "me", remote_port=1, **{**machine.login, "key_filename": missing}).open()
    elif name == "bad key file":
        (tmp_path / "bad").write_bytes(b"\xff\x00 not a key")
        settings = {**machine.login, "key_filename": str(tmp_path / "bad")}
        LocalForward(machine.host, "me", remote_port=1, **settings).open()
    elif name == "bad known_hosts":
        (tmp_path / "hosts").write_bytes(b"\xff\xfe|1|x\n@revoked\n\x00\n")
        settings = {**machine.login, "known_hosts": str(tmp_path / "hosts")}
        LocalForward(machine.host, "me", remote_port=1, **settings).open()
    elif name == "known_hosts is a directory":
        LocalForward(
            machine.host, "me", remote_port=1, **{**machine.login, "known_hosts": str(tmp_path)}
        ).open()
    elif name == "no config":
        LocalForward("x", "me", remote_port=1, ssh_config=str(tmp_path / "no-such-config")).open()
    elif name == "bad config":
        (tmp_path / "config").write_bytes(b"Host *\n  Port many\n")
        LocalForward("x", "me", remote_port=1, ssh_config=str(tmp_path / "config")).open()
    elif name == "taken port":
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            LocalForward(machine.host, "me", remote_port=1, local_port=port, **machine.login).open()
    elif name == "not our address":
        LocalForward(machine.host, "me", remote_port=1, bind_address="192.0.2.1", **machine.login).open()
    elif name == "bad bind address":
        LocalForward(
            machine.host, "me", remote_port=1, bind_address="no-such-host.invalid", **machine.login
        ).open()
    elif name == "forbidden":
        RemoteForward(machine.host, "me", remote_port=0, **machine.login).open()
    elif name == "unknown target":
        settings = {"local_host": "no-such-host.invalid", **machine.login}
        RemoteForward(machine.host, "me", remote_port=0, **settings).open()
    elif name == "closed":
        LocalForward("x", "me", remote_port=1).local_port  # noqa: B018
    elif name == "hostile name":
        LocalForward("-oProxyCommand=touch /tmp/x", "me", remote_port=1)
    elif name == "bad text":
        LocalForward("a\udcffb", "me", remote_port=1, **login).open()
    elif name == "bad user":
        LocalForward(machine.host, "\udcff", remote_port=1, **machine.login).open()


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("no such host", ResolveError),
        ("label too long", ResolveError),
        ("closed port", RefusedError),
        ("silence", ConnectTimeoutError),
        ("not SSH", ProtocolError),
        ("unknown key", UnknownHostKeyError),
        ("wrong key", AuthenticationError),
        ("no key file", BokehSSHError),
        ("bad key file", BokehSSHError),
        ("bad known_hosts", BokehSSHError),
        ("known_hosts is a directory", BokehSSHError),
        ("no config", ConfigError),
        ("bad config", ConfigError),
        ("taken port", PortInUseError),
        ("not our address", BokehSSHError),
        ("bad bind address", BokehSSHError),
        ("forbidden", ForwardingRefusedError),
        ("unknown target", ResolveError),
        ("closed", TunnelClosedError),
        ("hostile name", UsageError),
        ("bad text", BokehSSHError),
        ("bad user", BokehSSHError),
    ],
)
def test_no_foreign_error_leaks(
    name: str, error: type[BokehSSHError], embedded: Callable[..., Machine], tmp_path: Path, no_leaks: Any
) -> None:
    """Whatever goes wrong is one of our errors, says what to do next, and leaves nothing open."""
    from beds import Knobs

    machine = embedded(Knobs(remote_forward=False), user="me")
    machine.user = "me"
    with no_leaks():
        with pytest.raises(error) as caught:
            provoked(name, machine, tmp_path)
        assert type(caught.value).__module__ in ("bokeh_ssh", "bokeh_ssh._core.errors")
        assert "paramiko" not in str(caught.value)
        assert "Errno" not in str(caught.value)
        assert caught.value.hint or isinstance(caught.value, ProtocolError)
        str(caught.value).encode()  # can be printed
        caught.value.__traceback__ = None


# Where POSIX ends.

_ELSEWHERE = """
    import json, os, signal, socket, sys
    import getpass, paramiko, sshtunnel

    # They ask which system this is; from here on it is ours that must do without.
    for name in ("fcntl", "pwd", "grp", "termios", "tty", "resource", "readline", "posix_spawn", "crypt"):
        sys.modules[name] = None
    for name in (
        "chown fchmod fchown fork forkpty get_blocking getegid geteuid getgid getgroups getlogin "
        "getpgid getuid "
        "killpg mkfifo register_at_fork set_blocking setpgid setsid uname wait4 waitpid "
        "O_CLOEXEC O_NOFOLLOW O_NONBLOCK WNOHANG"
    ).split():
        if hasattr(os, name):
            delattr(os, name)
    for name in dir(signal):
        if name.startswith("SIG") and name not in ("SIGINT", "SIG_DFL", "SIG_IGN", "Signals"):
            delattr(signal, name)
    for name in ("AF_UNIX", "SO_REUSEPORT", "TCP_KEEPIDLE", "TCP_USER_TIMEOUT", "SO_PEERCRED", "MSG_NOSIGNAL",
                 "MSG_DONTWAIT", "sendfile", "send_fds", "recv_fds", "CMSG_LEN"):
        if hasattr(socket, name):
            delattr(socket, name)

    def pair():  # as Windows has it
        with socket.create_server(("127.0.0.1", 0)) as listener:
            one = socket.create_connection(listener.getsockname())
            two, _ = listener.accept()
            return one, two

    socket.socketpair = pair

    import selectors
    selectors.DefaultSelector = selectors.SelectSelector

    import bokeh_ssh._tunnels.direct, bokeh_ssh._tunnels.gateway  # tells what is missing
    from bokeh_ssh import LocalForward, RemoteForward, DirectTunnel, GatewayTunnel

    host, user, port, login = json.loads(sys.argv[1])
    login["allow_agent"] = True
    with LocalForward(host, user, remote_port=port, remote_host="127.0.0.1", **login) as forward:
        with socket.create_connection(("127.0.0.1", forward.local_port), timeout=20) as sock:
            sock.sendall(b"echo\\n" + bytes(300000))
            sock.shutdown(socket.SHUT_WR)
            count = 0
            while data := sock.recv(65536):
                count += len(data)
            assert count == 300000, count
        with RemoteForward(host, user, remote_port=0, local_port=forward.local_port, **login) as back:
            print(back.remote_port, flush=True)
            sys.stdin.readline()
    DirectTunnel(host, user)
    GatewayTunnel(host, user)
    print("done", flush=True)
"""


def test_client_needs_nothing_of_posix(embedded: Callable[..., Machine]) -> None:
    """With the POSIX-only names taken away, the client imports, logs in and forwards both ways."""
    import threading

    import conformance

    machine = embedded()
    with conformance.listen() as listener:
        threading.Thread(target=conformance.serve, args=(listener,), daemon=True).start()
        words = dumped([machine.host, machine.user, listener.getsockname()[1], machine.login])
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(_ELSEWHERE), words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        )
        with process:
            assert process.stdout
            port = process.stdout.readline()
            if port:
                conformance.CHECKS["echo"](("127.0.0.1", int(port)))
            out, err = process.communicate("\n", timeout=30)
        listener.shutdown(socket.SHUT_RDWR)
    assert (out, err) == ("done\n", ""), err
    assert process.returncode == 0


# Arguments.

OPENED = (DirectTunnel, GatewayTunnel, LocalForward, RemoteForward)


@pytest.mark.parametrize("cls", OPENED)
def test_every_argument_is_shown_and_described(cls: type) -> None:
    """``help()`` and editors have each argument with its default, also a login's; each is described once."""
    found = inspect.signature(cls).parameters
    assert not {each.kind for each in found.values()} & {inspect.Parameter.VAR_KEYWORD}
    assert found["reconnect"].default is True
    login = {name: each for name, each in inspect.signature(Host).parameters.items() if name != "name"}
    assert {name: found[name].default for name in login} == {n: each.default for n, each in login.items()}

    def described(thing: type) -> list[str]:
        return re.findall(r":param (\w+):", thing.__doc__ or "")

    own = described(cls)
    assert len(set(own)) == len(own)
    others = {*described(Host), *(described(DirectTunnel) if cls is GatewayTunnel else ())}
    assert set(own) <= set(found)
    assert set(found) <= {*own, *others}
    assert "bokeh_ssh" in str(inspect.get_annotations(cls.__init__)["on_event"])  # can be looked up


@pytest.mark.parametrize("cls", [*OPENED, Host])
def test_wrong_arguments_are_told_as_python_does(cls: type) -> None:
    """A wrong keyword, or one too few, is a TypeError that names it and the class."""
    first, *_ = inspect.signature(cls).parameters
    with pytest.raises(TypeError, match=rf"^{cls.__name__}\.__init__\(\) got .* 'pasword'"):
        cls("host.invalid", pasword="x")
    with pytest.raises(TypeError, match=rf"^{cls.__name__}\.__init__\(\) missing .* '{first}'"):
        cls()


def test_a_host_takes_no_login_beside_it() -> None:
    """A Host comes with its own login: a keyword beside it is refused, also where it is the default."""
    with pytest.raises(UsageError, match="its own user and login keywords"):
        DirectTunnel(Host("host.invalid", host_keys="accept-new"), host_keys="strict")
