"""A Kerberos realm: a KDC in a temporary directory, on loopback; nothing of this machine's is changed.

Its programs are the system's, or those below ``KRB5_ROOT``, where packages were unpacked.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from beds import free_port, until
from skips import missing

NAME = "EXAMPLE.TEST"
PASSWORD = "of a principal"
_ROOT = Path(os.environ["KRB5_ROOT"]) if "KRB5_ROOT" in os.environ else None

_CONFIG = """
[libdefaults]
 default_realm = {name}
 dns_lookup_kdc = false
 dns_lookup_realm = false
 dns_canonicalize_hostname = false
 rdns = false
[realms]
 {name} = {{
  kdc = 127.0.0.1:{port}
 }}
[domain_realm]
 localhost = {name}
 .example.test = {name}
"""

_KDC = """
[kdcdefaults]
 kdc_listen = 127.0.0.1:{port}
 kdc_tcp_listen = 127.0.0.1:{port}
[realms]
 {name} = {{
  database_name = {place}/principal
  key_stash_file = {place}/stash
  acl_file = {place}/acl
 }}
[dbmodules]
 {modules}
[logging]
 kdc = FILE:{place}/kdc.log
"""


class Realm:
    """The realm ``EXAMPLE.TEST``.

    :param place: its folder
    :ivar config: its ``krb5.conf``
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.port = free_port()
        self.config = self.write_config(self.port)
        libraries = [str(path) for path in _ROOT.glob("usr/lib/*-linux-gnu")] if _ROOT else []
        modules = next((f"db_module_dir = {path}/krb5/plugins/kdb" for path in libraries), "")
        (place / "kdc.conf").write_text(
            _KDC.format(name=NAME, port=self.port, place=place, modules=modules), encoding="ascii"
        )
        self._env = {
            **os.environ,
            "KRB5_CONFIG": str(self.config),
            "KRB5_KDC_PROFILE": str(place / "kdc.conf"),
        } | ({"LD_LIBRARY_PATH": ":".join(libraries)} if libraries else {})
        self.run("kdb5_util", "create", "-s", "-P", "master")

    def write_config(self, port: int) -> Path:
        """Write a ``krb5.conf`` whose KDC is at ``port``."""
        path = self.place / f"krb5-{port}.conf"
        path.write_text(_CONFIG.format(name=NAME, port=port), encoding="ascii")
        return path

    @property
    def log(self) -> str:
        """What the KDC has written."""
        return (self.place / "kdc.log").read_text(encoding="utf-8")

    def run(self, program: str, *words: str, said: str = "", cache: Path | None = None) -> str:
        """Run a program of Kerberos in the realm; return what it writes."""
        env = self._env | ({"KRB5CCNAME": f"FILE:{cache}"} if cache else {})
        command = [_find(program), *words]
        done = subprocess.run(command, input=said, env=env, text=True, capture_output=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def add(self, principal: str, *, keytab: Path | None = None) -> None:
        """Add a person, or, with a keytab that gets its key, a service."""
        kind = ["-randkey"] if keytab else ["-pw", PASSWORD]
        self.run("kadmin.local", "addprinc", *kind, principal)
        if keytab:
            self.run("kadmin.local", "ktadd", "-k", str(keytab), principal)

    def kinit(self, principal: str, cache: Path, *flags: str) -> None:
        """Get a ticket, as a person does."""
        self.run("kinit", *flags, principal, said=f"{PASSWORD}\n", cache=cache)

    @contextmanager
    def served(self) -> Iterator[None]:
        """Run the KDC."""
        with subprocess.Popen([_find("krb5kdc"), "-n"], env=self._env, stderr=subprocess.DEVNULL) as kdc:
            try:
                until(lambda: _answers(self.port), what="the KDC to listen")
                yield
            finally:
                kdc.terminate()


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _find(program: str) -> str:
    folders = [*os.environ["PATH"].split(os.pathsep), f"{_ROOT or ''}/usr/bin", f"{_ROOT or ''}/usr/sbin"]
    found = shutil.which(program, path=os.pathsep.join(folders))
    if not found:
        missing(f"{program} of MIT Kerberos is not installed")
    assert found
    return found


@contextmanager
def realm() -> Iterator[Realm]:
    """Make a realm, and run its KDC."""
    with tempfile.TemporaryDirectory(prefix="realm-") as place:
        made = Realm(Path(place))
        with made.served():
            yield made
