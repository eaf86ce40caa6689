#!/bin/bash
# Trains on TPU VMs until it is done: asks for them, sets them up, starts the run, watches, and begins anew when they are taken away.
#
#   launch/tpu_vm/babysit.sh NAME CONFIG WORKDIR --accelerator-type=TYPE [flags] [-- --config.a.b=value ...]
#
# Run it where it can stay, in tmux on a small machine. Ended and started again it takes up what it finds; Ctrl-C ends it, not the run.
# The last commit is what is trained. WORKDIR is gs://BUCKET/PATH, or a folder on NFS that --metadata-from-file=startup-script=FILE mounts.
#
#   --spot | --reserved | --provisioning-model=flex-start --max-run-duration=7d   on demand, if none of them is given
#   --node-count=N             slices, 1
#   --keep                     leaves the machines when all is over, which go on costing
#   --max-failures=N           how many failures in a row are tried again, 5; a run that lasted an hour begins a new row
#   --zone=Z --project=P --extras=tpu,... --tunnel-through-iap --internal-ip   as of setup.sh
#   --runtime-version=V --valid-until-duration=D --service-account=S --network=N --subnetwork=S --internal-ips --labels=K=V,...
#   --metadata-from-file=startup-script=FILE   as of create.sh
#   --dry-run                  prints the commands of a run that nothing happens to
#
# Exit codes: 0 done; 2 the run, or Google Cloud, says that trying again is no use; 75 stopped by stop.sh, all saved; 1 given up.
#
# launch/tpu_vm/babysit.sh b16 configs/vitb16.py gs://my-bucket/runs/b16 --accelerator-type=v5litepod-16 --zone=us-west4-a --spot
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "$0")/lib.sh"

readonly LONG=${LONG_SECONDS:-3600}      # a run that lasts as long is no part of a row of failures
readonly SILENT=${SILENT_SECONDS:-1800}  # workers that do not answer for as long, though Google Cloud does, are given back

created='' started='' failures=0
began=0 heard=0 # when the run did, and when workers were last heard of

say() { tell "$(date '+%F %T') $*"; }

# --- ends

finish() {
  local code=$1 tries=0
  if [[ -n ${flag_keep:-} ]]; then
    say "$NAME is kept, and goes on costing; launch/tpu_vm/stop.sh $NAME deletes it."
  elif [[ $(state_of || true) != NONE ]]; then
    until delete; do
      if ((++tries == 10)); then
        say "$NAME COULD NOT BE DELETED AND GOES ON COSTING: $(quoted gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --force)"
        exit "$EXIT_FAILED"
      fi
      sleep "$POLL"
    done
    say "$NAME is deleted."
  fi
  exit "$code"
}

show_log() { ssh_to 0 'tail -n 20 clip_jax_run/log' >&2 2>"$why" || true; }

# Counts a failure, and gives up in the end.
count() {
  started=''
  if ((++failures > ${flag_max_failures:-5})); then
    say "Given up after $failures failures in a row."
    finish "$EXIT_FAILED"
  fi
  say "Trying again: failure $failures of ${flag_max_failures:-5} in a row."
}

# failed CODE WHAT: what failed because the machines were taken away does not count.
failed() {
  say "$2"
  (($1 != EXIT_USAGE)) || finish "$EXIT_USAGE"
  if [[ $(state_of || echo ACTIVE) == ACTIVE ]]; then
    count
  else
    started=''
  fi
}

# --- a resource that is there

# Takes up a run that goes on there, or starts one.
take_up() {
  local said code=0
  said=$(everywhere status 2>"$scratch/status") || code=$?
  if ((code && code != 127)); then # 127: a new machine does not know the command
    silent "$(cat "$scratch/status")"
    return
  fi
  heard=$SECONDS
  if [[ $said == *running* ]] && ! grep -qv ' running$' <<<"$said"; then
    say "The run goes on; watching it."
    started=yes began=$SECONDS
    return
  fi
  code=0
  if [[ $said == *running* ]]; then # one that began on some of them only
    everywhere stop >/dev/null || code=$?
  fi
  say "Setting up ..."
  if ((!code)); then
    set_up >/dev/null 2>"$scratch/setup" || code=$?
  fi
  if ((code)); then
    cat "$scratch/setup" >&2 2>/dev/null || true
    failed "$code" "Setting up failed."
    return
  fi
  begin
}

