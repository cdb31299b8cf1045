"""What SSH writes of endpoints: requests for a channel, to listen, to stop; and what a server tells of them.

Also strings as all of SSH writes them.

TCP is RFC 4254, section 7; sockets are OpenSSH's extension (its PROTOCOL file, section 2.4). Pure text.
"""

from __future__ import annotations

import struct

from bokeh_ssh._core.endpoint import HERE, Endpoint, Origin, encode

#: Channels that lead to a lent SSH agent, and the request for them (draft-ietf-sshm-ssh-agent, section 4).
AGENT = "auth-agent@openssh.com"
AGENT_REQUEST = b"auth-agent-req@openssh.com"
_MOST_TEXT = 1024  # bytes of a name that a server may tell

_uint32 = struct.Struct(">I")


def string(raw: bytes) -> bytes:
    """Write bytes as a string (RFC 4251, section 5)."""
    return _uint32.pack(len(raw)) + raw


def strings(data: bytes, count: int) -> list[bytes]:
    """Read so many strings; what follows them is the last of what this returns.

    :raises ValueError: if there are fewer
    """
    found = []
    for _ in range(count):
        end = 4 + int.from_bytes(data[:4], "big")
        if end > len(data):
            msg = "a string ends beyond its message"
            raise ValueError(msg)
        found.append(data[4:end])
        data = data[end:]
    return [*found, data]


def _address(host: str, port: int) -> bytes:
    return string(encode(host)) + _uint32.pack(port)


def opening(target: Endpoint, origin: Origin) -> tuple[bytes, bytes]:
    """Return the type of a channel that leads to ``target``, and what follows it in the request."""
    if isinstance(target, str):
        return b"direct-streamlocal@openssh.com", string(encode(target)) + string(b"") + _uint32.pack(0)
    return b"direct-tcpip", _address(*target) + _address(*origin)


def listening(where: Endpoint) -> tuple[bytes, bytes]:
    """Return the name of the global request that has the server listen, and what follows it."""
    if isinstance(where, str):
        return b"streamlocal-forward@openssh.com", string(encode(where))
    return b"tcpip-forward", _address(*where)


def cancelling(where: Endpoint) -> tuple[bytes, bytes]:
    """Return the name of the global request that ends that, and what follows it."""
    kind, rest = listening(where)
    return b"cancel-" + kind, rest


def bound_port(answer: bytes) -> int | None:
    """Read the port that a server chose (RFC 4254, section 7.1); None where it does not say, or nonsense."""
    port = int(_uint32.unpack_from(answer)[0]) if len(answer) >= 4 else 0
    return port if 0 < port < 65536 else None


def forwarded(kind: bytes, rest: bytes) -> tuple[Endpoint, Origin] | None:
    """Read what a server says of a channel that it opens: which listener it is for, and who connected.

    :param kind: the type of the channel
    :param rest: what follows the packet size in its message
    :returns: None for any other type, and for what does not parse
    """
    try:
        if kind == b"forwarded-tcpip":
            host, rest = _take(rest)
            port = int(_uint32.unpack_from(rest)[0])
            origin, rest = _take(rest[4:])
            return (host, port), (origin, int(_uint32.unpack_from(rest)[0]))
        if kind == b"forwarded-streamlocal@openssh.com":
            return _take(rest)[0], HERE
        if kind == AGENT.encode():
            return AGENT, HERE
    except (struct.error, ValueError):
        pass
    return None


def _take(rest: bytes) -> tuple[str, bytes]:
    """Read a string, as :func:`encode` writes it; return it and what follows."""
    raw, rest = strings(rest, 1)
    if len(raw) > _MOST_TEXT:
        msg = "a name is too long"
        raise ValueError(msg)
    return raw.decode("utf-8", "surrogateescape"), rest
