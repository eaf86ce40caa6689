#!/bin/bash
# Has a run save and end, waits for it, and deletes its TPU VMs, so that nothing costs any more.
#
#   launch/tpu_vm/stop.sh NAME [flags]
#
#   --keep                     leaves the machines, which go on costing
#   --force                    deletes them even if the run could not be told to save
#   --zone=Z --project=P       gcloud's defaults
#   --tunnel-through-iap, --internal-ip   how workers without an address of their own are reached
#   --dry-run                  prints the commands
#
# launch/tpu_vm/stop.sh b16 --zone=us-west4-a
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "$0")/lib.sh"

# Only workers that are there can be told; what is not there costs nothing, but a request that waits would.
stop_run() {
  local state code=0
  if dry; then
    resources describe "$NAME" "${place[@]}" '--format=value(state.state)'
    everywhere stop
    return
  fi
  state=$(state_of) || exit "$EXIT_FAILED"
  case $state in
    NONE) usage_error "there is no queued resource $NAME there (${place[*]}); gcloud compute tpus queued-resources list --zone=- names all." ;;
    ACTIVE)
      everywhere stop || code=$?
      ((code == 0 || code == 127)) || [[ -n ${flag_force:-} ]] || fail_to_stop # 127: never set up
      ;;
    *) tell "$NAME is $state; nothing runs there." ;;
  esac
}

fail_to_stop() {
  tell "The run could not be told to save, so nothing was deleted, and $NAME goes on costing. Try again, or delete it with --force: then the steps since the last checkpoint are lost."
  exit "$EXIT_FAILED"
}

parse "NAME" "$PLACE keep force" "$@"
find_place
stop_run
if [[ -z ${flag_keep:-} ]]; then
  delete
fi
