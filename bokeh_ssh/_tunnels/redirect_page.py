"""A page that leads a browser to an address which must not stand in a process list.

What a browser is started with is seen by every account of the machine. So it is given the path of a page
that this account alone may read, and that says where to go, as Jupyter does. The page is removed when the
browser has had its time, when the tunnel is closed, when the program ends; and where that was killed, by one
that writes a page ten minutes later or more.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import stat
import subprocess
import tempfile
import threading
import time
import webbrowser
from collections.abc import Iterator
from html import escape
from pathlib import Path
from urllib.parse import quote

from bokeh_ssh._core.this_machine.home import expand

#: Seconds that a browser has to start, and to read it.
_STAYS = 60.0
#: Seconds after which one that is found is nobody's any more.
_STALE = 600.0
_PREFIX = "bokeh-ssh-page-"
_NAME = "open.html"
#: Browsers that are packed as snaps see nothing of /tmp, of /run, or of what is hidden in the home.
_SNAPS = ("/snap/bin", "/var/lib/snapd/snap/bin")
_BROWSERS = ("brave", "chromium", "firefox", "microsoft-edge", "opera", "vivaldi")

# It moves on without a script, leaves no entry in the history, and does not say where it was.
_TEXT = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="referrer" content="no-referrer">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'">
<meta http-equiv="refresh" content="0; url={url}">
<title>Opening the app</title>
</head>
<body><p>This page leads to <a href="{url}" rel="noreferrer">the app</a>.</p></body>
</html>
"""


class Page:
    """A page of mode 0600, in a directory of mode 0700 of its own, whose names say nothing.

    :param url: where it leads
    :ivar path: of the file
    :raises OSError: if it cannot be written anywhere
    """

    def __init__(self, url: str) -> None:
        self._made_by = os.getpid()
        folder = _make_folder()
        self.path = folder / _NAME
        try:
            folder.chmod(0o700)  # whatever the umask is
            fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(fd, "w", encoding="ascii", errors="xmlcharrefreplace") as file:
                self.path.chmod(0o600)
                file.write(_TEXT.format(url=escape(url)))
        except OSError:
            _remove(folder)
            raise
        self._timer = threading.Timer(_STAYS, self.remove)
        self._timer.name = "bokeh-ssh page"
        self._timer.daemon = True
        _pages.add(self)

    def stay(self) -> None:
        """Be there for as long as a browser may need."""
        self._timer.start()

    def remove(self) -> None:
        """Remove it; a forked copy leaves that to the one who made it."""
        self._timer.cancel()
        _pages.discard(self)
        if self._made_by == os.getpid():
            _remove(self.path.parent)


_pages: set[Page] = set()


@atexit.register
def remove_all() -> None:
    """Remove all that are left."""
    for page in list(_pages):
        page.remove()


def open_in_browser(url: str) -> Page | None:
    """Open an address that is a secret in the browser; return the page that leads there, for the time being.

    :returns: None if there is no browser
    :raises OSError: if the page cannot be written
    """
    page = Page(url)
    opened = False
    try:
        opened = webbrowser.open(_as_seen(page.path))
    finally:
        if not opened:
            page.remove()
    if not opened:
        return None
    page.stay()
    return page


def _make_folder() -> Path:
    fault: OSError | None = None
    for parent in _parents():
        _sweep(parent)
        try:
            return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        except OSError as exc:
            fault = fault or exc
    raise fault or FileNotFoundError("there is no directory for it")


def _parents() -> Iterator[Path]:
    """List where it may be, the best first: where the browser sees it, and it is gone after the login."""
    if any(Path(place, name).exists() for place in _SNAPS for name in _BROWSERS):
        yield expand("~")
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    if runtime.is_absolute() and _is_ours(runtime, private=True):
        yield runtime
    yield Path(tempfile.gettempdir())


def _is_ours(folder: Path, *, private: bool = False) -> bool:
    try:
        facts = folder.lstat()
    except OSError:
        return False
    mine = not hasattr(os, "geteuid") or facts.st_uid == os.geteuid()
    return stat.S_ISDIR(facts.st_mode) and mine and not (private and facts.st_mode & 0o077)


def _sweep(parent: Path) -> None:
    """Remove what programs have left that were killed."""
    with contextlib.suppress(OSError):
        for folder in parent.glob(f"{_PREFIX}*"):
            with contextlib.suppress(OSError):
                if _is_ours(folder) and time.time() - folder.lstat().st_mtime > _STALE:
                    _remove(folder)


def _remove(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.joinpath(_NAME).unlink(missing_ok=True)
        folder.rmdir()


def _as_seen(path: Path) -> str:
    """Return the address of a file, as the browser sees it: one of Windows, under WSL, has other paths."""
    if ".exe" in os.environ.get("BROWSER", "").lower() and (tool := shutil.which("wslpath")):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(
                [tool, "-m", os.fspath(path)], capture_output=True, text=True, timeout=5, check=True
            )
            there = done.stdout.strip()
            return f"file:{'' if there.startswith('//') else '///'}{quote(there, safe='/:')}"
    return path.absolute().as_uri()
