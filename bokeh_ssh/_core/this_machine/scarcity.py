"""What this process may have no more of: open files and threads.

It passes, as the program closes some. So it is no property of the machine that could not be reached, or of a
file that could not be read, and what is done again later may work.
"""

from __future__ import annotations

import errno

from bokeh_ssh._core.errors import BokehSSHError, ResourceError

_OUT_OF_FILES = (errno.EMFILE, errno.ENFILE)


def is_scarce(exc: BaseException | None) -> bool:
    """Return whether an exception says that there is no descriptor or no thread to be had."""
    if isinstance(exc, OSError):
        return exc.errno in _OUT_OF_FILES
    return type(exc) is RuntimeError and "new thread" in str(exc)  # as Python says it


def scarcity_of(exc: BaseException, host: str | None = None) -> ResourceError | None:
    """Return our own error for what has failed since something is scarce; None for anything else.

    :param host: what was to be reached
    """
    cause = exc.__cause__ if isinstance(exc, BokehSSHError) else exc
    if not is_scarce(cause):
        return None
    files = isinstance(cause, OSError)
    msg = f"this program may {'open no more files' if files else 'start no more threads'} ({cause})"
    hint = f"see what it has so many of, or raise the limit: ulimit -{'n' if files else 'u'}"
    return ResourceError(msg, host=host, hint=hint)
