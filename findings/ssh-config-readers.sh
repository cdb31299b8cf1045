#!/usr/bin/env bash
# One ~/.ssh/config, three readers: OpenSSH's ssh (asked with -G; 9.2p1 here), asyncssh 2.24.1 and paramiko 5.1.0.
# All lines below are valid and in common use; what the two libraries make of them is not what ssh does:
#
#   config                                       ssh              asyncssh                   paramiko
#   ProxyCommand none, later ProxyJump gate      no proxy         reports ProxyJump gate     reports ProxyJump gate
#   ProxyJump gate, later ProxyCommand nc        jump alone       reports both               reports both
#   Port 2022 # a comment                        2022             refuses the file           "2022 # a comment"
#   ServerAliveInterval 1m                       60               refuses the file           "1m"
#   Match exec "test %h = box"                   evaluates it     refuses the file           evaluates it
#   Match final                                  second pass      is never true              evaluates it
#   HostName %%h                                 %h               %h                         %box
#   Host b[o]x (no set, [ is a plain character)  no match         no match                   matches box
#   IdentityFile of a file that is not there     goes on          FileNotFoundError          goes on
#
# So a program that hands a user's config to either library connects elsewhere, or not at all, where `ssh` works.
# Needs an ssh program (Debian: openssh-client).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check asyncssh==2.24.1 paramiko==5.1.0

cat > seen.py <<'PY'
import subprocess
import sys
from pathlib import Path

import asyncssh
import paramiko

# name: config, keyword, then what each makes of it for "box"
ROWS = {
    "ProxyCommand none, later ProxyJump": (
        "Host box\n ProxyCommand none\nHost *\n ProxyJump gate\n", "ProxyJump", None, "gate", "gate"),
    "ProxyJump, later ProxyCommand": (
        "Host box\n ProxyJump gate\nHost *\n ProxyCommand nc %h %p\n", "ProxyCommand", None, "nc box 22", "nc box 22"),
    "a comment after a value": ("Host *\n Port 2022 # a comment\n", "Port", "2022", "refused", "2022 # a comment"),
    "a time with a unit": ("Host *\n ServerAliveInterval 1m\n", "ServerAliveInterval", "60", "refused", "1m"),
    "= within Match exec": ('Match exec "test %h = box"\n Port 2022\n', "Port", "2022", "refused", "2022"),
    "Match final": ("Match final\n Port 2022\n", "Port", "2022", "None", "2022"),
    "%% before a token's letter": ("Host *\n HostName %%h\n", "HostName", "%h", "%h", "%box"),
    "[ in a pattern": ("Host b[o]x\n Port 2022\n", "Port", "22", "None", "2022"),
    "an IdentityFile that is not there": ("Host *\n IdentityFile /none/such\n", "Port", "22", "FileNotFoundError", "None"),
}


def ssh(path: Path, keyword: str) -> str | None:
    done = subprocess.run(["ssh", "-G", "-F", str(path), "box"], capture_output=True, text=True, check=True)
    found = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    return found.get(keyword.lower())


def by_asyncssh(path: Path, keyword: str) -> str:
    try:
        config = asyncssh.SSHClientConnectionOptions(host="box", config=[str(path)]).config
    except asyncssh.ConfigParseError:
        return "refused"
    except FileNotFoundError:
        return "FileNotFoundError"
    return str(config.get("Hostname" if keyword == "HostName" else keyword))


def by_paramiko(path: Path, keyword: str) -> str:
    return str(paramiko.SSHConfig.from_path(str(path)).lookup("box").get(keyword.lower()))


print(subprocess.run(["ssh", "-V"], capture_output=True, text=True, check=True).stderr.strip())
good = True
for name, (text, keyword, *expected) in ROWS.items():
    path = Path("config")
    path.write_text(text)
    seen = [ssh(path, keyword), by_asyncssh(path, keyword), by_paramiko(path, keyword)]
    good = good and seen == expected
    print(f"{name:36} {keyword:20} ssh {seen[0]!s:6} asyncssh {seen[1]:18} paramiko {seen[2]}")
sys.exit(0 if good else "it has changed")
PY
env/bin/python seen.py
