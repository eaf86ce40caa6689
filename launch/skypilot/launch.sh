#!/bin/bash
# Trains with SkyPilot as a managed job: on spot TPUs, which it asks for again when they are taken away.
#
#   launch/skypilot/launch.sh NAME CONFIG WORKDIR [flags] [-- --config.a.b=value ...]
#
# WORKDIR is gs://BUCKET/PATH. The files of this folder are what is trained, committed or not.
#
#   --accelerator-type=TYPE    v5litepod-16
#   --zone=Z                   where SkyPilot finds some
#   --on-demand                not spot
#   --dry-run                  prints the command
#
# `sky jobs queue` lists jobs, `sky jobs logs --name NAME` follows one, and `sky jobs cancel --name NAME` ends it.
#
# launch/skypilot/launch.sh b16 configs/vitb16.py gs://my-bucket/runs/b16 --accelerator-type=v5litepod-16
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../common.sh
source "$(dirname "$0")/../common.sh"

parse "NAME CONFIG WORKDIR" "accelerator-type= zone= on-demand" "$@"
[[ $WORKDIR == gs://* ]] || usage_error "WORKDIR=$WORKDIR must be gs://BUCKET/PATH, which SkyPilot mounts on each machine it finds."
bucket=${WORKDIR#gs://}
command=(
  sky jobs launch "$ROOT/launch/skypilot/train.yaml" "--name=$NAME" "--workdir=$ROOT" "--gpus=tpu-${flag_accelerator_type:-v5litepod-16}"
  "--env=NAME=$NAME" "--env=CONFIG=$CONFIG" "--env=WORKDIR=$WORKDIR" "--env=BUCKET=${bucket%%/*}"
  "--env=OVERRIDES=$(quoted ${more[@]+"${more[@]}"})" --detach-run --yes
)
[[ -z ${flag_zone:-} ]] || command+=("--infra=gcp/${flag_zone%-*}/$flag_zone")
[[ -z ${flag_on_demand:-} ]] || command+=(--no-use-spot)
run "${command[@]}"
