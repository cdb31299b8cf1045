"""Containers as machines: one image with sshd and Bokeh, single machines, and the three gateway shapes.

Everything made here carries a label with this process's id, is removed at the end, and, where a killed run
left it behind, by the next run. Ports are published on 127.0.0.1 only.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import importlib.util
import io
import ipaddress
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker
import docker.errors

import light_bokeh
from beds import PASSWORD, Key, Knobs, Machine, Result, has_banner, until

CONTEXT = Path(__file__).parent / "image"
LABEL = "bokeh_ssh.tests"
PYTHON = "/opt/bokeh/bin/python"
ALICE = 1000  # the first account that Debian makes


@dataclass
class Silence:
    """A network that drops packets.

    :ivar dropped: how many, once it is over: proof that it was felt
    """

    dropped: int = 0


@dataclass(kw_only=True, eq=False)
class Container(Machine):
    """A machine in a container; ``server`` is the docker SDK's object (pause, kill, ...)."""

    def execute(
        self, command: str | Sequence[str], *, user: str | None = None, data: bytes = b"", timeout: float = 30
    ) -> Result:
        """Run a command in the container, as root unless ``user`` says otherwise; it gets no input."""
        assert not data, "use write() first"
        words = ["sh", "-c", command] if isinstance(command, str) else list(command)
        limited = ["timeout", str(timeout), *words]
        if entering := self._entering:
            status, *streams = _run(*entering(limited, user or "root"))
        else:
            status, streams = self.server.exec_run(limited, user=user or "root", demux=True)
        out, err = ((stream or b"").decode(errors="replace") for stream in streams)
        assert status != 124, f"{words} took longer than {timeout} s"
        return Result(status, out, err)

    @functools.cached_property
    def _entering(self) -> Callable[[Sequence[str], str], tuple[list[str], dict[str, str]]] | None:
        """Says how a user's command is run in there without the engine, which takes ten times as long.

        None where that cannot be: the engine is elsewhere, or we are not this machine's root.
        """
        nsenter, init = shutil.which("nsenter"), Path("/proc", str(self.server.attrs["State"]["Pid"]))
        try:
            if not nsenter or (init / "ns/user").readlink() != Path("/proc/self/ns/user").readlink():
                return None
            accounts = (init / "root/etc/passwd").read_text(encoding="utf-8").splitlines()
        except OSError:
            return None
        known = {fields[0]: fields for fields in (line.split(":") for line in accounts)}
        given = dict(pair.partition("=")[::2] for pair in self.server.attrs["Config"]["Env"])
        there = {**given, "HOSTNAME": self.server.attrs["Config"]["Hostname"]}
        enter = [nsenter, "-t", init.name, *("-m", "-u", "-i", "-n", "-p")]

        def words(command: Sequence[str], user: str) -> tuple[list[str], dict[str, str]]:
            _, _, uid, gid, _, home, _ = known[user]
            return [*enter, "-S", uid, "-G", gid, "--", *command], {**there, "HOME": home}

        return words

    @contextmanager
    def _detached(self, line: str, user: str | None) -> Iterator[None]:
        if entering := self._entering:
            words, env = entering(["sh", "-c", line], user or "root")
            null = subprocess.DEVNULL
            process = subprocess.Popen(
                words, env=env, stdin=null, stdout=null, stderr=null, start_new_session=True
            )
            with process:
                try:
                    yield
                finally:  # what it has run was ended
                    process.kill()
            return
        api = self.server.client.api
        made = api.exec_create(self.server.id, ["sh", "-c", line], user=user or "root")
        api.exec_start(made["Id"], detach=True)
        yield

    def write(self, path: str, text: str, *, user: str = "alice") -> None:
        """Write a file in the container; it belongs to ``user``."""
        uid, gid = map(int, str(self.execute(f"id -u {user}; id -g {user}")).split())
        info = tarfile.TarInfo(path.lstrip("/"))
        content = text.encode()
        info.size, info.mode, info.uid, info.gid = len(content), 0o644, uid, gid
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            tar.addfile(info, io.BytesIO(content))
        self.server.put_archive("/", buffer.getvalue())

    @contextmanager
    def silent(self) -> Iterator[Silence]:
        """Drop every packet to and from its sshd while the context lasts, as a broken network does."""
        self._iptables("-I", "INPUT", "-p", "tcp", "--dport", "22", "-j", "DROP")
        self._iptables("-I", "OUTPUT", "-p", "tcp", "--sport", "22", "-j", "DROP")
        silence = Silence()
        try:
            yield silence
        finally:
            table = self._iptables("-L", "INPUT", "1", "-v", "-x", "-n")
            silence.dropped = int(table.split()[0])
            self._iptables("-D", "INPUT", "1")
            self._iptables("-D", "OUTPUT", "1")

    def _iptables(self, *words: str) -> str:
        done = self.execute(["iptables", "-w", *words])
        assert done.status == 0, done.stderr
        return done.stdout

    def set_shell(self, shell: str, *, user: str = "alice") -> None:
        """Give a user another login shell, such as ``/bin/csh``."""
        self.execute(["usermod", "-s", shell, user])

    @property
    def log(self) -> str:
        """What its sshd has said."""
        said: bytes = self.server.logs()
        return said.decode(errors="replace")


