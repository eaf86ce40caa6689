#!/bin/bash
# Trains on a Slurm cluster: one job of several nodes that goes back into the queue whenever it is stopped early.
#
#   launch/slurm/submit.sh NAME CONFIG WORKDIR [flags] [-- --config.a.b=value ...]
#
# WORKDIR must be a folder that all nodes see. The log is WORKDIR/slurm-NAME.log.
#
#   --nodes=N               1
#   --gpus-per-node=G       8; 0 is for clusters of processors
#   --processes-per-node=P  1, which drives all GPUs of its node, or as many as there are GPUs
#   --partition=P --account=A --qos=Q --time=T --constraint=C --reservation=R   as of sbatch
#   --cpus-per-task=C --mem=M   as of sbatch; without either the job has its nodes to itself
#   --dry-run               prints the command
#
# launch/slurm/submit.sh b16 configs/vitb16.py /shared/runs/b16 --nodes=4 --partition=gpu --time=24:00:00 -- --config.mesh.fsdp=8
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../common.sh
source "$(dirname "$0")/../common.sh"

readonly FLAGS="nodes= gpus-per-node= processes-per-node= partition= account= qos= time= constraint= reservation= cpus-per-task= mem="

# What main.py needs of the environment goes as it does to every job; a comma in a value would split it in --export.
submit() {
  local flag variable command=(
    sbatch "--job-name=$NAME" "--chdir=$ROOT" "--output=$WORKDIR/slurm-$NAME.log" --export=ALL
    "--nodes=${flag_nodes:-1}" "--ntasks-per-node=${flag_processes_per_node:-1}"
  )
  [[ ${flag_gpus_per_node:-8} == 0 ]] || command+=("--gpus-per-node=${flag_gpus_per_node:-8}")
  for flag in partition account qos time constraint reservation cpus-per-task mem; do
    variable=flag_${flag//-/_}
    [[ -z ${!variable:-} ]] || command+=("--$flag=${!variable}")
  done
  [[ -n ${flag_cpus_per_task:-}${flag_mem:-} ]] || command+=(--exclusive --mem=0)
  run env "NAME=$NAME" "CONFIG=$CONFIG" "WORKDIR=$WORKDIR" "${command[@]}" "$ROOT/launch/slurm/train.sbatch" ${more[@]+"${more[@]}"}
}

parse "NAME CONFIG WORKDIR" "$FLAGS" "$@"
whole nodes 1
whole gpus-per-node 0
whole processes-per-node 1
[[ $WORKDIR != gs://* ]] || usage_error "WORKDIR=$WORKDIR must be a folder that all nodes see; on Slurm nothing mounts a bucket."
[[ $WORKDIR == /* ]] || WORKDIR=$ROOT/$WORKDIR
run mkdir -p "$WORKDIR"
submit
