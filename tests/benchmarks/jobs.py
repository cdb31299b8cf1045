"""A batch job on a Slurm of this machine's own, and what leads to its machine.

As a program it opens a tunnel to a job, with a forward to the target of the loads.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import slurm_bed
from benchmarks import starts
from benchmarks.process import Child

find_lacking = slurm_bed.find_lacking
#: Where the jobs run: the only machine of that queue, and its address in the cluster.
_QUEUE, _NODE, _ADDRESS = "one", "c1", "10.77.0.11"
_LIMIT = 120.0


class JobBench:
    """The cluster, with the target of the loads on the machine of the jobs.

    :param stack: takes what must be ended
    """

    def __init__(self, stack: ExitStack, directory: Path) -> None:
        self._bed = bed = stack.enter_context(slurm_bed.cluster())
        (bed.base / "home/alice/app.py").write_text(starts.APP, encoding="utf-8")
        # What ssh logs in to: our own ways need no SSH service there.
        bed.run(_NODE, f"/usr/sbin/sshd -f {bed.base}/etc/sshd_config -o AllowTcpForwarding=yes", "root")
        network = ["ip", "netns", "exec", f"{bed.tag}-{_NODE}"]
        self._target = int(stack.enter_context(Child("target", {}, directory, network)).hear(_LIMIT)["port"])

    def tunnel(self, way: str) -> tuple[str, dict[str, Any]]:
        """Say how a tunnel to a job is opened by a way: the module, and its order."""
        login = {"key_filename": str(self._bed.key_file), "known_hosts": str(self._bed.known_hosts)}
        return "jobs", {"host": self._bed.login1, "way": way, "target": self._target, "login": login}

    def ssh(self) -> tuple[str, dict[str, Any]]:
        """Say the same of ``ssh -L`` through the login node, whose key and file ``-J`` would not pass on."""
        bed = self._bed
        words = ["ssh", "-F", "none", "-i", str(bed.key_file), "-l", "alice"]
        words += ["-o", f"UserKnownHostsFile={bed.known_hosts}", "-o", "BatchMode=yes"]
        jump = [*words, "-p", str(slurm_bed.JUMP_PORT), "-W", f"{_ADDRESS}:22", bed.login1]
        words += ["-o", f"ProxyCommand={shlex.join(jump)}", "-o", f"HostKeyAlias={bed.login1}"]
        order = {"peer": "ssh", "host": _ADDRESS, "port": 22, "user": "alice", "key": "", "known_hosts": ""}
        return "peers", {**order, "target": self._target, "remote": False, "ssh": words}

    def copy(self, size: int) -> float:
        """Let ``srun`` carry zeros from a job to the login node; return the MB/s."""
        read = (
            f"srun -p {_QUEUE} -Q -u -n1 dd if=/dev/zero bs=64k count={-(-size // 65536)} status=none | wc -c"
        )
        began = time.perf_counter()
        count = int(self._bed.run("login1", read))
        return count / (time.perf_counter() - began) / 1e6


def main() -> None:
    """Do as standard input says."""
    words: dict[str, Any] = json.loads(sys.stdin.readline())
    import bokeh_ssh

    batch = bokeh_ssh.Batch(queue=_QUEUE, time="20:00", way=words["way"])
    forward = f"0:127.0.0.1:{words['target']}"
    login = {"ssh_config": None, "python": sys.executable, "local_port": 0, **words["login"]}
    try:
        with bokeh_ssh.DirectTunnel(
            words["host"], "alice", app="app.py", batch=batch, forwards=forward, **login
        ) as tunnel:
            print(json.dumps({"port": int(tunnel.forwards[0].rpartition(":")[2])}), flush=True)
            sys.stdin.read()
    except bokeh_ssh.BokehSSHError as exc:
        print(json.dumps({"failed": str(exc)[:200]}), flush=True)


if __name__ == "__main__":
    main()
