"""Brings a bundle to where a server runs, and with ``dev`` each change of it after that."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from bokeh_ssh._core.errors import BokehSSHError, UploadError
from bokeh_ssh._core.events import OnEvent, Updated, Uploading, Warned
from bokeh_ssh._core.threads import Thread
from bokeh_ssh._server.server import UploadChannel
from bokeh_ssh._server.upload import upload
from bokeh_ssh._server.upload_set import Bundle, Contents, Item

_REPORT_EVERY = 0.1  # seconds between two events of progress
_SETTLE = 100  # milliseconds without another change: editors write in several steps
_QUIET = 500  # milliseconds without a change, after which it is quiet
_SHOWN = 5  # names in a warning
_LOOKS = 3  # at what has changed while it was brought
_GROWTH = 16 << 20  # bytes by which something has grown that is not followed any further
_AGAIN = 0.5  # seconds before the next look at what has changed while it was brought
#: Bytes, in all, of what goes where it can go at once, at the start with the supervisor: SFTP takes three
#: round trips more, and two to open; base64 a third more bytes.
_LITTLE = 1 << 20


class FileSync:
    """Keeps what is there as it is here.

    :param bundle: what is to be there
    :param on_event: gets Uploading, Updated and Warned
    """

    def __init__(self, bundle: Bundle, on_event: OnEvent) -> None:
        self._bundle = bundle
        self._on_event = on_event
        self._there: dict[str, Item] = {}
        self._sizes: dict[str, int] = {}  # what was brought of each
        self._warned: set[str] = set()
        self._failed = ""  # why the last change was not brought
        self._to: UploadChannel | None = None
        self._change = threading.Condition()
        self._dirty = False
        self._over = threading.Event()

    def upload_all(self, to: UploadChannel) -> None:
        """Bring all of it to where nothing is yet; the server is started when the last of it has come.

        :raises UploadError: if something cannot be read here, or stored there
        :raises ConnectionLostError: if the line goes down
        """
        contents = self._bundle.scan()
        self._warn(to, contents)
        files, size = len(contents.items), contents.size
        reported = float("-inf")
        before = 0

        def report(sent: int) -> None:
            nonlocal reported
            # All of it is reported at the end.
            if before + sent < size and time.monotonic() - reported >= _REPORT_EVERY:
                reported = time.monotonic()
                self._on_event(Uploading(host=to.host, files=files, size=size, sent=before + sent))

        report(0)
        much = size > _LITTLE
        unsettled = upload(
            to, contents.items.values(), on_progress=report, files=to.open_sftp() if much else None, go=True
        )
        self._note(contents.items, unsettled)
        for _ in range(_LOOKS):
            # What changed while it was read may be half of one and half of another.
            again = self._bundle.scan()
            self._warn(to, again)
            files, before = len(again.items), size
            grown = {
                name for name, item in again.items.items() if item.size > self._sizes.get(name, 0) + _GROWTH
            }
            changed = [again.items[name] for name in unsettled - grown if name in again.items]
            removed = tuple(name for name in unsettled if name not in again.items)
            if not changed and not removed:
                break
            size += sum(item.size for item in changed)
            still = upload(to, changed, removed, on_progress=report)
            self._note({item.name: item for item in changed}, still, removed)
            unsettled = still | (unsettled & grown)
        self._on_event(Uploading(host=to.host, files=files, size=size, sent=size))
        if unsettled:
            names = _names(sorted(unsettled))
            text = f"changed during the upload, so what was uploaded may be out of date: {names}"
            self._on_event(Warned(host=to.host, text=text))

    def _note(self, items: dict[str, Item], unsettled: set[str], removed: Iterable[str] = ()) -> None:
        """Note what is there; what is not certain to be as it is here counts as something else."""
        for name in removed:
            self._there.pop(name, None)
        for name, item in items.items():
            self._there[name] = dataclasses.replace(item, size=-1) if name in unsettled else item
            self._sizes[name] = item.size

    def sync_to(self, to: UploadChannel | None) -> None:
        """Bring changes there from now on, those too that were made since the last; None: nowhere."""
        with self._change:
            self._to = to
            self._dirty = True
            self._change.notify_all()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Notice changes, and bring them, while the context lasts."""
        threads = [Thread(self._follow_changes, name="bokeh-ssh mirror")]
        folders = [root for root in self._bundle.roots if root.is_dir()]
        # Editors replace a file by another one, so it is its folder that has to be watched.
        files = {root.parent for root in self._bundle.roots if not root.is_dir()}
        for roots, deep in ((folders, True), (sorted(files), False)):
            if roots:
                threads.append(Thread(self._watch, roots, deep, name="bokeh-ssh watch"))
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            with self._change:
                self._change.notify_all()
            for thread in threads:
                thread.join(2)

    def _watch(self, roots: list[Path], deep: bool) -> None:
        while not self._over.is_set():
            with contextlib.suppress(FileNotFoundError):  # one is gone again
                self._watch_once(roots, deep)
            self._over.wait(_AGAIN)

    def _watch_once(self, roots: list[Path], deep: bool) -> None:
        """Watch until a folder is another one, which nobody watches: removed and made again, as by git.

        :raises FileNotFoundError: if there is one that does not exist
        """
        import watchfiles

        watched, removed = _identify(roots), False
        names = {str(root) for root in roots}
        options = {"step": _SETTLE, "debounce": 10 * _SETTLE, "rust_timeout": _QUIET}
        # Nobody reports what has changed before the watch stood, nor what was put into a new folder before
        # that one was watched too: one more look, once it is quiet, sees both.
        looks = True
        for changes in watchfiles.watch(
            *roots,
            recursive=deep,
            watch_filter=None,
            stop_event=self._over,
            raise_interrupt=False,
            yield_on_timeout=True,
            **options,  # type: ignore[arg-type]  # they are all numbers
        ):
            if changes or looks:
                with self._change:
                    self._dirty = True
                    self._change.notify_all()
            looks = bool(changes)
            # The new folder may have the number of the old one.
            removed = removed or any(
                kind is watchfiles.Change.deleted and at in names for kind, at in changes
            )
            now = _identify(roots)
            if None not in now and (removed or now != watched):
                return

    def _follow_changes(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: (self._dirty and self._to) or self._over.is_set())
                if self._over.is_set():
                    return
                self._dirty, to = False, self._to
            if to:
                self._upload_changes(to)

    def _upload_changes(self, to: UploadChannel) -> None:
        try:
            contents = self._bundle.scan()
            self._warn(to, contents)
            now = contents.items
            removed = tuple(name for name in self._there if name not in now)
            changed = [item for name, item in now.items() if self._there.get(name) != item]
            if changed or removed:
                much = sum(item.size for item in changed) > _LITTLE
                unsettled = upload(to, changed, removed, files=to.open_sftp() if much else None)
                self._note({item.name: item for item in changed}, unsettled, removed)
                names = tuple(item.name for item in changed)
                self._on_event(Updated(host=to.host, changed=names, removed=removed))
                self._failed = ""
                if unsettled and not self._over.wait(_AGAIN):
                    with self._change:
                        self._dirty = True
        except UploadError as exc:
            if exc.message != self._failed:  # it is tried at each look
                self._failed = exc.message
                self._on_event(Warned(host=to.host, text=f"a change was not uploaded: {exc.message}"))
        except BokehSSHError:
            pass  # the line is down, as others report; sync_to() is called again when it is back

    def _warn(self, to: UploadChannel, contents: Contents) -> None:
        left = [each for each in contents.left_out if each not in self._warned]
        self._warned = set(contents.left_out)
        if left:
            text = f"not uploaded: {_names(left)}"
            self._on_event(Warned(host=to.host, text=text))


def _identify(folders: Iterable[Path]) -> list[tuple[int, int] | None]:
    """Return what distinguishes each from another of its name; None for one that does not exist."""
    found: list[tuple[int, int] | None] = []
    for folder in folders:
        try:
            facts = folder.stat()
        except OSError:
            found.append(None)
        else:
            found.append((facts.st_dev, facts.st_ino))
    return found


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
