"""The programs that are sent to the remote machine: some of our modules, as one text."""

from __future__ import annotations

import functools
import importlib.resources

#: Modules as the program's own, whatever is installed there; ``main`` of the last one is what runs.
_FRAME = """\
import sys, types
def load(name, text):
    module = types.ModuleType(name)
    if text is None:
        module.__path__ = []
    sys.modules[name] = module
    exec(compile(text or "", "<" + name + ">", "exec", 0, True), module.__dict__)
    return module
load("bokeh_ssh", None)
load("bokeh_ssh._remote", None)
load("bokeh_ssh._remote.packing", None)
"""


_PARTS = {
    "supervisor": (
        *("process_tree", "process_group", "run_dir", "upload_dir", "control_socket", "guardian"),
        *("readiness", "client_stream", "server_process", "control_group", "packing.packer", "server"),
        *("client_requests", "daemonize", "supervisor"),
    ),
    "dev_server": ("process_tree", "dev_server"),
    "warden": ("run_dir", "warden"),
    "job_holder": ("process_tree", "run_dir", "job_place", "job_holder"),
    "job_stream": ("run_dir", "job_place", "job_stream"),
    "control_client": ("process_tree", "process_group", "run_dir", "control_socket", "control_client"),
}


@functools.cache
def payload(name: str) -> bytes:
    """Return the text of a program that runs on the other machine, with the modules that it needs.

    :param name: one of :data:`_PARTS`, such as ``"supervisor"``
    """
    folder = importlib.resources.files("bokeh_ssh") / "_remote"
    lines = [_FRAME]
    for module in _PARTS[name]:
        text = (folder / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        text = _without_docstrings(text)
        # Raw, since each escaped line end would be a byte more; no module has these quotes.
        lines.append(f"last = load('bokeh_ssh._remote.{module}', r'''{text}''')\n")
    lines.append("last.main()\n")
    return "".join(lines).encode()


def _without_docstrings(text: str) -> str:
    """Return a module's text without its docstrings, which are a fifth of it; nothing else has their quotes.

    The lines keep their numbers, for a traceback's sake.
    """
    parts = text.split('"""')
    parts[1::2] = ['""' + "\n" * part.count("\n") for part in parts[1::2]]
    return "".join(parts)
