"""How a browser reaches ports of this machine where it is a JupyterHub's: by way of jupyter-server-proxy."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

#: Variables that say where the hub is, the best first: JupyterHub's own from 5 on, where its administrator
#: has set it; Bokeh's; JupyterHub's where each user has a name of their own.
_PUBLIC = ("JUPYTERHUB_PUBLIC_URL", "JUPYTER_BOKEH_EXTERNAL_URL", "JUPYTERHUB_HOST")


@dataclass(frozen=True)
class HubProxy:
    """The addresses of a user's ports on a JupyterHub.

    :param prefix: the path of the user's server, such as ``/user/me/``
    :param site: such as ``https://hub.example.org``; empty where nothing says it
    """

    prefix: str
    site: str

    @property
    def origin(self) -> str:
        """What Bokeh's servers are to take for the pages' origin: a name and port, or ``*`` for any."""
        return urlsplit(self.site).netloc or "*"

    def root(self, port: int) -> str:
        """Return the path that the proxy passes on as it is to a port of this machine.

        A server that is to serve there (Bokeh's ``--prefix``) has its pages find their scripts.
        """
        return f"{self.prefix}proxy/absolute/{port}"

    def address(self, port: int, route: str) -> str:
        """Return the address of a path on a port of this machine; only a path where the site is not known.

        >>> hub = HubProxy("/user/me/", "https://hub.example.org")
        >>> hub.address(5006, hub.root(5006) + "/app")
        'https://hub.example.org/user/me/proxy/absolute/5006/app'
        >>> hub.address(5006, "/other")
        'https://hub.example.org/user/me/proxy/5006/other'
        """
        known = route.startswith(self.root(port) + "/")
        return f"{self.site}{route}" if known else f"{self.site}{self.prefix}proxy/{port}{route}"


def find_hub(environ: Mapping[str, str] = os.environ) -> HubProxy | None:
    """Return how ports of this machine are reached, by what a JupyterHub sets; None where there is none.

    >>> find_hub({"JUPYTERHUB_SERVICE_PREFIX": "/user/me/"})
    HubProxy(prefix='/user/me/', site='')
    """
    prefix = environ.get("JUPYTERHUB_SERVICE_PREFIX", "")
    if not re.fullmatch(r"/(?:[\w.~@%+-]+/)*", prefix):
        return None
    for name in _PUBLIC:
        found = re.match(r"https?://[\w.:\[\]-]+", environ.get(name, ""), re.ASCII)
        if found:
            return HubProxy(prefix, found[0])
    return HubProxy(prefix, "")