def _run(words: Sequence[str], env: Mapping[str, str]) -> tuple[int, bytes, bytes]:
    """Run a command to its end, not to that of what it has left behind."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        done = subprocess.run(
            words,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
            check=False,
        )
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
        return done.returncode, texts[0], texts[1]


@dataclass(frozen=True)
class Bed:
    """A gateway and, behind it, the machine where Bokeh runs.

    :param shape: "A", "B" or "C", as in the README
    """

    shape: str
    gateway: Container
    bokehhost: Container


@dataclass
class Docker:
    """A docker engine and the image.

    :param key: may log in to every machine made
    :param directory: for the machines' key and known_hosts files
    """

    client: Any
    key: Key = field(default_factory=Key.generate)
    directory: Path = field(default_factory=lambda: Path(tempfile.gettempdir()))
    image: str = ""
    run: str = field(default_factory=lambda: uuid.uuid4().hex[:8])

    @property
    def labels(self) -> dict[str, str]:
        return {LABEL: f"{os.getpid()}@{platform.node()}"}

    def prepare(self) -> None:
        """Remove what killed runs left; build the image unless it is there."""
        with _alone():
            self._sweep()
            self._build()

    def _build(self) -> None:
        arch = {"amd64": "x86_64", "arm64": "aarch64"}.get(found := self.client.info()["Architecture"], found)
        digest = hashlib.sha256(arch.encode())
        for path in sorted(CONTEXT.iterdir()):
            digest.update(path.name.encode() + path.read_bytes())
        self.image = f"bokeh-ssh-tests:{digest.hexdigest()[:12]}"
        with suppress(docker.errors.ImageNotFound):
            self.client.images.get(self.image)
            return
        with tempfile.TemporaryDirectory() as context:
            shutil.copytree(CONTEXT, context, dirs_exist_ok=True)
            shutil.copytree(download_wheels(arch), Path(context, "wheels"))
            try:
                self.client.images.build(path=context, tag=self.image, rm=True)
            except docker.errors.BuildError as exc:
                log = "".join(part.get("stream", "") for part in exc.build_log)
                raise AssertionError(f"the image was not built: {exc}\n{log[-3000:]}") from exc

    def _sweep(self) -> None:
        filters = {"label": LABEL}
        old = [
            *self.client.containers.list(all=True, filters=filters, ignore_removed=True),
            *self.client.networks.list(filters=filters),
        ]
        for thing in old:
            labels = thing.labels if hasattr(thing, "labels") else thing.attrs["Labels"]
            pid, _, node = labels[LABEL].partition("@")
            if node == platform.node() and not _alive(int(pid)):
                with suppress(docker.errors.APIError):
                    thing.remove(**({"force": True} if hasattr(thing, "image") else {}))

    @contextmanager
    def network(self, name: str, *, internal: bool) -> Iterator[Any]:
        """Make a network of its own; an internal one leads nowhere else."""
        made = self.client.networks.create(
            f"bokeh-ssh-tests-{self.run}-{name}-{uuid.uuid4().hex[:4]}", internal=internal, labels=self.labels
        )
        try:
            made.reload()
            yield made
        finally:
            made.remove()

    @contextmanager
    def machine(
        self,
        knobs: Knobs = Knobs(),  # noqa: B008 - frozen
        *,
        directives: Mapping[str, str] | None = None,
        name: str = "machine",
        networks: Sequence[Any] = (),
        published: bool = True,
        package: bool = True,
        firewall: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        tmpfs: Mapping[str, str] | None = None,
    ) -> Iterator[Container]:
        """Run one container with sshd.

        :param directives: sshd_config keywords that override those of ``knobs``
        :param networks: joined under ``name``; none is docker's default bridge. The first publishes the port
        :param published: whether it can be reached from here
        :param package: whether bokeh_ssh is installed there
        :param firewall: iptables arguments, one rule each
        :param tmpfs: directories that are file systems of their own, each with its mount options
        """
        host_key = Key.generate()
        config = {"HostKey": "/etc/ssh/host_key", **knobs.directives(), **(directives or {})}
        environment = {
            "HOST_KEY": host_key.private,
            "AUTHORIZED_KEYS": self.key.public,
            "PASSWORD": PASSWORD,
            "SSHD_CONFIG": "\n".join(f"{key} {value}" for key, value in config.items()),
            "FIREWALL": "\n".join(firewall),
        }
        container = self.client.containers.create(
            self.image,
            name=f"bokeh-ssh-tests-{self.run}-{name}-{uuid.uuid4().hex[:4]}",
            hostname=name,
            labels=self.labels,
            environment=environment | dict(env or {}),
            init=True,
            tmpfs=dict(tmpfs or {}),
            cap_add=["NET_ADMIN"],  # for its firewall, and for Container.silent()
            ports={"22/tcp": ("127.0.0.1", None)} if published else {},
            **self._first_network(networks, name),
        )
        try:
            for network in networks[1:]:
                network.connect(container, aliases=[name])
            container.put_archive("/", _light())
            if package:
                container.put_archive("/opt/src", _package())
            container.start()
            yield self._started(container, host_key, name, published)
        finally:
            container.remove(force=True, v=True)

    def _first_network(self, networks: Sequence[Any], name: str) -> dict[str, Any]:
        if not networks:
            return {}
        endpoint = self.client.api.create_endpoint_config(aliases=[name])
        return {"network": networks[0].name, "networking_config": {networks[0].name: endpoint}}

    def _started(self, container: Any, host_key: Key, name: str, published: bool) -> Container:
        place = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.directory))
        machine = Container(
            kind="docker",
            host="127.0.0.1",
            port=0,
            user="alice",
            key_path=self.key.write(place / "key"),
            known_hosts=place / "known_hosts",
            python=PYTHON,
            inside=name,
            server=container,
        )

        def ready() -> bool:
            container.reload()
            assert container.status in ("created", "running"), f"{name} ended: {machine.log}"
            if not container.attrs["State"]["Pid"]:
                return False
            if not published:
                return ("0.0.0.0", 22) in machine.listening()
            bindings = container.ports.get("22/tcp")
            machine.port = int(bindings[0]["HostPort"]) if bindings else 0
            return bool(bindings) and has_banner("127.0.0.1", machine.port)

        until(ready, what=f"the sshd of {name}")
        names = f"[127.0.0.1]:{machine.port},[localhost]:{machine.port},{name}"
        machine.known_hosts.write_text(f"{names} {host_key.public}\n", encoding="ascii")
        return machine

    @contextmanager
    def bed(
        self,
        shape: str,
        *,
        gateway: Knobs = Knobs(),  # noqa: B008 - frozen
        bokehhost: Knobs = Knobs(),  # noqa: B008 - frozen
        directives: Mapping[str, str] | None = None,
        package: bool = True,
        own_key: bool = True,
    ) -> Iterator[Bed]:
        """Build one of the three shapes.

        From here, the gateway can always be reached. The Bokeh host ("bokehhost" to the gateway, which is
        "gateway" to it) sits on an internal network and

        - A: lets nobody in, and reaches the gateway
        - B: as A, but from here it can be reached by a second way that the gateway does not have
        - C: can be reached from the gateway only

        :param gateway: what the gateway's sshd allows; ``directives`` are more sshd_config for it
        :param bokehhost: what the Bokeh host's sshd allows
        :param package: whether bokeh_ssh is installed on the Bokeh host (it never is on the gateway)
        :param own_key: whether alice has a key on the Bokeh host that logs in to the gateway
        """
        with ExitStack() as stack:
            inner = stack.enter_context(self.network("inner", internal=True))
            subnet = inner.attrs["IPAM"]["Config"][0]["Subnet"]
            here = str(next(ipaddress.ip_network(subnet).hosts()))
            networks = [inner]
            rules = ["-A INPUT -i lo -j ACCEPT", f"-A INPUT -d {subnet} -p tcp --syn -j DROP"]
            if shape == "B":
                networks.insert(0, stack.enter_context(self.network("side", internal=False)))
            elif shape == "C":
                rules[1] = f"-A INPUT -s {here} -p tcp --syn -j DROP"  # docker's host is on every network
            outer = stack.enter_context(self.network("outer", internal=False))
            door = stack.enter_context(
                self.machine(
                    gateway, directives=directives, name="gateway", networks=[outer, inner], package=False
                )
            )
            env = {}
            if own_key:
                env = {
                    "USER_KEY": self.key.private,
                    "KNOWN_HOSTS": door.known_hosts.read_text(encoding="ascii"),
                }
            room = stack.enter_context(
                self.machine(
                    bokehhost,
                    name="bokehhost",
                    networks=networks,
                    published=shape == "B",
                    package=package,
                    firewall=rules,
                    env=env,
                )
            )
            yield Bed(shape, door, room)


def connect() -> Docker | str:
    """Find a docker engine; give it, or why there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the SDK drops its socket where nothing answers
        try:
            client = docker.from_env(timeout=300)
            client.ping()
        except (docker.errors.DockerException, OSError) as exc:
            reason = f"no docker engine answers ({exc})"
        else:
            return Docker(client)
        gc.collect()
    return reason


