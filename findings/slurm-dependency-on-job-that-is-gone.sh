#!/usr/bin/env bash
# Slurm 22.05.8: --dependency=afterok:ID is no condition any more once job ID is out of the controller's memory (from
# MinJobAge on, 300 s if not set, after it has ended). sbatch takes it without a word, and the job runs, though ID has
# failed; afternotok:ID runs though ID went well; and so does each one for an ID that never was.
#
# Whoever submits the next step by hand after lunch, with the number that the first one got in the morning, or from a
# workflow program whose second run names jobs of the first one, gets a job that runs on results that are not there.
# Within five minutes of the failure the same line never runs (DependencyNeverSatisfied), so a try-out shows the right
# thing. One wrong digit does the same: of several IDs the one that is not there is dropped, and neither squeue's %E nor
# scontrol show job has a trace of it. --kill-on-invalid-dep=yes changes nothing, since nothing counts as invalid.
#
# sbatch(1) on afterok: "This job can begin execution after the specified jobs have successfully executed (ran to
# completion with an exit code of zero)", and "Once a job dependency fails due to the termination state of a preceding
# job, the dependent job will never be run". slurm.conf(5) on MinJobAge says nothing of dependencies.
# What helps: submit the whole chain at once (a dependency that was noted while ID was known holds for ever, the control
# below), or ask `scontrol show job ID` before, which fails for one that is gone.
#
# Seen (FAILED and WELL ended a while ago, NEVER never was, WAITS is held in the queue):
#
#   afterok:FAILED, submitted within MinJobAge  pending: DependencyNeverSatisfied afterok:FAILED(failed)
#   afterok:FAILED                              runs
#   afterok:FAILED, --kill-on-invalid-dep=yes   runs
#   afternotok:WELL                             runs
#   afterok:NEVER                               runs
#   afterok:WAITS                               pending: Dependency afterok:WAITS(unfulfilled)
#   afterok:WAITS:NEVER:FAILED                  pending: Dependency afterok:WAITS(unfulfilled)
#
# Runs on Debian 12 as root, with slurmctld, slurmd, slurm-client and munge: a cluster of this one machine.
set -euo pipefail
work=$(mktemp -d)
pids=()
trap 'for pid in "${pids[@]}"; do kill "$pid" 2> /dev/null && wait "$pid" || true; done; rm -rf "$work"' EXIT
cd "$work"
chmod 755 .
for package in slurmctld slurmd slurm-client munge; do
    dpkg-query -W -f '${Status}' "$package" 2> /dev/null | grep -q 'ok installed' && continue
    RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "$package" > apt.log 2>&1 || { cat apt.log && exit 1; }
done
dpkg-query -W -f '${Package} ${Version}\n' slurm-client slurmd | grep -F ' 22.05.8-'

free() { python3 -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])'; }
host=$(hostname -s)
mkdir -m 700 munge
mkdir state spool
head -c 128 /dev/urandom > munge/key
chmod 400 munge/key
export SLURM_CONF="$work/slurm.conf"
printf '%s\n' "ClusterName=one" "SlurmctldHost=$host(127.0.0.1)" "SlurmctldPort=$(free)" "SlurmdPort=$(free)" \
    "AuthInfo=socket=$work/munge/socket" "SlurmUser=root" "SlurmdUser=root" "StateSaveLocation=$work/state" \
    "SlurmdSpoolDir=$work/spool" "SlurmctldPidFile=$work/slurmctld.pid" "SlurmdPidFile=$work/slurmd.pid" \
    "ProctrackType=proctrack/pgid" "TaskPlugin=task/none" "SelectType=select/cons_tres" "SelectTypeParameters=CR_Core" \
    "SlurmdParameters=config_overrides" "MpiDefault=none" "MinJobAge=10" "NodeName=$host NodeAddr=127.0.0.1 CPUs=8" \
    "PartitionName=main Nodes=$host Default=YES State=UP" > slurm.conf
munged --foreground --force --key-file=munge/key --socket="$work/munge/socket" --pid-file="$work/munge/pid" \
    --log-file="$work/munge/log" --seed-file="$work/munge/seed" > munged.log 2>&1 &
pids+=($!)
for _ in $(seq 50); do [ -S munge/socket ] && break; sleep 0.1; done
slurmctld -D -c > slurmctld.log 2>&1 &
pids+=($!)
slurmd -D -N "$host" > slurmd.log 2>&1 &
pids+=($!)
for _ in $(seq 100); do sinfo -h -t idle -o %t 2> /dev/null | grep -q idle && break; sleep 0.2; done

cat > try.py <<'PY'
import subprocess
import sys
import time

NEVER = "987654"
ROWS = {
    "afterok:FAILED, submitted within MinJobAge": "pending: DependencyNeverSatisfied afterok:FAILED(failed)",
    "afterok:FAILED": "runs",
    "afterok:FAILED, --kill-on-invalid-dep=yes": "runs",
    "afternotok:WELL": "runs",
    "afterok:NEVER": "runs",
    "afterok:WAITS": "pending: Dependency afterok:WAITS(unfulfilled)",
    "afterok:WAITS:NEVER:FAILED": "pending: Dependency afterok:WAITS(unfulfilled)",
}


def run(*words: str) -> str:
    """Return what a command has printed, its errors too, after its status where that is not 0."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    return " ".join(f"{done.returncode or ''} {done.stdout}{done.stderr}".split())


def submit(command: str, *more: str) -> str:
    job = run("sbatch", "--parsable", "-o", "/dev/null", *more, "--wrap", command)
    return job if job.isdecimal() else sys.exit(f"sbatch {more}: {job}")


def until(what: str, *words: str) -> None:
    end = time.monotonic() + 90
    while what not in (seen := run(*words)):
        if time.monotonic() > end:
            sys.exit(f"{words}: {seen}, not {what}")
        time.sleep(0.5)


def submitted(row: str) -> str:
    what, _, option = row.partition(", ")
    for name, job in names.items():
        what = what.replace(name, job)
    return submit("sleep 300", "-d", what, *([option] if option.startswith("--") else []))


names = {"FAILED": submit("exit 1"), "WELL": submit("true"), "WAITS": submit("true", "-H"), "NEVER": NEVER}
until("JobState=FAILED", "scontrol", "show", "job", names["FAILED"])
jobs = {}
for row in ROWS:
    jobs[row] = submitted(row)
    for gone in ("FAILED", "WELL") if len(jobs) == 1 else ():
        until("Invalid job id", "scontrol", "show", "job", names[gone])
same = True
for row, expected in ROWS.items():
    if expected == "runs":
        until("RUNNING", "squeue", "-h", "-j", jobs[row], "-o", "%T")
    seen = run("squeue", "-h", "-j", jobs[row], "-o", "%T: %r %E")
    for name, job in names.items():
        seen = seen.replace(f":{job}(", f":{name}(")
    seen = {"RUNNING: None (null)": "runs"}.get(seen, seen.replace("PENDING", "pending"))
    print(f"{row:42}  {seen}")
    same = same and seen == expected
run("scancel", *jobs.values(), names["WAITS"])
end = time.monotonic() + 60
while run("squeue", "-h") and time.monotonic() < end:  # a cluster that is ended before its jobs waits for them
    time.sleep(0.5)
sys.exit(0 if same else "it has changed")
PY
timeout 240 python3 try.py
