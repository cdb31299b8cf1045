"""Open a Bokeh server that runs somewhere else as if it ran here.

>>> import bokeh_ssh
>>> bokeh_ssh.DirectTunnel("example.org", "me", app="dashboard.py")
<DirectTunnel to dashboard.py on example.org, new>
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bokeh_ssh._version import __version__

if TYPE_CHECKING:
    from bokeh_ssh._core.errors import (
        AlgorithmError,
        AuthenticationError,
        BokehNotFoundError,
        BokehSSHError,
        ChangedHostKeyError,
        ConfigError,
        ConnectError,
        ConnectionLostError,
        ConnectTimeoutError,
        ForeignServerError,
        ForwardError,
        ForwardingRefusedError,
        GatewayExposedError,
        HostKeyError,
        LaunchError,
        LaunchTimeoutError,
        PortInUseError,
        PromptRequiredError,
        ProtocolError,
        PythonNotFoundError,
        RefusedError,
        ResolveError,
        RevokedHostKeyError,
        ServerExitedError,
        ServerGoneError,
        ServerNotFoundError,
        ServerTakenError,
        SessionError,
        SocketInUseError,
        TargetUnreachableError,
        TooManyKeysError,
        TunnelClosedError,
        UnknownHostKeyError,
        UploadError,
        UsageError,
    )
    from bokeh_ssh._core.events import (
        AppFailed,
        Attached,
        Authenticated,
        Closed,
        Connecting,
        Event,
        HostKeyAdded,
        HostKeyVerified,
        Launched,
        Launching,
        Lost,
        Question,
        Ready,
        Reconnected,
        Reconnecting,
        ReverseForwarded,
        ServerExited,
        ServerResponsive,
        ServerTaken,
        ServerUnresponsive,
        Updated,
        Uploading,
        Warned,
    )
    from bokeh_ssh._core.host import Host
    from bokeh_ssh._tunnels.direct import DirectTunnel
    from bokeh_ssh._tunnels.gateway import GatewayTunnel
    from bokeh_ssh._tunnels.local_forward import LocalForward
    from bokeh_ssh._tunnels.notebook import notebook_prompt, show
    from bokeh_ssh._tunnels.remote_forward import RemoteForward

#: Where each public name lives. Loaded at first use: the command line shows its help without paramiko.
_HOMES = {
    "_tunnels.direct": ("DirectTunnel",),
    "_core.errors": (
        "AlgorithmError",
        "AuthenticationError",
        "BokehNotFoundError",
        "BokehSSHError",
        "ChangedHostKeyError",
        "ConfigError",
        "ConnectError",
        "ConnectTimeoutError",
        "ConnectionLostError",
        "ForeignServerError",
        "ForwardError",
        "ForwardingRefusedError",
        "GatewayExposedError",
        "HostKeyError",
        "LaunchError",
        "LaunchTimeoutError",
        "PortInUseError",
        "PromptRequiredError",
        "ProtocolError",
        "PythonNotFoundError",
        "RefusedError",
        "ResolveError",
        "RevokedHostKeyError",
        "ServerExitedError",
        "ServerGoneError",
        "ServerNotFoundError",
        "ServerTakenError",
        "SessionError",
        "SocketInUseError",
        "TargetUnreachableError",
        "TooManyKeysError",
        "TunnelClosedError",
        "UnknownHostKeyError",
        "UploadError",
        "UsageError",
    ),
    "_core.events": (
        "AppFailed",
        "Attached",
        "Authenticated",
        "Closed",
        "Connecting",
        "Event",
        "HostKeyAdded",
        "HostKeyVerified",
        "Launched",
        "Launching",
        "Lost",
        "Question",
        "Ready",
        "Reconnected",
        "Reconnecting",
        "ReverseForwarded",
        "ServerExited",
        "ServerResponsive",
        "ServerTaken",
        "ServerUnresponsive",
        "Updated",
        "Uploading",
        "Warned",
    ),
    "_tunnels.gateway": ("GatewayTunnel",),
    "_tunnels.local_forward": ("LocalForward",),
    "_tunnels.notebook": ("notebook_prompt", "show"),
    "_tunnels.remote_forward": ("RemoteForward",),
    "_core.host": ("Host",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AlgorithmError",
    "AppFailed",
    "Attached",
    "Authenticated",
    "AuthenticationError",
    "BokehNotFoundError",
    "BokehSSHError",
    "ChangedHostKeyError",
    "Closed",
    "ConfigError",
    "ConnectError",
    "ConnectTimeoutError",
    "Connecting",
    "ConnectionLostError",
    "DirectTunnel",
    "Event",
    "ForeignServerError",
    "ForwardError",
    "ForwardingRefusedError",
    "GatewayExposedError",
    "GatewayTunnel",
    "Host",
    "HostKeyAdded",
    "HostKeyError",
    "HostKeyVerified",
    "LaunchError",
    "LaunchTimeoutError",
    "Launched",
    "Launching",
    "LocalForward",
    "Lost",
    "PortInUseError",
    "PromptRequiredError",
    "ProtocolError",
    "PythonNotFoundError",
    "Question",
    "Ready",
    "Reconnected",
    "Reconnecting",
    "RefusedError",
    "RemoteForward",
    "ResolveError",
    "ReverseForwarded",
    "RevokedHostKeyError",
    "ServerExited",
    "ServerExitedError",
    "ServerGoneError",
    "ServerNotFoundError",
    "ServerResponsive",
    "ServerTaken",
    "ServerTakenError",
    "ServerUnresponsive",
    "SessionError",
    "SocketInUseError",
    "TargetUnreachableError",
    "TooManyKeysError",
    "TunnelClosedError",
    "UnknownHostKeyError",
    "Updated",
    "UploadError",
    "Uploading",
    "UsageError",
    "Warned",
    "__version__",
    "notebook_prompt",
    "show",
]


def __getattr__(name: str) -> Any:
    module = _HOME_OF.get(name)
    if module is None:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    found = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    found.__module__ = __name__  # tracebacks and reprs show the public path
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
