#!/bin/bash
# Has a run on GKE save and end, waits for it, and deletes its JobSet. Nodes go when the cluster's autoscaler takes them away.
#
#   launch/gke/stop.sh NAME [flags]
#
#   --namespace=N              kubectl's
#   --dry-run                  prints the command
#
# launch/gke/stop.sh b16
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../common.sh
source "$(dirname "$0")/../common.sh"

parse "NAME" "namespace=" "$@"
command=(kubectl delete jobset "$NAME" --cascade=foreground) # which waits for the pods, and they for their last save
[[ -z ${flag_namespace:-} ]] || command+=("--namespace=$flag_namespace")
run "${command[@]}"
