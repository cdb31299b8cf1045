"""The beds are what they say; driven by stock OpenSSH's ssh, so that no failure here is the package's."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from beds import Knobs, Machine, free_port, parse_listeners, until

Maker = Callable[..., Machine]
pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(not shutil.which("ssh"), reason="OpenSSH's ssh is not installed"),
]


def ssh(machine: Machine, *args: str, timeout: float = 20) -> subprocess.CompletedProcess[str]:
    """Run stock ssh to its end."""
    return subprocess.run(machine.ssh(*args), capture_output=True, text=True, timeout=timeout, check=False)


@contextmanager
def forwarding(machine: Machine, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """Keep stock ``ssh -N`` running with these flags; it has said that its forwards stand."""
    command = machine.ssh("-N", "-v", *flags, "")[:-1]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            said = []
            for line in process.stderr:
                said.append(line)
                if re.search("Entering interactive session|remote forward success", line) and (
                    "-R" not in flags or "remote forward success" in line
                ):
                    break
            else:
                raise AssertionError("".join(said))
            drain = threading.Thread(target=process.stderr.read)
            drain.start()
            yield process
        finally:
            process.kill()  # a TERM is missed now and then: OpenSSH 9.2 looks for it just before poll()
            process.wait(30)
            drain.join(30)


@contextmanager
def hello() -> Iterator[int]:
    """Serve "hello" over HTTP on loopback; gives the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "5")
            self.end_headers()
            self.wfile.write(b"hello")

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def get(port: int) -> bytes:
    """Fetch from a port of this machine."""
    with urlopen(f"http://127.0.0.1:{port}/", timeout=30) as answer:
        content: bytes = answer.read()
    return content


#: A web server for the other side: answers "there" on a free port of its loopback, which it prints.
THERE = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"there")
server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
print("port", server.server_address[1], flush=True)
server.serve_forever()
"""


@contextmanager
def there(machine: Machine, user: str | None = None) -> Iterator[int]:
    """Serve "there" on the machine's loopback; gives the port."""
    with machine.spawn([machine.python, "-c", THERE], user=user) as running:
        yield int(until(lambda: re.search(r"port (\d+)", running.log), what="the server there")[1])


def test_a_command_runs(machine: Machine) -> None:
    """Stock ssh logs in to either server and gets a command's output and status."""
    done = ssh(machine, "echo $USER; exit 7")
    assert (done.stdout.strip(), done.returncode) == (machine.user, 7), done.stderr


def test_the_host_key_is_checked(machine: Machine) -> None:
    """The known_hosts file is what lets ssh in: without it, the same login is refused."""
    machine_file = machine.known_hosts
    lines = machine_file.read_text()
    machine_file.write_text("")
    try:
        assert "Host key verification failed" in ssh(machine, "true").stderr
    finally:
        machine_file.write_text(lines)
    assert ssh(machine, "true").returncode == 0


def test_its_python_has_bokeh(machine: Machine) -> None:
    """The machine's interpreter runs Bokeh, through the login shell."""
    done = ssh(machine, f"{machine.python} -c 'import bokeh; print(bokeh.__version__)'")
    assert re.match(r"\d+\.\d+", done.stdout), done.stderr


def test_a_local_forward_reaches_its_loopback(machine: Machine) -> None:
    """``ssh -L`` leads to a server on the machine's own loopback."""
    port = free_port()
    with there(machine) as remote, forwarding(machine, "-L", f"127.0.0.1:{port}:127.0.0.1:{remote}"):
        assert get(port) == b"there"


def test_a_remote_forward_leads_here(machine: Machine) -> None:
    """``ssh -R`` opens a port on the machine's loopback that leads to a server here."""
    remote = free_port()
    fetch = [
        machine.python,
        "-c",
        f"from urllib.request import *; print(urlopen('http://127.0.0.1:{remote}').read())",
    ]
    with hello() as port, forwarding(machine, "-R", f"{remote}:127.0.0.1:{port}"):
        assert ("127.0.0.1", remote) in machine.listening()
        assert str(machine.execute(fetch)) == "b'hello'"
    until(lambda: ("127.0.0.1", remote) not in machine.listening(), what="the end of the remote forward")


