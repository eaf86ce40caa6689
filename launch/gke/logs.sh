#!/bin/bash
# Shows what the first process of a run on GKE says.
#
#   launch/gke/logs.sh NAME [flags]
#
#   --follow                   goes on until Ctrl-C, which does not end the run
#   --lines=N                  the last N lines, 100
#   --host=H --slice=S         host H of slice S, 0 and 0
#   --namespace=N              kubectl's
#   --dry-run                  prints the command
#
# launch/gke/logs.sh b16 --follow
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../common.sh
source "$(dirname "$0")/../common.sh"

parse "NAME" "follow lines= host= slice= namespace=" "$@"
whole lines 0
whole host 0
whole slice 0
command=(kubectl logs "--tail=${flag_lines:-100}" --container=train)
command+=("--selector=jobset.sigs.k8s.io/jobset-name=$NAME,jobset.sigs.k8s.io/job-index=${flag_slice:-0},batch.kubernetes.io/job-completion-index=${flag_host:-0}")
[[ -z ${flag_follow:-} ]] || command+=(--follow)
[[ -z ${flag_namespace:-} ]] || command+=("--namespace=$flag_namespace")
run "${command[@]}"
