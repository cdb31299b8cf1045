"""What the figures depend on: the machine, and the versions."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

_PACKAGES = ("asyncssh", "bokeh", "cryptography", "fabric", "paramiko", "sshtunnel", "tornado")


def gather() -> dict[str, Any]:
    """Gather them; nothing in it names the machine or its user."""
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    said = subprocess.run(["ssh", "-V"], capture_output=True, text=True, check=False).stderr
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "system": f"{platform.system()} {platform.release()}",
        "processor": _line("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory": _line("/proc/meminfo", "MemTotal"),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "openssh": said.partition(",")[0].strip(),
        "versions": versions,
    }


def sentence(found: dict[str, Any]) -> str:
    """Say them in one."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    memory = re.sub(r"(\d+) kB", lambda match: f"{int(match[1]) / 2**20:.0f} GiB", found["memory"] or "?")
    return (
        f"{found['date']}, {found['cores']} cores of {found['processor']}, {memory}, {found['system']}, "
        f"Python {found['python']}, {found['openssh']}, {versions}; load before the run: {found['load']}."
    )


def _line(path: str, name: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.search(rf"^{name}\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1] if found else ""
