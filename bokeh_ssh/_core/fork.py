"""What a forked child lets go of: its copies of our descriptors, which are not its own to use.

A child has none of our threads but a copy of every socket. Were it to use them, it would speak into the
parent's connection; were it to keep them, the far side would not see the parent die.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

_T = TypeVar("_T")
_calls: weakref.WeakKeyDictionary[Any, Callable[[Any], object]] = weakref.WeakKeyDictionary()


def in_child(thing: _T, call: Callable[[_T], object]) -> _T:
    """Call ``call(thing)`` in every child that is forked while ``thing`` lives; return ``thing``.

    Only the forking thread is there then: ``call`` must not take a lock that another may have held.
    """
    _calls[thing] = call
    return thing


def _forked() -> None:
    for thing, call in list(_calls.items()):
        try:
            call(thing)
        except OSError:  # it was closed already
            pass
    _calls.clear()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_forked)
