"""Host keys: the same verdicts as ``ssh``, and known_hosts files that only ever grow."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import logging
import os
import re
import shlex
import shutil
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bokeh_ssh._core.errors import (
    AuthenticationError,
    ChangedHostKeyError,
    ConfigError,
    HostKeyError,
    RevokedHostKeyError,
    UnknownHostKeyError,
)
from bokeh_ssh._core.events import Event, HostKeyAdded, HostKeyVerified, Question
from bokeh_ssh._core.host import Host
from bokeh_ssh._ssh.auth import host_keys as host_keys_module
from bokeh_ssh._ssh.auth import revocation_list
from bokeh_ssh._ssh.connect import connect
from skips import missing

SSH, KEYGEN = shutil.which("ssh"), shutil.which("ssh-keygen")
SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
HOST = "host.example.org"


def blob(public: str) -> bytes:
    return base64.b64decode(public.split()[1])


def run(*command: str, **more: Any) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(command, capture_output=True, text=True, timeout=30, env=env, check=False, **more)


def keygen(*arguments: str) -> None:
    done = run(str(KEYGEN), "-q", *arguments)
    assert done.returncode == 0, done.stderr


@dataclass(repr=False)
class Keys:
    """Keys by name, made by ssh-keygen: the public lines, and where the private ones are."""

    folder: Path
    public: dict[str, str] = field(default_factory=dict)

    def make(self, name: str, kind: str, *bits: str) -> None:
        keygen("-t", kind, *bits, "-N", "", "-C", "", "-f", str(self.folder / name))
        self.read(name)

    def read(self, name: str) -> None:
        self.public[name] = " ".join((self.folder / f"{name}.pub").read_text().split()[:2])

    def certify(self, name: str, ca: str, key: str, *options: str) -> None:
        """Make a certificate of a copy of ``key``."""
        for end in ("", ".pub"):
            shutil.copy(self.folder / f"{key}{end}", self.folder / f"{name}.of{end}")
        host = [] if "-user" in options else ["-h"]
        rest = [option for option in options if option != "-user"]
        keygen("-s", str(self.folder / ca), *host, "-I", name, *rest, str(self.folder / f"{name}.of.pub"))
        (self.folder / f"{name}.of-cert.pub").rename(self.folder / f"{name}.pub")
        self.read(name)


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    if KEYGEN is None:
        missing("there is no ssh-keygen here")
    made = Keys(tmp_path_factory.mktemp("keys"))
    for name in ("ed", "ed2", "ca", "ca2"):
        made.make(name, "ed25519")
    made.make("ec", "ecdsa", "-b", "256")
    made.make("ec384", "ecdsa", "-b", "384")
    made.make("rsa", "rsa", "-b", "2048")
    named = ("-n", f"other,{HOST},alias")
    made.certify("cert", "ca", "ed", *named, "-z", "77")
    made.certify("cert-ec", "ec", "ed", *named)
    made.certify("cert-ec384", "ec384", "ec", *named)
    made.certify("cert-rsa", "rsa", "rsa", *named)
    made.certify("cert-sha1", "rsa", "ed", *named, "-t", "ssh-rsa")
    made.certify("cert-expired", "ca", "ed", *named, "-V", "20200101:20200102")
    made.certify("cert-early", "ca", "ed", *named, "-V", "20900101:20900102")
    made.certify("cert-other", "ca", "ed", "-n", "other")
    made.certify("cert-any", "ca", "ed")
    made.certify("cert-pattern", "ca", "ed", "-n", "*.example.org")
    made.certify("cert-critical", "ca", "ed", *named, "-O", "critical:new=1")
    made.certify("cert-user", "ca", "ed", *named, "-user")
    return made


@dataclass
class Sshd:
    """A real sshd for each connection, at the other end of a pipe: any name and port can be given to it."""

    keys: Keys
    folder: Path

    def connect(self, present: str, host: str, files: list[str], port: int, *options: str) -> tuple[str, str]:
        """Have ssh connect; its verdict, and whether it was shown "key" or "certificate"."""
        config = self.folder / f"{present}.conf"
        if not config.exists():
            private = self.keys.folder / present
            certificate = []
            if not private.exists():
                private = self.keys.folder / f"{present}.of"
                certificate = [f"HostCertificate {self.keys.folder / present}.pub"]
            lines = [f"HostKey {private}", *certificate, "UsePAM no", "LogLevel QUIET"]
            config.write_text("\n".join(lines) + "\n")
        server = shlex.join([str(SSHD), "-i", "-f", str(config)])
        given = {
            "ProxyCommand": server.replace("%", "%%"),
            "BatchMode": "yes",
            "StrictHostKeyChecking": "yes",
            "UserKnownHostsFile": files[0],
            "GlobalKnownHostsFile": " ".join(files[1:]) or "none",
            "PreferredAuthentications": "none",
            "KexAlgorithms": "curve25519-sha256",
        }
        words = [word for name, value in given.items() for word in ("-o", f"{name}={value}")]
        done = run(str(SSH), "-F", "none", "-v", *options, *words, "-p", str(port), host, "true")
        said = done.stderr
        shown = re.search("Server host (key|certificate):", said)
        assert shown, said
        if "Host key verification failed" not in said:
            assert "Permission denied" in said, said
            return "known", shown[1]
        revoked, changed = "REVOKED HOST KEY DETECTED" in said, "IDENTIFICATION HAS CHANGED" in said
        return "revoked" if revoked else "changed" if changed else "unknown", shown[1]


@pytest.fixture(scope="session")
def sshd(keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Sshd:
    if SSH is None or SSHD is None:
        missing("there is no OpenSSH server here")
    if os.getuid() == 0:  # where sshd locks itself in; systems without it make it at start
        Path("/run/sshd").mkdir(mode=0o755, parents=True, exist_ok=True)
    return Sshd(keys, tmp_path_factory.mktemp("sshd"))


def verify(key: bytes, files: list[str], *, name: str = HOST, port: int | None = 22, **more: Any) -> Any:
    given: dict[str, Any] = {
        "host": "me",
        "address": None,
        "policy": "strict",
        "ask": None,
        "writable": files[0],
    }
    told = host_keys_module.verify(key=key, name=name, port=port, files=files, **{**given, **more})
    assert isinstance(told[-1], HostKeyVerified)
    return told[0] if isinstance(told[0], HostKeyAdded) else None


def verdict(key: bytes, files: list[str], *, name: str = HOST, port: int | None = 22) -> str:
    try:
        assert verify(key, files, name=name, port=port) is None
    except RevokedHostKeyError:
        return "revoked"
    except ChangedHostKeyError:
        return "changed"
    except UnknownHostKeyError:
        return "unknown"
    return "known"


def hashed(name: str, salt: bytes = b"0123456789abcdefghij") -> str:
    digest = hmac.new(salt, name.encode(), hashlib.sha1).digest()
    return f"|1|{base64.b64encode(salt).decode()}|{base64.b64encode(digest).decode()}"


H = HOST
P = f"[{HOST}]:2222"
#: What is presented, the port, what the file says ({name} is a key), and what comes of it.
TABLE: dict[str, tuple[str, int, str, str]] = {
    "empty": ("ed", 22, "", "unknown"),
    "plain": ("ed", 22, f"{H} {{ed}}\n", "known"),
    "ecdsa": ("ec", 22, f"{H} {{ec}}\n", "known"),
    "ecdsa 384": ("ec384", 22, f"{H} {{ec384}}\n", "known"),
    "rsa": ("rsa", 22, f"{H} {{rsa}}\n", "known"),
    "rsa by signature": ("rsa", 22, f"{H} {{rsa_sha2}}\n", "known"),
    "no line end": ("ed", 22, f"{H} {{ed}}", "known"),
    "other host": ("ed", 22, "other {ed}\n", "unknown"),
    "list": ("ed", 22, f"other,{H},10.0.0.1 {{ed}}\n", "known"),
    "list of others": ("ed", 22, "other,10.0.0.1 {ed}\n", "unknown"),
    "list with blanks is none": ("ed", 22, f"other, {H} {{ed}}\n", "unknown"),
    "upper case": ("ed", 22, f"{H.upper()} {{ed}}\n", "known"),
    "star": ("ed", 22, "*.example.org {ed}\n", "known"),
    "star alone": ("ed", 22, "* {ed}\n", "known"),
    "stars": ("ed", 22, "*o*.ex*e.* {ed}\n", "known"),
    "star elsewhere": ("ed", 22, "*.example.com {ed}\n", "unknown"),
    "question mark": ("ed", 22, "h?st.example.org {ed}\n", "known"),
    "question mark is one": ("ed", 22, "h?ost.example.org {ed}\n", "unknown"),
    "negated": ("ed", 22, f"*.example.org,!{H} {{ed}}\n", "unknown"),
    "negated first": ("ed", 22, f"!{H},*.example.org {{ed}}\n", "unknown"),
    "negated other": ("ed", 22, "*.example.org,!bad.* {ed}\n", "known"),
    "only negated": ("ed", 22, "!bad.* {ed}\n", "unknown"),
    "negated on one line only": ("ed", 22, f"*,!{H} {{ed2}}\n{H} {{ed}}\n", "known"),
    "hashed": ("ed", 22, f"{hashed(H)} {{ed}}\n", "known"),
    "hashed with port": ("ed", 2222, f"{hashed(P)} {{ed}}\n", "known"),
    "hashed other": ("ed", 22, f"{hashed('other')} {{ed}}\n", "unknown"),
    "hashed with another": ("ed", 22, f"{hashed(H)} {{ed2}}\n", "changed"),
    "hashed with short salt": ("ed", 22, f"{hashed(H, b'short')} {{ed}}\n", "unknown"),
    "hashed of unknown kind": ("ed", 22, f"{hashed(H).replace('|1|', '|2|')} {{ed}}\n", "unknown"),
    "hash cut off": ("ed", 22, f"|1|abc {{ed}}\n{H} {{ed}}\n", "known"),
    "port": ("ed", 2222, f"{P} {{ed}}\n", "known"),
    "port in upper case": ("ed", 2222, f"{P.upper()} {{ed}}\n", "known"),
    "other port": ("ed", 2222, f"[{H}]:2223 {{ed}}\n", "unknown"),
    "port written out as 22": ("ed", 22, f"[{H}]:22 {{ed}}\n", "unknown"),
    "bare name for a port": ("ed", 2222, f"{H} {{ed}}\n", "known"),
    "bare name speaks not against": ("ed", 2222, f"{H} {{ed2}}\n", "unknown"),
    "revoked bare name, port known": ("ed", 2222, f"{P} {{ed}}\n@revoked {H} {{ed}}\n", "known"),
    "port before bare name": ("ed", 2222, f"{P} {{ed2}}\n{H} {{ed}}\n", "changed"),
    "port of another key type before bare name": ("ed", 2222, f"{P} {{rsa}}\n{H} {{ed}}\n", "changed"),
    "port pattern": ("ed", 2222, "[*.example.org]:* {ed}\n", "known"),
    "star with port": ("ed", 2222, "*.example.org {ed}\n", "known"),
    "changed": ("ed", 22, f"{H} {{ed2}}\n", "changed"),
    "two of a type": ("ed", 22, f"{H} {{ed2}}\n{H} {{ed}}\n", "known"),
    "two of a type, wrong last": ("ed", 22, f"{H} {{ed}}\n{H} {{ed2}}\n", "known"),
    "other type only": ("ed", 22, f"{H} {{rsa}}\n", "changed"),
    "other curve only": ("ec", 22, f"{H} {{ec384}}\n", "changed"),
    "wildcard and changed": ("ed", 22, f"* {{ed2}}\n{H} {{ed}}\n", "known"),
    "revoked": ("ed", 22, f"@revoked {H} {{ed}}\n", "revoked"),
    "revoked before plain": ("ed", 22, f"@revoked {H} {{ed}}\n{H} {{ed}}\n", "revoked"),
    "revoked after plain": ("ed", 22, f"{H} {{ed}}\n@revoked {H} {{ed}}\n", "revoked"),
    "revoked everywhere": ("ed", 22, f"{H} {{ed}}\n@revoked * {{ed}}\n", "revoked"),
    "revoked hashed": ("ed", 22, f"{H} {{ed}}\n@revoked {hashed(H)} {{ed}}\n", "revoked"),
    "revoked elsewhere": ("ed", 22, f"{H} {{ed}}\n@revoked other {{ed}}\n", "known"),
    "revoked other key": ("ed", 22, f"{H} {{ed}}\n@revoked * {{ed2}}\n", "known"),
    "revoked other key only": ("ed", 22, f"@revoked {H} {{ed2}}\n", "unknown"),
    "revoked and changed": ("ed", 22, f"{H} {{ed2}}\n@revoked {H} {{ed}}\n", "revoked"),
    "revoked with blanks": ("ed", 22, f"  @revoked  \t {H} \t {{ed}}\n{H} {{ed}}\n", "revoked"),
    "revoked bare name": ("ed", 2222, f"@revoked {H} {{ed}}\n", "revoked"),
    "revoked as certificate": ("ed", 22, f"{H} {{ed}}\n@revoked {H} {{cert}}\n", "revoked"),
    "two markers": ("ed", 22, f"@revoked @revoked {H} {{ed}}\n{H} {{ed}}\n", "known"),
    "unknown marker": ("ed", 22, f"@new {H} {{ed2}}\n{H} {{ed}}\n", "known"),
    "marker in upper case": ("ed", 22, f"@REVOKED {H} {{ed}}\n{H} {{ed}}\n", "known"),
    "ca is no key": ("ed", 22, f"@cert-authority {H} {{ed}}\n", "unknown"),
    "ca beside key": ("ed", 22, f"@cert-authority {H} {{ca}}\n{H} {{ed}}\n", "known"),
    "bad line before": ("ed", 22, f"nonsense\n{H} ssh-ed25519 AAAA\n{H}\n{H} {{ed}}\n", "known"),
    "bad line only": ("ed", 22, f"{H} ssh-ed25519 AAAA\n", "unknown"),
    "wrong type name": ("ed", 22, f"{H} {{ed_as_rsa}}\n", "unknown"),
    "unknown type": ("ed", 22, f"{H} ssh-new AAAA\n{H} {{ed}}\n", "known"),
    "old rsa1 line": ("ed", 22, f"{H} 1024 35 123456789\n", "unknown"),
    "key cut off": ("ed", 22, f"{H} {{ed_cut}}\n", "unknown"),
    "key in two": ("ed", 22, f"{H} {{ed_split}}\n", "unknown"),
    "other key damaged": ("ed", 22, f"{H} {{ed2_cut}}\n", "unknown"),
    "certificate as a key": ("ed", 22, f"{H} {{cert}}\n", "changed"),
    "certificate as a key for a certificate": ("cert", 22, f"{H} {{cert}}\n", "changed"),
    "certificate in a line": ("ed", 22, f"{H} {{ed}}\n{H} {{cert}}\n", "known"),
    "comments": ("ed", 22, f"# {H} {{ed2}}\n\n   # x\n{H} {{ed}} a comment # more\n", "known"),
    "comment for a key": ("ed", 22, f"{H} # {{ed}}\n", "unknown"),
    "blanks": ("ed", 22, f" \t{H}  \t {{ed_blanks}}  \n", "known"),
    "windows": ("ed", 22, f"# x\r\n{H} {{ed}}\r\nother {{ed}}\r\n", "known"),
    "windows with comment": ("ed", 22, f"{H} {{ed}} c\r\n", "known"),
    "old mac": ("ed", 22, f"x {{ed}}\r{H} {{ed}}\r", "unknown"),
    "not utf-8": ("ed", 22, f"other {{ed}} \udcff\n{H} {{ed}} M\udcfcller\n", "known"),
    "nul": ("ed", 22, f"{H} {{ed}}\0junk\n\0\n", "known"),
    "long line": ("ed", 22, f"{'x' * 20000},{H} {{ed}}\n{H} {{ed}}\n", "known"),
    "certificate": ("cert", 22, f"@cert-authority {H} {{ca}}\n", "known"),
    "certificate for all": ("cert", 22, "@cert-authority * {ca}\n", "known"),
    "certificate by ecdsa": ("cert-ec", 22, f"@cert-authority {H} {{ec}}\n", "known"),
    "certificate by ecdsa 384": ("cert-ec384", 22, f"@cert-authority {H} {{ec384}}\n", "known"),
    "certificate by rsa": ("cert-rsa", 22, f"@cert-authority {H} {{rsa}}\n", "known"),
    "certificate by rsa with sha1": ("cert-sha1", 22, f"@cert-authority {H} {{rsa}}\n", "unknown"),
    "certificate of another ca": ("cert", 22, f"@cert-authority {H} {{ca2}}\n", "unknown"),
    "certificate of two cas": ("cert", 22, "@cert-authority * {ca2}\n@cert-authority * {ca}\n", "known"),
    "certificate, ca elsewhere": ("cert", 22, "@cert-authority other {ca}\n", "unknown"),
    "certificate, ca not marked": ("cert", 22, f"{H} {{ca}}\n", "changed"),
    "certificate, ca after tab": ("cert", 22, f"@cert-authority\t{H} {{ca}}\n", "unknown"),
    "certificate, ca with tabs only": ("cert", 22, f"@cert-authority\t{H}\t{{ca_tab}}\n", "known"),
    "certificate with port": ("cert", 2222, f"@cert-authority {P} {{ca}}\n", "known"),
    "certificate with bare name": ("cert", 2222, f"@cert-authority {H} {{ca}}\n", "known"),
    "certificate, key with bare name": ("cert", 2222, f"{P} {{ed2}}\n{H} {{ed}}\n", "known"),
    "certificate, key revoked with bare name": (
        "cert",
        2222,
        f"{P} {{ed2}}\n@revoked {H} {{ed}}\n",
        "revoked",
    ),
    "certificate, ca revoked with bare name": ("cert", 2222, f"@revoked {H} {{ca}}\n", "revoked"),
    "certificate, revoked with bare name, known": (
        "cert",
        2222,
        f"{P} {{ed}}\n@revoked {H} {{ed}}\n",
        "known",
    ),
    "certificate expired": ("cert-expired", 22, f"@cert-authority {H} {{ca}}\n", "unknown"),
    "certificate too early": ("cert-early", 22, f"@cert-authority {H} {{ca}}\n", "unknown"),
    "certificate for others": ("cert-other", 22, f"@cert-authority {H} {{ca}}\n", "unknown"),
    "certificate with critical option": ("cert-critical", 22, f"@cert-authority {H} {{ca}}\n", "unknown"),
    "certificate for a user": ("cert-user", 22, f"@cert-authority {H} {{ca}}\n", "unknown"),
    "certificate of no use, key known": (
        "cert-expired",
        22,
        f"@cert-authority * {{ca}}\n{H} {{ed}}\n",
        "known",
    ),
    "certificate of no use, key changed": (
        "cert-expired",
        22,
        f"@cert-authority * {{ca}}\n{H} {{ed2}}\n",
        "changed",
    ),
    "certificate unasked, key known": ("cert", 22, f"{H} {{ed}}\n", "known"),
    "certificate unasked": ("cert", 22, "", "unknown"),
    "certificate, key revoked": ("cert", 22, "@cert-authority * {ca}\n@revoked * {ed}\n", "revoked"),
    "certificate, ca revoked": ("cert", 22, "@revoked * {ca}\n@cert-authority * {ca}\n", "revoked"),
    "certificate, ca revoked, key known": ("cert", 22, f"@revoked * {{ca}}\n{H} {{ed}}\n", "revoked"),
    "certificate, other ca revoked": ("cert", 22, "@revoked * {ca2}\n@cert-authority * {ca}\n", "known"),
}


def fill(text: str, keys: Keys) -> bytes:
    """Put the keys into a known_hosts text."""
    kind, code = keys.public["ed"].split()
    values = {
        **keys.public,
        "rsa_sha2": keys.public["rsa"].replace("ssh-rsa", "rsa-sha2-256"),
        "ed_as_rsa": f"ssh-rsa {code}",
        "ed_cut": f"{kind} {code[:-4]}",
        "ed2_cut": keys.public["ed2"][:-8],
        "ed_split": f"{kind} {code[:40]} {code[40:]}",
        "ed_blanks": f"{kind} \t  {code}",
        "ca_tab": keys.public["ca"].replace(" ", "\t"),
    }
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", value)
    assert "{" not in text
    return text.encode(errors="surrogateescape")


def compare(
    sshd: Sshd, present: str, port: int, files: list[str], name: str = HOST, alias: str | None = None
) -> str:
    """Have ssh and us judge the same: the verdict of both."""
    options = ["-o", f"HostKeyAlias={alias}"] if alias else []
    theirs, shown = sshd.connect(present, name, files, port, *options)
    kind = present if shown == "certificate" or present in ("ed", "ec", "ec384", "rsa") else f"{present}.of"
    if kind not in sshd.keys.public:
        sshd.keys.read(kind)
    key = blob(sshd.keys.public[kind])
    ours = verdict(key, files, name=alias or name, port=None if alias else port)
    assert ours == theirs
    return ours


@pytest.mark.parametrize("case", TABLE)
def test_same_as_ssh(case: str, sshd: Sshd, tmp_path: Path) -> None:
    """Whatever a known_hosts file says, we take, refuse and denounce the keys that ssh does."""
    present, port, text, expected = TABLE[case]
    path = tmp_path / "known_hosts"
    path.write_bytes(fill(text, sshd.keys))
    before = path.read_bytes()
    assert compare(sshd, present, port, [str(path)]) == expected
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("present", "text", "since"),
    [
        ("cert-any", f"@cert-authority {H} {{ca}}\n", "unknown"),
        ("cert-pattern", "@cert-authority * {ca}\n", "known"),
    ],
)
def test_principals(present: str, text: str, since: str, sshd: Sshd, tmp_path: Path) -> None:
    """A certificate without names is for no host, one for a pattern is for all that fit (OpenSSH 10.3)."""
    path = tmp_path / "known_hosts"
    path.write_bytes(fill(text, sshd.keys))
    assert verdict(blob(sshd.keys.public[present]), [str(path)]) == since
    version = re.search(r"OpenSSH_(\d+)\.(\d+)", run(str(SSH), "-V").stderr)
    if version and (int(version[1]), int(version[2])) >= (10, 3):
        assert compare(sshd, present, 22, [str(path)]) == since


@pytest.mark.parametrize(
    ("alias", "port", "text", "expected"),
    [
        ("alias", 2222, "alias {ed}\n", "known"),
        ("ALIAS", 2222, "alias {ed}\n", "known"),
        ("ALIAS", 2222, f"{hashed('alias')} {{ed}}\n", "known"),
        ("alias", 2222, f"[alias]:2222 {{ed}}\n{P} {{ed}}\n{H} {{ed}}\n", "unknown"),
        ("alias", 22, f"{H} {{ed}}\nalias {{ed2}}\n", "changed"),
        ("Alias", 2222, "@cert-authority alias {ca}\n", "known"),
        ("nobody", 2222, "@cert-authority * {ca}\n", "unknown"),
    ],
)
def test_alias(alias: str, port: int, text: str, expected: str, sshd: Sshd, tmp_path: Path) -> None:
    """A HostKeyAlias stands in the files as it is: without the port, and in the certificate, too."""
    path = tmp_path / "known_hosts"
    path.write_bytes(fill(text, sshd.keys))
    present = "cert" if "{ca}" in text else "ed"
    assert compare(sshd, present, port, [str(path)], alias=alias) == expected


@pytest.mark.parametrize("name", ["HOST.example.org", "10.1.2.3", "fe80::1"])
@pytest.mark.parametrize("port", [22, 2222])
def test_names(name: str, port: int, sshd: Sshd, tmp_path: Path) -> None:
    """Names in upper case, IPv4 and IPv6 addresses are found with any port."""
    path = tmp_path / "known_hosts"
    written = name.lower() if port == 22 else f"[{name.lower()}]:{port}"
    path.write_bytes(fill(f"{written} {{ed}}\n", sshd.keys))
    assert compare(sshd, "ed", port, [str(path)], name) == "known"
    assert verdict(blob(sshd.keys.public["ed"]), [str(path)], name=name, port=port) == "known"


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("", f"{H} {{ed}}\n", "known"),
        (f"{H} {{ed2}}\n", f"{H} {{ed}}\n", "known"),
        (f"{H} {{ed}}\n", f"@revoked {H} {{ed}}\n", "revoked"),
        (f"{H} {{ed2}}\n", "", "changed"),
        ("", f"{H} {{ed2}}\n", "changed"),
    ],
)
def test_several_files(first: str, second: str, expected: str, sshd: Sshd, tmp_path: Path) -> None:
    """All files count together, the user's and the system's; a missing one is as good as empty."""
    files = [str(tmp_path / name) for name in ("mine", "system")]
    for path, text in zip(files, (first, second), strict=True):
        if text:
            Path(path).write_bytes(fill(text, sshd.keys))
    assert compare(sshd, "ed", 22, files) == expected


LINE = st.builds(
    "{}{} {}".format,
    st.sampled_from(["", "", "", "", "@revoked ", "@cert-authority ", "@revoked \t ", "# "]),
    st.one_of(
        st.lists(
            st.sampled_from(
                [H, P, "*", "*.org", "!*.org", f"!{H}", "[*]:2222", "[*", "other", H.upper(), "?*"]
            ),
            min_size=1,
            max_size=3,
        ).map(",".join),
        st.sampled_from([hashed(H), hashed(P), hashed("other"), "|1|x|y"]),
    ),
    st.sampled_from(
        ["{ed}", "{ed}", "{ed2}", "{rsa}", "{ca}", "{ca}", "{cert}", "{ed_cut}", "{ed_as_rsa}", "x"]
    ),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(LINE, max_size=5),
    present=st.sampled_from(["ed", "cert", "cert-other"]),
    port=st.sampled_from([22, 2222]),
)
def test_any_file(lines: list[str], present: str, port: int, sshd: Sshd, tmp_path: Path) -> None:
    """Any mixture of lines gives the verdict that ssh gives."""
    path = tmp_path / "known_hosts"
    path.write_bytes(fill("".join(f"{line}\n" for line in lines), sshd.keys))
    compare(sshd, present, port, [str(path)])


def test_revoked_after_a_tab(keys: Keys, tmp_path: Path) -> None:
    """A revocation with a tab behind its marker counts; ssh overlooks it where a blank follows later."""
    path = tmp_path / "known_hosts"
    path.write_bytes(fill(f"@revoked\t{H} {{ed}}\n{H} {{ed}}\n", keys))
    assert verdict(blob(keys.public["ed"]), [str(path)]) == "revoked"


def test_revoked_without_port(keys: Keys, tmp_path: Path) -> None:
    """A key revoked under the bare name is not taken for another port, whatever the policy."""
    path = tmp_path / "known_hosts"
    path.write_bytes(fill(f"@revoked {H} {{ed}}\n", keys))
    with pytest.raises(RevokedHostKeyError):
        verify(blob(keys.public["ed"]), [str(path)], port=2222, policy="accept-new")


@pytest.mark.parametrize("name", ["cert", "cert-ec", "cert-ec384", "cert-rsa", "ed", "ec", "rsa"])
def test_damaged(name: str, keys: Keys, tmp_path: Path) -> None:
    """A certificate of which any byte was changed, and a key cut short, are never trusted nor remembered."""
    path = tmp_path / "known_hosts"
    path.write_bytes(fill("@cert-authority * {ca}\n@cert-authority * {ec}\n@cert-authority * {rsa}\n", keys))
    path.write_bytes(path.read_bytes() + fill("@cert-authority * {ec384}\n", keys))
    whole = blob(keys.public[name])
    assert verdict(whole, [str(path)]) == ("known" if name.startswith("cert") else "unknown")
    for at in range(0, len(whole), 7):
        changed = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
        if name.startswith("cert"):
            assert verdict(changed, [str(path)]) == "unknown"
        before = path.read_bytes()
        with pytest.raises(UnknownHostKeyError):
            verify(whole[:at], [str(path)], policy="accept-new")
        assert path.read_bytes() == before


@pytest.mark.parametrize("junk", [b"", b"\0", b"\0\0\0\7ssh-new", b"\xff" * 40, b"\0\0\0\x0bssh-ed25519"])
def test_junk(junk: bytes, tmp_path: Path) -> None:
    """Whatever a server sends in the place of a key ends in a typed error."""
    with pytest.raises(UnknownHostKeyError, match="cannot be trusted") as caught:
        verify(junk, [str(tmp_path / "no")], policy="accept-new")
    assert caught.value.fingerprint.startswith("SHA256:")


def test_fingerprint(keys: Keys) -> None:
    """Fingerprints are those that ``ssh-keygen -l`` prints; a certificate has that of its key."""
    for name in ("ed", "ec", "rsa", "cert", "cert-rsa"):
        printed = run(str(KEYGEN), "-l", "-f", "-", input=keys.public[name] + "\n").stdout
        assert host_keys_module.fingerprint(blob(keys.public[name])) == printed.split()[1]


def test_known_algorithms(keys: Keys, tmp_path: Path) -> None:
    """The server is asked for what is known: certificates where there is a CA, else the keys' types."""
    path = tmp_path / "known_hosts"
    path.write_bytes(
        fill(
            f"{H} {{rsa}}\n{H} {{ed}}\n@revoked {H} {{ec}}\nca,{P} {{ec}}\n@cert-authority ca {{ca}}\n", keys
        )
    )
    files = [str(tmp_path / "missing"), str(path)]
    assert host_keys_module.known_algorithms("HOST.example.org", 22, files) == (
        "ssh-ed25519",
        "rsa-sha2-512",
        "rsa-sha2-256",
    )
    assert host_keys_module.known_algorithms(HOST, 2222, files) == ("ecdsa-sha2-nistp256",)
    assert host_keys_module.known_algorithms(HOST, 2223, files) == ()
    assert host_keys_module.known_algorithms("ca", None, files) == (
        "ssh-ed25519-cert-v01@openssh.com",
        "ecdsa-sha2-nistp256-cert-v01@openssh.com",
        "ecdsa-sha2-nistp384-cert-v01@openssh.com",
        "ecdsa-sha2-nistp521-cert-v01@openssh.com",
        "rsa-sha2-512-cert-v01@openssh.com",
        "rsa-sha2-256-cert-v01@openssh.com",
        "ecdsa-sha2-nistp256",
    )


