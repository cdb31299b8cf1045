#!/usr/bin/env bash
# sshconf 0.2.7: a Match block of ~/.ssh/config belongs, for it, to the Host block above. remove("box") deletes the
# Match block below box too, set("box", User=...) deletes the User line of the Match block, and unset() takes its
# keyword from there. ssh then logs in to other hosts as another user, or no longer through their gateway.
#
# sshconf begins a block at Host alone, and takes each line up to the next Host for that one's. What it says of box is
# wrong for the same reason: host("box") has the user and the gateway of machines that have another name.
#
# Its documentation: "a library for reading and modifying your ssh/config file in a non-intrusive way, meaning your file
# should look more or less the same after modifications"; no page names Match. ssh_config(5): "Match: Restricts the
# following declarations (up to the next Host or Match keyword) to be used only when the conditions following the Match
# keyword are satisfied".
# What helps: an empty Host block of one's own below each host that a program edits, or Match blocks at the top.
#
# Seen, a config with "Host box / User me" and, below it, "Match host *.lab / User guest / ProxyJump gate"; ssh -G:
#
#   sshconf, host("box")             user ['me', 'guest'], proxyjump gate
#   ssh, before                      box: me                     pc.lab: guest, by gate
#   after set("box", User="you")     box: you                    pc.lab: the account's name, by gate
#   after unset("box", "proxyjump")  box: me                     pc.lab: guest, no gateway
#   after remove("box")              box: the account's name     pc.lab: the account's name, no gateway
#
# Needs ssh (Debian 12: openssh-client).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check sshconf==0.2.7
ssh -V

cat > seen.py <<'PY'
import getpass
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from sshconf import SshConfig, read_ssh_config

TEXT = """\
Host box
    HostName 192.0.2.7
    User me

Match host *.lab
    User guest
    ProxyJump gate

Host other
    Port 2022
"""


def by_ssh(host: str) -> str:
    words = ["ssh", "-G", "-F", "config", host]
    text = subprocess.run(words, capture_output=True, text=True, check=True, timeout=30).stdout
    found = dict(line.split(" ", 1) for line in text.splitlines() if " " in line)
    user = "the account's name" if found["user"] == getpass.getuser() else found["user"]
    return f"{user}, by {found['proxyjump']}" if "proxyjump" in found else user


def after(change: Callable[[SshConfig], None]) -> tuple[str, str]:
    Path("config").write_text(TEXT)
    config = read_ssh_config("config")
    change(config)
    config.save()
    return by_ssh("box"), by_ssh("pc.lab")


Path("config").write_text(TEXT)
told = read_ssh_config("config").host("box")
print(f"sshconf, host('box')             user {told['user']}, proxyjump {told.get('proxyjump')}")
seen = {
    "ssh, before": after(lambda config: None),
    "after set('box', User='you')": after(lambda config: config.set("box", User="you")),
    "after unset('box', 'proxyjump')": after(lambda config: config.unset("box", "proxyjump")),
    "after remove('box')": after(lambda config: config.remove("box")),
}
for name, (box, lab) in seen.items():
    print(f"{name:31}  box: {box:22}  pc.lab: {lab}")
expected = [
    ("me", "guest, by gate"), ("you", "the account's name, by gate"), ("me", "guest"),
    ("the account's name", "the account's name"),
]
good = list(seen.values()) == expected and told["user"] == ["me", "guest"] and told["proxyjump"] == "gate"
sys.exit(0 if good else "it has changed")
PY
env/bin/python seen.py
