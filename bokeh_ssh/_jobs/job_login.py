"""The login to a job's own SSH server: a key pair for one job, and the host key that the job has sent."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import paramiko

from bokeh_ssh._core.errors import ChangedHostKeyError, ProtocolError
from bokeh_ssh._core.host import Host

#: What a FIPS machine takes too. It is made for each job and never written anywhere.
_CURVE_BITS = 256


class JobLogin:
    """The login to one job; its private key stays in this process.

    :param like: the machine whose timeout and compression are taken
    """

    def __init__(self, stack: contextlib.ExitStack, like: Host) -> None:
        self._like = like
        self._key = paramiko.ECDSAKey.generate(bits=_CURVE_BITS)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bokeh-ssh-"))
        self._known_hosts = Path(folder) / "known_hosts"
        self._host_key = ""

    @property
    def public_key(self) -> str:
        """The public half, as a line of ``authorized_keys``."""
        return f"{self._key.get_name()} {self._key.get_base64()}"

    def host(self, node: str, user: str) -> Host:
        """Return the login to the node, once :meth:`trust` knows its host key."""
        return Host(
            node,
            user,
            pkey=self._key,
            allow_agent=False,
            look_for_keys=False,
            known_hosts=self._known_hosts,
            host_keys="strict",
            ssh_config=None,
            jump=(),
            timeout=self._like.timeout,
            compression=self._like.compression,
        )

    def trust(self, node: str, host_key: str) -> None:
        """Take the job's host key, which came over the login session and the scheduler; the first one counts.

        :raises ChangedHostKeyError: if it is another one than before
        :raises ProtocolError: if it is no key
        """
        kind, _, blob = host_key.partition(" ")
        if not kind.startswith("ecdsa-") or not blob.isascii() or not blob or any(c.isspace() for c in blob):
            msg = f"the job did not tell its host key: {host_key[:80]!r}"
            raise ProtocolError(msg, host=node, hint="start it again")
        if self._host_key and host_key != self._host_key:
            msg = "the job's SSH server has another host key than before"
            raise ChangedHostKeyError(msg, host=node, hint="start it again", key_type=kind)
        self._host_key = host_key
        self._known_hosts.write_text(f"{node} {host_key}\n", encoding="ascii")
