"""What a program that a supervisor holds says to it, when it is no Bokeh server: that it is ready."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence

_VARIABLE = "BOKEH_SSH_READY_FD"


def announce(where: int | str, *, routes: Sequence[str] = ("/",), versions: str = "") -> bool:
    """Say, to the supervisor that runs this program, that it is ready; once, and only where there is one.

    :param where: the port that its pages are on, or the path of the socket; of a publication, the gateway's
    :returns: whether somebody waits for that
    """
    number = os.environ.pop(_VARIABLE, "")  # the programs that this one starts have nothing to say there
    if not number.isdigit():
        return False
    word = {
        "socket" if isinstance(where, str) else "port": where,
        "routes": list(routes),
        "versions": versions,
    }
    with contextlib.suppress(OSError), os.fdopen(int(number), "wb") as pipe:
        pipe.write(json.dumps(word).encode("ascii") + b"\n")
        return True
    return False
