"""The ssh config: the same answers as ``ssh -G``, and a word about each line that we cannot follow."""

from __future__ import annotations

import functools
import json
import os
import pwd
import random
import re
import shlex
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from beds import until
from bokeh_ssh._core.errors import ConfigError
from bokeh_ssh._core.host import Host
from bokeh_ssh._ssh.config import keywords, lookup, syntax
from bokeh_ssh._ssh.config.lookup import COMMAND, HostConfig, load
from bokeh_ssh._ssh.config.match_exec import holds
from bokeh_ssh._ssh.route import find_hop
from local_runner import processes
from skips import missing

SSH = shutil.which("ssh")


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Give a function that writes a config, in a home that ssh and Python agree about."""
    monkeypatch.setenv("HOME", pwd.getpwuid(os.getuid()).pw_dir)

    def write(text: str, name: str = "config") -> str:
        path = tmp_path / name
        path.write_bytes(text.encode())
        path.chmod(0o600)
        return str(path)

    return write


def ssh_g(path: str, alias: str, *options: str) -> dict[str, list[str]] | str:
    """Run ``ssh -G``: what it says by keyword, or its complaint."""
    if SSH is None:
        missing("there is no ssh here")
    env = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(
        [str(SSH), "-G", "-F", path, *options, "--", alias, *COMMAND.split()],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=env,
        timeout=20,
        check=False,
    )
    if done.returncode:
        return done.stderr
    said: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        keyword, _, value = line.partition(" ")
        said.setdefault(keyword, []).append(value)
    return said


def ssh_version() -> tuple[int, int]:
    text = subprocess.run([str(SSH), "-V"], capture_output=True, text=True, check=True).stderr
    found = re.search(r"OpenSSH_(\d+)\.(\d+)", text)
    assert found
    return int(found[1]), int(found[2])


@functools.cache
def ssh_defaults(_program: str | None) -> dict[str, list[str]]:
    """Return what ``ssh -G`` prints where no config says anything."""
    said = ssh_g("none", "a")
    assert not isinstance(said, str), said
    return said


def as_ssh_g(config: HostConfig, said: dict[str, list[str]]) -> dict[str, list[str]]:
    """Write our answer as ``ssh -G`` does; what no line says is taken from its defaults."""
    defaults = ssh_defaults(SSH)

    def or_default(keyword: str, value: object) -> list[str]:
        return defaults.get(keyword, []) if value is None else [str(value)]

    def flag(value: bool | None) -> str | None:
        return None if value is None else "yes" if value else "no"

    def whole(value: float | None) -> int | None:
        return None if value is None else int(value)

    def said_of(value: bool | None) -> str | None:
        """What ssh says of a keyword that has more words than yes and no."""
        return None if value is None else "true" if value else "false"

    def commas(value: tuple[str, ...] | None) -> str | None:
        return None if value is None else ",".join(value)

    def adding(value: tuple[str, float] | None) -> str | None:
        if value is None or not value[1]:
            return None if value is None else {"yes": "true", "no": "false"}.get(value[0], value[0])
        return f"{'confirm ' * (value[0] == 'confirm')}{value[1]:.0f}"

    def listed(value: tuple[str, ...] | None) -> str | None:
        return None if value is None else " ".join(value) or "none"

    return {
        "hostname": [config.hostname],
        "user": or_default("user", config.user),
        "port": or_default("port", config.port),
        "identityfile": list(config.identity_files) or defaults.get("identityfile", []),
        "certificatefile": list(config.certificate_files),
        "identitiesonly": ["yes" if config.identities_only else "no"],
        "identityagent": or_default("identityagent", config.identity_agent),
        "userknownhostsfile": or_default("userknownhostsfile", listed(config.user_known_hosts)),
        "globalknownhostsfile": or_default("globalknownhostsfile", listed(config.global_known_hosts)),
        "hostkeyalias": [config.host_key_alias] if config.host_key_alias else [],
        "connecttimeout": or_default("connecttimeout", whole(config.connect_timeout)),
        "serveraliveinterval": or_default("serveraliveinterval", whole(config.server_alive_interval)),
        "serveralivecountmax": or_default("serveralivecountmax", config.server_alive_count),
        "proxyjump": [",".join(config.proxy_jump)] if config.proxy_jump else [],
        "compression": or_default("compression", flag(config.compression)),
        "controlmaster": or_default("controlmaster", config.control_master),
        "controlpath": [config.control_path] if config.control_path else [],
        "gssapiauthentication": or_default("gssapiauthentication", flag(config.gssapi_authentication)),
        "gssapidelegatecredentials": or_default(
            "gssapidelegatecredentials", flag(config.gssapi_delegate_credentials)
        ),
        **({"gssapitrustdns": [flag(config.gssapi_trust_dns)]} if "gssapitrustdns" in said else {}),
        **({"gssapikeyexchange": [flag(config.gssapi_key_exchange)]} if "gssapikeyexchange" in said else {}),
        "gssapiclientidentity": [config.gssapi_client_identity] if config.gssapi_client_identity else [],
        "gssapiserveridentity": [config.gssapi_server_identity] if config.gssapi_server_identity else [],
        "batchmode": or_default("batchmode", flag(config.batch_mode)),
        "pubkeyauthentication": or_default("pubkeyauthentication", said_of(config.pubkey_authentication)),
        "passwordauthentication": or_default("passwordauthentication", flag(config.password_authentication)),
        "kbdinteractiveauthentication": or_default(
            "kbdinteractiveauthentication", flag(config.kbd_interactive_authentication)
        ),
        "preferredauthentications": or_default(
            "preferredauthentications", commas(config.preferred_authentications)
        ),
        "numberofpasswordprompts": or_default("numberofpasswordprompts", config.password_prompts),
        "addkeystoagent": or_default("addkeystoagent", adding(config.add_keys_to_agent)),
        "addressfamily": or_default("addressfamily", FAMILIES[config.address_family]),
        "bindaddress": [config.bind_address] if config.bind_address else [],
        "bindinterface": [config.bind_interface] if config.bind_interface else [],
        "connectionattempts": or_default("connectionattempts", config.connection_attempts),
        "hashknownhosts": or_default("hashknownhosts", flag(config.hash_known_hosts)),
        "checkhostip": or_default("checkhostip", flag(config.check_host_ip)),
        "nohostauthenticationforlocalhost": [flag(config.unchecked_localhost)],
        "knownhostscommand": list(config.known_hosts_command.words) if config.known_hosts_command else [],
        "pkcs11provider": [config.pkcs11_provider] if config.pkcs11_provider else [],
        "verifyhostkeydns": ["true" if config.verify_host_key_dns else "false"],
        "requiredrsasize": or_default("requiredrsasize", config.required_rsa_size),
        "revokedhostkeys": [" ".join(config.revoked_host_keys)] if config.revoked_host_keys else [],
    }


FAMILIES = {None: "any", socket.AF_INET: "inet", socket.AF_INET6: "inet6"}


def check_same(path: str, alias: str, user: str | None = None, port: int | None = None) -> HostConfig | None:
    """Compare our answer with ssh's; None where both refuse."""
    options = [*(["-l", user] if user else []), *(["-p", str(port)] if port else [])]
    said = ssh_g(path, alias, *options)
    refused = ""
    try:
        config = load(path, alias, user=user, port=port)
    except ConfigError as exc:
        refused = str(exc)
    if isinstance(said, str):
        assert refused or "jumphost loop" in said, said  # which is seen when the route is put together
        return None
    assert not refused
    tokens = {"h": config.hostname, "n": alias, "p": said["port"][0], "r": said["user"][0]}
    command = syntax.expand(said.get("proxycommand", [""])[0], tokens)
    if config.proxy_command and not command:
        # Before 10.3, an earlier ProxyJump none was the end of a ProxyCommand.
        assert ssh_version() < (10, 3)
        assert "proxyjump" not in said
    else:
        assert (config.proxy_command or "") == command
    ours = as_ssh_g(config, said)
    if "identityfile" in said:  # ssh skips a "none" among others when it loads them
        said["identityfile"] = [file for file in said["identityfile"] if file != "none"] or ["none"]
    said["hostname"] = [said["hostname"][0].lower()]  # ssh -G shows HostName as it was written
    said["knownhostscommand"] = [w for line in said.get("knownhostscommand", ()) for w in shlex.split(line)]
    said["revokedhostkeys"] = [line for line in said.get("revokedhostkeys", ()) if line != "none"]
    if said["connecttimeout"] == ["0"]:  # which is the system's own, too
        said["connecttimeout"] = ["none"]
    if config.batch_mode and config.server_alive_interval is None:  # Debian's ssh takes 300
        said["serveraliveinterval"] = ["0"]
    if said["verifyhostkeydns"] == ["ask"]:
        said["verifyhostkeydns"] = ["true"]
    if said.get("identityagent") == ["SSH_AUTH_SOCK"]:
        del said["identityagent"]
    if "gssapiauthentication" not in said:  # an ssh that was built without
        ours = {keyword: value for keyword, value in ours.items() if not keyword.startswith("gssapi")}
    assert ours == {keyword: said.get(keyword, []) for keyword in ours}
    return config


