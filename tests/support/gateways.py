"""The gateway and the Bokeh host of a bed: how to log in to them, and what is published from there."""

from __future__ import annotations

import shlex
from typing import Any

from bokeh_ssh import Host


def gateway_of(bed: Any) -> Host:
    """Say how to log in to the bed's gateway from here."""
    return Host(bed.gateway.host, bed.gateway.user, **bed.gateway.login)


def host_of(bed: Any, **keywords: Any) -> Host:
    """Say how to log in to the bed's Bokeh host: by its second way in shape B, through the gateway in C."""
    host = bed.bokehhost
    if bed.shape == "B":
        return Host(host.host, host.user, jump=(), **host.login, **keywords)
    return Host(host.inside, host.user, **{**host.login, "port": 22}, **keywords)


def publish(bed: Any, *words: str) -> Any:
    """Run ``bokeh-ssh publish`` on the Bokeh host, as its user would there."""
    command = [bed.bokehhost.python, "-u", "-m", "bokeh_ssh", "publish", *words, "--gateway", "gateway"]
    line = f"cd && exec {shlex.join(command)}"
    return bed.bokehhost.spawn(["sh", "-c", line], user=bed.bokehhost.user)
