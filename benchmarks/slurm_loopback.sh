#!/bin/bash
# Slurm itself, of two nodes with one processor each, on this machine's loopback: what `ttt submit` writes is validated
# by `sbatch --test-only`, runs as a job, is preempted by a job of more priority, is queued again by its own script,
# goes on from its checkpoint, and ends with the losses of a run that nobody disturbed.
#
#   apt-get install slurmctld slurmd slurm-client munge   (Debian; as root; no service is started)
#   benchmarks/slurm_loopback.sh                          all of that; TASKS=2 trains in two processes, on two
#                                                         nodes; STEPS=20 for so many
#   benchmarks/slurm_loopback.sh up FOLDER                the daemons alone, for `export SLURM_CONF=FOLDER/slurm.conf`
#   benchmarks/slurm_loopback.sh down FOLDER              ends them
#
# Everything is in the folder, and only daemons whose numbers are written there are ended. Needs root: slurmd starts a
# job as whoever submitted it.
set -u
here=$(cd "$(dirname "$0")/.." && pwd)
TTT=${TTT:-"$here/.venv/bin/ttt"}
PATH=$PATH:/usr/sbin:/sbin

fail() { echo "slurm_loopback: $*" >&2; exit 1; }

require() {
  local program
  for program in slurmctld slurmd sbatch munged; do
    command -v "$program" >/dev/null || fail "no $program; apt-get install slurmctld slurmd slurm-client munge"
  done
  [ "$(id -u)" = 0 ] || fail "needs root: slurmd starts a job as whoever submitted it"
}