SAME = {
    "nothing": "",
    "host": "Host a\n User u\nHost b\n User v\n",
    "first value wins": "Port 1\nPort 2\nHost a\nPort 3\n",
    "specific before general": "Host a\n Port 3\nHost *\n Port 4\n User u\n",
    "negation": "Host * !a\n User u\nHost !b\n User v\nHost * !b\n User w\n",
    "negation wins in any order": "Host !a a *\n User u\n",
    "wildcards": "Host ?\n User u\nHost a*a\n Port 9\nHost *a\n HostKeyAlias X\n",
    "case of the name": "Host A\n User u\nMatch host A\n User v\n",
    "hostname": "Host a\n HostName %h.Example.%%.ORG\n",
    "include of nobody's": "Include ~no-such-user/x\nUser u\n",
    "include with a variable that is not set": "Include ${NO_SUCH_VARIABLE}/x\nUser u\n",
    "hostname first wins": "HostName x\nHostName y\n",
    "key=value": 'Port=99\nUser = "u"\nHostKeyAlias= k\nCompression =yes\n',
    "quoted keyword": '"Port" 99\n',
    "tabs and blanks": "\t Port\t 99 \t\n  Host\ta \t b\n\tUser\tu\n",
    "form feed and CRLF": "Port 99\f\r\nHost a\r\n  User u\r\n",
    "comments": "# Port 1\nPort 2 # Port 3\n  #x\nUser u#v\n",
    "quotes": 'IdentityFile "/a b/c"\nIdentityFile \'/d "e"\'\nIdentityFile /f\\ g\nIdentityFile /h"i j"k\n',
    "backslashes": 'IdentityFile "/a\\"b"\nIdentityFile /c\\\\d\nIdentityFile /e\\f\n',
    "case of keywords": "PORT 99\nuSer u\nHOST a\nIDENTITIESONLY yes\nidentitiesonly no\n",
    "identity files add up": "IdentityFile /x\nHost a\nIdentityFile /y\nIdentityFile /x\n",
    "identity file none": "IdentityFile none\n",
    "flags": "IdentitiesOnly TRUE\nCompression YES\n",
    "known hosts": 'UserKnownHostsFile /x "/y z"\nGlobalKnownHostsFile /g1 /g2\nUserKnownHostsFile /w\n',
    "known hosts with tokens": "UserKnownHostsFile ~/x /%h/%n/%p/%r/%u/%l/%L/%k/%i%d/%% ${HOME}/k\n",
    "global known hosts as it stands": "GlobalKnownHostsFile ~/%h\n",
    "agent": "IdentityAgent ~/%r.sock\nUser u\n",
    "agent none": "IdentityAgent none\n",
    "times": "ConnectTimeout 1m30\nServerAliveInterval 2H\nServerAliveCountMax 7\n",
    "quoted blank before a number": 'CanonicalizeMaxDots " 1"\nPort " 22"\n',
    "time none": "ConnectTimeout none\nConnectTimeout 5\nServerAliveInterval 0\n",
    "alias in lower case": "HostKeyAlias BIG\n",
    "match host": "Match host a,c\n User u\nMatch host !a,*\n Port 3\n",
    "match negated": "Match !host a\n User u\nMatch !host b\n Port 4\n",
    "match sees hostname": "Host a\n HostName x%h\nMatch host xa\n User u\nMatch originalhost a\n Port 5\n",
    "match user": "User u\nMatch user u,v\n Port 5\nMatch user root,me\n HostKeyAlias k\n",
    "match user by default": f"Match user {pwd.getpwuid(os.getuid()).pw_name}\n Port 5\n",
    "match localuser": f"Match localuser {pwd.getpwuid(os.getuid()).pw_name}\n Port 5\n",
    "match several": "Match host a user u\n Port 5\nUser u\nMatch host a user u\n Port 6\n",
    "match all": "Match all\n Port 5\n",
    "match !all": "Match !all\n Port 5\n",
    "match with =": "Match host=a user=root\n Port 5\n",
    "match quoted": 'Match host "a,b" \n Port 5\n',
    "match with comment": "Match host a # user nobody\n Port 5\n",
    "match final": "Match final host z\n Port 5\nHost a\n HostName Z\n",
    "match final all": "Match final all\n Port 5\n",
    "final sees the new name": "Match final host zz\n User f\nHost zz\n Port 7\nHost a\n HostName zz\n",
    "canonical alone is never": "Match canonical\n Port 5\n",
    "canonical beside final": "Match canonical\n Port 5\nMatch final\n User u\n",
    "not canonical": "Match !canonical\n Port 5\n",
    "jump": "ProxyJump b\n",
    "jumps": "ProxyJump u@b:99,c\n",
    "jump none": "ProxyJump none\nProxyJump b\n",
    "jump with comment": "ProxyJump b # c\n",
    "jump before command": "ProxyJump b\nProxyCommand /bin/x\n",
    "command before jump": "ProxyCommand /bin/x\nProxyJump b\n",
    "command none before jump": "ProxyCommand none\nProxyJump b\n",
    "jump none before command": "ProxyJump none\nProxyCommand /bin/x\n",
    "command for others": "Host b\n ProxyCommand /bin/x\n",
    "exec for others": "Match host b exec /no/such/program\n Port 3\n",
    "certificates": "CertificateFile /a\nCertificateFile /b\nHost a\n CertificateFile /a\n",
    "exec": "Match exec true\n Port 3\n",
    "exec false": "Match exec false\n Port 3\n",
    "exec with more": "Match host a exec true user root\n Port 3\n",
    "exec before others": 'Match exec "exit 0" host b\n Port 3\n',
    "not exec": 'Match !exec "exit 3"\n Port 3\n',
    "exec with tokens": 'User u\nMatch exec "test %h-%n-%r-%% = a-a-u-%%"\n Port 3\n',
    "exec after HostName": 'HostName x\nMatch exec "test %h = x"\n Port 3\n',
    "exec for others with an unknown token": 'Match host b exec "test %z"\n Port 3\n',
    "exec of what is not there": "Match exec /no/such/program\n Port 3\n",
    "exec in the user's shell": "Match exec \"[ -n '$SHELL' ] && true\"\n Port 3\n",
    "exec chooses the way": "Match exec true\n ProxyJump b\nMatch exec false\n ProxyJump c\n",
    "canonicalize without domains": "CanonicalizeHostname yes\nMatch canonical\n Port 5\n",
    "canonicalize with dots enough": "HostName a.b.c\nCanonicalizeHostname yes\nCanonicalDomains x.invalid\n",
    "canonicalize behind a jump": "ProxyJump b\nCanonicalizeHostname yes\nCanonicalDomains x.invalid\n",
    "address in one way": "HostName 0:0::0:1\n",
    "methods": "PubkeyAuthentication no\nPasswordAuthentication No\nKbdInteractiveAuthentication FALSE\n",
    "methods by older names": "SKeyAuthentication no\nDSAAuthentication no\n",
    "older name first": "ChallengeResponseAuthentication no\nKbdInteractiveAuthentication yes\n",
    "newer name first": "KbdInteractiveAuthentication yes\nTISAuthentication no\n",
    "keys in two more ways": "Host a\n PubkeyAuthentication no\nPubkeyAuthentication unbound\n",
    "order of methods": "Host b\n PreferredAuthentications a\nHost a\n PreferredAuthentications x,,y,X\n",
    "prompts": "NumberOfPasswordPrompts 0\nNumberOfPasswordPrompts 5\n",
    "batch": "BatchMode yes\nBatchMode no\n",
    "add keys": "AddKeysToAgent Ask\nAddKeysToAgent yes\n",
    "add keys confirm": "AddKeysToAgent confirm\n",
    "add keys confirm for a time": "AddKeysToAgent CONFIRM 1h30\n",
    "add keys for a time": "AddKeysToAgent 5m\n",
    "add keys for no time": "AddKeysToAgent 0\n",
    "add keys for others": "Host b\n AddKeysToAgent yes\n",
    "strict host key checking is not ours": "StrictHostKeyChecking no\n",
    # both refuse
    "bad port": "Port x\n",
    "bad port elsewhere": "Host b\n Port 70000\n",
    "port 0": "Port 0\n",
    "two ports": "Port 1 2\n",
    "no value": "Port\n",
    "empty value": 'User ""\n',
    "open quote": 'IdentityFile "/x\n',
    "bad time": "ConnectTimeout 5x\n",
    "bad flag": "IdentitiesOnly maybe\n",
    "bad compression": "Compression 6\n",
    "bad method switch": "PasswordAuthentication maybe\n",
    "bad key switch": "PubkeyAuthentication bound\n",
    "no methods": 'PreferredAuthentications ""\n',
    "two lists of methods": "PreferredAuthentications a b\n",
    "prompts below none": "NumberOfPasswordPrompts -1\n",
    "prompts beyond number": "NumberOfPasswordPrompts 2147483648\n",
    "prompts in hex": "NumberOfPasswordPrompts 0x3\n",
    "add keys none": "AddKeysToAgent none\n",
    "add keys ask for a time": "AddKeysToAgent ask 5m\n",
    "add keys yes for a time": "AddKeysToAgent yes 5m\n",
    "add keys with more": "AddKeysToAgent confirm 5m 6m\n",
    "add keys for nothing": 'AddKeysToAgent ""\n',
    "add keys confirm nothing": 'AddKeysToAgent confirm ""\n',
    "none among others": "UserKnownHostsFile /x none\n",
    "empty host": "Host\n",
    "empty pattern": 'Host ""\n',
    "match nothing": "Match\n",
    "match without argument": "Match host\n Port 5\n",
    "match all and more": "Match all host a\n",
    "match too many and all": "Match host a user u all\n",
    "unknown token": "UserKnownHostsFile /%z\n",
    "unset variable": "UserKnownHostsFile /${NO_SUCH_VARIABLE}\n",
    "hostname with a token that it has not": "HostName %n\n",
    "nobody's home": "UserKnownHostsFile ~no-such-user/x\n",
}


