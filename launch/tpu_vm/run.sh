#!/bin/bash
# Starts training on all workers of TPU VMs, or goes on with it, in tmux: it does not end with this terminal.
#
#   launch/tpu_vm/run.sh NAME CONFIG WORKDIR [flags] [-- --config.a.b=value ...]
#
# WORKDIR is gs://BUCKET/PATH, or a folder that all hosts see; a slice of one host may have it on its own disk, which goes with the machine.
#
#   --zone=Z --project=P       gcloud's defaults
#   --tunnel-through-iap, --internal-ip   how workers without an address of their own are reached
#   --dry-run                  prints the commands
#
# launch/tpu_vm/run.sh b16 configs/vitb16.py gs://my-bucket/runs/b16 --zone=us-west4-a -- --config.data.path='gs://my-bucket/data/*.tar'
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "$0")/lib.sh"

parse "NAME CONFIG WORKDIR" "$PLACE" "$@"
find_place
said=$(everywhere status) || exit
if dry; then
  printf '%s\n' "$said"
elif grep -q ' running$' <<<"$said"; then
  usage_error "a run is going on already on $NAME; launch/tpu_vm/stop.sh $NAME --keep ends it."
fi
start any
tell "Started. launch/tpu_vm/logs.sh $NAME --follow shows what it says."