configure() { # FOLDER
  local port=$((20000 + RANDOM % 9000))
  cat > "$1/slurm.conf" <<CONF
ClusterName=loopback
SlurmctldHost=localhost
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$1/munge.sock
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
StateSaveLocation=$1/state
SlurmdSpoolDir=$1/spool/%n
SlurmctldPidFile=$1/slurmctld.pid
SlurmdPidFile=$1/slurmd.%n.pid
SlurmctldLogFile=$1/slurmctld.log
SlurmdLogFile=$1/slurmd.%n.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30
SchedulerParameters=sched_interval=2,batch_sched_delay=1
NodeName=n[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((port + 1))-$((port + 2)) CPUs=1 RealMemory=1000
PartitionName=low Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120
PartitionName=high Nodes=n[1-2] MaxTime=INFINITE State=UP PriorityTier=10
CONF
}

up() { # FOLDER
  require
  local folder node
  mkdir -p "$1" && folder=$(cd "$1" && pwd) || fail "$1: cannot be made"
  mkdir -p "$folder/state" "$folder/spool/n1" "$folder/spool/n2"
  (umask 077 && head -c 1024 /dev/urandom > "$folder/munge.key")
  configure "$folder"
  munged --force --key-file="$folder/munge.key" --socket="$folder/munge.sock" --pid-file="$folder/munge.pid" \
    --log-file="$folder/munge.log" --seed-file="$folder/munge.seed" --num-threads=2 || fail "munged does not start"
  export SLURM_CONF="$folder/slurm.conf"
  slurmctld 2>> "$folder/started.log" || { down "$folder"; fail "slurmctld does not start; see $folder/slurmctld.log"; }
  for node in n1 n2; do
    slurmd -N $node 2>> "$folder/started.log" || { down "$folder"; fail "slurmd does not start; see $folder/slurmd.$node.log"; }
  done
  for _ in $(seq 60); do
    [ "$(sinfo --noheader --partition=low --states=idle --format=%D 2>/dev/null)" = 2 ] && return
    sleep 0.5
  done
  sinfo
  down "$folder"
  fail "the nodes do not come up; see $folder/slurmctld.log"
}

down() { # FOLDER
  local folder pid file
  folder=$(cd "$1" && pwd) || return
  export SLURM_CONF="$folder/slurm.conf"
  timeout 20 scancel --user="$(id -un)" --signal=KILL --full 2>/dev/null
  timeout 20 scancel --user="$(id -un)" 2>/dev/null
  for _ in $(seq 40); do
    [ -z "$(timeout 20 squeue --noheader --states=running,completing 2>/dev/null)" ] && break
    sleep 0.5
  done
  for file in slurmd.n1 slurmd.n2 slurmctld munge; do
    pid=$(cat "$folder/$file.pid" 2>/dev/null) || continue
    kill "$pid" 2>/dev/null
    for _ in $(seq 40); do kill -0 "$pid" 2>/dev/null || break; sleep 0.25; done
    kill -9 "$pid" 2>/dev/null
  done
  return 0
}

state() { squeue --noheader --job="$1" --states=all --format=%T 2>/dev/null; }

await() { # SECONDS, then a command
  local left=$(($1 * 2)); shift
  until "$@"; do
    left=$((left - 1)); [ $left -gt 0 ] || { cat "$log"; fail "waited in vain for: $*"; }
    sleep 0.5
  done
}

has_steps() { [ "$(cat "$1/metrics.jsonl" 2>/dev/null | wc -l)" -ge "$2" ]; }
stands() { [ "$(state "$1")" = "$2" ]; }
preempted() { grep -q 'queued again' "$log" && stands "$1" PENDING; }
# Slurm lets a job that is queued again wait for two minutes, which begin once its nodes are cleaned up.
completed() { scontrol update jobid="$1" starttime=now 2>/dev/null; stands "$1" COMPLETED; }

all() {
  require
  local nodes=${TASKS:-1} job run
  folder=$(mktemp -d) || exit 1 # not local: the trap outlives this function
  trap 'down "$folder/slurm"; rm -rf "$folder"' EXIT
  trap 'exit 143' TERM INT HUP
  up "$folder/slurm"
  cd "$folder" || exit 1
  export NO_TORCH_COMPILE=1
  "$TTT" init --backbone moshi --out c.yaml 2>/dev/null || fail "no config"
  run=$folder/run
  local asked=(--nodes "$nodes" --gpus 0 --time 1:00:00 --set train.max_steps="${STEPS:-60}" --set train.log_freq=1)
  echo "--- the script, and what Slurm says of it"
  "$TTT" submit c.yaml "${asked[@]}" --set run_dir="$run" --dry-run > script.sh || fail "no script"
  cat script.sh
  sbatch --test-only script.sh || fail "sbatch does not take the script"
  [ ! -e "$run" ] || fail "--dry-run wrote something"

  echo "--- a job, preempted once"
  "$TTT" submit c.yaml "${asked[@]}" --set run_dir="$run" || fail "not submitted"
  job=$(basename "$run"/slurm/*_submission.sh _submission.sh)
  log=$run/slurm/${job}_0_log.out
  await 300 has_steps "$run" 5
  "$TTT" submit c.yaml "${asked[@]}" --set run_dir="$run" && fail "a second job was submitted"
  sbatch --quiet --partition=high --nodes=2 --ntasks-per-node=1 --time=5 --output=/dev/null --wrap "sleep 3"
  await 200 preempted "$job"
  echo "saved: $(ls "$run/checkpoints")"
  await 300 completed "$job"
  grep -v '^step ' "$log"

  echo "--- the same, undisturbed"
  "$TTT" submit c.yaml "${asked[@]}" --set run_dir="$folder/whole" || fail "not submitted"
  await 300 test -f "$folder/whole/summary.json"
  "$here/.venv/bin/python" - "$run" "$folder/whole" <<'PYTHON' || fail "the losses differ"
import json, sys
runs = [[json.loads(line) for line in open(f"{folder}/metrics.jsonl")] for folder in sys.argv[1:]]
steps, whole = [[(line["step"], line["loss"], line.get("eval_loss")) for line in run] for run in runs]
assert [step for step, _, _ in steps] == list(range(1, len(whole) + 1)), steps
apart = max(abs(one[1] - other[1]) for one, other in zip(steps, whole))
print(f"{len(steps)} steps, none twice, none missing; losses differ by {apart:.1e} at most from those of the whole run")
sys.exit(apart > 1e-6)
PYTHON
}

case ${1:-all} in
  up | down) [ $# = 2 ] || fail "$1 FOLDER"; "$1" "$2" ;;
  all) all ;;
  *) fail "up FOLDER, down FOLDER, or nothing" ;;
esac