@pytest.mark.parametrize("name", SAME)
def test_same_as_ssh(name: str, write) -> None:
    """Whatever a config says, we take from it what ssh does; what ssh refuses, we refuse."""
    check_same(write(SAME[name]), "a")


def test_options_first(write) -> None:
    """What the caller gives counts before the config, and for its tokens and Match lines."""
    path = write("User c\nPort 5\nMatch user me\n HostKeyAlias k\nUserKnownHostsFile /%r/%p\n")
    config = check_same(path, "a", "me", 7)
    assert config is not None
    assert (config.user, config.port, config.host_key_alias) == ("me", 7, "k")
    assert config.user_known_hosts == ("/me/7",)


@pytest.mark.parametrize("alias", ["a", "A", "ab", "b", "127.0.0.1", "::1", "FE80:0::1"])
def test_names(alias: str, write) -> None:
    """Names are taken as ssh takes them: Host tells upper case apart, an address is written in one way."""
    check_same(write("Host a\n User u\nHost *b\n Port 4\nHost *:*\n HostKeyAlias six\n"), alias)


WORDS = st.sampled_from(["a", "b", "ab", "*", "?", "a*", "*b", "!a", "!b", "!*", "A"])
PATTERNS = st.lists(WORDS, min_size=1, max_size=3)
CRITERION = st.one_of(
    st.tuples(
        st.sampled_from(["host", "originalhost", "user", "localuser", "!host", "!user", "Host"]),
        st.sampled_from([" ", "=", "  "]),
        PATTERNS.map(",".join),
    ).map("".join),
    st.sampled_from(["final", "canonical", "all", "!all", "!canonical"]),
)
SETTING = st.sampled_from(
    [
        *("Port 1", "Port=2", "User a", "User b", "User root", "HostName a", "HostName %hb", "HostName B"),
        *("IdentityFile /1", 'IdentityFile "/2"', "IdentityFile none", "IdentitiesOnly yes"),
        *("ProxyJump c", "ProxyJump u@b:7,c", "ProxyJump none", "ProxyCommand none", "ProxyCommand /x %h"),
        *("UserKnownHostsFile /%n/%h /2", "HostKeyAlias K", "IdentityAgent /%p", "Compression no"),
        *("ConnectTimeout 5", "ConnectTimeout none", "ServerAliveInterval 1m", "ServerAliveCountMax 2"),
        *("PasswordAuthentication no", "PubkeyAuthentication yes", "SKeyAuthentication no", "BatchMode yes"),
        *("PreferredAuthentications b,a", "NumberOfPasswordPrompts 2", "AddKeysToAgent confirm 1h"),
        *("# Port 9", "", "GlobalKnownHostsFile none", "CertificateFile /1", "CertificateFile /2"),
    ]
)
LINE = st.one_of(
    PATTERNS.map(lambda words: "Host " + " ".join(words)),
    st.lists(CRITERION, min_size=1, max_size=3).map(lambda words: "Match " + " ".join(words)),
    SETTING.map(lambda line: "  " + line),
    SETTING.map(lambda line: line.upper() if line.startswith("Port") else "\t" + line),
    st.just("Include inc"),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(LINE, max_size=12),
    more=st.lists(LINE, max_size=5),
    alias=st.sampled_from(["a", "b", "ab"]),
)
def test_any_config(lines: list[str], more: list[str], alias: str, write) -> None:
    """Any mixture of blocks, matches, includes and values gives what ``ssh -G`` gives."""
    inner = write("\n".join(line for line in more if "Include" not in line), "inc")
    path = write("\n".join(lines).replace("Include inc", f"Include {inner}") + "\n")
    check_same(path, alias)


# Many configs at once. What a block says is put together at random, from every keyword that is followed and
# many that are not; ``ssh`` is the one of this machine, and what that one does not know is left out.

