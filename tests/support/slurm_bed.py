"""A real Slurm on this machine: two login nodes, a controller and two nodes, each in namespaces of its own.

``slurm_bed.sh`` makes it, as root, in some seconds, from the distribution's packages. Nodes have no SSH
service. Grid Engine can be had on them too. Nothing of the machine's own is changed: users, homes and
settings are mounted over, in the namespaces alone.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from beds import Key, until
from skips import missing

_SCRIPT = Path(__file__).parent / "slurm_bed.sh"
_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "sshd", "ip", "nsenter", "unshare", "runuser")
_USERS = {"alice": 22001, "mallory": 22002}
NODES = ("c1", "c2")
#: Of an SSH server on the login nodes that forwards, as a jump host does, and takes one session.
JUMP_PORT = 2222

_CONFIG = """\
ClusterName=tests
SlurmctldHost=ctl(10.77.0.3)
AuthType=auth/munge
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=/var/spool/slurmctld
SlurmdSpoolDir=/var/spool/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=/var/log/slurm/slurmctld.log
SlurmdLogFile=/var/log/slurm/slurmd.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=bf_interval=2,sched_interval=2,sched_min_interval=100000
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
KillWait=5
MinJobAge=300
SlurmdTimeout=5
MessageTimeout=3
InactiveLimit=0
DefMemPerCPU=500
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
NodeName=c1 NodeAddr=10.77.0.11 CPUs=4 RealMemory=4000
NodeName=c2 NodeAddr=10.77.0.12 CPUs=4 RealMemory=4000
PartitionName=main Nodes=c1,c2 Default=YES MaxTime=1:00:00 DefaultTime=30:00 State=UP
PartitionName=short Nodes=c1,c2 MaxTime=1 DefaultTime=1 State=UP
PartitionName=one Nodes=c1 MaxTime=1:00:00 DefaultTime=30:00 State=UP
PartitionName=two Nodes=c2 MaxTime=1:00:00 DefaultTime=30:00 State=UP
PartitionName=down Nodes=c1 MaxTime=1:00:00 State=DOWN
PartitionName=closed Nodes=c1 AllowGroups=root MaxTime=1:00:00 State=UP
PartitionName=members Nodes=c1 AllowAccounts=proj1 MaxTime=1:00:00 State=UP
PartitionName=urgent Nodes=c1,c2 PriorityTier=10 GraceTime=5 MaxTime=1:00:00 State=UP
"""
_BY_CGROUP = """\
ProctrackType=proctrack/cgroup
TaskPlugin=task/cgroup
JobAcctGatherType=jobacct_gather/cgroup
"""
_BY_PARENTS = """\
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
"""
_CGROUP = """\
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
CgroupAutomount=no
ConstrainCores=no
ConstrainRAMSpace=yes
ConstrainSwapSpace=no
ConstrainDevices=no
"""
_SSHD = """\
Port 22
HostKey {base}/etc/host_key
PermitRootLogin no
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PidFile none
AllowTcpForwarding no
MaxSessions 2
"""


@dataclass(frozen=True)
class SlurmBed:
    """A cluster that runs.

    :ivar base: where its settings and homes are
    :ivar login1: the address of a login node, as is ``login2``
    :ivar by_cgroup: whether memory limits hold, and only the script's own process gets TERM
    """

    base: Path
    tag: str
    net: str
    key_file: Path
    known_hosts: Path
    by_cgroup: bool

    @property
    def login1(self) -> str:
        return f"{self.net}.11"

    @property
    def login2(self) -> str:
        return f"{self.net}.12"

    def script(self, *words: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run the script that makes all of it."""
        env = {"BASE": str(self.base), "TAG": self.tag, "NET": self.net, "LANG": "C.UTF-8"}
        env["PATH"] = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        # Not a pipe: what runs on would hold it.
        with tempfile.TemporaryFile("w+") as said:
            done = subprocess.run(
                ["bash", str(_SCRIPT), *words],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                env=env,
                timeout=timeout,
                check=False,
            )
            said.seek(0)
            return subprocess.CompletedProcess(done.args, done.returncode, said.read())

    def run(self, node: str, command: str, user: str = "alice") -> str:
        """Run a command on a machine, as a user; return what it says, errors included."""
        words = ["runuser", "-u", user, "--", "env", "-C", f"/home/{user}", f"HOME=/home/{user}"]
        words = [] if user == "root" else words
        return self.script("on", node, *words, "sh", "-c", command).stdout

    def start_grid_engine(self) -> None:
        """Have Grid Engine run beside Slurm, until the cluster ends."""
        if not (self.base / "sge").exists():
            missing("Grid Engine needs sge_qmaster, sge_execd and qsub")
        made = self.script("sge")
        assert made.returncode == 0, made.stdout
        said = f"there is a queue: {made.stdout}"
        until(lambda: re.search("main.q@c1.* lx-", self.run("login2", "qstat -f")), what=said)

    def queue(self) -> list[str]:
        """List the jobs that wait or run, as ``NUMBER STATE``."""
        return self.run("ctl", 'squeue -h -o "%A %T"', "root").splitlines()

    def files(self, node: str) -> list[str]:
        """List what the account has left in a machine's /tmp, and in the home."""
        found = self.run(node, "find /tmp -mindepth 1 -user alice; ls -A /home/alice", "root").splitlines()
        return [each for each in found if "bokeh-ssh" in each.replace(str(self.base), "")]

    def clear(self) -> None:
        """Remove what a test that failed has left on the nodes, or each one after it would fail too."""
        for node in ("c1", "c2"):
            found = "find /tmp -mindepth 1 -maxdepth 1 -user alice -name 'bokeh-ssh*' -exec rm -rf {} +"
            self.run(node, found, "root")

    def settle(self) -> None:
        """End all jobs, and wait until both nodes take one."""
        self.run("ctl", "scancel -u alice; scancel -u mallory", "root")
        until(lambda: not self.queue(), what="no job runs")
        self.run("ctl", "scontrol update NodeName=c1,c2 State=RESUME", "root")
        until(self._idle, timeout=60, what="both nodes are idle")

    def _idle(self) -> bool:
        return self.run("ctl", "sinfo -h -N -p main -t idle -o %N", "root").split() == list(NODES)


