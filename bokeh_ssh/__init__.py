"""Open a Bokeh server that runs somewhere else as if it ran here.

>>> import bokeh_ssh
>>> bokeh_ssh.DirectTunnel("example.org", "me", app="dashboard.py")
<DirectTunnel to dashboard.py on example.org, new>
"""

# ruff: noqa: F405 - a test sees to it that each name is there

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bokeh_ssh._version import __version__

if TYPE_CHECKING:
    # All of both that __all__ names.
    from bokeh_ssh._core.errors import *  # noqa: F403
    from bokeh_ssh._core.events import *  # noqa: F403
    from bokeh_ssh._core.host import Host
    from bokeh_ssh._forwarding.status import HopStatus, TunnelStatus
    from bokeh_ssh._jobs.batch import Batch
    from bokeh_ssh._jobs.job import Job, JobState
    from bokeh_ssh._tunnels.direct import DirectTunnel
    from bokeh_ssh._tunnels.gateway import GatewayTunnel
    from bokeh_ssh._tunnels.local_forward import LocalForward
    from bokeh_ssh._tunnels.notebook import notebook_prompt, show
    from bokeh_ssh._tunnels.remote_forward import RemoteForward

#: Where public names live that are neither errors nor events.
_HOMES = {
    "Batch": "_jobs.batch",
    "DirectTunnel": "_tunnels.direct",
    "GatewayTunnel": "_tunnels.gateway",
    "HopStatus": "_forwarding.status",
    "Host": "_core.host",
    "Job": "_jobs.job",
    "JobState": "_jobs.job",
    "LocalForward": "_tunnels.local_forward",
    "RemoteForward": "_tunnels.remote_forward",
    "TunnelStatus": "_forwarding.status",
    "notebook_prompt": "_tunnels.notebook",
    "show": "_tunnels.notebook",
}

__all__ = [
    "AlgorithmError",
    "AppAccessError",
    "AppFailed",
    "Attached",
    "Authenticated",
    "AuthenticationError",
    "Batch",
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
    "HopStatus",
    "Host",
    "HostKeyAdded",
    "HostKeyError",
    "HostKeyVerified",
    "Job",
    "JobEnded",
    "JobEndedError",
    "JobEnding",
    "JobError",
    "JobNeverStartsError",
    "JobReached",
    "JobStarted",
    "JobState",
    "JobSubmitted",
    "JobWaiting",
    "KDCUnreachableError",
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
    "QueueTimeoutError",
    "Ready",
    "Reconnected",
    "Reconnecting",
    "RefusedError",
    "RemoteForward",
    "ResolveError",
    "ResourceError",
    "ReverseForwarded",
    "RevokedHostKeyError",
    "SecurityKeyAbsentError",
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
    "SubmitError",
    "TargetUnreachableError",
    "TooManyKeysError",
    "TouchRequested",
    "TunnelClosedError",
    "TunnelStatus",
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
    """Load a public name at its first use: the command line shows its help without paramiko."""
    if name not in __all__:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    module = _HOMES.get(name) or ("_core.errors" if name.endswith("Error") else "_core.events")
    found = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    found.__module__ = __name__  # tracebacks and reprs show the public path
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