VALUES: dict[str, list[str]] = {
    "AddKeysToAgent": ["yes", "ask", "confirm 1h", "5m", "No"],
    "AddressFamily": ["inet", "INET6", "any"],
    "BatchMode": ["yes", "no"],
    "BindAddress": ["127.0.0.1", "::1", '"x y"'],
    "BindInterface": ["lo", "eth9"],
    "CanonicalDomains": ["none"],
    "CanonicalizeFallbackLocal": ["yes"],
    "CanonicalizeHostname": ["no", "yes", "always"],
    "CanonicalizeMaxDots": ["0", "3"],
    "CanonicalizePermittedCNAMEs": ["none"],
    "CertificateFile": ["/c1", '"/c 2"'],
    "CheckHostIP": ["yes", "no"],
    "CASignatureAlgorithms": ["ssh-ed25519", "-rsa*"],
    "Ciphers": ["aes128-ctr", "+aes256-ctr"],
    "Compression": ["yes", "NO"],
    "ConnectionAttempts": ["1", "3", "+2"],
    "ControlMaster": ["auto", "no", "YES", "ask", "autoask", "true"],
    "ControlPath": ["none", "NONE", "~/.ssh/%r@%h:%p", "/%n-%L-%i-%u-%k", "${HOME}/c", '"/a b"'],
    "ConnectTimeout": ["5", "1m30", "none", "0", "2H", "1d2h3m4s", "1.5", ".5"],
    "GlobalKnownHostsFile": ["/g1 /g2", "none", '"/g 3"', "~/g"],
    "GSSAPIAuthentication": ["yes", "no"],
    "GSSAPIClientIdentity": ["joe", '"joe doe"'],
    "GSSAPIDelegateCredentials": ["TRUE", "no"],
    "GSSAPIKeyExchange": ["yes", "no"],
    "GSSAPIServerIdentity": ["%h.x", "B"],
    "GSSAPITrustDns": ["yes", "no"],
    "HashKnownHosts": ["yes", "no"],
    "HostKeyAlgorithms": ["ssh-ed25519"],
    "HostKeyAlias": ["K", "key.alias", '"k k"'],
    "HostName": [
        "a",
        "%h.x",
        "B",
        "127.0.0.1",
        "::1",
        "127.1",
        "0x7f000001",
        "fe80::1%%lo",
        "x%%y",
        "a.b.c.d",
    ],
    "IdentitiesOnly": ["yes", "FALSE", "true"],
    "IdentityAgent": ["none", "SSH_AUTH_SOCK", "~/agent", "/%r/%p/%n", "${HOME}/a", "/%C-%j"],
    "IdentityFile": ["/1", '"/2 3"', "none", "/4\\ 5"],
    "IdentityFile2": ["/old"],
    "KbdInteractiveAuthentication": ["no", "yes"],
    "KexAlgorithms": ["curve25519-sha256"],
    "KnownHostsCommand": ["/bin/x %H %I", "none", '/bin/x "a b" %t'],
    "MACs": ["hmac-sha2-256"],
    "NoHostAuthenticationForLocalhost": ["yes", "no"],
    "NumberOfPasswordPrompts": ["0", "2"],
    "PasswordAuthentication": ["no", "yes"],
    "PKCS11Provider": ["/p.so", "NONE", '"/p q.so"'],
    "SmartcardDevice": ["/q.so"],
    "Port": ["1", "65535", "ssh", "http", "+99", "0022"],
    "PreferredAuthentications": ["password,publickey", "x"],
    "ProxyCommand": ["none", "/x %h %p", "/y %r-%n %%", "'/z w'", "NONE", "/q # c"],
    "ProxyJump": ["c", "u@b:7,c", "none", "NONE", "u@c:ssh", "b # x", "ssh://u@b:9", "d,e@f"],
    "PubkeyAcceptedAlgorithms": ["ssh-ed25519"],
    "PubkeyAuthentication": ["yes", "no"],
    "RevokedHostKeys": ["/r1", "none"],
    "ServerAliveCountMax": ["2", "0"],
    "ServerAliveInterval": ["1m", "none", "7"],
    "SessionType": ["none", "default"],
    "SKeyAuthentication": ["no"],
    "ProtocolKeepAlives": ["8"],
    "Tag": ["t1", "t2"],
    "User": ["a", "B", "root", '"joe doe"', "DOM\\joe", "u#x"],
    "UserKnownHostsFile": [
        "/%n/%h /2",
        "none",
        "~/%u-%r",
        "/%C/%j",
        "/%k/%i/%L",
        '"/a b" ~/c ${HOME}/d',
        "%d/x",
    ],
    # Passed over.
    "ChannelTimeout": ["session=5m"],
    "ControlPersist": ["10m"],
    "DynamicForward": ["1080"],
    "EscapeChar": ["none"],
    "FingerprintHash": ["md5"],
    "ForwardAgent": ["yes"],
    "ForwardX11": ["yes"],
    "IgnoreUnknown": ["Novel*"],
    "IPQoS": ["ef cs0"],
    "LocalForward": ["5000 localhost:6000"],
    "LogLevel": ["ERROR"],
    "ObscureKeystrokeTiming": ["interval:50"],
    "RekeyLimit": ["1G 1h"],
    "RemoteForward": ["5000 localhost:6000"],
    "RequestTTY": ["force"],
    "RequiredRSASize": ["2048"],
    "SendEnv": ["LANG LC_*"],
    "SetEnv": ["A=b"],
    "StrictHostKeyChecking": ["no", "accept-new", "yes", "OFF", "ask"],
    "TCPKeepAlive": ["no"],
    "UpdateHostKeys": ["ask"],
    "VerifyHostKeyDNS": ["yes", "Ask", "no"],
    "VersionAddendum": ["me"],
    "VisualHostKey": ["yes"],
    "WarnWeakCrypto": ["no"],
}
#: What no ssh takes.
BAD = [
    *("Port x", "Port 0", "Port 65536", "Port -1", 'Port ""', "Port 1 2", "Port", "Port no-such-service"),
    *("User", 'User ""', "User a b", 'IdentityFile "/x', "ConnectTimeout 5x", "ConnectTimeout -1"),
    *("AddressFamily inet5", "ConnectionAttempts -1", "ConnectionAttempts x", "CheckHostIP maybe"),
    *("ServerAliveCountMax 2147483648", "CanonicalizeHostname maybe", "CanonicalDomains none x"),
    *("CanonicalDomains .x", "CanonicalizePermittedCNAMEs x", "Host", 'Host ""', "Match", "Match #x"),
    *("Match host", "Match all host a", "ProxyJump b,,c", "ProxyJump @b", "ProxyJump b:x", "ProxyJump #b"),
    *("RevokedHostKeys none /x", "GlobalKnownHostsFile /x none", "HashKnownHosts 2", "Include"),
    *("StrictHostKeyChecking maybe", "IgnoreUnknown", "CASignatureAlgorithms"),
    *("BindAddress", 'HostName ""', "HostKeyAlias a b", '"Port"=9', "ProxyCommand", 'ProxyCommand "x'),
    *("IdentityAgent $a-b", "PubkeyAuthentication bound", "SessionType x", "Tag", "KnownHostsCommand"),
    *("Match localnetwork 10.0.0.1/8", "Match localnetwork 10.0.0.0/255.0.0.0", "Match host b exec 'x %z'"),
    *("Match localnetwork 127.0.0.0/8,::1/", "Match localnetwork x", "Match tagged", "Match version"),
    "Match user",
]
NAMES = ["a", "b", "ab", "A", "a.b", "127.0.0.1", "::1"]
PATTERN_WORDS = ["a", "b", "ab", "*", "?", "a*", "*b", "!a", "!b", "!*", "A", "*.*", "127.*", "*:*"]
MATCHES = [
    *("all", "!all", "final", "!final", "canonical", "!canonical", "final all", "canonical all"),
    *("localnetwork 127.0.0.0/8", "localnetwork 203.0.113.0/24,::1/128", "!localnetwork 127.0.0.1"),
    *(
        "tagged t1",
        "tagged t*",
        'tagged ""',
        "!tagged t1",
        "tagged=t2",
        "sessiontype exec",
        "sessiontype none",
    ),
    *("!sessiontype shell", 'command ""', "command *sh*", "!command=x", "version OpenSSH_1*", "version x"),
    *("exec true", "exec false", "!exec 'exit 3'", 'exec "test %h = a"', 'exec "test %r-%k-%p = root-a-22"'),
    *('exec "test %j = c"', 'exec "test %n = %h"', "host=a", "user root,a", "!user root", "localuser root"),
]


def known_to_ssh(write) -> tuple[dict[str, list[str]], list[str]]:
    """List the keywords with their values, and the criteria, that the ssh of this machine takes."""

    def takes(line: str) -> bool:
        return not isinstance(ssh_g(write(f"Host b\n {line}\nHost *\n {line}\n", "probe"), "zz"), str)

    # Before 10.0, "!final" too asked for a second reading.
    said = ssh_g(write("Match !final\nMatch canonical\n Port 5\n"), "a")
    old = not isinstance(said, str) and said["port"] == ["5"]
    criteria = [m for m in MATCHES if takes(f"Match {m}") and not (old and m == "!final")]
    values = {name: [value for value in some if takes(f"{name} {value}")] for name, some in VALUES.items()}
    return {name: some for name, some in values.items() if some}, criteria


