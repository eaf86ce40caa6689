# shellcheck shell=bash disable=SC2034 # variables are for the scripts that source it
# Shared by the scripts of this folder: one queued resource, its state, its workers, its code.
#
# gcloud's answers are taken for what they are worth (Google Cloud SDK 528): `ssh` to all workers passes over slices that it cannot reach
# with a warning and exit code 0, so workers are counted; and errors are told apart by the codes of the API in their text.

# shellcheck source-path=SCRIPTDIR source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

readonly PLACE="zone= project= tunnel-through-iap internal-ip"
readonly RESOURCE="accelerator-type= runtime-version= node-count= spot reserved provisioning-model= max-run-duration= valid-until-duration=
  service-account= network= subnetwork= internal-ips labels= metadata-from-file="
readonly POLL=${POLL_SECONDS:-60}
readonly WORKER="bash clip_jax/launch/tpu_vm/worker.sh"

place=() # --zone, --project, and no questions: nobody would see them
way=()   # how ssh reaches workers
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
readonly scratch why=$scratch/why # what gcloud wrote on standard error

# Where the resource is: by flags, or as gcloud is configured.
find_place() {
  local zone=${flag_zone:-${ZONE:-}} project=${flag_project:-${PROJECT:-}}
  command -v gcloud >/dev/null || usage_error "gcloud is not installed; launch/README.md says how."
  [[ -n $zone ]] || zone=$(gcloud config get compute/zone 2>/dev/null) || true
  [[ -n $zone ]] || usage_error "--zone is missing, and gcloud has no default: --zone=us-east5-b, or gcloud config set compute/zone us-east5-b."
  place=("--zone=$zone" --quiet)
  [[ -z $project ]] || place+=("--project=$project")
  [[ -z ${flag_tunnel_through_iap:-} ]] || way+=(--tunnel-through-iap)
  [[ -z ${flag_internal_ip:-} ]] || way+=(--internal-ip)
}

resources() {
  local verb=$1
  shift
  run gcloud compute tpus queued-resources "$verb" "$@"
}

