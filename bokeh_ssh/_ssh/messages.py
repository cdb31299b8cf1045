"""Strings as all of SSH writes them, and names and numbers that several parts of it use. Pure text."""

from __future__ import annotations

#: Channels that lead to a lent SSH agent, and the request for them (draft-ietf-sshm-ssh-agent, section 4).
AGENT = "auth-agent@openssh.com"
AGENT_REQUEST = b"auth-agent-req@openssh.com"
#: What ends the type of a certificate.
CERTIFICATE = "-cert-v01@openssh.com"
#: Why a channel is refused (RFC 4254, section 5.1).
PROHIBITED, CONNECT_FAILED, UNKNOWN_TYPE, SHORTAGE = 1, 2, 3, 4


def string(raw: bytes | str) -> bytes:
    """Write bytes, or a path or a name as it was read, as a string (RFC 4251, section 5)."""
    raw = raw.encode("utf-8", "surrogateescape") if isinstance(raw, str) else raw
    return len(raw).to_bytes(4, "big") + raw


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