class Configs:
    """Configs at random, the same for the same seed."""

    def __init__(self, seed: int, values: dict[str, list[str]], criteria: list[str]) -> None:
        self._random = random.Random(seed)
        self._values = values
        self._criteria = criteria

    def _patterns(self, between: str) -> str:
        return between.join(self._random.choices(PATTERN_WORDS, k=self._random.randint(1, 3)))

    def _criterion(self) -> str:
        if self._random.random() < 0.4:
            name = self._random.choice(["host ", "originalhost ", "user ", "!host ", "Host=", "localuser "])
            return name + self._patterns(",")
        return self._random.choice(self._criteria)

    def _setting(self) -> str:
        choose = self._random.choice
        name = choose(list(self._values))
        value = choose(self._values[name])
        plain = set(value).isdisjoint(" \"'\\#%,=$") and name not in ("ProxyCommand", "ProxyJump")
        if plain and self._random.random() < 0.2:
            value = choose([f'"{value}"', f"'{value}'"])
        between = choose([" ", " ", "\t", "  ", "=", " = ", "= "])
        shown = choose([name, name, name.lower(), name.upper(), f'"{name}"'])
        between = " " if shown.startswith('"') else between
        after = choose(["", "", "", " ", "\t", " # c" if plain else "", "\r"])
        return choose(["", " ", "\t", "    "]) + shown + between + value + after

    def _line(self) -> str:
        kind = self._random.random()
        if kind < 0.15:
            return "Host " + choose_comment(self._random, self._patterns(" "))
        if kind < 0.32:
            criteria = [self._criterion() for _ in range(self._random.choice([1, 1, 2, 3]))]
            return "Match " + " ".join(criteria)
        if kind < 0.36:
            return "Include {inc}"
        if kind < 0.38:
            return self._random.choice(["", "# Port 9", "  ", "Host #c", "Host  # Port 9", '"unclosed'])
        return self._setting()

    def text(self, most: int) -> str:
        lines = [self._line() for _ in range(self._random.randint(1, most))]
        if self._random.random() < 0.08:
            lines.insert(self._random.randint(0, len(lines)), self._random.choice(BAD))
        return "\n".join(lines) + "\n"

    def alias(self) -> str:
        return self._random.choice(NAMES)


def choose_comment(chance: random.Random, text: str) -> str:
    return text + chance.choice(["", "", "", " # a b", " #"])


#: Pairs of a config and a host; BOKEH_SSH_PAIRS and BOKEH_SSH_SEED take more, and others, by hand.
PAIRS = int(os.environ.get("BOKEH_SSH_PAIRS", "2000"))
SEED = int(os.environ.get("BOKEH_SSH_SEED", "0"))


@pytest.mark.once
def test_many_configs_at_random(write, tmp_path: Path) -> None:
    """Two thousand configs of all keywords give what ``ssh -G`` gives, and are refused where it refuses."""
    values, criteria = known_to_ssh(write)

    def check(number: int) -> str:
        configs = Configs(SEED + number, values, criteria)
        inner = tmp_path / f"inc{number}"
        inner.write_text(configs.text(5).replace("Include {inc}", ""), newline="")
        path = tmp_path / f"config{number}"
        path.write_text(configs.text(14).replace("{inc}", str(inner)), newline="")
        for file in (inner, path):
            file.chmod(0o600)
        alias = configs.alias()
        try:
            check_same(str(path), alias)
        except Exception as exc:  # noqa: BLE001  # whatever it is, with its config
            texts = f"{path.read_text()}-- Include\n{inner.read_text()}"
            return f"seed {SEED + number}, host {alias}:\n{texts}-- {exc!s:.1500}"
        return ""

    with ThreadPoolExecutor(4) as pool:
        wrong = [found for found in pool.map(check, range(PAIRS)) if found]
    assert not wrong, f"{len(wrong)} of {PAIRS} differ\n" + "\n\n".join(wrong[:200])


def test_include(write, tmp_path: Path) -> None:
    """Include takes patterns of glob(3), several files in order, no links to nothing, and counts only where
    its block does."""
    write("User one\nHost b\nUser no\n", "1.conf")
    write("Match host a\nPort 2\n", "2.conf")
    (tmp_path / "3.conf").symlink_to(tmp_path / "gone")
    for name in ("[x].inc", "z.inc"):
        write(f"IdentityFile /{name}\n", name)
    later = f"Host a\nInclude {tmp_path}/*.conf {tmp_path}/none*\nHostKeyAlias k\n"
    odd = rf"Include {tmp_path}/\[x]*.inc {tmp_path}/[!x^].i*c"
    path = write(f"{odd}\nHost b\nInclude {tmp_path}/1.conf\n{later}")
    config = check_same(path, "a")
    assert config is not None
    assert (config.user, config.port, config.host_key_alias) == ("one", 2, "k")
    assert config.identity_files == ("/[x].inc", "/z.inc")


def test_include_depth(write) -> None:
    """A file that includes itself ends in an error, not in a loop."""
    path = write("")
    write(f"Include {path}\n")
    assert check_same(path, "a") is None
    with pytest.raises(ConfigError, match=r"config line 1: .*too deeply"):
        load(path, "a")


def test_include_in_home(account: Path) -> None:
    """A relative Include of the user's config is in ~/.ssh, that of the system's beside it; one with a
    variable that is not set is passed over with a warning, as with ssh."""
    (account / ".ssh" / "config").write_text("Include more/*\n")
    (account / ".ssh" / "config").chmod(0o600)
    (account / ".ssh" / "more").mkdir()
    (account / ".ssh" / "more" / "x").write_text("Include ${WHERE}/y\n")
    (account / ".ssh" / "more" / "x").chmod(0o600)
    system = account / "etc"
    system.mkdir()
    (system / "ssh_config").write_text("Include sub/p\nUser late\n")
    (system / "sub").mkdir()
    for name, text in (("sub/p", "Include p2\n"), ("p2", "Port 77\n")):
        (system / name).write_text(text)
        (system / name).chmod(0o600)
    (account / ".ssh" / "y").write_text("User mine\n")
    (account / ".ssh" / "y").chmod(0o600)
    (warning,) = load("~/.ssh/config", "a", system=None).warnings
    assert "more/x line 1: Include: the environment variable ${WHERE} is not set" in warning
    os.environ["WHERE"] = str(account / ".ssh")
    try:
        config = load("~/.ssh/config", "a", system=str(system / "ssh_config"))
    finally:
        del os.environ["WHERE"]
    assert (config.user, config.port) == ("mine", 77)


def test_files(account: Path, tmp_path: Path) -> None:
    """The default config may be missing, another one may not; None and "none" read nothing at all."""
    system = tmp_path / "system"
    system.write_text("Port 5\n")
    assert load("~/.ssh/config", "a", system=str(system)).port == 5
    assert load(account / ".ssh" / "config", "a", system=str(system)).port == 5
    assert load("~/.ssh/config", "a", system=str(tmp_path / "no")).port is None
    assert load(None, "A", system=str(system)) == HostConfig("a")
    assert load("none", "a", system=str(system)) == HostConfig("a")
    with pytest.raises(ConfigError, match="there is no ssh config") as caught:
        load(tmp_path / "no", "a")
    assert caught.value.host == "a"
    own = tmp_path / "own"
    own.write_text("User u\n")
    assert load(own, "a", system=str(system)) == HostConfig("a", user="u")


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="there are no such permissions here")
def test_others_can_write(account: Path, tmp_path: Path) -> None:
    """A config that others can write may lead anywhere: it is refused, as ssh does."""
    path = account / ".ssh" / "config"
    path.write_text("User u\n")
    path.chmod(0o666)
    with pytest.raises(ConfigError, match="can be written by others"):
        load("~/.ssh/config", "a", system=None)
    path.chmod(0o644)
    assert load("~/.ssh/config", "a", system=None).user == "u"
    other = tmp_path / "other"
    other.write_text(f"Include {path}\n")
    path.chmod(0o602)
    with pytest.raises(ConfigError, match="can be written by others"):
        load(other, "a")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("Host a\n ProxyCommand nc %h %p %C\n", "line 2: ProxyCommand: the token %C is not supported"),
        ("Host a\n ProxyCommand ssh -W %h:%p a;b\n ProxyUseFdpass yes\n", "line 3: ProxyUseFdpass"),
        ("Match host a exec 'echo %z'\n User u\n", "line 1: match: the token %z is not supported"),
        ("\nMatch exec 'kill -9 $$'\n", "line 2: match: 'kill -9 $$' was killed (signal 9)"),
        ("Match exec true novel x\n User u\n", "line 1: Match novel is not supported"),
        ("Match host a novel x\n User u\n", "line 1: Match novel is not supported"),
        ("Match novel x\n Match novel y\n  Port 3\n", "line 2: Match novel is not supported"),
        ("Match novel\n Port 9\n Include /no/such\n", "line 1: Match novel is not supported"),
        ("Match !novel x\n RefuseConnection no\n", "line 1: Match novel is not supported"),
        ("ProxyUseFdpass yes\nProxyCommand x\n", "line 1: ProxyUseFdpass is not supported"),
        ("ProxyCommand -\n", "line 1: ProxyCommand - is not supported"),
        ("ConnectionAttempts 0\n", "line 1: ConnectionAttempts: 0"),
        ("User %r\n", "line 1: User: the token %r"),
        ("User u-%C\n", "line 1: User: the token %C"),
        ("User ${NO_SUCH_VARIABLE}\n", "line 1: User: the environment variable ${NO_SUCH_VARIABLE}"),
        ("User %u;x\n", "line 1: User: "),
        ("KnownHostsCommand /x %z\n", "line 1: KnownHostsCommand: the token %z"),
        ('ProxyJump "u@b"\n', "line 1: ProxyJump: "),
        ("RefuseConnection 'use b'\n", "line 1: RefuseConnection: use b"),
        ("Port=x\n", "line 1: Port: 'x' is not a port"),
        ("ProxyJump b,,c\n", "line 1: ProxyJump: a place is empty"),
        ("ProxyJump b:x\n", "line 1: ProxyJump: 'b:x' has no valid port"),
    ],
)
def test_told(text: str, what: str, write) -> None:
    """A line that changes who we connect to or trust, and is not supported, is told with file and line."""
    path = write(text)
    with pytest.raises(ConfigError, match=re.escape(f"{path} {what}")) as caught:
        load(path, "a")
    assert caught.value.host == "a"
    assert caught.value.hint


