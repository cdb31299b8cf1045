#!/usr/bin/env bash
# Slurm 22.05.8: sbatch --wait ends with status 0 for a job that was never run, and for one that is being killed. A job
# that has not ended by itself has the status 0 until its script's arrives, and sbatch takes that one as soon as the job
# is "finished" in the controller's eyes, without a look at its state (CANCELLED, TIMEOUT). So
# `sbatch --wait simulate.sh && sbatch --wait plot.sh`, or a Makefile, goes on with results that are not there.
#
#   - A job that somebody cancels while it is in the queue: the person who no longer wants to wait, an administrator
#     before a maintenance. Of an array, of which some tasks ran and others were cancelled in time, too.
#   - A job whose dependency has failed, where such jobs are removed (--kill-on-invalid-dep=yes, or the site's
#     SchedulerParameters=kill_invalid_depend): the very case that afterok is there for.
#   - A job that is cancelled while it runs, if sbatch asks, as it does every 2 to 32 s, before the job has ended: one
#     that saves its state on SIGTERM, for up to KillWait (30 s, if not set). sbatch ends while the job still writes;
#     the status that the script ends with, here 3, is never looked at. A time limit that is reached does the same (not
#     part of this script, since it takes two minutes).
#   - An sbatch that did not run itself when the job ended (Ctrl-Z, a machine that was suspended) and asks again more
#     than MinJobAge (300 s, if not set) after that: it prints "no longer found and exit code not found", and ends with
#     0, also where the job has failed.
#
# sbatch(1): "Do not exit until the submitted job terminates. The exit code of the sbatch command will be the same as
# the exit code of the submitted job. If the job terminated due to a signal rather than a normal exit, the exit code
# will be set to 1." srun and salloc end with 1 where they are cancelled in the queue: the controls.
# What helps: have the job write a file as the last thing that it does, or `sbatch --parsable` and the job's state.
#
# Seen:
#
#   sbatch --wait, the job exits with 3                           status 3
#   sbatch --wait, the job is killed by a signal                  status 1
#   sbatch --wait, cancelled in the queue                         status 0
#   sbatch --wait, an array of two, one cancelled in the queue    status 0
#   sbatch --wait, afterok of a job that has failed               status 0
#   srun, cancelled in the queue                                  status 1
#   salloc, cancelled in the queue                                status 1
#   sbatch --wait, cancelled, ends 20 s later with 3              status 0, the job still runs
#   sbatch --wait, stopped while the job exits with 3             status 0, Job N no longer found and ...
#
# Runs on Debian 12 as root, with slurmctld, slurmd, slurm-client and munge: a cluster of one node on this machine.
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
    "SlurmdSpoolDir=$work/spool" "SlurmctldPidFile=$work/slurmctld.pid" "SlurmdPidFile=$work/slurmd.pid" \
    "ProctrackType=proctrack/pgid" "TaskPlugin=task/none" "SelectType=select/cons_tres" "SelectTypeParameters=CR_Core" \
    "SlurmdParameters=config_overrides" "MpiDefault=none" "SchedulerParameters=bf_interval=1" "MinJobAge=300" \
    "NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$(free) CPUs=8" \
    "PartitionName=main Nodes=n1 Default=YES State=UP" > slurm.conf
munged --foreground --force --key-file=munge/key --socket="$work/munge/socket" --pid-file="$work/munge/pid" \
    --log-file="$work/munge/log" --seed-file="$work/munge/seed" > munged.log 2>&1 &
pids+=($!)
for _ in $(seq 50); do [ -S munge/socket ] && break; sleep 0.1; done
slurmctld -D -c > slurmctld.log 2>&1 &
pids+=($!)
slurmd -D -N n1 > slurmd.log 2>&1 &
pids+=($!)
for _ in $(seq 100); do [ "$(sinfo -h -t idle -o %D 2> /dev/null)" = 1 ] && break; sleep 0.2; done

cat > try.py <<'PY'
import signal
import subprocess
import sys
import time
from pathlib import Path


def run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    return " ".join((done.stdout + done.stderr).split())


def start(*words: str) -> subprocess.Popen:
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until(what: str, *words: str) -> None:
    end = time.monotonic() + 90
    while (said := run(*words)) != what:
        if time.monotonic() > end:
            sys.exit(f"{words}: {said}, not {what}")
        time.sleep(0.2)


def state(job: str) -> list[str]:
    return ["squeue", "-h", "-r", "-t", "all", "-n", job, "-S", "i", "-o", "%T"]


BATCH = ["sbatch", "--wait", "-o", "/dev/null"]
waits = {
    "sbatch --wait, the job exits with 3": start(*BATCH, "-J", "failed", "--wrap", "exit 3"),
    "sbatch --wait, the job is killed by a signal": start(*BATCH, "-J", "killed", "--wrap", "kill -9 $$"),
    "sbatch --wait, cancelled in the queue": start(*BATCH, "-J", "queued", "--hold", "--wrap", "true"),
    "sbatch --wait, an array of two, one cancelled in the queue":
        start(*BATCH, "-J", "array", "-a", "0-1%1", "--wrap", "sleep 5"),
}
until("FAILED", *state("failed"))
failed = run("squeue", "-h", "-t", "all", "-n", "failed", "-o", "%A")
waits["sbatch --wait, afterok of a job that has failed"] = start(
    *BATCH, "-J", "after", "-d", f"afterok:{failed}", "--kill-on-invalid-dep=yes", "--wrap", "true")
waits["srun, cancelled in the queue"] = start("srun", "-J", "srun", "--hold", "true")
waits["salloc, cancelled in the queue"] = start("salloc", "-J", "salloc", "--hold", "true")
until("RUNNING PENDING", *state("array"))
array = run("squeue", "-h", "-n", "array", "-t", "R", "-o", "%F")
run("scancel", f"{array}_1")
for job in "queued", "srun", "salloc":
    until("PENDING", *state(job))
for job in "queued", "srun", "salloc":
    run("scancel", "-n", job)
until("CANCELLED", *state("after"))
until("COMPLETED CANCELLED", *state("array"))
seen = {}
for name, process in waits.items():
    process.communicate(timeout=90)
    seen[name] = process.returncode, ""

SLOW = "trap 'sleep 20; touch ended; exit 3' TERM; touch runs; sleep 300 & wait"
process = start(*BATCH, "-J", "slow", "--wrap", SLOW)
until("runs", "ls", "runs")
run("scancel", "-n", "slow")
process.communicate(timeout=90)
seen["sbatch --wait, cancelled, ends 20 s later with 3"] = (
    process.returncode, "" if Path("ended").exists() else "the job still runs")
until("ended", "ls", "ended")

# What takes five minutes with the default takes two seconds now.
config = Path("slurm.conf")
config.write_text(config.read_text().replace("MinJobAge=300", "MinJobAge=2"))
run("scontrol", "reconfigure")
process = start(*BATCH, "-J", "stopped", "--wrap", "sleep 5; exit 3")
until("RUNNING", *state("stopped"))
process.send_signal(signal.SIGSTOP)
until("", *state("stopped"))
process.send_signal(signal.SIGCONT)
error = process.communicate(timeout=90)[0].strip().rpartition("sbatch: error: ")[2]
seen["sbatch --wait, stopped while the job exits with 3"] = process.returncode, error

for name, (status, error) in seen.items():
    print(f"{name:60}  status {status}{error and ', ' + error}")
good = [status for status, _ in seen.values()] == [3, 1, 0, 0, 0, 1, 1, 0, 0]
sys.exit(0 if good and error.endswith("no longer found and exit code not found") else "it has changed")
PY
timeout 240 python3 try.py