begin() {
  local code=0
  start shared >/dev/null || code=$?
  if ((code)); then
    failed "$code" "Starting failed."
    return
  fi
  started=yes began=$SECONDS heard=$SECONDS
  say "Training. launch/tpu_vm/logs.sh $NAME --follow shows what it says."
}

# Workers do not answer, though Google Cloud does: for a while that is the network's doing.
silent() {
  say "Workers do not answer: $1"
  if ((SECONDS - heard >= SILENT)); then
    say "Nor have they for $SILENT s; giving the machines back."
    if delete; then
      created=''
    fi
    count
  fi
}

# One look. The first worker is asked, as all end together; how they ended, all are.
look() {
  local said
  if ! said=$(ssh_to 0 "$WORKER status" 2>"$why") || [[ $said != *clip_jax-worker* ]]; then
    silent "$(last_error)"
    return
  fi
  heard=$SECONDS
  ((SECONDS - began < LONG)) || failures=0
  [[ $said == *running* ]] || conclude
}

# How a run ended, by "HOST none|ended|stopped [CODE]" of all workers: 2 if one says so, 1 if one has another code than 0 and 75, or was
# started anew and knows nothing; 0 if all are done.
verdict() {
  awk '
    { code = $2 == "none" ? 1 : $3; if (code == 2) usage = 1; else if (code == 75) again = 1; else if (code != 0) failed = 1; if ($2 == "stopped") stopped = 1 }
    END { print usage ? 2 : failed ? 1 : again && stopped ? "stopped" : again ? 75 : 0 }'
}

conclude() {
  local said
  said=$(everywhere status) || return 0         # the next look asks again
  ! grep -q ' running$' <<<"$said" || return 0 # the others end, too: docs/reliability.md, "Hangs"
  case $(verdict <<<"$said") in
    0)
      say "Done: all steps of $WORKDIR."
      finish 0
      ;;
    stopped)
      say "Stopped by stop.sh, all saved."
      exit "$EXIT_TRY_AGAIN"
      ;;
    75)
      say "Stopped early, all saved; it is started again, if the machines are still there."
      started=''
      ;;
    2)
      show_log
      say "main.py says that starting it again is no use; see its last lines above."
      finish "$EXIT_USAGE"
      ;;
    *)
      show_log
      failed "$EXIT_FAILED" "The run failed; its last lines are above, and its workers ended so: $(tr '\n' ';' <<<"$said")"
      ;;
  esac
}

# --- all of it

# A resource that was taken away, or never came, is replaced.
replace() {
  tell_why_it_failed
  if is_quota; then
    say "$NAME was refused for want of quota; launch/README.md, \"Quota\", says how to ask for it."
    finish "$EXIT_USAGE"
  fi
  started=''
  if delete; then
    created=''
  fi
  [[ $1 == SUSPENDED ]] || count # spot machines are taken away any number of times
}

# What a state asks for.
act() {
  case $1 in
    NONE)
      if [[ -n $created ]]; then
        say "$NAME was deleted by somebody else; that ends this, too."
        exit "$EXIT_TRY_AGAIN"
      fi
      say "Asking for it: $flag_accelerator_type, ${flag_node_count:-1} times."
      if create; then
        created=yes
      fi
      ;;
    ACTIVE)
      if [[ -z $started ]]; then take_up; else look; fi
      ;;
    SUSPENDED | FAILED) replace "$1" ;;
  esac
}

attend() {
  local state before=''
  while true; do
    if state=$(state_of); then
      if [[ $state != "$before" ]]; then
        say "$NAME is $state."
        heard=$SECONDS # of a machine that is new nobody has yet
      fi
      before=$state
      [[ $state == NONE ]] || created=yes
      act "$state"
    fi
    sleep "$POLL"
  done
}

describe_all() {
  resources describe "$NAME" "${place[@]}" '--format=value(state.state)'
  note "if there is no such resource:"
  create
  wait_until_active
  note "unless a run goes on there already:"
  everywhere status
  set_up
  start shared
  note "until all workers have ended, every $POLL s:"
  ssh_to 0 "$WORKER status"
  everywhere status
  if [[ -z ${flag_keep:-} ]]; then
    note "when it is done:"
    delete
  fi
}

parse "NAME CONFIG WORKDIR" "$PLACE $RESOURCE extras= keep max-failures=" "$@"
check_resource
whole max-failures 0
check_code
find_place
if dry; then
  describe_all
else
  trap 'say "No longer watching. The run goes on, and $NAME goes on costing; launch/tpu_vm/stop.sh $NAME ends both."; exit 130' INT TERM
  attend
fi
