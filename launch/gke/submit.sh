#!/bin/bash
# Trains on GKE: fills in tpu.yaml or gpu.yaml, and creates it in the cluster that kubectl talks to, which has JobSet 0.10 or later.
#
#   launch/gke/submit.sh NAME CONFIG WORKDIR --topology=KIND:SHAPE --image=IMAGE [flags] [-- --config.a.b=value ...]
#
# WORKDIR is gs://BUCKET/PATH, which GKE mounts, or a path whose first folder --volume-claim=CLAIM is mounted at.
#
#   --topology=v5e:4x4         a slice, as clip-jax plan names it; or h100:16, two nodes of eight
#   --slices=N                 of TPUs, 1
#   --image=IMAGE              of launch/docker/build.sh
#   --queue=Q                  a LocalQueue of Kueue
#   --service-account=S        of Kubernetes, which may write to the bucket: default
#   --spot                     on spot nodes
#   --max-restarts=N           after failures, 10; being stopped early does not count
#   --chips-per-host=C         of machines that are not those of launch/accelerators.txt, such as 8 of ct6e-standard-8t
#   --namespace=N              kubectl's
#   --dry-run                  prints the manifest and the command
#
# launch/gke/submit.sh b16 configs/vitb16.py gs://my-bucket/runs/b16 --topology=v5e:4x4 --image=us-west4-docker.pkg.dev/my-project/clip/tpu:1 --spot

# shellcheck disable=SC2089,SC2090 # quotes are YAML's and JSON's
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../common.sh
source "$(dirname "$0")/../common.sh"