@pytest.mark.parametrize(
    ("knobs", "flags"),
    [
        ({"remote_forward": False}, ["-R", "0:127.0.0.1:1"]),
        ({"permit_listen": ("localhost:1",)}, ["-R", "0:127.0.0.1:1"]),
    ],
)
def test_a_forbidden_remote_forward_is_refused(machine_with: Maker, knobs: Any, flags: list[str]) -> None:
    """Knobs mean the same to both servers: what they forbid, stock ssh is refused."""
    done = ssh(machine_with(**knobs), "-N", *flags, "")
    assert done.returncode != 0
    assert "remote port forwarding failed" in done.stderr


@pytest.mark.parametrize("knobs", [{"local_forward": False}, {"permit_open": ("127.0.0.1:1",)}])
def test_a_forbidden_local_forward_is_refused(machine_with: Maker, knobs: Any) -> None:
    """A target that is not permitted is refused as administratively prohibited (``ssh -W``)."""
    done = ssh(machine_with(**knobs), "-W", "127.0.0.1:22", "")
    assert "administratively prohibited" in done.stderr


def test_gateway_ports_open_every_address(machine_with: Maker) -> None:
    """With GatewayPorts yes, a remote forward for loopback is open to the network on both servers."""
    machine, remote = machine_with(gateway_ports="yes"), free_port()
    with hello() as port, forwarding(machine, "-R", f"localhost:{remote}:127.0.0.1:{port}"):
        assert ("0.0.0.0", remote) in machine.listening()


def test_two_factors(machine_with: Maker) -> None:
    """With two methods required, the key alone is a partial success on both servers."""
    machine = machine_with(interactive=True, require=("publickey", "keyboard-interactive"))
    done = ssh(machine, "-v", "true")
    assert "partial success" in done.stderr
    assert "Permission denied (keyboard-interactive)" in done.stderr


def test_a_machine_of_its_own_starts_fast(container: Maker) -> None:
    """A container for one test is there in a moment, and its processes and users are its own."""
    machine = container(Knobs(), directives={"Banner": "none", "AllowUsers": "mallory"})
    assert ssh(machine, "true").returncode == 255
    assert (
        subprocess.run(machine.ssh("true", user="mallory"), capture_output=True, check=False).returncode == 0
    )
    machine.set_shell("/bin/csh", user="mallory")  # type: ignore[attr-defined]
    done = subprocess.run(
        machine.ssh("echo $shell", user="mallory"), capture_output=True, text=True, check=False
    )
    assert done.stdout == "/bin/csh\n"
    assert str(machine.execute("id -un", user="alice")) == "alice"
    machine.write("/home/alice/app.py", "x = 1\n")  # type: ignore[attr-defined]
    assert str(machine.execute("cat /home/alice/app.py; stat -c %U /home/alice/app.py")) == "x = 1\nalice"


def test_a_real_sshd_on_this_machine(sshd: Maker) -> None:
    """sshd(...) runs a real sshd with one directive changed."""
    assert ssh(sshd(), "echo in").stdout == "in\n"
    assert (
        "administratively prohibited" in ssh(sshd(AllowTcpForwarding="no"), "-W", "127.0.0.1:22", "").stderr
    )


def test_spawned_commands_end_with_their_block(machine: Machine) -> None:
    """A spawned command can be found by its marker, and is gone after its block."""
    marker = "marker-7a1c"
    with machine.spawn(
        ["sh", "-c", f"trap '' TERM; echo up; while :; do sleep 0.1; done # {marker}"]
    ) as running:
        until(lambda: running.log == "up\n")
        assert running.running
        assert machine.pids(marker) == [running.pid]
        running.signal(9)
        until(lambda: not running.running, what="its end")
    assert machine.pids(marker) == []


def test_no_leaks_tells_what_is_left(no_leaks: Callable[..., AbstractContextManager[None]]) -> None:
    """The leak check passes a clean block and names a thread that stays."""
    with no_leaks():
        pass
    stop = threading.Event()
    with pytest.raises(AssertionError, match="straggler"), no_leaks(timeout=0.1):
        threading.Thread(target=stop.wait, name="straggler").start()
    stop.set()


def test_listeners_are_read_from_proc() -> None:
    """Addresses in /proc/net/tcp are little-endian words; only listeners count."""
    table = (
        "  sl  local_address rem_address   st tx_queue\n"
        "   0: 0100007F:138E 00000000:0000 0A 00000000:00000000\n"
        "   1: 0100007F:138F 0100007F:D431 01 00000000:00000000\n"
        "   0: 00000000000000000000000001000000:0016 00000000000000000000000000000000:0000 0A 0\n"
    )
    assert parse_listeners(table) == {("127.0.0.1", 5006), ("::1", 22)}


