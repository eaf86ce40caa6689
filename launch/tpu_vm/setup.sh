#!/bin/bash
# Gives all workers of TPU VMs the last commit, Python and the packages, and mounts the bucket of WORKDIR.
#
#   launch/tpu_vm/setup.sh NAME WORKDIR [flags]
#
#   --extras=tpu,...           what of setup.py's extras is installed: tpu
#   --zone=Z --project=P       gcloud's defaults
#   --tunnel-through-iap, --internal-ip   how workers without an address of their own are reached
#   --dry-run                  prints the commands
#
# launch/tpu_vm/setup.sh b16 gs://my-bucket/runs/b16 --zone=us-west4-a
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "$0")/lib.sh"

parse "NAME WORKDIR" "$PLACE extras=" "$@"
check_code
find_place
set_up