def _cache() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "bokeh-ssh-tests")
    cache.mkdir(parents=True, exist_ok=True)
    return cache


@contextmanager
def _alone() -> Iterator[None]:
    """Let the processes of a run that tests in parallel prepare one after the other."""
    import fcntl  # where containers run, it is there

    with Path(_cache(), "lock").open("w", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def download_wheels(arch: str) -> Path:
    """Bring the image's wheels into the user's cache, once; pip in a container may have no way out."""
    requirements = CONTEXT / "requirements.txt"
    digest = hashlib.sha256(requirements.read_bytes() + arch.encode()).hexdigest()[:12]
    wheels = _cache() / f"wheels-{digest}"
    if wheels.is_dir():
        return wheels
    part = Path(tempfile.mkdtemp(dir=_cache()))
    tags = [f"manylinux_2_{minor}_{arch}" for minor in (5, 12, 17, 26, 27, 28)]
    tags += [f"manylinux{old}_{arch}" for old in ("1", "2010", "2014")]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += [
        "--implementation",
        "cp",
        "--python-version",
        "3.11",
        "-r",
        str(requirements),
        "-d",
        str(part),
    ]
    command += [word for tag in tags for word in ("--platform", tag)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"pip did not bring the image's wheels:\n{done.stderr[-3000:]}"
    part.replace(wheels)
    return wheels


@functools.cache
def _light() -> bytes:
    """Pack the stand-in for Bokeh, and the Python that has it."""
    with tempfile.TemporaryDirectory() as place:
        packages = Path(light_bokeh.path_with_it(Path(place)))
        python = packages / Path(light_bokeh.PYTHON).name
        there = Path(light_bokeh.PYTHON).parent
        python.write_text(f'#!/bin/sh\nPYTHONPATH={there} exec {PYTHON} "$@"\n', encoding="ascii")
        python.chmod(0o755)
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            tar.add(packages, there)
        return buffer.getvalue()


@functools.cache
def _package() -> bytes:
    """Pack the bokeh_ssh that is tested here; in folders of alice's, where Python keeps what it compiles."""
    spec = importlib.util.find_spec("bokeh_ssh")
    assert spec
    assert spec.submodule_search_locations
    (place,) = spec.submodule_search_locations
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path in (Path(place), *sorted(Path(place).rglob("*"))):
            if "__pycache__" in path.parts:
                continue
            info = tar.gettarinfo(path, Path("bokeh_ssh", path.relative_to(place)).as_posix())
            if path.is_dir():
                info.uid, info.gid, info.mode = ALICE, ALICE, 0o755
                tar.addfile(info)
                continue
            info.uid = info.gid = 0
            info.mode = 0o644
            with path.open("rb") as file:
                tar.addfile(info, file)
    return buffer.getvalue()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