# Prints the state of the resource, NONE where there is none; fails where gcloud does not say.
state_of() {
  local state
  if state=$(gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" '--format=value(state.state)' 2>"$why"); then
    printf '%s\n' "$state"
  elif grep -q NOT_FOUND "$why"; then
    echo NONE
  else
    tell "$(date +%T) gcloud does not answer: $(last_error)"
    return 1
  fi
}

last_error() { grep -v '^$' "$why" | tail -n 1; }

# Checks the flags of a resource before anything is asked of Google Cloud.
check_resource() {
  local kind=${flag_accelerator_type:-} ways=0 one
  [[ -n $kind ]] || usage_error "--accelerator-type is missing, as in --accelerator-type=v5litepod-16."
  [[ $kind =~ ^[a-z0-9]+-[1-9][0-9]*$ ]] || usage_error "--accelerator-type=$kind is not a type and a number, as in v5litepod-16."
  if [[ -z ${flag_runtime_version:-} ]] && ! flag_runtime_version=$(accelerator 2 "${kind%-*}" 3); then
    usage_error "--accelerator-type=$kind is not in launch/accelerators.txt; v4, v5litepod, v5p, v6e and tpu7x are, and --runtime-version takes any other."
  fi
  whole node-count 1
  for one in "${flag_spot:-}" "${flag_reserved:-}" "${flag_provisioning_model:-}"; do
    [[ -z $one ]] || ways=$((ways + 1))
  done
  ((ways < 2)) || usage_error "--spot, --reserved and --provisioning-model exclude each other."
  if [[ ${flag_provisioning_model:-flex-start} != flex-start ]]; then
    usage_error "--provisioning-model=$flag_provisioning_model is not known here; flex-start is."
  fi
  if [[ -n ${flag_provisioning_model:-} && -z ${flag_max_run_duration:-} ]]; then
    usage_error "--provisioning-model=flex-start needs --max-run-duration, as in 7d, which is the most."
  fi
}

# Asks for the resource. Fails where it may be asked for again; what would be refused again ends the script.
create() {
  local flag variable track=() flags=("--accelerator-type=$flag_accelerator_type" "--runtime-version=$flag_runtime_version")
  if ((${flag_node_count:-1} > 1)); then
    flags+=("--node-count=$flag_node_count" "--node-prefix=$NAME")
  else
    flags+=("--node-id=$NAME")
  fi
  for flag in spot reserved internal-ips; do
    variable=flag_${flag//-/_}
    [[ -z ${!variable:-} ]] || flags+=("--$flag")
  done
  for flag in provisioning-model max-run-duration valid-until-duration service-account network subnetwork labels metadata-from-file; do
    variable=flag_${flag//-/_}
    [[ -z ${!variable:-} ]] || flags+=("--$flag=${!variable}")
  done
  [[ -z ${flag_provisioning_model:-} ]] || track=(alpha) # these two flags are not in the other release tracks
  if ! run gcloud ${track[@]+"${track[@]}"} compute tpus queued-resources create "$NAME" "${place[@]}" "${flags[@]}" 2>"$why"; then
    refuse_what_stays
    tell "$(date +%T) $NAME could not be asked for: $(last_error)"
    return 1
  fi
}

# Whether gcloud's answer tells of quota, and not of machines that are not free, or of a project that quota is taken from.
is_quota() { grep -v 'no more capacity' "$why" | grep -qE 'Quota limit|[Qq]uota .*exceeded|exceeded .*[Qq]uota|RESOURCE_EXHAUSTED'; }

# Ends the script where asking again would not help.
refuse_what_stays() {
  if is_quota; then
    tell "$NAME was refused for want of quota: $(last_error)"
    tell "Ask for more of it in that zone, or take another --zone, --accelerator-type or --node-count; launch/README.md, \"Quota\", says how."
    exit "$EXIT_USAGE"
  fi
  if grep -qE 'PERMISSION_DENIED|UNAUTHENTICATED|INVALID_ARGUMENT|FAILED_PRECONDITION|NOT_FOUND|ALREADY_EXISTS|SERVICE_DISABLED|required property|gcloud auth login' "$why"; then
    tell "$NAME was refused: $(last_error)"
    exit "$EXIT_USAGE"
  fi
}

# Waits until the resource is there. Fails where it will not be.
wait_until_active() {
  local state before=
  if dry; then
    note "until it prints ACTIVE, every $POLL s:"
    resources describe "$NAME" "${place[@]}" '--format=value(state.state)'
    return
  fi
  while true; do
    state=$(state_of) || state=$before
    [[ $state == "$before" ]] || tell "$(date +%T) $NAME is $state."
    before=$state
    case $state in
      ACTIVE) return 0 ;;
      NONE | SUSPENDING | SUSPENDED | FAILED | DELETING)
        tell_why_it_failed
        return 1
        ;;
    esac
    sleep "$POLL"
  done
}

# Says why a resource is FAILED or SUSPENDED, as far as the API does.
tell_why_it_failed() {
  gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" '--format=value(state.stateInitiator,state.failedData.error.message)' >"$why" 2>&1 || return 0
  [[ ! -s $why ]] || tell "Google Cloud says: $(last_error)"
}

delete() { resources delete "$NAME" "${place[@]}" --force; }

# ssh_to 0|all COMMAND: on the first worker of the first slice, or on all of all.
ssh_to() { resources ssh "$NAME" "${place[@]}" ${way[@]+"${way[@]}"} "--node=$1" "--worker=$1" "--command=$2"; }

# everywhere VERB ...: has each worker do something of worker.sh, and prints what each answers. Fails, with the code of one that failed, or
# with 1, unless all have answered.
everywhere() {
  local said code=0 answers total
  if dry; then
    ssh_to all "$WORKER $(quoted "$@")"
    return
  fi
  said=$(ssh_to all "$WORKER $(quoted "$@")" 2>"$why") || code=$?
  answers=$(sed -n 's/^clip_jax-worker //p' <<<"$said")
  total=$(awk 'NR == 1 { print $1 + 0 }' <<<"$answers")
  if ((code == 127)); then
    tell "$NAME is not set up; launch/tpu_vm/setup.sh does it."
    return "$code"
  fi
  if ((code)) || (($(grep -c . <<<"$answers") != total)); then
    tell "$(date +%T) $1: $(grep -c . <<<"$answers") of $total workers have answered; $(grep -vE '^$|^##### |Completed execution' "$why" | tail -n 1)"
    return "$((code ? code : EXIT_FAILED))"
  fi
  cut -d ' ' -f 2- <<<"$answers"
}

# Gives all workers the code, Python and the packages, and mounts the bucket of WORKDIR where it is one.
set_up() {
  local archive unpack
  archive=clip_jax-$commit.tar.gz
  # What an earlier commit had is removed, but for the packages, which take minutes.
  unpack="mkdir -p clip_jax && find clip_jax -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} +"
  run git -C "$ROOT" archive --format=tar.gz --prefix=clip_jax/ "--output=${TMPDIR:-/tmp}/$archive" "$commit" &&
    resources scp "${TMPDIR:-/tmp}/$archive" "$NAME:" "${place[@]}" ${way[@]+"${way[@]}"} --node=all --worker=all &&
    ssh_to all "tmux has-session -t clip_jax 2>/dev/null && { echo 'a run is going on there' >&2; exit 1; }; $unpack && tar -xzf $archive && echo $commit >clip_jax/.commit" &&
    everywhere setup "$commit" "${flag_extras:-tpu}" "${WORKDIR:-}"
}

# start any|shared: begins, or goes on with, training on all workers; see worker.sh.
start() { everywhere run "$1" "$CONFIG" "$WORKDIR" ${more[@]+"${more[@]}"}; }