def reaches(machine: Machine, host: str, port: int = 22) -> bool:
    """Tell whether a machine gets an SSH greeting from another."""
    # Whether it is let in shows at once; for its greeting a server has to be started.
    look = "import socket, sys; sock = socket.create_connection((sys.argv[1], int(sys.argv[2])), 0.7); "
    look += "sock.settimeout(20); print(sock.recv(4))"
    python = machine.python
    return "SSH-" in machine.execute([python, "-c", look, host, str(port)]).stdout


def address(machine: Any, *, of: str = "inner") -> str:
    """Tell a container's address on one of its networks."""
    machine.server.reload()
    networks = machine.server.attrs["NetworkSettings"]["Networks"]
    return next(str(found["IPAddress"]) for name, found in networks.items() if of in name)


def reached_from_here(machine: Any) -> bool:
    """Tell whether this machine gets an SSH greeting from a container's own address."""
    import socket

    try:
        with socket.create_connection((address(machine), 22), 0.7) as sock:
            sock.settimeout(20)
            return sock.recv(4) == b"SSH-"
    except OSError:
        return False


def test_shape_a_lets_nobody_in(shape_a: Any) -> None:
    """A: the Bokeh host reaches the gateway; neither the gateway nor this machine reaches the Bokeh host."""
    assert reaches(shape_a.bokehhost, "gateway")
    assert ssh(shape_a.gateway, "echo in").stdout == "in\n"
    assert reaches(shape_a.bokehhost, "bokehhost")  # its sshd runs: it is the way in that is shut
    assert not reaches(shape_a.gateway, "bokehhost")
    assert not reached_from_here(shape_a.bokehhost)
    assert shape_a.bokehhost.port == 0


def test_shape_a_works_by_hand(shape_a: Any) -> None:
    """A, with stock ssh: ``ssh -R`` on the Bokeh host and ``ssh -L`` here lead to its server."""
    host, gateway = shape_a.bokehhost, shape_a.gateway
    remote, local = free_port(), free_port()
    with there(host, "alice") as port:
        words = ["ssh", "-N", "-o", "BatchMode=yes", "-R", f"{remote}:localhost:{port}", "gateway"]
        with host.spawn(words, user="alice") as running:
            until(
                lambda: ("127.0.0.1", remote) in gateway.listening(),
                what=f"the reverse forward: {running.log}",
            )
            with forwarding(gateway, "-L", f"127.0.0.1:{local}:localhost:{remote}"):
                assert get(local) == b"there"
        until(lambda: ("127.0.0.1", remote) not in gateway.listening(), what="the end of it")


def test_shape_b_has_a_second_way_from_here(shape_b: Any) -> None:
    """B: as A, but this machine logs in to the Bokeh host by a way that the gateway does not have."""
    assert ssh(shape_b.bokehhost, "hostname").stdout == "bokehhost\n"
    assert reaches(shape_b.bokehhost, "gateway")
    assert not reaches(shape_b.gateway, "bokehhost")
    assert not reaches(shape_b.gateway, address(shape_b.bokehhost, of="side"))
    assert not reached_from_here(shape_b.bokehhost)


def test_shape_c_leads_through_the_gateway(shape_c: Any) -> None:
    """C: the gateway reaches the Bokeh host; this machine does not, except through it."""
    assert reaches(shape_c.gateway, "bokehhost")
    assert not reached_from_here(shape_c.bokehhost)
    done = ssh(shape_c.gateway, "-W", "bokehhost:22", "")
    assert done.stdout.startswith("SSH-2.0-OpenSSH")


def test_the_bokeh_host_has_the_package(shape_a: Any) -> None:
    """On the Bokeh host bokeh_ssh can be run; on the gateway it is not there."""
    version = "import bokeh_ssh; print(bokeh_ssh.__version__)"
    assert shape_a.bokehhost.execute([shape_a.bokehhost.python, "-c", version], user="alice").status == 0
    assert shape_a.gateway.execute([shape_a.gateway.python, "-c", version]).status != 0


def test_an_unreachable_port_is_no_hello() -> None:
    """The control of the fetches above: where nothing serves, they fail."""
    with pytest.raises(URLError):
        get(free_port())
