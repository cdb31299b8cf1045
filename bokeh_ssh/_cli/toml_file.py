"""Files of settings: read with care for who may have written them, and their values checked by kind."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import Any

from bokeh_ssh._core.errors import UsageError
from bokeh_ssh._core.file_reader import FLAGS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: Bytes of such a file.
_MOST = 1 << 20
#: What TOML has for each kind, how that is called, and an example; any other kind is a text.
_SHAPES: dict[Any, tuple[tuple[type, ...], str, str]] = {
    bool: ((bool,), "true or false", "true"),
    int: ((int,), "a number", "5006"),
    float: ((int, float), "a number", "60"),
    str: ((str,), "a text", '"text"'),
    list[str]: ((list,), "a list of texts", '["one", "two"]'),
    dict[str, str]: ((dict,), "a table of texts", '{ NAME = "value" }'),
}


def read_toml(file: Path) -> tuple[dict[str, Any], os.stat_result] | None:
    """Return what a file says, and whose it is; None where there is none. Nothing there is waited for.

    :raises UsageError: if it cannot be read, or is no file of settings by its kind, size or text
    """
    try:
        with os.fdopen(os.open(file, FLAGS), "rb") as stream:
            facts = os.fstat(stream.fileno())
            data = stream.read(_MOST + 1) if stat.S_ISREG(facts.st_mode) else None
        if data is None or len(data) > _MOST:
            msg = f"{file} is no file of settings ({'it is too long' if data else 'it is no file'})"
            raise UsageError(msg, hint="move it away, or run this elsewhere")
        return tomllib.loads(data.decode("utf-8")), facts
    except (FileNotFoundError, NotADirectoryError):
        return None
    except IsADirectoryError as exc:  # Python's own words have the number of the descriptor as its name
        msg = f"{file} is a folder, and no file of settings"
        raise UsageError(msg, hint="move it away, or run this elsewhere") from exc
    except (OSError, UnicodeDecodeError) as exc:
        msg = f"{file} cannot be read ({exc})"
        raise UsageError(msg, hint="mend it, or move it away") from exc
    except (ValueError, RecursionError) as exc:  # TOMLDecodeError is a ValueError; so is a number too long
        msg = f"{file} is no TOML ({exc})"
        raise UsageError(msg, hint='texts are in quotes, as in app = "dashboard.py"; see toml.io') from exc


def check_shape(key: str, value: Any, kind: Any, file: object) -> Any:
    """Return a value of a TOML file as a keyword takes it: lists as tuples, and one text as a list of one.

    Words for the server may be numbers, and so may GPUs, which may have a kind before their number.

    :raises UsageError: if it is something else
    """
    types, what, example = _SHAPES.get(kind, _SHAPES[str])
    if list in types and isinstance(value, str):
        value = [value]
    if key == "args" and isinstance(value, list):
        value = [str(word) if type(word) in (int, float) else word for word in value]
    if key == "gpus" and type(value) is int:
        value = str(value)
    texts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if type(value) not in types or not all(isinstance(text, str) for text in texts):
        msg = f"{file}: {key} is not {what}"
        raise UsageError(msg, hint=f"write {key} = {example}")
    return tuple(value) if isinstance(value, list) else value
