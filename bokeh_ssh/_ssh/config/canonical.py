"""The canonical name of a host, as CanonicalizeHostname asks for it: by look-ups of names."""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass

from bokeh_ssh._core.errors import ResolveError
from bokeh_ssh._core.patterns import lower, matches_list
from bokeh_ssh._ssh.config import syntax
from bokeh_ssh._ssh.tcp import look_up

#: Seconds for one name; the system's own look-up may have a longer one.
PATIENCE = 10.0


@dataclass(frozen=True)
class Rules:
    """What the config says about canonical names.

    :ivar mode: of CanonicalizeHostname: ``"no"``, ``"yes"`` or ``"always"``
    :ivar direct: whether we look the host up ourselves: there is no jump host and no ProxyCommand
    :ivar domains: to be tried behind a name, in order
    :ivar most_dots: a name with more is one already
    :ivar fallback: whether a name may stay as it is where no domain has it
    :ivar cnames: pattern lists of a name, and of what the name server may make of it
    """

    mode: str
    direct: bool
    family: int
    domains: tuple[str, ...]
    most_dots: int
    fallback: bool
    cnames: tuple[tuple[str, str], ...]

    def canonicalize(self, host: str) -> str:
        """Return the canonical name of a host, which is no address.

        :raises ResolveError: if it has none, and the config says that it must
        """
        applies = self.mode == "always" or (self.mode == "yes" and self.direct)
        if applies and (found := self._by_domain(host)):
            return found
        if self.cnames and (self.direct or self.mode == "always"):
            cname = self._look_up(host)
            if cname is None and self.direct:
                msg = f"{host} has no address"
                raise ResolveError(msg, host=host, hint="check the name, and CanonicalizePermittedCNAMEs")
            return self._follow(host, cname or "")
        return host

    def _by_domain(self, host: str) -> str | None:
        names: tuple[str, ...]
        if host.endswith("."):
            names = (host,)
        elif host.count(".") > self.most_dots:
            return None
        else:
            names = tuple(f"{host}.{domain}." for domain in self.domains)
        for name in names:
            cname = self._look_up(name)
            if cname is not None:
                return self._follow(name.removesuffix("."), cname)
        if not self.fallback:
            msg = f"{host} is found in none of the CanonicalDomains"
            raise ResolveError(msg, host=host, hint="check the name, or set CanonicalizeFallbackLocal yes")
        return None

    def _look_up(self, name: str) -> str | None:
        """Return what the name server calls a name, "" where it does not say; None where it is not found."""
        found = look_up(name, None, family=self.family, flags=socket.AI_CANONNAME, timeout=PATIENCE)
        if found is None or isinstance(found, Exception):
            return None
        cname = str(found[0][3])
        with contextlib.suppress(ValueError):
            return cname if syntax.domain(cname) else ""
        return ""

    def _follow(self, name: str, cname: str) -> str:
        applies = self.mode == "always" or (self.mode == "yes" and self.direct)
        for source, target in self.cnames if applies and cname and cname != name else ():
            if matches_list(name, source) and matches_list(cname, target):
                return lower(cname)
        return name
