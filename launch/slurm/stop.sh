#!/bin/bash
# Has a run on a Slurm cluster save and end, and not go back into the queue.
#
#   launch/slurm/stop.sh NAME [flags]
#
#   --dry-run                  prints the commands
#
# launch/slurm/stop.sh b16
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../common.sh
source "$(dirname "$0")/../common.sh"

jobs_of() { squeue --me --noheader "--name=$NAME" --format=%A "$@"; }

stop() {
  run scontrol update "JobId=$1" Requeue=0 # so that 75 ends it: train.sbatch asks for no more than this allows
  run scancel --signal=TERM "$1" || true   # to the processes, which save; there may be none yet
  run scancel --state=PENDING "$1" 2>/dev/null || true # then this is what ends it
}

# A job that has just gone back into the queue can be cancelled only once its nodes are free.
wait_for_pending() {
  local tries=0 job
  while [[ -n $(jobs_of --states=PENDING) ]]; do
    ((++tries < 90)) || usage_error "a job of $NAME is still in the queue: squeue --me --name=$NAME."
    sleep "${POLL_SECONDS:-2}"
    for job in $(jobs_of --states=PENDING); do
      scancel --state=PENDING "$job" 2>/dev/null || true
    done
  done
}

parse "NAME" "" "$@"
if dry; then
  note "JOB is each number that this prints: squeue --me --noheader --name=$NAME --format=%A"
  stop JOB
  exit
fi
jobs=$(jobs_of)
[[ -n $jobs ]] || usage_error "you have no job of the name $NAME in the queue; squeue --me lists those that you have."
for job in $jobs; do
  stop "$job"
done
wait_for_pending
