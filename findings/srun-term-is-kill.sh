#!/usr/bin/env bash
# Slurm 22.05.8: SIGTERM, SIGHUP or SIGQUIT to srun is SIGKILL for its tasks, at once; so is `scancel JOB.STEP`. A
# server or solver that saves its state on SIGTERM never gets to it when `timeout`, a service manager, a supervisor,
# or the end of an SSH session ends the srun that it runs under. KillWait (30 s here) plays no part, though srun
# itself prints "Waiting up to 32 seconds for job step to finish".
#
# srun(1): "Signals sent to the srun command are automatically forwarded to the tasks it is controlling with a few
# exceptions", of which it names the keys ^C and ^Z; its termination sequence sends "SIGCONT, SIGTERM, and SIGKILL".
# scancel(1): SIGCONT, SIGTERM, then "KillWait", then SIGKILL: "This gives time for the running job/step(s) to clean
# up". Only cancelling the whole job does that. SIGUSR1 is forwarded, and `scancel --signal=TERM JOB.STEP` arrives.
# So: to end a step softly, send that first, and srun's SIGTERM later; or have --signal=USR1 and the like mean "end".
#
# Seen (the task writes down each signal that it gets, and ends itself after SIGTERM or SIGUSR1 with 7):
#
#   kill -TERM srun            the task got: nothing            srun's status: 137
#   kill -HUP srun             the task got: nothing            srun's status: 137
#   kill -QUIT srun            the task got: nothing            srun's status: 137
#   scancel JOB.0              the task got: nothing            srun's status: 137
#   kill -USR1 srun            the task got: SIGUSR1            srun's status: 7
#   scancel -s TERM JOB.0      the task got: SIGTERM            srun's status: 7
#   scancel JOB                the task got: SIGCONT SIGTERM    srun's status: 7
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
    "SlurmdParameters=config_overrides" "MpiDefault=none" "NodeName=$host NodeAddr=127.0.0.1 CPUs=8" \
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

cat > task.py <<'PY'
import os
import signal
import sys
import time

record = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
got = []


def hear(number, frame):
    got.append(signal.Signals(number).name)
    os.write(record, f"{got[-1]} ".encode())


for name in ("SIGCONT", "SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1"):
    signal.signal(getattr(signal, name), hear)
print(os.environ["SLURM_JOB_ID"], flush=True)
end = time.monotonic() + 20
while not {"SIGTERM", "SIGUSR1"} & set(got) and time.monotonic() < end:
    time.sleep(0.05)
sys.exit(7)
PY
cat > try.py <<'PY'
import signal
import subprocess
import sys
from pathlib import Path

WAYS = {
    "kill -TERM srun": ("nothing", 137), "kill -HUP srun": ("nothing", 137), "kill -QUIT srun": ("nothing", 137),
    "scancel JOB.0": ("nothing", 137), "kill -USR1 srun": ("SIGUSR1", 7), "scancel -s TERM JOB.0": ("SIGTERM", 7),
    "scancel JOB": ("SIGCONT SIGTERM", 7),
}
bad = False
for number, (way, expected) in enumerate(WAYS.items()):
    command = ["srun", "-Q", sys.executable, "task.py", str(Path(f"got{number}").absolute())]
    srun = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True)
    job = srun.stdout.readline().strip()  # the task has its handlers
    if way.startswith("kill"):
        srun.send_signal(getattr(signal, "SIG" + way.split()[1][1:]))
    else:
        subprocess.run(way.replace("JOB", job).split(), check=True)
    srun.communicate(timeout=25)
    seen = Path(f"got{number}").read_text().strip() or "nothing"
    print(f"{way:25}  the task got: {seen:17}  srun's status: {srun.returncode}")
    bad |= (seen, srun.returncode) != expected
sys.exit("it has changed" if bad else 0)
PY
timeout 90 python3 try.py
