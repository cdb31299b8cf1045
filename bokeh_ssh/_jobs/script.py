"""The batch script: it finds a Python and becomes the holder. No secret is in it: schedulers keep scripts."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence

from bokeh_ssh._server.bootstrap import take_path, word
from bokeh_ssh._server.launch_spec import OLDEST_PYTHON
from bokeh_ssh._server.payload import payload

_CHECK = f"import sys; sys.exit(sys.version_info < {OLDEST_PYTHON!r})"
#: Python puts the current directory, which is often the home, before all others.
_RUN = (
    "import sys; sys.path[:] = [p for p in sys.path if p]; "
    'exec(compile(open(3, "rb").read(), "<bokeh_ssh job>", "exec", 0, True), {"__name__": "__main__"})'
)


def job_script(
    pythons: Sequence[str],
    client_key: str,
    grace: float,
    output: str,
    *,
    variable: str,
    ways: Sequence[str],
    step: bool = False,
    redirect: bool = False,
    setup: str | Sequence[str] = (),
) -> str:
    """Write the script.

    :param pythons: interpreters; the first that runs on the node is taken
    :param client_key: the public key that gets in
    :param grace: seconds without a client after which the job ends
    :param output: where the scheduler puts what it writes, which its end removes
    :param variable: what holds the job's number in a job
    :param ways: how the bytes may get there
    :param step: whether it runs beside a job's own script
    :param redirect: whether the script has to put it there itself
    :param setup: steps that may bring a Python; they are run if the node has none without them
    """
    order = json.dumps(
        {
            "client_key": client_key,
            "grace": grace,
            "output": output,
            "job": variable,
            "ways": list(ways),
            "step": step,
        }
    )
    end = "END_" + secrets.token_hex(8)  # a line that the program has not
    # exec: a signal for the job reaches the script's own process alone.
    # The warning of a job with a short time may come now; what is ignored stays so until the program listens.
    lines = ["#!/bin/sh", "trap '' USR1", "unset PYTHONPATH PYTHONHOME"]
    if redirect and output:
        before, _, after = output.partition("%j")
        lines += [
            f'f={word(before)}"${{{variable}%%.*}}"{word(after)}',
            '(: >>"$f") 2>/dev/null && exec >>"$f" 2>&1',  # by itself, exec would end the shell
        ]
    lines += [
        f"find_python() {{ for p in {' '.join(map(word, pythons))}; do",
        f"  \"$p\" -S -c '{_CHECK}' </dev/null >/dev/null 2>&1 && return",
        "done; false; }",
        *(["find_python || {", *brought, "}"] if (brought := take_path(setup)) else ()),
        'find_python || { echo "bokeh_ssh: there is no Python on this node" >&2; exit 127; }',
        f"exec \"$p\" -S -c '{_RUN}' <<'{end}' 3<<'{end}3'",
        order,
        end,
        payload("job_holder").decode().rstrip("\n"),
        f"{end}3",
    ]
    return "\n".join(lines) + "\n"
