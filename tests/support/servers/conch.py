"""An SSH server on Twisted Conch, with the forwarding and the sessions that it comes with; takes any key.

python conch.py HOST_KEY    prints its port
"""

from __future__ import annotations

import os
import sys

from twisted.conch.interfaces import IConchUser, ISession
from twisted.conch.ssh import connection, factory, keys, userauth
from twisted.conch.unix import SSHSessionForUnixConchUser, UnixConchUser
from twisted.cred import checkers, credentials, portal
from twisted.internet import reactor
from twisted.python.components import registerAdapter
from zope.interface import implementer


class User(UnixConchUser):
    def _runAsUser(self, f, *args, **kw):  # noqa: N802  # there is one user, who runs this
        calls = [(f, args, kw)] if callable(f) else f
        for call in calls:
            result = call[0](*(call[1] if len(call) > 1 else ()), **(call[2] if len(call) > 2 else {}))
        return result

    def getUserGroupId(self):  # noqa: N802
        return None, None  # whoever runs this

    def getHomeDir(self):  # noqa: N802
        return os.environ["HOME"]


class Session(SSHSessionForUnixConchUser):
    def __init__(self, user: User) -> None:
        super().__init__(user)
        kept = ("PATH", "BOKEH_SSH_DIR")
        self.environ.update((name, os.environ[name]) for name in kept if name in os.environ)


registerAdapter(Session, User, ISession)


@implementer(portal.IRealm)
class Realm:
    def requestAvatar(self, name, mind, *interfaces):  # noqa: N802  # twisted's name
        user = User(name.decode())
        return IConchUser, user, user.logout


@implementer(checkers.ICredentialsChecker)
class AnyKey:
    credentialInterfaces = (credentials.ISSHPrivateKey,)  # noqa: N815

    def requestAvatarId(self, login):  # noqa: N802
        if not login.signature:
            from twisted.conch.error import ValidPublicKey

            raise ValidPublicKey  # it may sign now (RFC 4252, section 7)
        return login.username


class Factory(factory.SSHFactory):
    services = {b"ssh-userauth": userauth.SSHUserAuthServer, b"ssh-connection": connection.SSHConnection}  # noqa: RUF012
    publicKeys = privateKeys = {b"ssh-ed25519": keys.Key.fromFile(sys.argv[1])}  # noqa: N815, RUF012
    portal = portal.Portal(Realm(), [AnyKey()])

    def getPrimes(self):  # noqa: N802
        return None


port = reactor.listenTCP(0, Factory(), interface="127.0.0.1")
print(port.getHost().port, flush=True)
reactor.run()
