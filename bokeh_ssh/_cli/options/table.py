"""The flags of all commands, in tables under their headings."""

from __future__ import annotations

import os
from collections.abc import Sequence

import typer

from bokeh_ssh._cli.completion import complete_host, complete_job
from bokeh_ssh._cli.options.flag import Flag, under


def _environment(pairs: Sequence[str]) -> dict[str, str]:
    """Read ``NAME=VALUE`` words; a NAME alone has its value here, so that no secret need be typed."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            if name not in os.environ:
                msg = f"{name} is not set here; write NAME=VALUE"
                raise typer.BadParameter(msg, param_hint="'--env'")
            value = os.environ[name]
        found[name] = value
    return found


def _jump(targets: Sequence[str]) -> tuple[str, ...]:
    names = [name.strip() for target in targets for name in target.split(",")]
    return () if names == ["none"] else tuple(names)


def _path(path: str) -> str | None:
    return None if path == "none" else path


def _no(_: bool) -> bool:
    return False


#: How events are printed.
OUTPUT = under(
    "Output",
    Flag("json", "", "Print events as JSON objects, one per line, on standard output."),
    Flag("quiet", "", "Show only the address and problems.", also="-q"),
)

#: The same, where there is a server.
LOGGED = (*OUTPUT, *under("Output", Flag("log", "", "Show the server's output.", first=True)))

#: How a command holds what it opens.
HELD = under(
    "Output",
    Flag("background", "", "Go to the background once open (ssh -f).", also="-f", first=True),
    Flag("dry_run", "", "Print what would be done, as commands of ssh; connect nowhere."),
)

#: The login keywords that can be typed: secrets are asked for, and never on a command line that ``ps`` shows.
LOGIN = under(
    "Login",
    Flag("user", "NAME", "The login name (ssh -l).", also="-l"),
    Flag("port", "PORT", "The SSH server's port (ssh -p).", also="-p"),
    Flag("key_filename", "FILE", "A private key file; repeat for several (ssh -i).", also="-i", first=True),
    Flag(
        "jump",
        "TARGET",
        "A machine to go through; repeat, or separate with commas; 'none' goes directly (ssh -J).",
        also="-J",
        convert=_jump,
        complete=complete_host,
        first=True,
    ),
    Flag("known_hosts", "FILE", "The file of known host keys."),
    Flag(
        "host_keys",
        "strict|ask|accept-new",
        "How to treat an unknown host key (default: ask).",
        default="ask",
    ),
    Flag("ssh_config", "FILE", "The ssh config file; 'none' reads none (ssh -F).", also="-F", convert=_path),
    Flag("allow_agent", "", "Do not use the SSH agent.", name="--no-allow-agent", convert=_no),
    Flag("look_for_keys", "", "Do not try ~/.ssh/id_*.", name="--no-look-for-keys", convert=_no),
    Flag(
        "gss_auth",
        "",
        "Log in with a Kerberos ticket, or not (default: as your ssh config says).",
        name="--gss-auth/--no-gss-auth",
    ),
    Flag(
        "gss_deleg_creds",
        "",
        "Delegate your Kerberos ticket to the machine, and log in with it (ssh -K).",
        name="--gss-deleg-creds/--no-gss-deleg-creds",
        also="-K/-k",
    ),
    Flag("timeout", "SECONDS", "Time for each stage of connecting (default: 15)."),
    Flag("compression", "", "SSH compression, for slow connections (ssh -C).", also="-C"),
    Flag(
        "reconnect",
        "",
        "End when the connection is lost, in place of reconnecting.",
        name="--no-reconnect",
        convert=_no,
    ),
)

#: The same for what looks at a machine once.
LOGIN_ONCE = tuple(flag for flag in LOGIN if flag.keyword != "reconnect")

#: That, with a program there that is asked.
VISIT = (
    *LOGIN_ONCE,
    *under(
        "What runs",
        Flag("python", "PATH", "A Python on that machine (default: the first that runs).", first=True),
    ),
)

#: How a server is started, wherever it is.
START = under(
    "What runs",
    Flag("args", "OPTION", "An option for bokeh serve; repeat, or write all of them after --.", also="--arg"),
    Flag(
        "command",
        "WORDS",
        "'bokeh serve', 'panel serve', or any web server with {port} in place of its port.",
    ),
    Flag("python", "PATH", "The Python that has Bokeh (default: the first on the PATH).", first=True),
    Flag("setup", "LINE", "A shell line to run first, such as 'conda activate viz'; repeat.", first=True),
    Flag("cwd", "PATH", "The directory to run in."),
    Flag(
        "env",
        "NAME=VALUE",
        "An environment variable for the server; NAME alone takes its value here; repeat.",
        convert=_environment,
    ),
    Flag(
        "grace",
        "SECONDS",
        "How long the server stays if bokeh-ssh is killed (default: {default}; publish: 60).",
    ),
    Flag("launch_timeout", "SECONDS", "Time for the server to become ready (default: {default})."),
    Flag(
        "extra_origins", "HOST:PORT", "Another site whose pages may embed the app; repeat.", also="--origin"
    ),
)

#: The same for one that is ended at once.
STARTED_ONCE = tuple(flag for flag in START if flag.keyword != "grace")

_LOCAL_PORT = Flag(
    "local_port",
    "PORT",
    "The port on this machine; 0: any free one (default: 5006, or a free one).",
    first=True,
)

_ALLOW_OTHERS = Flag(
    "allow_others", "", "Let other users of this machine use the local port, as ssh -L does."
)

_CACHE = Flag(
    "cache",
    "",
    "Keep no static files on this machine, and use none that are kept (see bokeh-ssh cache).",
    name="--no-cache",
    convert=_no,
)

#: What both tunnels share.
TUNNEL = (
    *under(
        "Ports",
        _LOCAL_PORT,
        Flag(
            "remote_port",
            "PORT",
            "The server's port on that machine (default: any free one; to attach, 5006).",
        ),
        Flag(
            "forwards",
            "[BIND:]PORT:HOST:HOSTPORT[/http]",
            "Another port to forward, as for ssh -L; /http if a web server is there; repeat.",
            also="--forward -L",
        ),
    ),
    *under(
        "What runs",
        Flag(
            "launch",
            "",
            "Always start a server, or only attach to a running one (default: start one for an APP; "
            "without APP, attach, or start one if none answers).",
            name="--launch/--attach",
        ),
    ),
    *START,
    *under(
        "What runs",
        Flag("ready", "PATH", "A page that answers when the server is ready (with --command)."),
        Flag(
            "upload",
            "",
            "Upload APP from this machine: a script or a folder, without files that git ignores.",
            first=True,
        ),
        Flag("bring", "PATH", "Another file or folder to upload, beside APP; repeat (uploads APP too)."),
        Flag(
            "server",
            "NAME",
            "Take over a running server of yours: its id, app or route as ls shows them; '*': the only one.",
        ),
        Flag("detach", "", "Leave the server running at the end.", first=True),
        Flag(
            "dev",
            "",
            "Restart the server and reload open pages when the app's files change (with --upload, here).",
            first=True,
        ),
        Flag("allow_foreign", "", "Attach to a server of another user."),
        _ALLOW_OTHERS,
        _CACHE,
        Flag("allow_any_origin", "", "Let pages of any site open WebSockets to the server."),
        Flag(
            "signed",
            "",
            "Accept only signed sessions, or also those of other users of its machine (default: a private "
            "socket; signed sessions if there is none).",
            name="--signed/--unsigned",
        ),
    ),
)

#: What a DirectTunnel has besides: ``batch``, taken apart.
BATCH = under(
    "In a batch job",
    Flag(
        "batch",
        "",
        "Run the server in a batch job of the cluster with login node HOST (Slurm, PBS, LSF, Grid Engine).",
        first=True,
    ),
    Flag("time", "LIMIT", "The job's time limit, as the scheduler writes it: 2:00:00 (LSF: 2:00)."),
    Flag("queue", "NAME", "The queue (Slurm: partition)."),
    Flag("account", "NAME", "The account or project that pays."),
    Flag("cpus", "N", "CPUs of the job."),
    Flag("memory", "SIZE", "Memory of the job, such as 32G."),
    Flag("gpus", "N", "GPUs of the job; of a kind as a100:2."),
    Flag("name", "NAME", "The job's name in the queue (default: the app's).", name="--job-name"),
    Flag("extra", "OPTION", "One more option of the submit command; repeat.", name="--batch-arg"),
    Flag("scheduler", "NAME", "slurm, pbs, lsf or sge (default: the one that is there)."),
    Flag("way", "WAY", "How to get from HOST to the job: srun, tcp or back (default: what leads there)."),
)

#: What goes with it, and is the tunnel's own.
QUEUE = under(
    "In a batch job",
    Flag("queue_timeout", "SECONDS", "How long the job may wait (default: as long as it takes)."),
    Flag("resubmit", "", "Submit a new job when this one reaches its time limit, or loses its machine."),
)

JOB = under(
    "In a batch job",
    Flag(
        "job",
        "ID",
        "Run the server in this job, by number or name, which runs or waits; it stays at the end.",
        complete=complete_job,
    ),
)

#: What opens a server that runs.
ATTACH = (
    *JOB,
    *under("Ports", _LOCAL_PORT, _ALLOW_OTHERS, _CACHE),
    *under(
        "What runs",
        Flag("detach", "", "Leave the server running at the end, from now on.", first=True),
        Flag("python", "PATH", "A Python on that machine (default: the first that runs).", first=True),
        Flag("grace", "SECONDS", "How long the server stays if bokeh-ssh is killed (default: {default})."),
    ),
)

_ALLOW_EXPOSED = Flag(
    "allow_exposed", "", "Accept a gateway that opens the port to its whole network (GatewayPorts yes)."
)

#: What a GatewayTunnel has besides.
GATEWAY = under(
    "Gateway",
    Flag(
        "host",
        "TARGET",
        "The Bokeh host, reached through the gateway; without it, the host publishes by itself.",
        complete=complete_host,
        first=True,
    ),
    Flag(
        "reverse",
        "auto|host|relay",
        "Who opens the gateway's port: the Bokeh host, this machine (relay), or the host if it can "
        "(default: {default}).",
    ),
    Flag("name", "NAME", "The name that it was published under (default: the only one).", first=True),
    Flag("gateway_port", "PORT", "The port on the gateway (default: what is published by name, or 5006)."),
    Flag("gateway_address", "HOST:PORT", "The gateway as the Bokeh host sees it, if that differs."),
    Flag(
        "forward_agent",
        "",
        "Forward your SSH agent to the Bokeh host, for its login to the gateway only (ssh -A).",
        also="-A",
    ),
    _ALLOW_EXPOSED,
)

#: What means nothing to a tunnel without one.
GATEWAY_ONLY = {flag.keyword for flag in GATEWAY} - {"host"}

#: What a RemoteForward takes.
REMOTE = under(
    "Ports",
    Flag(
        "name",
        "NAME",
        "Publish it under this name, for your account only (default: the app's name).",
        first=True,
    ),
    Flag(
        "remote_port",
        "PORT",
        "A port on the gateway in place of a name, open to its other users; 0: any free one.",
    ),
    Flag("local_port", "PORT", "The server's port (default: 5006; for an APP, any free one).", first=True),
    Flag("local_host", "HOST", "The machine that the server runs on (default: this one)."),
    Flag("local_socket", "PATH", "The Unix socket that the server listens on."),
    Flag(
        "remote_socket",
        "PATH",
        "A Unix socket on the gateway in place of a port; only you can connect to it.",
    ),
    Flag(
        "bind_address",
        "ADDRESS",
        "The address that the gateway listens on; any but loopback opens it to others.",
    ),
    _ALLOW_EXPOSED,
)

#: What a LocalForward takes.
FORWARD = under(
    "Ports",
    Flag("remote_port", "PORT", "The target's port.", first=True),
    Flag("remote_host", "NAME", "The target, as seen from HOST (default: HOST itself).", first=True),
    Flag("remote_socket", "PATH", "A Unix socket on HOST as the target, in place of a port.", first=True),
    Flag("local_port", "PORT", "The port on this machine (default: any free one).", first=True),
    Flag(
        "local_socket",
        "PATH",
        "A Unix socket on this machine in place of a port; only you can connect to it.",
    ),
    Flag("bind_address", "ADDRESS", "The local address to listen on; any but loopback opens it to others."),
    Flag(
        "allow_others",
        "",
        "Let other users of this machine use the local port, as ssh -L does; or refuse also programs "
        "that close too soon to see whose they are (default: let these in).",
        name="--allow-others/--no-allow-others",
    ),
    Flag(
        "http",
        "",
        "A web server is there: refuse requests of other sites' pages, keep static files on this machine.",
    ),
    _CACHE,
)

#: What ``forward -R`` takes besides.
EXPOSED = under("Ports", _ALLOW_EXPOSED)

#: What the demo takes: its server, app and login are its own.
DEMO = under("Ports", _LOCAL_PORT)

#: Every keyword that some flag is, but what says how a single command runs.
EVERY_KEYWORD = {
    flag.keyword
    for flag in (*LOGGED, *LOGIN, *TUNNEL, *BATCH, *QUEUE, *JOB, *GATEWAY, *REMOTE, *FORWARD, *HELD)
}
#: The commands that have settings.
COMMANDS = frozenset(
    {
        *("direct", "attach", "gateway", "up", "publish", "forward"),
        *("ls", "stop", "status", "doctor", "cache", "demo"),
    }
)
#: What means nothing without a batch job.
JOB_ONLY = {flag.keyword for flag in (*BATCH, *QUEUE)} - {"batch", "name"}
#: What means nothing to a tunnel without an app, and to a publication of a server that runs.
APP_ONLY = {"upload", "bring", "dev"}
START_ONLY = {flag.keyword for flag in START}
