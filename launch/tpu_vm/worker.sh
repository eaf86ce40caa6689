#!/bin/bash
# What one worker of a TPU slice does; the other scripts of this folder call it over ssh.
#
#   worker.sh setup COMMIT EXTRAS [WORKDIR]       Python, the packages, and the bucket of WORKDIR
#   worker.sh run any|shared CONFIG WORKDIR ...   starts main.py in tmux; "any" lets a slice of one host use its own disk
#   worker.sh status                              none, running, ended CODE, stopped CODE
#   worker.sh stop                                has main.py save and end, and waits for it
#
# Each answers with one line, "clip_jax-worker WORKERS HOST WHAT"; WORKERS is how many there are in all slices. main.py writes to
# ~/clip_jax_run/log, and its exit code is in ~/clip_jax_run/exit.
set -euo pipefail

readonly CODE=$HOME/clip_jax RUN=$HOME/clip_jax_run BUCKETS=$HOME/clip_jax_buckets SESSION=clip_jax
readonly PYTHON_VERSION=3.12 UV=0.13.8 # images have Python 3.10, and the project needs 3.11

refuse() {
  printf '%s: %s\n' "$(hostname)" "$*" >&2
  exit 2
}

attribute() { curl --silent --fail --header 'Metadata-Flavor: Google' "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"; }

# As jax.distributed counts them: the hosts of this slice, and the slices.
workers() {
  local hosts slices
  hosts=$(attribute worker-network-endpoints | tr ',' '\n' | grep -c .) || return
  slices=$(attribute tpu-env | sed -n "s/^MEGASCALE_NUM_SLICES: *'\{0,1\}\([0-9]*\).*/\1/p") || return
  echo $((hosts * ${slices:-1}))
}

answer() {
  local total
  if ! total=$(workers); then # for a while: no reason to give up
    echo "$(hostname): the metadata server does not say how many workers there are." >&2
    exit 1
  fi
  printf 'clip_jax-worker %s %s %s\n' "$total" "$(hostname)" "$*"
}

running() { tmux has-session -t "$SESSION" 2>/dev/null; }

# --- setup

install_tools() {
  local apt=(sudo apt-get -o DPkg::Lock::Timeout=600 --quiet --yes) # new machines upgrade themselves first
  if ! command -v tmux; then
    "${apt[@]}" update && "${apt[@]}" install tmux
  fi
  # https://docs.astral.sh/uv/getting-started/installation
  [[ -x $HOME/.local/bin/uv ]] || curl --location --silent --show-error --fail "https://astral.sh/uv/$UV/install.sh" | sh
  cd "$CODE"
  "$HOME/.local/bin/uv" venv --allow-existing --python "$PYTHON_VERSION" .venv
  "$HOME/.local/bin/uv" pip install --python .venv/bin/python -c constraints.txt -e ".[$1]"
  .venv/bin/python -c 'import clip_jax, jax'
}

# https://docs.cloud.google.com/storage/docs/cloud-storage-fuse/install
install_gcsfuse() {
  local apt=(sudo apt-get -o DPkg::Lock::Timeout=600 --quiet --yes) key=/usr/share/keyrings/cloud.google.asc
  ! command -v gcsfuse || return 0
  curl --silent --show-error --fail https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release --codename --short) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  "${apt[@]}" update
  "${apt[@]}" install gcsfuse
}

