"""Where the Pythons that we start on this machine find their modules, and where not.

A file beside a notebook or in a home is called ``random.py`` or ``token.py`` before long. A program of ours
that runs there must not take it for what it imports itself: so it starts with no path of the person's, and is
sent by us, as plain data, where to look. What it starts in turn finds ``PYTHONPATH`` as it was.
"""

from __future__ import annotations

import json
import os
import site
import sys
from collections.abc import Iterator
from typing import Any

from bokeh_ssh._core.this_machine.home import expand_home

#: What our package needs to run: where these are is looked in, wherever it is.
_NEEDED = ("cryptography", "h11", "paramiko", "pathspec", "rich", "sshtunnel", "typer")
#: Carries :func:`hand_over` to a program that has no pipe for it; what is in it is no secret.
_VARIABLE = "BOKEH_SSH_SEARCH"

#: How such a program begins. Python has put the current directory first, and that is all it can have of it:
#: an import before this would be an import from there.
START = """\
import sys
sys.path[:] = filter(None, sys.path)
import os
def take(path, given, package):
    import importlib.util
    sys.path[:] = path
    os.environ.pop("PYTHONPATH", None)
    if given is not None:
        os.environ["PYTHONPATH"] = given
    if package is not None:
        within = [os.path.dirname(package)]
        spec = importlib.util.spec_from_file_location("bokeh_ssh", package, submodule_search_locations=within)
        sys.modules["bokeh_ssh"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
"""


def command(run: str) -> tuple[str, ...]:
    """Return the command that runs Python code of ours, with :func:`environment` in its environment."""
    take = f"import json\ntake(*json.loads(os.environ.pop({_VARIABLE!r})))\n"
    return sys.executable, "-c", START + take + run


def environment() -> dict[str, str]:
    """Return what :func:`command` needs; without a path, which Python would follow before the first word."""
    return {"PYTHONPATH": "", _VARIABLE: json.dumps(hand_over())}


def hand_over() -> tuple[list[str], str | None, str | None]:
    """Return the path to look in, ``PYTHONPATH`` as it is here, and the file that is this very package."""
    package = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "__init__.py")
    return list(_kept()), os.environ.get("PYTHONPATH"), package if os.path.isfile(package) else None


def _kept() -> Iterator[str]:
    """List ``sys.path`` without where a person keeps files of their own; what we need of that comes last."""
    here = _here()
    avoided, needed = _avoided(here), _needed()
    last = []
    for entry in filter(lambda entry: isinstance(entry, str), sys.path):  # Python passes over others too
        if os.path.isabs(entry) and os.path.realpath(entry) not in avoided:
            yield entry
        elif os.path.isabs(entry) or here:
            path = os.path.join(here, entry)
            if os.path.realpath(path) in needed:
                last.append(path)
    yield from last


def _here() -> str:
    try:
        return os.getcwd()
    except OSError:  # it is gone
        return ""


def _avoided(here: str) -> set[str]:
    """Find where a person keeps files of their own: the current directory, the home, that of the program."""
    found = [expand_home("~"), here]
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    if isinstance(main, str):
        main = os.path.join(here, main)
        folders = os.path.dirname(main), os.path.dirname(os.path.realpath(main))  # a link leads to its files
        found += filter(os.path.isdir, folders)  # else it is an archive, with all in it
    library = os.path.dirname(os.__file__)
    own = [library, os.path.join(library, "lib-dynload"), *_sites()]
    return set(map(os.path.realpath, filter(None, found))) - set(map(os.path.realpath, own))


def _sites() -> list[str]:
    """List the directories where packages are installed; some embedded Pythons do not say."""
    every: list[str] = list(getattr(site, "getsitepackages", list)())
    user: Any = site.ENABLE_USER_SITE and site.getusersitepackages()
    return [*every, user] if user else every


def _needed() -> set[str]:
    """Find the directories where what we need has been imported from."""
    files = (getattr(sys.modules.get(name), "__file__", None) for name in _NEEDED)
    # A package is a folder with an __init__; sshtunnel is a file.
    parents = (
        os.path.dirname(os.path.dirname(file) if os.path.basename(file) == "__init__.py" else file)
        for file in files
        if file
    )
    return set(map(os.path.realpath, parents))
