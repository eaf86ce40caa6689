#!/bin/bash
# A Slurm of this machine alone, and a run of two tasks on it that is preempted twice; its result must be that of an undisturbed one.
#
#   tests/launch/slurm.sh FOLDER DATA
#
# DATA is a shard for tests/end_to_end/recipe.py. Slurm is installed if it is not there, where apt-get can (Debian's slurm-wlm and munge).
# It has its own settings, keys, ports and state in FOLDER, and ends with this script. Exit code 77, with the reason: not possible here.
set -euo pipefail

ROOT=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$1"
HERE=$(cd "$1" && pwd) DATA=$2
readonly ROOT HERE DATA NOT_HERE=77

not_here() {
  echo "Slurm cannot run here: $*"
  exit "$NOT_HERE"
}

install_slurm() {
  command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null && return
  command -v apt-get >/dev/null || not_here "it is not installed, and there is no apt-get."
  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends slurm-wlm munge; } >"$HERE/apt.log" 2>&1 ||
    not_here "slurm-wlm could not be installed: $(tail -n 1 "$HERE/apt.log")"
}

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }

# comes SECONDS COMMAND ...: waits until a command succeeds.
comes() {
  local deadline=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    ((SECONDS < deadline)) || return 1
    sleep 0.2
  done
}

# until_true SECONDS WHAT COMMAND ...: the same, and ends the script where it does not.
until_true() {
  if ! comes "$1" "${@:3}"; then
    echo "Not within $1 s: $2"
    tail -n 20 "$HERE"/*.log
    exit 1
  fi
}

start_slurm() {
  local name
  name=$(hostname -s)
  mkdir -p "$HERE"/{ctld,d}
  head -c 1024 /dev/urandom >"$HERE/munge.key"
  chmod 600 "$HERE/munge.key"
  # A job that goes back into the queue waits until its old credential is no longer good, which would be two minutes.
  cat >"$HERE/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$name(127.0.0.1)
SlurmUser=root
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
AuthType=auth/munge
AuthInfo=socket=$HERE/munge.socket,cred_expire=6
CryptoType=crypto/munge
StateSaveLocation=$HERE/ctld
SlurmdSpoolDir=$HERE/d
SlurmctldPidFile=$HERE/slurmctld.pid
SlurmdPidFile=$HERE/slurmd.pid
SlurmctldLogFile=$HERE/slurmctld.log
SlurmdLogFile=$HERE/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
ReturnToService=2
KillWait=60
MpiDefault=none
NodeName=$name NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
  export SLURM_CONF=$HERE/slurm.conf
  munged --foreground --force --socket="$HERE/munge.socket" --key-file="$HERE/munge.key" --pid-file="$HERE/munge.pid" \
    --seed-file="$HERE/munge.seed" --log-file="$HERE/munge.log" >"$HERE/munge.out.log" 2>&1 &
  comes 30 munge --socket="$HERE/munge.socket" --no-input || not_here "munge does not start: $(tail -n 1 "$HERE/munge.out.log")"
  slurmctld -D >"$HERE/slurmctld.out.log" 2>&1 &
  slurmd -D >"$HERE/slurmd.out.log" 2>&1 &
  comes 60 node_is_idle || not_here "its daemons do not come together: $(tail -qn 1 "$HERE/slurmctld.log" "$HERE/slurmd.log" 2>&1 | paste -sd ' ')"
}

node_is_idle() { [[ $(sinfo --noheader --format=%T) == idle ]]; }

stop_slurm() {
  local processes
  scancel --user=root --quiet 2>/dev/null || true
  processes=$(jobs -p)
  # shellcheck disable=SC2086 # one word a process
  [[ -z $processes ]] || kill $processes 2>/dev/null || true
  wait
}

submit() {
  "$ROOT/launch/slurm/submit.sh" "$1" tests/end_to_end/recipe.py "$HERE/$1" --gpus-per-node=0 --processes-per-node=2 --cpus-per-task=1 -- \
    "--config.data.path=$DATA" --config.train.steps=16 --config.checkpoint.every=4 --config.train.host_timeout=60 "${@:2}"
}

# How many lines of training a run has.
steps() { grep -c '"loss"' "$HERE/$1/metrics.jsonl" 2>/dev/null || true; }
has_steps() { (($(steps "$1") >= $2)); }
is_over() { [[ -z $(squeue --noheader --job="$1" 2>/dev/null) ]]; }
came_back() { [[ $(scontrol --oneliner show job "$1") == *" Restarts=$2 "*"JobState=RUNNING"* || $(scontrol --oneliner show job "$1") == *"JobState=RUNNING"*" Restarts=$2 "* ]]; }

main() {
  local job whole
  [[ $(id -u) == 0 ]] || not_here "its daemons need root."
  install_slurm
  trap stop_slurm EXIT
  start_slurm

  whole=$(submit whole | grep -o '[0-9]*$')
  until_true 500 "the undisturbed run is done" is_over "$whole"

  job=$(submit stopped | grep -o '[0-9]*$')
  until_true 300 "the run has 3 steps" has_steps stopped 3
  scancel --signal=TERM "$job" # as with a time limit that comes near: to the tasks
  until_true 300 "the job came back" came_back "$job" 1
  until_true 300 "the run has 9 steps" has_steps stopped 9
  scontrol requeue "$job" # as a preemption does
  until_true 300 "the job came back twice" came_back "$job" 2
  until_true 500 "the run is done" is_over "$job"
  echo "job $job: $(grep -c 'train.sbatch: stopped, job' "$HERE/stopped/slurm-stopped.log" || true)"
  scontrol --oneliner show job "$job" | grep -o 'JobState=[A-Z]*\|Restarts=[0-9]*\|ExitCode=[0-9:]*'
}

main
