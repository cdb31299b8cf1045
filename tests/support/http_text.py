"""Requests as bytes."""

from __future__ import annotations


def head(*lines: str, path: str = "/") -> bytes:
    """Write the head of a request."""
    return "\r\n".join([f"GET {path} HTTP/1.1", *lines, "", ""]).encode("latin-1")
