"""Session ids and tokens, signed as Bokeh signs them; text only, and no Bokeh needed (bokeh.util.token).

A server that runs with ``--session-ids external-signed`` answers only to who has the key.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import string
import time

_LETTERS = string.ascii_letters + string.digits
_LENGTH = 44  # characters: 261 bits


def new_session_id(key: str) -> str:
    """Return the id of a new session, signed with ``key``."""
    name = "".join(secrets.choice(_LETTERS) for _ in range(_LENGTH))
    return f"{name}.{_signature(name, key)}"


def token_of(session_id: str, key: str, *, lifetime: int = 300) -> str:
    """Return the token that the websocket of a session wants as its second subprotocol.

    :param lifetime: seconds that it can be used to connect
    """
    payload = {"session_id": session_id, "session_expiry": int(time.time()) + lifetime}
    text = _base64(json.dumps(payload).encode())
    return f"{text}.{_signature(text, key)}"


def _signature(text: str, key: str) -> str:
    return _base64(hmac.new(key.encode(), text.encode(), hashlib.sha256).digest())


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")