json() {
  local text=${1//\\/\\\\} line=$'\n' tab=$'\t'
  text=${text//\"/\\\"}
  text=${text//$line/\\n}
  printf '"%s"' "${text//$tab/\\t}"
}

json_list() {
  local word comma=''
  printf '['
  for word; do
    printf '%s%s' "$comma" "$(json "$word")"
    comma=', '
  done
  printf ']'
}

check() {
  local kind=${flag_topology%%:*} shape=${flag_topology#*:} side
  [[ $flag_topology =~ ^[a-z0-9]+:[1-9][0-9]*(x[1-9][0-9]*)*$ ]] || usage_error "--topology=$flag_topology is not KIND:SHAPE, as in v5e:4x4 or h100:16."
  if ! selector=$(accelerator 1 "$kind" 4); then
    usage_error "--topology=$flag_topology: $kind is not in launch/accelerators.txt; v4, v5e, v5p, v6e, tpu7x and h100 are."
  fi
  all=1
  for side in ${shape//x/ }; do
    all=$((all * side))
  done
  chips=${flag_chips_per_host:-$(accelerator 1 "$kind" 6)}
  ((all > 1 || chips > 4)) || chips=1 # the smallest slices are machines of one chip
  ((all % chips == 0)) || usage_error "--topology=$flag_topology has $all chips, which hosts of $chips do not add up to."
  hosts=$((all / chips))
  if [[ $kind == h100 ]]; then
    [[ -z ${flag_slices:-} ]] || usage_error "--slices=$flag_slices is of TPUs; more nodes are --topology=h100:$((all * 2))."
  elif ((${flag_slices:-1} > 1 && hosts == 1)); then
    usage_error "--slices=$flag_slices of $flag_topology: GKE joins slices of several hosts only; take a larger one."
  fi
}

# Where the run writes: what is mounted, and the path of WORKDIR below.
place_workdir() {
  local bucket options=implicit-dirs,uid=1000,gid=1000,file-mode=664,dir-mode=775
  # As launch/tpu_vm/worker.sh mounts it, and why.
  options+=,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0,file-system:kernel-list-cache-ttl-secs:0
  options+=,write:enable-streaming-writes:false,file-system:rename-dir-limit:200000
  pod_annotations='{}'
  if [[ $WORKDIR == gs://* ]]; then
    [[ -z ${flag_volume_claim:-} ]] || usage_error "--volume-claim=$flag_volume_claim and WORKDIR=$WORKDIR exclude each other."
    bucket=${WORKDIR#gs://}
    mount_path=/buckets/${bucket%%/*}
    path=/buckets/$bucket
    # Files wait on the node's disk until they are in the bucket, checkpoints too: no limit.
    pod_annotations='{gke-gcsfuse/volumes: "true", gke-gcsfuse/ephemeral-storage-limit: "0", gke-gcsfuse/memory-limit: "0", gke-gcsfuse/cpu-limit: "0"}'
    volume="{name: runs, csi: {driver: gcsfuse.csi.storage.gke.io, volumeAttributes: {bucketName: $(json "${bucket%%/*}"), mountOptions: $(json "$options")}}}"
  else
    [[ $WORKDIR =~ ^(/[^/]+)/. ]] || usage_error "WORKDIR=$WORKDIR must be gs://BUCKET/PATH, or a path in a folder that is mounted, as in /runs/$NAME."
    mount_path=${BASH_REMATCH[1]} path=$WORKDIR
    [[ -n ${flag_volume_claim:-} ]] || usage_error "WORKDIR=$WORKDIR needs --volume-claim=CLAIM, a volume that all hosts may write to, to be mounted at $mount_path."
    volume="{name: runs, persistentVolumeClaim: {claimName: $(json "$flag_volume_claim")}}"
  fi
}

select_nodes() {
  local kind=${flag_topology%%:*} spot='' pairs
  tolerations='[]' labels='{app: clip-jax}'
  [[ -z ${flag_queue:-} ]] || labels="{app: clip-jax, kueue.x-k8s.io/queue-name: $(json "$flag_queue")}"
  if [[ -n ${flag_spot:-} ]]; then
    spot=', cloud.google.com/gke-spot: "true"'
    tolerations='[{key: cloud.google.com/gke-spot, operator: Equal, value: "true", effect: NoSchedule}]'
  fi
  if [[ $kind == h100 ]]; then
    pairs="cloud.google.com/gke-accelerator: $selector"
  else
    pairs="cloud.google.com/gke-tpu-accelerator: $selector, cloud.google.com/gke-tpu-topology: ${flag_topology#*:}"
  fi
  node_selector="{$pairs$spot}"
}

# A template with its $words replaced by variables of the environment; $$ is a $.
render() {
  awk '{
    line = $0; text = ""
    while (/\$/ && match(line, /\$(\$|[a-z_]+)/)) {
      word = substr(line, RSTART + 1, RLENGTH - 1)
      if (word != "$" && !(word in ENVIRON)) { print FILENAME ": $" word " stands for nothing" > "/dev/stderr"; exit 1 }
      text = text substr(line, 1, RSTART - 1) (word == "$" ? "$" : ENVIRON[word])
      line = substr(line, RSTART + RLENGTH)
    }
    if (line !~ /^ *#/ || text != "") print text line
  }' "$1"
}

submit() {
  local template=$ROOT/launch/gke/tpu.yaml manifest command=(kubectl create --filename=-)
  [[ ${flag_topology%%:*} != h100 ]] || template=$ROOT/launch/gke/gpu.yaml
  [[ -z ${flag_namespace:-} ]] || command+=("--namespace=$flag_namespace")
  manifest=$(
    export name=$NAME image labels max_restarts=${flag_max_restarts:-10} slices=${flag_slices:-1} hosts chips pod_annotations
    export service_account=${flag_service_account:-default} node_selector tolerations args mount_path volume
    image=$(json "$flag_image")
    args=$(json_list main.py "--config=$CONFIG" "--workdir=$path" ${more[@]+"${more[@]}"})
    render "$template"
  )
  if dry; then
    printf "%s <<'MANIFEST'\n%s\nMANIFEST\n" "$(quoted "${command[@]}")" "$manifest"
  else
    "${command[@]}" <<<"$manifest"
  fi
}

parse "NAME CONFIG WORKDIR" "topology= slices= image= queue= service-account= spot max-restarts= chips-per-host= volume-claim= namespace=" "$@"
[[ -n ${flag_topology:-} ]] || usage_error "--topology is missing, as in --topology=v5e:4x4."
[[ -n ${flag_image:-} ]] || usage_error "--image is missing; launch/docker/build.sh makes one, and says what it is called."
whole slices 1
whole max-restarts 0
whole chips-per-host 1
check
place_workdir
select_nodes
submit
