#!/usr/bin/env bash
# Slurm 22.05.8: asked about a job that is not there, squeue says "no jobs", or that it failed, depending on how long
# ago the job ended and on how many one asks for; scancel says that all went well, and not a word more.
#
#   - squeue -j ID of a job that has ended: status 0 and nothing for MinJobAge (300 s, if not set), status 1 and
#     "Invalid job id specified" from then on. So a loop that takes nothing for "it has ended" and a status for "ask
#     again, the controller is busy" works in each try-out, and runs for ever once the laptop slept for six minutes.
#     With two such IDs, or another that still runs, it is 0 again, so a mistyped ID among others is never told.
#   - scancel ID: status 0 and silence for an ID that never was and for one that is gone, also with other IDs. One
#     digit that is wrong, or the ID of another cluster, and the job that was meant runs on until its time is over.
#     With a step behind it (ID.0) scancel says so and ends with 1, as scontrol, srun and sattach do for that ID.
#   - squeue -p with a name that does not exist: status 0 and nothing; -w: 1; -u: 0, with an error printed.
#
# scancel(1) has -Q for it: "Do not report an error if the specified job is already completed"; without it none is
# reported either. squeue(1) on -j says nothing of an ID that is not there; neither page has a word on exit statuses.
# What helps: squeue --me -h -o "%i %T", and look for the ID oneself; scontrol show job ID before scancel.
#
# Seen (GONE and GONE2 ended a while ago, NEVER never was):
#
#   squeue -h -j JUST               status 0  nothing
#   squeue -h -j GONE               status 1  slurm_load_jobs error: Invalid job id specified
#   squeue -h -j NEVER              status 1  slurm_load_jobs error: Invalid job id specified
#   squeue -h -j GONE,GONE2         status 0  nothing
#   squeue -h -j NEVER,RUNS         status 0  RUNS RUNNING
#   squeue -h -p nosuch             status 0  nothing
#   squeue -h -w nosuch             status 1  squeue: error: Invalid node name nosuch
#   squeue -h -u nosuch             status 0  squeue: error: Invalid user: nosuch
#   scancel GONE                    status 0  nothing
#   scancel NEVER                   status 0  nothing
#   scancel NEVER.0                 status 1  scancel: error: Kill job error on job step id NEVER.0: ...
#   scontrol show job NEVER         status 1  slurm_load_jobs error: Invalid job id specified
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
    "SlurmdParameters=config_overrides" "MpiDefault=none" "MinJobAge=5" "NodeName=$host NodeAddr=127.0.0.1 CPUs=8" \
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

GONE = "slurm_load_jobs error: Invalid job id specified"
ROWS = {
    "squeue -h -j JUST": (0, "nothing"),
    "squeue -h -j GONE": (1, GONE),
    "squeue -h -j NEVER": (1, GONE),
    "squeue -h -j GONE,GONE2": (0, "nothing"),
    "squeue -h -j NEVER,RUNS": (0, "RUNS RUNNING"),
    "squeue -h -p nosuch": (0, "nothing"),
    "squeue -h -w nosuch": (1, "squeue: error: Invalid node name nosuch"),
    "squeue -h -u nosuch": (0, "squeue: error: Invalid user: nosuch"),
    "scancel GONE": (0, "nothing"),
    "scancel NEVER": (0, "nothing"),
    "scancel NEVER.0": (1, "scancel: error: Kill job error on job step id NEVER.0: Invalid job id specified"),
    "scontrol show job NEVER": (1, GONE),
}


def run(words: list[str]) -> tuple[int, str]:
    done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def submit(command: str, *more: str) -> str:
    return run(["sbatch", "--parsable", "-o", "/dev/null", *more, "--wrap", command])[1]


def until(words: list[str], what: tuple[int, str]) -> None:
    end = time.monotonic() + 90
    while run(words) != what:
        if time.monotonic() > end:
            sys.exit(f"{words}: {run(words)}, not {what}")
        time.sleep(0.5)


runs = submit("sleep 300")
until(["squeue", "-h", "-j", runs, "-o", "%T"], (0, "RUNNING"))
gone, gone2 = submit("true"), submit("true")
for job in (gone, gone2):
    until(["scontrol", "show", "job", job], (1, GONE))
just = submit("true", "--wait")  # its end has just been seen
names = {"JUST": just, "GONE2": gone2, "GONE": gone, "NEVER": "987654", "RUNS": runs}
same = True
for row, expected in ROWS.items():
    command = row
    for name, job in names.items():
        command = command.replace(name, job)
    status, said = run(command.split() + (["-o", "%i %T"] if command.startswith("squeue") else []))
    said = said.replace(f"{runs} RUNNING", "RUNS RUNNING").replace(names["NEVER"], "NEVER") or "nothing"
    print(f"{row:30}  status {status}  {said}")
    same = same and (status, said) == expected
run(["scancel", runs])
until(["squeue", "-h", "-j", runs], (0, ""))  # a cluster that is ended before its jobs waits for them
sys.exit(0 if same else "it has changed")
PY
timeout 240 python3 try.py