def find_lacking() -> str:
    """Return what this machine lacks for a cluster; empty where it has all."""
    if sys.platform != "linux":
        return "Linux"
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    lacking = [name for name in _PROGRAMS if not shutil.which(name, path=path)]
    return ", ".join(lacking) or ("root" if os.geteuid() else "")


@contextmanager
def cluster() -> Iterator[SlurmBed]:
    """Make a cluster, and end it."""
    if lacking := find_lacking():
        missing(f"a Slurm of its own needs {lacking}")
    number = os.getpid() % 250 + 1
    base = Path(tempfile.mkdtemp(prefix="bokeh-ssh-slurm-"))
    bed = SlurmBed(
        base=base,
        tag=f"bs{os.getpid()}",
        net=f"10.79.{number}",
        key_file=base / "key",
        known_hosts=base / "known_hosts",
        by_cgroup=os.access("/sys/fs/cgroup/memory/cgroup.procs", os.W_OK),
    )
    try:
        _write(bed)
        made = bed.script("up", timeout=120)
        assert made.returncode == 0, made.stdout
        until(bed._idle, timeout=60, what=f"both nodes are idle: {made.stdout}")
        yield bed
    finally:
        bed.script("down")
        shutil.rmtree(base, ignore_errors=True)


def _write(bed: SlurmBed) -> None:
    base = bed.base
    base.chmod(0o755)
    for name in ("etc/slurm", "run", "home", "munge"):
        (base / name).mkdir(parents=True)
    _write_accounts(base)
    (base / "munge/munge.key").write_bytes(os.urandom(1024))
    (base / "munge/munge.key").chmod(0o400)
    shutil.chown(base / "munge/munge.key", "munge")
    shutil.chown(base / "munge", "munge")
    (base / "munge").chmod(0o700)
    (base / "etc/slurm/slurm.conf").write_text(_CONFIG + (_BY_CGROUP if bed.by_cgroup else _BY_PARENTS))
    (base / "etc/slurm/cgroup.conf").write_text(_CGROUP)
    if bed.by_cgroup:
        (base / "cgroup").touch()
    if Path("/usr/sbin/sge_qmaster").exists():
        shutil.copytree("/var/lib/gridengine", base / "sge", symlinks=True)
        shutil.rmtree(base / "sge/default", ignore_errors=True)
        (base / "sge/default/common").mkdir(parents=True)
        shutil.copy("/var/lib/gridengine/default/common/bootstrap", base / "sge/default/common")
        for each in (base / "sge", base / "sge/default", base / "sge/default/common"):
            shutil.chown(each, "sgeadmin")
    (base / "etc/pythons").write_text("".join(f"{path}\n" for path in _pythons()))
    host, user = Key.generate(), Key.generate()
    (base / "etc/host_key").write_text(host.private.rstrip() + "\n")
    (base / "etc/host_key").chmod(0o600)
    (base / "etc/sshd_config").write_text(_SSHD.format(base=base))
    (base / "etc/hosts").write_text(
        "127.0.0.1 localhost\n10.77.0.1 login1\n10.77.0.2 login2\n"
        "10.77.0.3 ctl\n10.77.0.11 c1\n10.77.0.12 c2\n"
    )
    bed.key_file.write_text(user.private.rstrip() + "\n")
    bed.key_file.chmod(0o600)
    bed.known_hosts.write_text(
        "".join(f"{each},[{each}]:{JUMP_PORT} {host.public}\n" for each in (bed.login1, bed.login2))
    )
    for name, number in _USERS.items():
        home = base / "home" / name
        (home / ".ssh").mkdir(parents=True, mode=0o700)
        (home / ".ssh/authorized_keys").write_text(user.public + "\n")
        for each in (home, home / ".ssh", home / ".ssh/authorized_keys"):
            os.chown(each, number, number)
        home.chmod(0o750)


def _write_accounts(base: Path) -> None:
    mine = re.compile(rf"({'|'.join(_USERS)}):")
    added = {
        "passwd": [f"{name}:x:{number}:{number}::/home/{name}:/bin/bash" for name, number in _USERS.items()],
        "group": [f"{name}:x:{number}:" for name, number in _USERS.items()],
        "shadow": [f"{name}:*:19000:0:99999:7:::" for name in _USERS],
    }
    for file, lines in added.items():
        there = [line for line in Path("/etc", file).read_text().splitlines() if not mine.match(line)]
        (base / "etc" / file).write_text("\n".join([*there, *lines]) + "\n")


def _pythons() -> Sequence[str]:
    """List the folders that this Python is in, by its links too, without those that are below another."""
    found = {os.path.realpath(path) for path in (sys.prefix, sys.base_prefix)}
    python = Path(sys.executable)
    while python.is_symlink():
        python = python.parent / python.readlink()
        found.add(os.path.realpath(python.parent))
    return sorted(path for path in found if not any(path.startswith(other + "/") for other in found))
