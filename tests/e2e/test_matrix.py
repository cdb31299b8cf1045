"""Which server does what: the table of docs/servers.md is what comes out when it is tried."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import matrix
import other_servers
from skips import missing

#: What no distribution that we run on has itself: .ci/run says so where it cannot be had.
FETCHED = ("OpenSSH 10.6", "Dropbear 2026.94", "npm ssh2", "Apache MINA")

if os.name != "posix":
    pytest.skip("the servers are POSIX programs", allow_module_level=True)


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.parametrize("server", matrix.SERVERS, ids=lambda server: server.name)
def test_page_says_what_each_server_does(server: matrix.Server, tmp_path: Path) -> None:
    """Each cell of the server's row is what comes of it: a word that is not true fails, either way."""
    try:
        with server.running(tmp_path) as machine:
            found = {feature: matrix.try_feature(server, machine, feature) for feature in matrix.FEATURES}
    except other_servers.MissingError as exc:
        if server.name in FETCHED:
            pytest.skip(str(exc))
        missing(str(exc))
    words = {feature: word for feature, (word, _) in found.items()}
    assert words == matrix.read_page()[server.name], {name: why for name, (_, why) in found.items() if why}


def test_page_has_every_server() -> None:
    """The table has a row for each server of the bed, and no other."""
    assert list(matrix.read_page()) == [server.name for server in matrix.SERVERS]