@pytest.mark.parametrize(
    "text",
    [
        "Host b\n ProxyCommand nc\n",
        "ProxyUseFdpass yes\n",
        "ProxyUseFdpass yes\nProxyCommand none\n",
        "ProxyCommand NONE\n",
        "ProxyJump c\nProxyCommand nc\nProxyUseFdpass yes\n",
        "Match host b exec false\n User u\n",
        "Match exec false host b\n User u\n",
        "Match host b novel\n",
        "Host b\n Include /no/such\n RevokedHostKeys /x\n",
        "Host b\n CanonicalizeHostname yes\n CanonicalDomains x\n",
        "RevokedHostKeys none\nCanonicalizePermittedCNAMEs none\nProxyUseFdpass no\n",
        "HostName 10.0.0.1\nCanonicalizeHostname yes\nCanonicalDomains x\n",
        "Novelty yes\nForwardX11 maybe\n",
        "Match novel x\n WarnWeakCrypto no\n ObscureKeystrokeTiming no\n",
        "Port 5\nMatch novel x\n Port 6\n",
        "Match !originalhost a novel x\n User u\n",
        "Host b\n User %r\n",
    ],
)
def test_not_told(text: str, write) -> None:
    """A line that does not count for this host, or changes nothing for it, stands in nobody's way."""
    assert load(write(text), "a").user is None


def test_jump_given(write) -> None:
    """Where the caller says how to get there, ProxyJump and ProxyCommand do not count (``ssh -J``)."""
    assert load(write("ProxyCommand nc\n"), "a", jump="j").proxy_jump is None
    assert load(write("ProxyJump b\nUser u\n"), "a", jump="j") == HostConfig("a", user="u")


def test_proxy_jump(write) -> None:
    """The hops come in the order to dial, with their tokens; "none" is not the same as nothing."""
    assert load(write(""), "a").proxy_jump is None
    assert load(write("ProxyJump none\n"), "a").proxy_jump == ()
    assert load(write("ProxyCommand none\n"), "a").proxy_jump == ()
    path = write("User me\nHostName x\nProxyJump %r@%n-gw:%p,ssh://u@[::1]:9,fe80::1%%eth0\n")
    assert load(path, "a").proxy_jump == ("me@a-gw:22", "u@[::1]:9", "fe80::1%eth0")
    with pytest.raises(ConfigError, match="line 1: ProxyJump: the token %e"):
        load(write("ProxyJump fe80::1%eth0\n"), "a")


