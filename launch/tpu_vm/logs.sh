#!/bin/bash
# Shows what a worker of TPU VMs says.
#
#   launch/tpu_vm/logs.sh NAME [flags]
#
#   --follow                   goes on until Ctrl-C, which does not end the run
#   --lines=N                  the last N lines, 100
#   --worker=W --node=S        worker W of slice S, 0 and 0
#   --zone=Z --project=P       gcloud's defaults
#   --tunnel-through-iap, --internal-ip   how workers without an address of their own are reached
#   --dry-run                  prints the command
#
# launch/tpu_vm/logs.sh b16 --zone=us-west4-a --follow
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "$0")/lib.sh"

parse "NAME" "$PLACE follow lines= worker= node=" "$@"
whole lines 0
whole worker 0
whole node 0
find_place
resources ssh "$NAME" "${place[@]}" ${way[@]+"${way[@]}"} "--node=${flag_node:-0}" "--worker=${flag_worker:-0}" \
  "--command=tail -n ${flag_lines:-100}${flag_follow:+ -F} clip_jax_run/log"
