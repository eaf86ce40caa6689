#!/bin/bash
# Asks for TPU VMs as a queued resource, and waits until they are there.
#
#   launch/tpu_vm/create.sh NAME --accelerator-type=TYPE [flags]
#
#   --zone=Z --project=P       gcloud's defaults
#   --spot | --reserved | --provisioning-model=flex-start --max-run-duration=7d   on demand, if none of them is given
#   --node-count=N             slices, 1
#   --runtime-version=V        by launch/accelerators.txt
#   --no-wait                  returns once the request is in the queue
#   --valid-until-duration=D --service-account=S --network=N --subnetwork=S --internal-ips --labels=K=V,... --metadata-from-file=startup-script=FILE   as of gcloud
#   --dry-run                  prints the commands
#
# launch/tpu_vm/create.sh b16 --accelerator-type=v5litepod-16 --zone=us-west4-a --spot
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "$0")/lib.sh"

parse "NAME" "$PLACE $RESOURCE no-wait" "$@"
check_resource
find_place
create || exit "$EXIT_FAILED"
if [[ -z ${flag_no_wait:-} ]]; then
  wait_until_active || exit "$EXIT_FAILED"
fi
