#!/usr/bin/env bash
# Slurm 22.05.8: srun cannot enter a heterogeneous job from outside as it enters any other job, and the numbers that
# squeue prints for its parts lead each command somewhere else.
#
#   - srun --jobid=LEADER COMMAND, the usual way into a job that runs, ends with "No directives to start application on
#     any available hetjob components", though srun(1) names a default (--het-group=0). It works with --het-group=0
#     written out, an option that, by the same page, applies only inside a salloc allocation or an sbatch script. So
#     whatever enters jobs by srun (a debugger, a profiler, a shell, a web portal) fails for these.
#   - The second part has a job number of its own (squeue's %A, SLURM_JOB_ID of its tasks), with which srun ends with
#     "Expired or invalid job"; it is neither. LEADER+1, which squeue's %i prints, is no number for srun.
#   - squeue -j LEADER+1 lists all parts, and so does LEADER+0; the second alone is listed by -j SECOND. But scancel
#     LEADER+1 ends that part alone.
#
# What helps: read %A (the number) and %i (LEADER+OFFSET) of each part from squeue, and enter with --jobid=LEADER
# --het-group=OFFSET.
#
# Seen (LEADER and SECOND are the job numbers of the two parts):
#
#   squeue -h -j LEADER -o %i                             status 0  LEADER+0 LEADER+1
#   squeue -h -j LEADER+0 -o %i                           status 0  LEADER+0 LEADER+1
#   squeue -h -j LEADER+1 -o %i                           status 0  LEADER+0 LEADER+1
#   squeue -h -j SECOND -o %i                             status 0  LEADER+1
#   srun --overlap --jobid=LEADER echo in                 status 1  srun: error: No directives to start application ...
#   srun --overlap --jobid=SECOND echo in                 status 1  srun: error: Unable to confirm allocation for ...
#   srun --overlap --jobid=LEADER+1 echo in               status 1  srun: error: Invalid numeric value "LEADER+1" ...
#   srun --overlap --jobid=LEADER --het-group=0 echo in   status 0  in
#   srun --overlap --jobid=LEADER --het-group=1 echo in   status 0  in
#   scancel LEADER+1                                      status 0  (LEADER+0 runs on)
#
# Runs on Debian 12 as root, with slurmctld, slurmd, slurm-client and munge: a cluster of two nodes on this one machine.
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
printf '%s\n' "ClusterName=one" "SlurmctldHost=$host(127.0.0.1)" "SlurmctldPort=$(free)" \
    "AuthInfo=socket=$work/munge/socket" "SlurmUser=root" "SlurmdUser=root" "StateSaveLocation=$work/state" \
    "SlurmdSpoolDir=$work/spool-%n" "SlurmctldPidFile=$work/slurmctld.pid" "SlurmdPidFile=$work/slurmd-%n.pid" \
    "ProctrackType=proctrack/pgid" "TaskPlugin=task/none" "SelectType=select/cons_tres" "SelectTypeParameters=CR_Core" \
    "SlurmdParameters=config_overrides" "MpiDefault=none" "SchedulerParameters=bf_interval=1" \
    "NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$(free) CPUs=4" \
    "NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$(free) CPUs=4" \
    "PartitionName=main Nodes=n1,n2 Default=YES State=UP" > slurm.conf
munged --foreground --force --key-file=munge/key --socket="$work/munge/socket" --pid-file="$work/munge/pid" \
    --log-file="$work/munge/log" --seed-file="$work/munge/seed" > munged.log 2>&1 &
pids+=($!)
for _ in $(seq 50); do [ -S munge/socket ] && break; sleep 0.1; done
slurmctld -D -c > slurmctld.log 2>&1 &
pids+=($!)
for node in n1 n2; do
    slurmd -D -N "$node" > "slurmd-$node.log" 2>&1 &
    pids+=($!)
done
for _ in $(seq 100); do [ "$(sinfo -h -t idle -o %D 2> /dev/null)" = 2 ] && break; sleep 0.2; done

cat > try.py <<'PY'
import subprocess
import sys
import time

LIST = "LEADER+0 LEADER+1"
NONE = "srun: error: No directives to start application on any available hetjob components"
PART = "srun: error: Unable to confirm allocation for job SECOND: Job not heterogeneous job leader"
PART += " srun: Check SLURM_JOB_ID environment variable. Expired or invalid job SECOND"
ROWS = {
    "squeue -h -j LEADER -o %i": (0, LIST),
    "squeue -h -j LEADER+0 -o %i": (0, LIST),
    "squeue -h -j LEADER+1 -o %i": (0, LIST),
    "squeue -h -j SECOND -o %i": (0, "LEADER+1"),
    "srun --overlap --jobid=LEADER echo in": (1, NONE),
    "srun --overlap --jobid=SECOND echo in": (1, PART),
    "srun --overlap --jobid=LEADER+1 echo in": (1, 'srun: error: Invalid numeric value "LEADER+1" for --jobid.'),
    "srun --overlap --jobid=LEADER --het-group=0 echo in": (0, "in"),
    "srun --overlap --jobid=LEADER --het-group=1 echo in": (0, "in"),
    "scancel LEADER+1": (0, ""),
}


def run(words: list[str]) -> tuple[int, str]:
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def until(words: list[str], what: tuple[int, str]) -> None:
    end = time.monotonic() + 90
    while run(words) != what:
        if time.monotonic() > end:
            sys.exit(f"{words}: {run(words)}, not {what}")
        time.sleep(0.5)


for _ in range(20):  # so that no number is a part of another, or of a status
    run(["sbatch", "--hold", "--wrap", "true"])
run(["scancel", "-u", "root"])
leader = run(["sbatch", "--parsable", "-o", "/dev/null", "-n1", ":", "-n1", "--wrap", "sleep 300"])[1]
until(["squeue", "-h", "-o", "%T"], (0, "RUNNING RUNNING"))
second = next(number for number in run(["squeue", "-h", "-o", "%A"])[1].split() if number != leader)
same = True
for row, expected in ROWS.items():
    status, said = run(row.replace("LEADER", leader).replace("SECOND", second).split())
    said = said.replace(leader, "LEADER").replace(second, "SECOND")
    print(f"{row:52}  status {status}  {said}")
    same = same and (status, said) == expected
until(["squeue", "-h", "-o", "%i %T"], (0, f"{leader}+0 RUNNING"))
run(["scancel", leader])
until(["squeue", "-h"], (0, ""))  # a cluster that is ended before its jobs waits for them
sys.exit(0 if same else "it has changed")
PY
timeout 240 python3 try.py