# Mounts the bucket of a gs:// folder, unless it is. Nothing that another host has changed may be remembered (metadata caches), fsync must put a file into
# the bucket, as training relies on it (it does not with streaming writes: gcsfuse's docs/semantics.md), and folders are renamed.
mount_bucket() {
  local bucket=${1#gs://}
  bucket=${bucket%%/*}
  ! mountpoint --quiet "$BUCKETS/$bucket" || return 0
  mkdir -p "$BUCKETS/$bucket"
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 --kernel-list-cache-ttl-secs=0 \
    --enable-streaming-writes=false --rename-dir-limit=200000 "$bucket" "$BUCKETS/$bucket"
}

install() {
  install_tools "$1"
  if [[ $2 == gs://* ]]; then
    install_gcsfuse
    mount_bucket "$2"
  fi
}

setup() {
  local commit=$1
  shift
  if [[ $(cat "$CODE/.commit") != "$commit" ]]; then # gcloud passed over this worker when it copied
    echo "$(hostname): the code here is not that of commit $commit." >&2
    exit 1
  fi
  # A process of its own: where a function's result is asked for, bash does not stop at its first error.
  if ! bash "$0" install "$1" "${2:-}" >"$HOME/clip_jax_setup.log" 2>&1; then
    tail -n 5 "$HOME/clip_jax_setup.log" >&2
    exit 1
  fi
  answer ready
}

# --- run

# All hosts must see one folder, and it must outlive them.
check_shared() {
  local any=$1 path=$2 kind
  while [[ ! -e $path ]]; do
    path=$(dirname "$path")
  done
  kind=$(findmnt --noheadings --output FSTYPE --target "$path")
  case $kind in
    nfs* | fuse* | lustre | ceph | gpfs | 9p) ;;
    *)
      [[ $any == any && $(workers) == 1 ]] ||
        refuse "WORKDIR=$2 is on this machine's own disk ($kind), which other hosts do not see, and which goes with the machine; take gs://BUCKET/PATH, or a folder on NFS."
      ;;
  esac
}

start() {
  local any=$1 config=$2 workdir=$3
  shift 3
  ! running || refuse "a run is going on already."
  if [[ $workdir == gs://* ]]; then
    mount_bucket "$workdir" >&2
    workdir=$BUCKETS/${workdir#gs://}
  fi
  check_shared "$any" "$workdir"
  mkdir -p "$RUN"
  rm -f "$RUN/exit" "$RUN/stopped" "$RUN/pid"
  tmux new-session -d -s "$SESSION" bash "$0" train "$config" "$workdir" "$@"
  while running && [[ ! -s $RUN/pid ]]; do # which stop needs
    sleep 0.1
  done
  answer running
}

# In tmux. When a machine goes down tmux is told first, and would take main.py along with a SIGHUP before it has saved.
train() {
  local config=$1 workdir=$2 code=0 pid
  shift 2
  trap '' HUP
  cd "$CODE"
  echo "worker.sh: $(date) $config $workdir" >>"$RUN/log"
  .venv/bin/python main.py "--config=$config" "--workdir=$workdir" "$@" >>"$RUN/log" 2>&1 &
  pid=$!
  echo "$pid" >"$RUN/pid"
  trap 'kill -TERM "$pid" 2>/dev/null' TERM
  wait "$pid" || code=$?
  while kill -0 "$pid" 2>/dev/null; do # a signal ended the wait, not the process
    code=0
    wait "$pid" || code=$?
  done
  echo "$code" >"$RUN/exit.new"
  mv "$RUN/exit.new" "$RUN/exit"
}

status() {
  local word=ended
  if running; then
    echo running
  elif [[ ! -e $RUN/exit ]]; then
    echo none # also after the machine has been started anew in the middle of a run
  else
    [[ ! -e $RUN/stopped ]] || word=stopped
    echo "$word $(cat "$RUN/exit")"
  fi
}

stop() {
  local seconds=0
  if running; then
    touch "$RUN/stopped" # so that nobody starts it again
    kill -TERM "$(cat "$RUN/pid")" || true
    while running; do
      if ((seconds++ == 600)); then
        echo "$(hostname): main.py has not ended within ten minutes." >&2
        exit 1
      fi
      sleep 1
    done
  fi
  answer "$(status)"
}

case ${1:-} in
  install) install "${@:2}" ;;
  setup) setup "${@:2}" ;;
  run) start "${@:2}" ;;
  train) train "${@:2}" ;;
  status) answer "$(status)" ;;
  stop) stop ;;
  *) refuse "worker.sh does not know '${1:-}'; it knows setup, run, status and stop." ;;
esac
