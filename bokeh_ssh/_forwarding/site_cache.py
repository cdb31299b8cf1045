"""Answers requests for the static files of one server, and keeps them; see ``static_requests``."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

from bokeh_ssh._forwarding.revalidator import Revalidator
from bokeh_ssh._forwarding.static_cache import Content, Recording, StaticCache
from bokeh_ssh._forwarding.static_requests import (
    Address,
    StaticFile,
    StaticRequest,
    find_hash_to_keep,
    find_lasting,
    find_length_to_keep,
    fits,
    read_unchanged,
    write_lasting_head,
    write_question,
    write_static_head,
    write_unchanged_head,
)
from bokeh_ssh._ssh.connection import Connection
from bokeh_ssh._ssh.relay import Loop

#: Gets an answer, head first, or None where only the server has one.
Use = Callable[["list[memoryview] | None"], None]


def name_site(connection: Connection, server: str) -> str:
    """Name a server for whom alone files are kept: by host key, account, and what it is there.

    :param server: names it on that machine, the same each time
    :returns: empty where the machine has no key of its own (:mod:`control_master`)
    """
    if connection.methods == ("ControlMaster",):
        return ""
    machine = hashlib.sha256(connection.transport.host_key_blob).hexdigest()
    return f"{machine} {connection.hop.user} {server}"


class SiteCache:
    """What one server's files are looked for in, over one connection.

    :param site: names the machine, the account and the server there; empty keeps nothing for an address
    """

    def __init__(self, cache: StaticCache, revalidator: Revalidator, site: str) -> None:
        self._cache = cache
        self._revalidator = revalidator
        self._site = site

    def look_up(self, loop: Loop, request: StaticRequest, done: Use) -> None:
        """Have ``done`` called on the loop's thread, later. Loop thread only."""
        if request.sha512:
            file = StaticFile(request.name, request.sha512)
            self._cache.look_up(loop, file, lambda content: done(_answer_by_content(request, content)))
        elif request.again:
            self._ask_again(loop, request, done)
        elif self._site:
            address = Address(self._site, request.target)
            self._cache.look_up(loop, address, lambda content: done(_answer_lasting(request, content)))
        else:
            loop.post(lambda: done(None))

    def _ask_again(self, loop: Loop, request: StaticRequest, done: Use) -> None:
        hashes: list[str] = []

        def ask(found: list[str] | None) -> None:
            if not found:
                done(None)
                return
            hashes[:] = found
            self._revalidator.ask(write_question(request, found), take)

        def take(head: bytes) -> None:
            sha512 = read_unchanged(head)
            if sha512 not in hashes:
                done(None)
                return
            file = StaticFile(request.name, sha512)
            self._cache.look_up(loop, file, lambda content: use(head, content))

        def use(head: bytes, content: Content | None) -> None:
            if content is None:
                done(None)
            else:
                done(_parts(write_unchanged_head(request, head, len(content)), content))

        self._cache.find(loop, request.name, ask)

    def record(self, request: StaticRequest, head: bytes) -> Recording | None:
        """Begin to keep the file that follows the head of an answer; None where it is not to be kept."""
        if request.sha512:
            file = StaticFile(request.name, request.sha512)
            return self._cache.record(file) if find_length_to_keep(head) else None
        if request.again:
            sha512 = find_hash_to_keep(head)
            return self._cache.record(StaticFile(request.name, sha512), promised=False) if sha512 else None
        answer = find_lasting(request, head, time.time()) if self._site else None
        return self._cache.record(Address(self._site, request.target), answer) if answer else None


def _parts(head: bytes, content: Content) -> list[memoryview]:
    return [memoryview(head), memoryview(content)]


def _answer_by_content(request: StaticRequest, content: Content | None) -> list[memoryview] | None:
    if content is None:
        return None
    head = write_static_head(request, len(content))
    return [memoryview(head)] if request.known else _parts(head, content)


def _answer_lasting(request: StaticRequest, content: Content | None) -> list[memoryview] | None:
    answer, now = content.answer if content is not None else None, time.time()
    if content is None or answer is None or not (fits(answer, request) and answer.is_fresh(now)):
        return None
    return _parts(write_lasting_head(answer, len(content), now), content)