def test_bad_lines_are_logged(keys: Keys, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A line for the host that cannot be read is skipped, and the debug log says which one."""
    path = tmp_path / "known_hosts"
    path.write_bytes(fill(f"# x\n{H} ssh-ed25519 AAAA\n{H} {{ed}}\n", keys))
    with caplog.at_level(logging.DEBUG, "bokeh_ssh"):
        assert verdict(blob(keys.public["ed"]), [str(path)]) == "known"
    assert f"{path} line 2 is skipped" in caplog.text


# What the errors say.


def test_errors(keys: Keys, tmp_path: Path) -> None:
    """Each refusal names host, key type, fingerprint, the line that decided or the name that was looked up,
    and the next step."""
    path = tmp_path / "known_hosts"
    path.write_bytes(fill(f"# old\n{P} {{rsa}}\n{P} {{ed2}}\n@revoked {P} {{ec}}\n", keys))
    prints = {
        name: host_keys_module.fingerprint(blob(keys.public[name])) for name in ("ed", "ed2", "ec", "rsa")
    }
    caught: dict[str, HostKeyError] = {}
    for name, port in (("ed", 2222), ("ec", 2222), ("rsa", 22)):
        with pytest.raises(HostKeyError) as info:
            verify(blob(keys.public[name]), [str(path)], port=port)
        caught[name] = info.value
        assert (info.value.host, info.value.fingerprint) == ("me", prints[name])
        assert info.value.key_type == keys.public[name].split()[0]
        assert prints[name] in str(info.value)
    changed = str(caught["ed"])
    assert f"{path} line 3" in changed
    assert prints["ed2"] in changed
    assert f"ssh-keygen -f {path} -R '{P}'" in changed
    assert f"@revoked in {path} line 4" in str(caught["ec"])
    assert f"{prints['rsa']} (looked up as {HOST});" in str(caught["rsa"])
    assert 'host_keys="ask" or host_keys="accept-new"' in str(caught["rsa"])


def test_file_that_cannot_be_read_is_named(keys: Keys, tmp_path: Path) -> None:
    """It knows nobody, as with ssh; where that may be why a key is not known, the error says so."""
    with pytest.raises(UnknownHostKeyError) as caught:
        verify(blob(keys.public["ed"]), [str(tmp_path), str(tmp_path / "missing")])
    assert f"; {tmp_path} cannot be read (" in str(caught.value)
    assert "missing" not in str(caught.value)


@pytest.mark.parametrize("names", [P, P + ",[192.0.2.7]:2222", "hashed"])
def test_advice_works(names: str, keys: Keys, tmp_path: Path) -> None:
    """The command that a changed key's error gives does remove the old key; ssh may have written it with the
    address, or hashed."""
    path = tmp_path / "known hosts"
    path.write_bytes(fill(f"{hashed(P) if names == 'hashed' else names} {{ed2}}\nother {{ed}}\n", keys))
    with pytest.raises(ChangedHostKeyError) as caught:
        verify(blob(keys.public["ed"]), [str(path)], port=2222, address="192.0.2.7")
    command = shlex.split(str(caught.value.hint).rpartition("remove the old key: ")[2])
    assert run(*command).returncode == 0
    assert verdict(blob(keys.public["ed"]), [str(path)], port=2222) == "unknown"


@pytest.mark.parametrize("names", ["other,HOST", "*.example.org", "h*,other"])
def test_advice_spares_other_hosts(names: str, keys: Keys, tmp_path: Path) -> None:
    """Where the old key's line is for other hosts too, the error says how to take this one out of it.

    ``ssh-keygen -R`` would forget them all. What it says works for ``ssh`` as well.
    """
    names = names.replace("HOST", HOST)
    path = tmp_path / "known_hosts"
    path.write_bytes(fill(f"# old\n{names} {{ed2}}\n", keys))
    with pytest.raises(ChangedHostKeyError) as caught:
        verify(blob(keys.public["ed"]), [str(path)])
    hint = str(caught.value.hint)
    added = hint.partition("add ")[2].partition(" ")[0]
    assert f"the names of {path} line 2" in hint
    assert f"({names})" in hint
    path.write_bytes(fill(f"# old\n{names}{added} {{ed2}}\n", keys))
    assert verdict(blob(keys.public["ed"]), [str(path)]) == "unknown"
    assert verdict(
        blob(keys.public["ed2"]), [str(path)], name="other" if "other" in names else "b.example.org"
    ) == ("known")
    assert run("ssh-keygen", "-F", HOST, "-f", str(path)).returncode == 1


def test_certificate_problem_is_told(keys: Keys, tmp_path: Path) -> None:
    """Where a certificate was to be trusted and does not count, the error says why."""
    path = tmp_path / "known_hosts"
    path.write_bytes(fill("@cert-authority * {ca}\n", keys))
    for name, why in (
        ("cert-expired", r"expired since \d+-\d\d-\d\d; the clock here says 20"),
        ("cert-other", "for other names"),
        ("cert-any", "for no host's name"),
        ("cert-user", "not a host"),
    ):
        with pytest.raises(UnknownHostKeyError, match=f"its certificate is {why}"):
            verify(blob(keys.public[name]), [str(path)])


# New keys.


@pytest.mark.parametrize(
    ("before", "name", "port"),
    [
        ("", HOST, 22),
        ("# mine\r\nbad line\n\n@new x\nother {ed}  two  blanks\n", "HOST.example.org", 2222),
        ("* \udcff\n", "10.0.0.1", 22),
        ("# x\n", "fe80::1", 2222),
    ],
)
def test_added_as_ssh_does(before: str, name: str, port: int, sshd: Sshd, tmp_path: Path) -> None:
    """With accept-new a key is added as ssh adds it: one line at the end, every other byte as it was."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for path in (ours, theirs):
        path.write_bytes(fill(before, sshd.keys))
    sshd_says = sshd.connect("ed", name, [str(theirs)], port, "-o", "StrictHostKeyChecking=accept-new")
    assert sshd_says[0] == "known"
    key = sshd.keys.public["ed"]
    added = verify(blob(key), [str(ours)], name=name, port=port, policy="accept-new")
    print_of = host_keys_module.fingerprint(blob(key))
    assert added == HostKeyAdded(host="me", key_type="ssh-ed25519", fingerprint=print_of, path=str(ours))
    assert ours.read_bytes() == theirs.read_bytes()
    assert verify(blob(key), [str(ours)], name=name, port=port) is None


@pytest.mark.parametrize("known", ["", f"{H} {{ed}}\n", f"{H} {{ed2}}\n", f"@revoked {H} {{ed}}\n"])
@pytest.mark.parametrize("own", ["none", "/dev/null", "/dev/null {folder}/own"])
def test_nowhere_to_keep_keys(own: str, known: str, sshd: Sshd, tmp_path: Path) -> None:
    """With accept-new, ``UserKnownHostsFile /dev/null`` takes a new key each time, as with ssh, and ``none``
    never does, as with ssh; what the system's file says of the key counts with both."""
    (tmp_path / "system").write_bytes(fill(known, sshd.keys))
    files = f"UserKnownHostsFile {own.format(folder=tmp_path)}\nGlobalKnownHostsFile {tmp_path / 'system'}"
    for _ in range(2):
        ours = meet(sshd, "ed", files, host_keys="accept-new")
        words = [word for line in files.splitlines() for word in ("-o", line.replace(" ", "=", 1))]
        accept = ["-o", "StrictHostKeyChecking=accept-new"]
        theirs, _ = sshd.connect("ed", H, ["unused"], 22, *accept, *words)
        assert ours == theirs
        assert ours == "known" or known or own == "none"
    assert not (tmp_path / "own").exists()


def test_new_file(keys: Keys, tmp_path: Path) -> None:
    """A new file and its directory are for their owner only; a missing line end is added first."""
    path = tmp_path / "home" / ".ssh" / "known_hosts"
    mask = os.umask(0)
    try:
        verify(blob(keys.public["ed"]), [str(path)], policy="accept-new")
    finally:
        os.umask(mask)
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    path.chmod(0o644)
    verify(blob(keys.public["ec"]), [str(path)], name="second", policy="accept-new")
    assert path.read_text().splitlines() == [f"{H} {keys.public['ed']}", f"second {keys.public['ec']}"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644 or os.name != "posix"


def test_certificate_without_ca(keys: Keys, tmp_path: Path) -> None:
    """Where a certificate's CA is unknown, the key in it is what is accepted and remembered, as with ssh."""
    path = tmp_path / "known_hosts"
    verify(blob(keys.public["cert"]), [str(path)], policy="accept-new")
    assert path.read_text() == f"{H} {keys.public['ed']}\n"
    assert verdict(blob(keys.public["ed"]), [str(path)]) == "known"


def test_changed_is_never_added(keys: Keys, tmp_path: Path) -> None:
    """No policy and no answer accepts a changed or revoked key, and the file stays as it was."""
    path = tmp_path / "known_hosts"
    for text in (f"{H} {{ed2}}\n", f"@revoked * {{ed}}\n{H} {{ed}}\n"):
        path.write_bytes(fill(text, keys))
        for policy in ("accept-new", "ask", "strict"):
            with pytest.raises((ChangedHostKeyError, RevokedHostKeyError)):
                verify(blob(keys.public["ed"]), [str(path)], policy=policy, ask=answers("yes")[0])
        assert path.read_bytes() == fill(text, keys)


def test_strict_asks_nobody(keys: Keys, tmp_path: Path) -> None:
    """The strict policy refuses an unknown key without a question, and makes no file."""

    def never(question: Question) -> str:
        raise AssertionError

    path = tmp_path / "dir" / "known_hosts"
    with pytest.raises(UnknownHostKeyError) as caught:
        verify(blob(keys.public["ed"]), [str(path)], ask=never)
    assert "connect once" in str(caught.value.hint)
    assert not path.parent.exists()


def test_strict_without_a_file_points_at_one(keys: Keys, tmp_path: Path) -> None:
    """Where no file keeps keys (``UserKnownHostsFile none``), nobody is told to connect once for that."""
    with pytest.raises(UnknownHostKeyError) as caught:
        verify(blob(keys.public["ed"]), [str(tmp_path / "system")], writable=None)
    assert "connect once" not in str(caught.value.hint)
    assert "known_hosts=" in str(caught.value.hint)


def answers(*given: str | None) -> tuple[Callable[[Question], str | None], list[Question]]:
    asked: list[Question] = []

    def ask(question: Question) -> str | None:
        asked.append(question)
        return given[len(asked) - 1]

    return ask, asked


def test_question(keys: Keys, tmp_path: Path) -> None:
    """The question has what one needs to decide: name, address, key type, fingerprint, other names."""
    path = tmp_path / "known_hosts"
    path.write_bytes(fill(f"old.example {{ed}}\n{hashed('x')} {{ed}}\n", keys))
    ask, asked = answers("yes")
    assert verify(blob(keys.public["ed"]), [str(path)], port=2222, policy="ask", ask=ask, address="10.0.0.9")
    (question,) = asked
    assert (question.kind, question.host, question.echo) == ("host_key", "me", True)
    for part in (f"{P} (10.0.0.9)", "ssh-ed25519", host_keys_module.fingerprint(blob(keys.public["ed"]))):
        assert part in question.text
    assert f"{path} line 1: old.example" in question.text
    assert f"{path} line 2: [hashed name]" in question.text
    assert verdict(blob(keys.public["ed"]), [str(path)], port=2222) == "known"


def test_question_where_no_file_keeps_keys(keys: Keys, tmp_path: Path) -> None:
    """The answer counts for this time alone (``UserKnownHostsFile none``), and a person is asked again."""
    key, files = blob(keys.public["ed"]), [str(tmp_path / "x")]
    for _ in range(2):
        ask, asked = answers("yes")
        assert verify(key, files, policy="ask", ask=ask, writable=None) is None
        assert len(asked) == 1


def test_answers(keys: Keys, tmp_path: Path) -> None:
    """Yes and the fingerprint accept, no and nothing decline, anything else is asked again."""
    key = blob(keys.public["ed"])
    print_of = host_keys_module.fingerprint(key)
    for number, (said, accepted) in enumerate(
        [
            (["yes"], True),
            ([" YES\n"], True),
            ([print_of], True),
            (["y", "what", "yes"], True),
            ([print_of.lower(), "no"], False),
            (["no"], False),
            ([""], False),
            ([None], False),
            (["y", "y", "y"], False),
        ]
    ):
        path = tmp_path / str(number)
        ask, asked = answers(*said)
        if accepted:
            assert verify(key, [str(path)], policy="ask", ask=ask) is not None
        else:
            with pytest.raises(UnknownHostKeyError, match="not accepted"):
                verify(key, [str(path)], policy="ask", ask=ask)
        assert len(asked) == len(said)
        assert path.exists() == accepted


def test_nobody_to_ask(keys: Keys, tmp_path: Path) -> None:
    """Without a prompt, and without a file to write to, an unknown key is refused, with the way out."""
    key = blob(keys.public["ed"])
    with pytest.raises(UnknownHostKeyError, match="nobody can be asked"):
        verify(key, [str(tmp_path / "x")], policy="ask")
    with pytest.raises(UnknownHostKeyError, match="no file to remember it in"):
        verify(key, [str(tmp_path / "x")], policy="accept-new", writable=None)
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file" / "x"):
        with pytest.raises(UnknownHostKeyError, match="cannot be remembered") as caught:
            verify(key, [str(place)], policy="accept-new")
        assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("name", ["a b", "a,b", "*", "a?", "!a", "a\nb", "a#", "|1|x", "@revoked", "[a"])
def test_names_that_cannot_stand_in_a_file(name: str, keys: Keys, tmp_path: Path) -> None:
    """A name that would be read as something else is never written into a known_hosts file."""
    path = tmp_path / "known_hosts"
    with pytest.raises(UnknownHostKeyError):
        verify(blob(keys.public["ed"]), [str(path)], name=name, policy="accept-new")
    assert not path.exists()


def test_added_meanwhile(keys: Keys, tmp_path: Path) -> None:
    """While a person thinks, others may write: the same key is not added twice, another one refuses ours."""
    key = blob(keys.public["ed"])
    for theirs, expected in (("ed", "known"), ("ed2", "changed")):
        path = tmp_path / theirs
        text = f"{H} {keys.public[theirs]}\n"

        def ask(question: Question, path: Path = path, text: str = text) -> str:
            path.write_text(text)
            return "yes"

        if expected == "known":
            assert verify(key, [str(path)], policy="ask", ask=ask) is None
        else:
            with pytest.raises(ChangedHostKeyError):
                verify(key, [str(path)], policy="ask", ask=ask)
        assert path.read_text() == text


def test_threads_at_once(keys: Keys, tmp_path: Path) -> None:
    """Many that add keys at once lose none, cut none and add none twice."""
    path = tmp_path / "known_hosts"
    path.write_bytes(b"# no line end")
    start = threading.Barrier(12)

    def add(number: int) -> None:
        start.wait(30)
        for host in ("same", f"host{number}"):
            verify(blob(keys.public["rsa"]), [str(path)], name=host, policy="accept-new")

    threads = [threading.Thread(target=add, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    lines = path.read_text().splitlines()
    assert lines[0] == "# no line end"
    assert sorted(lines[1:]) == sorted(
        f"{n} {keys.public['rsa']}" for n in ("same", *(f"host{i}" for i in range(12)))
    )


def test_processes_at_once(keys: Keys, tmp_path: Path) -> None:
    """So do several processes."""
    path = tmp_path / "known_hosts"
    program = (
        "import sys, base64; from bokeh_ssh._ssh.auth import host_keys as h\n"
        "sys.stdin.read()\n"
        "for name in ('same', sys.argv[2]):\n"
        "    h.verify('me', base64.b64decode(sys.argv[3]), name=name, address=None, port=22,\n"
        "             files=[sys.argv[1]], writable=sys.argv[1], policy='accept-new', ask=None)\n"
    )
    code = keys.public["ed"].split()[1]
    with contextlib.ExitStack() as stack:
        made = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", program, str(path), f"p{n}", code],
                    stdin=subprocess.PIPE,
                    cwd=Path(__file__).parents[2],
                )
            )
            for n in range(4)
        ]
        for process in made:
            assert process.stdin
            process.stdin.close()
        assert [process.wait(60) for process in made] == [0, 0, 0, 0]
    names = sorted(line.split()[0] for line in path.read_text().splitlines())
    assert names == ["p0", "p1", "p2", "p3", "same"]


def test_lock_has_a_deadline(keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that somebody never gives back does not hold us for ever."""
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(host_keys_module, "_LOCK_SECONDS", 0.2)
    path = tmp_path / "known_hosts"
    with path.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert verify(blob(keys.public["ed"]), [str(path)], policy="accept-new") is not None
    assert verdict(blob(keys.public["ed"]), [str(path)]) == "known"


@pytest.mark.parametrize("locks", [True, False])
def test_windows(locks: bool, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without fcntl the file is locked as Windows does, and a key is added there, too."""
    tried: list[int] = []

    class Msvcrt:
        LK_NBLCK = 2

        @staticmethod
        def locking(file: int, *_: int) -> None:
            tried.append(os.lseek(file, 0, os.SEEK_CUR))
            if not locks:
                raise PermissionError

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", Msvcrt)
    monkeypatch.setattr(host_keys_module, "_LOCK_SECONDS", 0.1)
    path = tmp_path / "known_hosts"
    path.write_bytes(b"# x\n")
    assert verify(blob(keys.public["ed"]), [str(path)], policy="accept-new") is not None
    assert path.read_bytes() == fill(f"# x\n{H} {{ed}}\n", keys)
    assert min(tried) > 2**30


def test_home(keys: Keys, account: Path) -> None:
    """Paths may begin with ``~``."""
    verify(blob(keys.public["ed"]), ["~/.ssh/known_hosts"], policy="accept-new")
    assert (account / ".ssh" / "known_hosts").read_text() == f"{H} {keys.public['ed']}\n"
    assert verdict(blob(keys.public["ed"]), ["~/.ssh/known_hosts"]) == "known"


def test_nobodys_home(keys: Keys) -> None:
    """A path in the home of nobody is as good as missing, and cannot be written to."""
    with pytest.raises(UnknownHostKeyError, match="cannot be remembered in ~nobody-here/x"):
        verify(blob(keys.public["ed"]), ["~nobody-here/x"], policy="accept-new")


def test_imports() -> None:
    """Host keys are checked without paramiko: what is trusted does not depend on what is to be distrusted."""
    program = (
        "import sys; import bokeh_ssh._ssh.auth.host_keys, bokeh_ssh._ssh.config.lookup; "
        "assert 'paramiko' not in sys.modules"
    )
    done = run(sys.executable, "-c", program, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr


def _string(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def _certificate(key: str, ca: bytes, signature: bytes) -> bytes:
    """Make a certificate for the host of whatever parts."""
    own = blob(key)[4 + len("ssh-ed25519") :]
    numbers = struct.pack(">QI", 0, 2)
    names = _string(b"") + _string(_string(HOST.encode()))
    rest = struct.pack(">QQ", 0, 2**64 - 1) + 3 * _string(b"") + _string(ca) + _string(signature)
    return _string(b"ssh-ed25519-cert-v01@openssh.com") + _string(b"nonce") + own + numbers + names + rest


def test_certificates_for_certificates(keys: Keys, tmp_path: Path) -> None:
    """A certificate that a certificate signed, and so on, is refused, however deep."""
    key, signature = keys.public["ed"], _string(b"ssh-ed25519") + _string(bytes(64))
    deep = blob(keys.public["cert"])
    for _ in range(1200):
        deep = _certificate(key, deep, signature)
    with pytest.raises(UnknownHostKeyError, match="cannot be trusted"):
        verify(deep, [str(tmp_path / "no")], policy="accept-new")


def test_certificate_of_a_security_key(keys: Keys, tmp_path: Path) -> None:
    """What a security key signed is not checked: it vouches for nobody, and the key alone may be known."""
    kind = "sk-ssh-ed25519@openssh.com"
    ca = _string(kind.encode()) + blob(keys.public["ca"])[4 + len("ssh-ed25519") :] + _string(b"ssh:")
    signature = _string(kind.encode()) + _string(bytes(64)) + b"\1\0\0\0\7"
    shown = _certificate(keys.public["ed"], ca, signature)
    path = tmp_path / "known_hosts"
    authority = f"@cert-authority * {kind} {base64.b64encode(ca).decode()}\n"
    path.write_text(authority)
    with pytest.raises(UnknownHostKeyError, match=f"not supported .signed with {kind}"):
        verify(shown, [str(path)])
    path.write_text(authority + f"{HOST} {keys.public['ed']}\n")
    assert verdict(shown, [str(path)]) == "known"


# What the ssh config says about host keys, from the file to the verdict, with a real sshd.


def meet(
    sshd: Sshd,
    present: str,
    config: str,
    *,
    known: str = "",
    port: int = 22,
    verbatim: bool = False,
    **keywords: Any,
) -> str:
    """Connect through a config and say the verdict; the login itself is not there to succeed.

    :param verbatim: let errors through
    """
    folder = sshd.folder
    (folder / "known").write_bytes(fill(known, sshd.keys))
    sshd.connect(present, HOST, [str(folder / "known")], 22)  # which writes the server's config
    server = shlex.join([str(SSHD), "-i", "-f", str(folder / f"{present}.conf")]).replace("%", "%%")
    path = folder / "config"
    files = f"UserKnownHostsFile {folder / 'known'}\nGlobalKnownHostsFile none\n"
    path.write_text(f"{config}\nProxyCommand {server}\nPort {port}\nPreferredAuthentications x\n{files}")
    host = Host(f"joe@{HOST}", ssh_config=path, allow_agent=False, look_for_keys=False, **keywords)
    events: list[Event] = []
    try:
        connect(host, on_event=events.append)
    except RevokedHostKeyError:
        return "revoked"
    except ChangedHostKeyError:
        return "changed"
    except UnknownHostKeyError:
        if verbatim:
            raise
        return "unknown"
    except AuthenticationError:
        assert any(isinstance(event, HostKeyVerified) for event in events)
        return "known"
    raise AssertionError


def say(folder: Path, text: bytes, status: int = 0) -> Path:
    """Make a program for KnownHostsCommand; it writes down its words."""
    (folder / "said").write_bytes(text)
    program = folder / "say"
    program.write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\ncat {folder}/said\nexit {status}\n')
    program.chmod(0o755)
    (folder / "asked").write_text("")
    return program


def test_certificate_by_the_bare_name_on_another_port(sshd: Sshd) -> None:
    """A @cert-authority for the bare name vouches for a server on any port, which is asked for one."""
    for port in (22, 2222):
        assert meet(sshd, "cert", "", known=f"@cert-authority {H} {{ca}}\n", port=port) == "known"
        assert meet(sshd, "cert", "", known=f"@cert-authority {H} {{ca2}}\n", port=port) == "unknown"
    known = f"{P} {{ed}}\n@cert-authority {H} {{ca2}}\n"
    assert meet(sshd, "cert", "", known=known, port=2222) == "known"


@pytest.mark.parametrize("port", [22, 2222])
def test_known_hosts_command(port: int, sshd: Sshd, tmp_path: Path) -> None:
    """What a KnownHostsCommand says counts like the lines of a file; it is asked with what ssh asks it."""
    name = P if port == 2222 else H
    program = say(tmp_path, fill(f"{name} {{ed}}\n", sshd.keys))
    line = f"KnownHostsCommand {program} %I %H %t %f %K %n-%h-%p-%r %%"
    assert meet(sshd, "ed", line, port=port) == "known"
    asked = (tmp_path / "asked").read_text().splitlines()
    key = sshd.keys.public["ed"].split()[1]
    print_of = host_keys_module.fingerprint(blob(sshd.keys.public["ed"]))
    rest = f"{H}-{H}-{port}-joe %"
    assert asked == [
        f"ORDER {name} NONE NONE NONE {rest}",
        f"HOSTNAME {name} ssh-ed25519 {print_of} {key} {rest}",
    ]
    say(tmp_path, fill(f"{name} {{ed}}\n", sshd.keys))
    theirs, _ = sshd.connect(
        "ed", H, [str(tmp_path / "no")], port, "-l", "joe", "-o", line.replace(" ", "=", 1)
    )
    assert theirs == "known"
    assert (tmp_path / "asked").read_text().splitlines()[-1] == asked[-1]
    say(tmp_path, fill(f"@revoked {name} {{ed}}\n", sshd.keys))
    assert meet(sshd, "ed", line, port=port, known=f"{name} {{ed}}\n") == "revoked"
    say(tmp_path, fill("other {ed}\n", sshd.keys))
    assert meet(sshd, "ed", line, port=port) == "unknown"


def test_known_hosts_command_that_fails(sshd: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A KnownHostsCommand that fails, hangs or is not there ends it: what it knows may be against the key."""
    known = f"{H} {{ed}}\n"
    program = say(tmp_path, b"", status=3)
    with pytest.raises(ConfigError, match=r"config line 1: KnownHostsCommand failed \(status 3\)"):
        meet(sshd, "ed", f"KnownHostsCommand {program}", known=known)
    with pytest.raises(ConfigError, match="No such file"):
        meet(sshd, "ed", f"KnownHostsCommand {tmp_path}/none", known=known)
    with pytest.raises(ConfigError, match="not an absolute path"):
        meet(sshd, "ed", "KnownHostsCommand true", known=known)
    monkeypatch.setattr(host_keys_module, "_COMMAND_SECONDS", 0.2)
    with pytest.raises(ConfigError, match="did not end within"):
        meet(sshd, "ed", "KnownHostsCommand /bin/sleep 20", known=known)


def test_revoked_host_keys(sshd: Sshd, tmp_path: Path) -> None:
    """RevokedHostKeys refuses the keys of its files, and what they signed; an unreadable file, all."""
    known = f"{H} {{ed}}\n@cert-authority {H} {{ca}}\n"
    revoked = tmp_path / "revoked"
    line = f"RevokedHostKeys {revoked}"
    for text, present, verdict_ in (
        ("# none\n\n", "ed", "known"),
        ("{ed2}\n", "ed", "known"),
        ("{ed2}\n{ed} comment\n", "ed", "revoked"),
        ("{ca}\n", "cert", "revoked"),
        ("{ed}\n", "cert", "revoked"),
        (" {ed2}\r\n  # {ed}\n", "ed", "known"),
        ("{ed2}\n{ed_cut}\n", "ed", "error"),
        ("nonsense\n", "ed", "error"),
        (f"{H} {{ed2}}\n", "ed", "error"),
        ("{ed_as_rsa}\n", "ed", "error"),
    ):
        revoked.write_bytes(fill(text, sshd.keys))
        if verdict_ == "error":
            with pytest.raises(HostKeyError, match=rf"{revoked} cannot be read \(line \d"):
                meet(sshd, present, line, known=known)
        else:
            assert meet(sshd, present, line, known=known) == verdict_
        option = line.replace(" ", "=", 1)
        theirs, _ = sshd.connect(present, H, [str(sshd.folder / "known")], 22, "-o", option)
        assert (theirs == "known") == (verdict_ == "known")
    assert meet(sshd, "ed", "RevokedHostKeys none", known=known) == "known"
    revoked.unlink()
    with pytest.raises(HostKeyError, match="cannot be read"):
        meet(sshd, "ed", line, known=known)


def test_hashed_names(keys: Keys, tmp_path: Path) -> None:
    """With HashKnownHosts a new name is written so that only who knows it finds it, as ssh-keygen does."""
    path = tmp_path / "known_hosts"
    rules = host_keys_module.Rules(hash_names=True)
    key = blob(keys.public["ed"])
    assert verify(key, [str(path)], port=2222, policy="accept-new", rules=rules) is not None
    assert HOST not in path.read_text()
    assert verify(key, [str(path)], port=2222) is None
    assert P in run(str(KEYGEN), "-F", P, "-f", str(path)).stdout


def test_check_host_ip(keys: Keys, tmp_path: Path) -> None:
    """With CheckHostIP, another key for the address is a changed one; else, and for loopback, it is not."""
    path = tmp_path / "known_hosts"
    path.write_bytes(fill(f"{H} {{ed}}\n192.0.2.7,127.0.0.1 {{ed2}}\n192.0.2.8 {{ed}}\n", keys))
    key, files = blob(keys.public["ed"]), [str(path)]
    rules = host_keys_module.Rules(check_address=True)
    with pytest.raises(ChangedHostKeyError):
        verify(key, files, address="192.0.2.7", rules=rules)
    assert verify(key, files, address="192.0.2.7") is None
    for address in ("192.0.2.8", "192.0.2.9", "127.0.0.1", None):
        assert verify(key, files, address=address, rules=rules) is None


def test_required_rsa_size(sshd: Sshd) -> None:
    """An RSA host key of fewer bits than RequiredRSASize asks for is refused; others have no such size."""
    known = f"{H} {{rsa}}\n{H} {{ed}}\n"
    assert meet(sshd, "rsa", "RequiredRSASize 2048", known=known) == "known"
    assert meet(sshd, "ed", "RequiredRSASize 4096", known=known) == "known"
    with pytest.raises(HostKeyError, match="has 2048 bits, and RequiredRSASize asks for 2049"):
        meet(sshd, "rsa", "RequiredRSASize 2049", known=known)


@pytest.mark.parametrize(
    "line", ["*ed25519*", "ssh-ed25519", "-rsa*", "+rsa-sha2-512", "rsa-sha2-512", "-*25519"]
)
def test_ca_signature_algorithms(line: str, sshd: Sshd) -> None:
    """A certificate that was signed with what CASignatureAlgorithms leaves out vouches for nobody."""
    known = f"@cert-authority {H} {{ca}}\n"
    line = f"CASignatureAlgorithms {line}"
    ours = meet(sshd, "cert", line, known=known)
    theirs, _ = sshd.connect("cert", H, [str(sshd.folder / "known")], 22, "-o", line.replace(" ", "=", 1))
    assert (ours == "known") == (theirs == "known")
    assert meet(sshd, "cert", line, known=f"@revoked * {{ca}}\n{known}") == "revoked"
    assert meet(sshd, "ed", line, known=f"{H} {{ed}}\n") == "known"


@pytest.mark.parametrize("line", ["", "yes", "true", "ask", "accept-new", "no", "off", "false"])
def test_strict_host_key_checking(line: str, sshd: Sshd) -> None:
    """Its yes has nobody asked; nothing else of it makes us trust more or less than host_keys says."""
    asked: list[Question] = []

    def prompt(question: Question) -> str:
        asked.append(question)
        return "yes"

    config = f"StrictHostKeyChecking {line}" if line else ""
    strict = line in ("yes", "true")
    for policy, verdict_, questions in (
        ("strict", "unknown", 0),
        ("ask", "unknown" if strict else "known", 0 if strict else 1),
        ("accept-new", "known", 0),
    ):
        asked.clear()
        said = meet(sshd, "ed", config, host_keys=policy, prompt=prompt)
        assert (said, len(asked)) == (verdict_, questions), policy
    if strict:
        with pytest.raises(UnknownHostKeyError, match=r"nobody is asked: StrictHostKeyChecking yes .*line 1"):
            meet(sshd, "ed", config, host_keys="ask", prompt=prompt, verbatim=True)


@pytest.mark.parametrize("line", ["GSSAPIKeyExchange yes", "VerifyHostKeyDNS yes", "VerifyHostKeyDNS ask"])
def test_other_ways_to_know_a_key(line: str, sshd: Sshd) -> None:
    """Where ssh might know the host by other means, which we do not follow, the error names the line."""
    keyword = line.split()[0]
    with pytest.raises(UnknownHostKeyError, match=rf"{keyword} is not followed \(.*line 1\)"):
        meet(sshd, "ed", line, verbatim=True)
    assert meet(sshd, "ed", line, known=f"{H} {{ed}}\n") == "known"


#: What key revocation lists are made of; the certificate has the serial number 77.
LISTS = [
    *("{ed}", "{ed2}", "{ca}", "{cert}", "serial: 77", "serial: 1000-2000", "serial: 7-0xffffffff"),
    *("serial: 70\nserial: 72\nserial: 77", "serial: 70\nserial: 72\nserial: 76\nserial: 78-90"),
    *("serial: 1\nserial: 1000000\nserial: 77", "id: nobody", "id: cert", "key: {ed}", "sha1: {ed}"),
    *("sha256: {ed}", "sha256: {ca}", "sha1: {ed2}", ""),
]


@pytest.mark.parametrize("number", range(len(LISTS)))
def test_revocation_lists(number: int, sshd: Sshd, tmp_path: Path) -> None:
    """A binary list (ssh-keygen -k) revokes what it does with ssh: keys, CAs, certificates, in all ways."""
    public = {name: sshd.keys.folder / f"{name}.pub" for name in ("ed", "ed2", "ca")}
    texts = {name: path.read_text().strip() for name, path in public.items()}
    spec = LISTS[number].format(**texts, cert=sshd.keys.public["cert"])
    (tmp_path / "spec").write_text(f"{spec}\n")
    keygen("-k", "-f", str(tmp_path / "krl"), "-s", str(public["ca"]), str(tmp_path / "spec"))
    known = f"{H} {{ed}}\n@cert-authority {H} {{ca}}\n"
    line = f"RevokedHostKeys {tmp_path / 'krl'}"
    for present in ("ed", "cert"):
        ours = meet(sshd, present, line, known=known)
        option = line.replace(" ", "=", 1)
        theirs, _ = sshd.connect(present, H, [str(sshd.folder / "known")], 22, "-o", option)
        assert (ours == "known") == (theirs == "known"), (present, ours, theirs)


def test_damaged_revocation_list(sshd: Sshd, tmp_path: Path) -> None:
    """One that cannot be read could have the key: it is an error, wherever it is cut off or changed."""
    path = tmp_path / "krl"
    keygen("-k", "-f", str(path), str(sshd.keys.folder / "ed2.pub"))
    whole = path.read_bytes()
    key = host_keys_module.public_keys.read(blob(sshd.keys.public["ed"]))
    assert not revocation_list.revokes(whole, key)
    for bad in (whole[:-1], whole[:40], whole + b"\x09\0\0\0\0", whole[:11] + b"\2" + whole[12:]):
        with pytest.raises(ValueError, match=r"string|version|part"):
            revocation_list.revokes(bad, key)
    path.write_bytes(whole[:-1])
    with pytest.raises(HostKeyError, match=r"revocation list .* cannot be read"):
        meet(sshd, "ed", f"RevokedHostKeys {path}", known=f"{H} {{ed}}\n")
