"""Brings files to where a server runs: their contents over SFTP, their places by its supervisor's hand.

A file is written beside the folders first, and gets its name when all of it is there; nobody meets half a
file. Its holes are not sent, nor other stretches of zeros. What SFTP does not carry goes in messages over the
server's own session, which every machine has: where there is no SFTP, or no second session (MaxSessions), or
one that sees other folders than the server does; and where something goes wrong, since a message comes back
with the reason in words. So does what is little, as messages need not wait for anything.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import itertools
import logging
import secrets
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from bokeh_ssh._core.errors import UploadError
from bokeh_ssh._core.file_reader import NotAFileError, Reading
from bokeh_ssh._server.upload_set import Item
from bokeh_ssh._ssh.sftp_writer import Sftp, SftpError

if TYPE_CHECKING:
    from bokeh_ssh._server.server import UploadChannel

log = logging.getLogger("bokeh_ssh.upload")

_CHUNK = 96 << 10  # bytes of a file in one message
_STEP = 256 << 10  # bytes after which the far side is asked how far it is
_AHEAD = 16  # such steps that may be under way
_EACH = 512  # what a message costs besides its bytes
_SILENCE = 30.0  # seconds without any progress

_numbers = itertools.count(1)


def upload(
    to: UploadChannel,
    changed: Iterable[Item],
    removed: Iterable[str] = (),
    *,
    on_progress: Callable[[int], object] = lambda sent: None,
    files: Sftp | None = None,
    go: bool = False,
) -> set[str]:
    """Bring all of it there.

    :param changed: what is to be there, as it is here now; what has vanished here, or is no file any more, is
        left out
    :param removed: names that are to be there no longer
    :param on_progress: gets how many bytes have arrived, now and then
    :param files: the session for what is in the files, closed afterwards; None sends it in messages
    :param go: whether the server is to be started when all is there, unless something has to be looked at
        again
    :returns: the names of those that were left out, or have changed here meanwhile: they have to be looked
        at again
    :raises UploadError: if something cannot be read here, or stored there
    :raises ConnectionLostError: if the line goes down
    """
    unsettled: set[str] = set()
    left = {item.name: item for item in changed}
    for name in removed:
        to.send_order(do="drop", name=name)
    before = 0  # bytes that are there when the messages begin

    def report(sent: int) -> None:
        on_progress(before + sent)

    if files:
        with contextlib.closing(files):
            before = _upload_over_sftp(to, files, left, unsettled, report)
    _upload_in_messages(to, left.values(), unsettled, report, go)
    return unsettled


def _upload_over_sftp(
    to: UploadChannel,
    files: Sftp,
    left: dict[str, Item],
    unsettled: set[str],
    on_progress: Callable[[int], object],
) -> int:
    """Write what is in the files, as far as that goes; what is there is taken from ``left``.

    :returns: the bytes of those that are there
    """
    to.wait_for_directory()
    begun: dict[str, tuple[str, Reading]] = {}
    there = 0
    mark = secrets.token_hex(8)  # no file of a project has such a name

    def opened() -> Iterator[tuple[Item, bytes, Reading]]:
        for item in [item for item in left.values() if not item.link]:
            file = _open(item)
            if file is None:
                unsettled.add(item.name)
                del left[item.name]
            else:
                part = f".bokeh-ssh-{mark}-{next(_numbers)}"
                begun[item.name] = part, file
                yield item, f"{to.directory}/{part}".encode("utf-8", "surrogateescape"), file

    def done(item: Item) -> None:
        nonlocal there
        part, file = begun.pop(item.name)
        to.send_order(do="place", part=part, name=item.name, runs=item.runs)
        if not file.settled:
            unsettled.add(item.name)
        there += item.size
        del left[item.name]

    try:
        files.put(opened(), done=done, on_progress=on_progress)
    except SftpError as exc:
        log.info("%s: SFTP: %s; files go over the server's session", to.host, exc)
    except OSError as exc:
        raise _unreadable(exc.filename, exc) from exc
    finally:
        for part, _ in begun.values():
            to.send_order(do="drop", name=part)
    return there


def _upload_in_messages(
    to: UploadChannel,
    items: Iterable[Item],
    unsettled: set[str],
    on_progress: Callable[[int], object],
    go: bool,
) -> None:
    """Send it, and wait until that and all that was ordered before is done."""
    under_way: collections.deque[tuple[int, int]] = collections.deque()
    sent = since = 0

    def mark(most: int, *, go: bool = False) -> None:
        under_way.append((to.request_sync(go=go), sent))
        while len(under_way) > most:
            number, size = under_way.popleft()
            to.wait_for_sync(number, _SILENCE)
            on_progress(size)

    for item in items:
        for message, count in _messages(item, unsettled):
            to.send_order(**message)
            sent += count
            since += len(message.get("data", "")) + _EACH
            if since >= _STEP:
                since = 0
                mark(_AHEAD)
    mark(0, go=go and not unsettled)


def _messages(item: Item, unsettled: set[str]) -> Iterator[tuple[dict[str, Any], int]]:
    """Say what makes an item there; with the bytes of each, and of the hole before it."""
    if item.link:
        yield {"do": "link", "name": item.name, "to": item.link}, 0
        return
    file = _open(item)
    if file is None:
        unsettled.add(item.name)
        return

    def put(data: bytes, *, last: bool, **hole: int) -> dict[str, Any]:
        text = base64.b64encode(data).decode("ascii")
        return {"do": "put", "name": item.name, "data": text, "last": last, "runs": item.runs, **hole}

    with contextlib.closing(file):
        end, held = 0, b""
        hole: dict[str, int] = {}
        try:
            for at, data in file.pieces(_CHUNK):
                if held:
                    yield put(held, last=False, **hole), len(held) + hole.get("skip", 0)
                hole = {"skip": at - end} if at > end else {}
                held, end = data, at + len(data)
        except OSError as exc:
            raise _unreadable(item.path, exc) from exc
        yield put(held, last=True, **hole), len(held) + hole.get("skip", 0)
        if not file.settled:
            unsettled.add(item.name)


def _open(item: Item) -> Reading | None:
    """Open a file; None if it has gone, or become something else, since we looked."""
    try:
        return item.open()
    except (FileNotFoundError, NotAFileError):
        return None
    except OSError as exc:
        raise _unreadable(item.path, exc) from exc


def _unreadable(path: object, exc: OSError) -> UploadError:
    msg = f"{path} cannot be read ({exc.strerror})"
    return UploadError(msg, hint="name the files that the app needs, or have it ignored")