def test_identity_files(write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Identity files have ``~``, all the tokens and variables expanded."""
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.setenv("DIR", "/v%h")
    files = "IdentityFile ~/k\nIdentityFile %d/%h/%u/%r/%n/%p/%%\nIdentityFile ${DIR}/x\n"
    text = f"HostName X.org\nPort 9\nUser me\n{files}"
    me = pwd.getpwuid(os.getuid()).pw_name
    assert load(write(text), "a").identity_files == ("/h/k", f"/h/x.org/{me}/me/a/9/%", "/v%h/x")
    assert load(write("IdentityFile none\n"), "a").identity_files == ("none",)
    assert load(write("IdentityFile none\nIdentityFile /x\n"), "a").identity_files == ("/x",)


def test_identity_files_as_ssh(write) -> None:
    """ssh, which prints them unexpanded with -G, tries the same files when it connects."""
    if SSH is None:
        missing("there is no ssh here")
    text = (
        "User me\nHostKeyAlias K\nIdentityFile ~/%h-%r\nIdentityFile /%n/%p/%k/%i%%\nIdentityFile ${HOME}/x\n"
    )
    path = write(text)
    command = [str(SSH), "-v", "-F", path, "-o", "ProxyCommand=true", "-o", "BatchMode=yes", "Name", "true"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    tried = re.findall(r"identity file (\S+) type", done.stderr)
    assert load(path, "Name").identity_files == tuple(file for file in tried if not file.endswith("-cert"))


def test_identity_agent(write, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent is a path, none, or what a variable says."""
    monkeypatch.setenv("AGENT", "/tmp/s")
    monkeypatch.delenv("AGENT2", raising=False)
    for said, meant in (
        ("/x", "/x"),
        ("none", "none"),
        ("SSH_AUTH_SOCK", None),
        ("$AGENT", "/tmp/s"),
        ("$AGENT2", "none"),
        ("${AGENT}.2", "/tmp/s.2"),
        (r"\\.\pipe\agent", r"\.\pipe\agent"),  # as ssh reads it: two of the backslashes are one
    ):
        assert load(write(f"IdentityAgent {said}\n"), "a").identity_agent == meant


def test_known_hosts_none(write) -> None:
    """No known_hosts file at all is another thing than the default ones."""
    config = load(write("UserKnownHostsFile none\nGlobalKnownHostsFile NONE\n"), "a")
    assert (config.user_known_hosts, config.global_known_hosts) == ((), ())


def test_byte_order_mark_and_bytes(tmp_path: Path) -> None:
    """A byte order mark hides no line, and bytes that are not UTF-8 stay what they are."""
    path = tmp_path / "config"
    path.write_bytes(b"\xef\xbb\xbfHost b\nUser u\nHost a\nIdentityFile /\xff\n# \xfe\n")
    assert load(path, "a") == HostConfig("a", identity_files=(os.fsdecode(b"/\xff"),))


def test_unreadable(tmp_path: Path) -> None:
    """A directory in the place of a config says nothing, as with ssh; so does an empty glob."""
    assert load(tmp_path, "a") == HostConfig("a")


def test_no_account(write, monkeypatch: pytest.MonkeyPatch) -> None:
    """An account without a database entry, as in some containers, can still read its config."""

    def nobody(*_: object) -> str:
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    assert load(write("Match localuser x\nPort 4\nMatch all\nUser u\n"), "a").port is None


def test_no_home(write, account: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An account without a home has no config of its own; what needs the home is told."""

    def nobody(*_: object) -> str:
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.delenv("HOME")
    system = write("Port 4\n", "system")
    assert load("~/.ssh/config", "a", system=system).port == 4
    assert load(write("Port 5\nIdentityFile /x\n"), "a").port == 5
    for line in ("IdentityFile ~/x", "IdentityFile %d/x", "Include x"):
        with pytest.raises(ConfigError, match="line 1"):
            load(write(f"{line}\n"), "a")
    with pytest.raises(ConfigError, match="no ssh config ~nobody-here/x"):
        load("~nobody-here/x", "a")
    hop = find_hop(Host("a", "u", ssh_config=None))
    assert hop.own_known_hosts[0] == "~/.ssh/known_hosts"


@pytest.mark.skipif(os.name != "posix", reason="HOME is a Unix variable")
@pytest.mark.parametrize("value", [None, "", "relative"])
def test_home_of_the_account(write, monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    """With HOME missing, empty or relative the home is that of the account database, as with ssh."""
    path = write("UserKnownHostsFile ~/x %d/y\nIdentityAgent ~/z\nControlPath ~/c\n")
    monkeypatch.delenv("HOME")
    if value is not None:
        monkeypatch.setenv("HOME", value)
    check_same(path, "a")
    home = pwd.getpwuid(os.getuid()).pw_dir
    hop = find_hop(Host("a", "u", ssh_config=None, known_hosts="~/k"))
    assert hop.known_hosts == (f"{home}/k",)


def test_without_posix(write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no numeric users (Windows), the config is read all the same."""
    monkeypatch.delattr(os, "getuid")
    monkeypatch.setitem(__import__("sys").modules, "pwd", None)
    monkeypatch.setenv("LOGNAME", "me")
    path = write("Match localuser me\nPort 4\n")
    assert load(path, "a").port == 4
    assert lookup._local_user() == "me"


def test_exec_is_run_once_and_only_where_it_decides(write, tmp_path: Path) -> None:
    """A command is run once in a look-up, and not where other criteria have decided; its words go nowhere."""
    ran = tmp_path / "ran"
    command = f"echo x | tee -a {ran} >&2"
    assert load(write(f'Match host a exec "{command}"\n Port 3\n'), "a").port == 3
    assert ran.read_text() == "x\n"
    assert load(write(f'Match host b exec "{command}"\n Port 3\n'), "a").port is None
    other = write(f'Match exec "{command}"\n Port 3\n', "inner")
    assert load(write(f"Host b\n Include {other}\n"), "a").port is None
    assert ran.read_text() == "x\n"


def test_exec_that_does_not_end_is_given_up(monkeypatch: pytest.MonkeyPatch, mark: str) -> None:
    """A command that hangs is an error after a while, and is ended, with what it has started."""
    with pytest.raises(ValueError, match=r"did not end within 0\.3 s"):
        holds(f"sleep 1000; : {mark}", 0.3)
    until(lambda: not processes(mark), what="the command to end")
    monkeypatch.setenv("SHELL", "/no/such/shell")
    with pytest.raises(ValueError, match="cannot be run"):
        holds("true")


# What the documentation says.

#: Every keyword of ssh_config(5) of OpenSSH 10.6, and those of Debian's and Fedora's for GSSAPI.
MANUAL = """
    AddKeysToAgent AddressFamily BatchMode BindAddress BindInterface CanonicalDomains
    CanonicalizeFallbackLocal CanonicalizeHostname CanonicalizeMaxDots CanonicalizePermittedCNAMEs
    CASignatureAlgorithms CertificateFile ChannelTimeout CheckHostIP Ciphers ClearAllForwardings
    Compression ConnectionAttempts ConnectTimeout ControlMaster ControlPath ControlPersist
    DynamicForward EnableEscapeCommandline EnableSSHKeysign EscapeChar ExitOnForwardFailure
    FingerprintHash ForkAfterAuthentication ForwardAgent ForwardX11 ForwardX11Timeout
    ForwardX11Trusted GatewayPorts GlobalKnownHostsFile GSSAPIAuthentication GSSAPIClientIdentity
    GSSAPIDelegateCredentials GSSAPIKexAlgorithms GSSAPIKeyExchange GSSAPIRenewalForcesRekey
    GSSAPIServerIdentity GSSAPITrustDns HashKnownHosts Host HostbasedAcceptedAlgorithms
    HostbasedAuthentication HostKeyAlgorithms HostKeyAlias Hostname IdentitiesOnly IdentityAgent
    IdentityFile IgnoreUnknown Include IPQoS KbdInteractiveAuthentication KbdInteractiveDevices
    KexAlgorithms KnownHostsCommand LocalCommand LocalForward LogLevel LogVerbose MACs Match
    NoHostAuthenticationForLocalhost NumberOfPasswordPrompts ObscureKeystrokeTiming
    PasswordAuthentication PermitLocalCommand PermitRemoteOpen PKCS11Provider Port
    PreferredAuthentications ProxyCommand ProxyJump ProxyUseFdpass PubkeyAcceptedAlgorithms
    PubkeyAuthentication RefuseConnection RekeyLimit RemoteCommand RemoteForward RequestTTY
    RequiredRSASize RevokedHostKeys SecurityKeyProvider SendEnv ServerAliveCountMax
    ServerAliveInterval SessionType SetEnv StdinNull StreamLocalBindMask StreamLocalBindUnlink
    StrictHostKeyChecking SyslogFacility Tag TCPKeepAlive Tunnel TunnelDevice UpdateHostKeys User
    UserKnownHostsFile VerifyHostKeyDNS VersionAddendum VisualHostKey WarnWeakCrypto XAuthLocation
"""


def test_table_of_keywords_is_the_parsers() -> None:
    """The table in docs/ has every keyword of the newest manual, with what the parser does about it."""
    text = Path(__file__).parents[2].joinpath("docs/ssh_config/keywords.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `(\w+)` \| (\w+) \|", text, re.MULTILINE))
    told = {keyword.name for keyword in keywords.TOLD}
    read = {keyword.name for keyword in keywords.KEYWORDS.values()} | set(keywords.BLOCKS)
    assert table == {
        **dict.fromkeys(keywords.HARMLESS, "harmless"),
        **dict.fromkeys(read, "followed"),
        **dict.fromkeys(told, "reported"),
    }
    assert {name.lower() for name in table} == {name.lower() for name in MANUAL.split()}
    assert set(keywords.ALIASES.values()) <= set(keywords.KEYWORDS)


@pytest.mark.parametrize("name", sorted(keywords.HARMLESS))
def test_harmless_keywords_change_nothing(name: str, write) -> None:
    """A keyword that is not followed changes nothing for the host, whatever its value."""
    config = load(write(f"{name} yes\nPort 5\n{name.lower()} 0 ~none %z ${{NO_SUCH_VARIABLE}}\n"), "a")
    assert config == HostConfig("a", port=5)


MISSPELT = {
    "ProxyJmp gate\n": "'proxyjmp' is not a keyword of ssh_config(5), and is ignored; did you mean "
    "ProxyJump?",
    "Host b\n  IdentitiyFile /x\n": "did you mean IdentityFile?",
    "Hsot *\n": "did you mean Host?",
    "Banana split\n": "'banana' is not a keyword of ssh_config(5), and is ignored; IgnoreUnknown names",
    "IgnoreUnknown Use*\nBanana x\n": "'banana'",
    "Banana x\nIgnoreUnknown *\n": "'banana'",
    "Host b\n IgnoreUnknown *\nHost *\n Banana x\n": "'banana'",
    "IgnoreUnknown A*,ban*\nBanana x\n": "",
    "Match final\n Port 5\nIgnoreUnknown *\nbanana x\n": "'banana'",
    "UseKeychain yes\nCipher blowfish\nProtocol 2,1\nNoneEnabled yes\n": "",
}


@pytest.mark.parametrize("text", MISSPELT)
def test_misspelt_keyword_is_told(text: str, write) -> None:
    """Where ssh refuses the file for a keyword that it does not know, that is named, and what is meant."""
    path = write(text + "Port 5\n")
    warnings = load(path, "a").warnings
    assert len(warnings) == bool(MISSPELT[text])
    assert MISSPELT[text] in "".join(warnings)
    said = ssh_g(path, "a")
    if MISSPELT[text]:
        assert "Bad configuration option" in said
        assert re.search(rf"^{re.escape(path)} line \d+: ", warnings[0])
    elif not text.startswith("UseKeychain"):
        assert not isinstance(said, str)


def test_red_hats_name_for_the_least_size_counts(write) -> None:
    """RSAMinSize, as Red Hat's ssh has called RequiredRSASize, is not ignored."""
    config = load(write("RSAMinSize 3072\nRequiredRSASize 1024\n"), "a")
    assert (config.required_rsa_size, config.warnings) == (3072, ())


# What newer releases have brought; those that know it are asked too.

NEWER: dict[str, tuple[str, str, object]] = {
    "tagged": ("Tag x\nMatch tagged y,x\n Port 5\n", "port", 5),
    "tagged too early": ("Match tagged x\n Port 5\nTag x\n", "port", None),
    "not tagged": ('Match tagged ""\n Port 5\n', "port", 5),
    "first tag": ("Tag x\nTag y\nMatch tagged y\n Port 5\n", "port", None),
    "network": ("Match localnetwork 127.0.0.0/8\n Port 5\n", "port", 5),
    "network of others": ("Match localnetwork 203.0.113.0/24\n Port 5\n", "port", None),
    "not on a network": ("Match !localnetwork 203.0.113.0/24,2001:db8::/32\n Port 5\n", "port", 5),
    "session": ("Match sessiontype exec\n Port 5\n", "port", 5),
    "session of the config": ("SessionType none\nMatch sessiontype none\n Port 5\n", "port", 5),
    "command": ('Match command "exec /bin/sh*"\n Port 5\n', "port", 5),
    "another command": ("Match !command git-*,rsync*\n Port 5\n", "port", 5),
    "some command": ('Match !command ""\n Port 5\n', "port", 5),
    "version": ("Match version OpenSSH_*\n Port 5\n", "port", 5),
    "another version": ("Match version dropbear*\n Port 5\n", "port", None),
    "user with tokens": (
        "User u-%n-%h-%p-%%-%j\nHostName b\nPort 7\nProxyJump x@c:9\n",
        "user",
        "u-a-b-7-%-c",
    ),
    "user by variable": ("User u${NAME_OF_USER}\n", "user", "ujoe"),
    "hash of all": ("User u\nProxyJump c\nIdentityAgent /%C\n", "identity_agent", None),
    "files by hash": ("UserKnownHostsFile /%C/%j ~/x\n", "user_known_hosts", None),
    "two revoked": ("RevokedHostKeys /x /y-%n\n", "revoked_host_keys", ("/x", "/y-a")),
}


@pytest.mark.parametrize("name", NEWER)
def test_newer_releases(name: str, write, monkeypatch: pytest.MonkeyPatch) -> None:
    """What OpenSSH 10 has brought is read as there; an ssh that knows it says the same."""
    monkeypatch.setenv("NAME_OF_USER", "joe")
    text, attribute, wanted = NEWER[name]
    path = write(text)
    found = getattr(load(path, "a"), attribute)
    assert found == wanted if wanted is not None or attribute == "port" else "%" not in str(found)
    if SSH and ssh_version() >= (10, 3):
        check_same(path, "a")


def test_session_of_a_jump_host(write) -> None:
    """A machine that is only gone through runs no command, and knows what it is reached through."""
    path = write('User u%j\nMatch sessiontype none command ""\n Port 5\n')
    assert load(path, "a", session="none").port == 5
    config = load(path, "a", jump="gate")
    assert (config.port, config.user) == (None, "ugate")


def test_version_is_that_of_the_ssh_here(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Match version asks the ssh of this machine; without one it is the release that we follow."""
    path = write("Match version OpenSSH_12.3p1*\n Port 5\nMatch version OpenSSH_10.6p1\n Port 6\n")
    program = tmp_path / "bin" / "ssh"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'OpenSSH_12.3p1 Best-1, OpenSSL 9' >&2\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    assert load(path, "a").port == 5
    program.unlink()
    assert load(path, "a").port == 6


def test_undecided_match_runs_no_command_twice(write, tmp_path: Path) -> None:
    """To find out whether a criterion matters the config is read again, but nothing in it is run again."""
    ran = tmp_path / "ran"
    assert (
        load(write(f"Match novel x\n VisualHostKey yes\nMatch exec 'echo x >> {ran}'\n Port 3\n"), "a").port
        == 3
    )
    assert ran.read_text() == "x\n"


HOSTS = """
127.0.0.1 localhost
127.0.0.9 real.example.test web.example.test.
127.0.0.10 db.example.test.
127.0.0.11 plain.other.test plain
127.0.0.12 dot.example.test.
"""
DOMAIN = "CanonicalizeHostname yes\nCanonicalDomains example.test\n"
CANONICAL = {
    "by domain": "CanonicalizeHostname yes\nCanonicalDomains none.test example.test\n",
    "of the block": DOMAIN + "Match host db.example.test\n Port 5\n",
    "match canonical": DOMAIN + "Match canonical\n Port 5\n",
    "host of the second reading": DOMAIN + "Host *.example.test\n Port 5\n",
    "cname": DOMAIN + "CanonicalizePermittedCNAMEs *.example.test:*.example.test\n",
    "cname of others": DOMAIN + "CanonicalizePermittedCNAMEs *:*.org\n",
    "any cname": "CanonicalizeHostname yes\nCanonicalizePermittedCNAMEs *:*\n",
    "cname alone": "CanonicalizePermittedCNAMEs *:*\n",
    "too many dots": DOMAIN + "CanonicalizeMaxDots 0\nHostName db.x\n",
    "full name": "HostName db.example.test.\nCanonicalizeHostname yes\nCanonicalizeMaxDots 0\n",
    "behind a jump": DOMAIN + "ProxyJump c\n",
    "always": "CanonicalizeHostname always\nCanonicalDomains example.test\nProxyJump c\n",
    "no fallback": "CanonicalizeHostname yes\nCanonicalDomains none.test\nCanonicalizeFallbackLocal no\n",
    "no": "CanonicalizeHostname no\nCanonicalDomains example.test\n",
    "other family": DOMAIN + "AddressFamily inet6\n",
    "none": "CanonicalizeHostname yes\nCanonicalDomains none\nCanonicalizePermittedCNAMEs none\n",
}
#: Run where /etc/hosts is another one: says what we make of each pair of config and host.
LOOK_UP = """
import json, sys
from bokeh_ssh import BokehSSHError
from bokeh_ssh._ssh.config.lookup import load
found = []
for path, alias in json.load(sys.stdin):
    try:
        config = load(path, alias)
        found.append([config.hostname, config.port or 22])
    except BokehSSHError as exc:
        found.append(str(exc))
print(json.dumps(found))
"""


def test_canonical_names_as_ssh(tmp_path: Path) -> None:
    """CanonicalizeHostname and its companions lead to the same names as with ssh, by the same look-ups."""
    if SSH is None:
        missing("there is no ssh here")
    hosts = tmp_path / "hosts"
    hosts.write_text(HOSTS)
    inside = ["unshare", "-m", *([] if os.getuid() == 0 else ["-r"]), "sh", "-c"]
    start = f'mount --bind {hosts} /etc/hosts && exec "$@"'
    if (
        shutil.which("unshare") is None
        or subprocess.run([*inside, start, "sh", "true"], check=False).returncode
    ):
        missing("this account cannot have an /etc/hosts of its own")
    pairs = []
    for number, text in enumerate(CANONICAL.values()):
        path = tmp_path / f"config{number}"
        path.write_text(text)
        pairs += [(str(path), alias) for alias in ("web", "db", "plain", "nobody", "127.1")]
    env = {**os.environ, "LC_ALL": "C"}
    ask = [*inside, start, "sh", sys.executable, "-c", LOOK_UP]
    done = subprocess.run(
        ask, input=json.dumps(pairs), env=env, capture_output=True, text=True, timeout=120, check=True
    )
    for (path, alias), ours in zip(pairs, json.loads(done.stdout), strict=True):
        command = [*inside, start, "sh", str(SSH), "-G", "-F", path, alias]
        theirs = subprocess.run(command, env=env, capture_output=True, text=True, timeout=20, check=False)
        if theirs.returncode:
            assert isinstance(ours, str), (Path(path).read_text(), alias, theirs.stderr)
            continue
        said = dict(line.split(" ", 1) for line in theirs.stdout.splitlines() if " " in line)
        assert ours == [said["hostname"], int(said["port"])], (Path(path).read_text(), alias)
