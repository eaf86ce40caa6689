#!/bin/sh
# Stands in for the programs of a worker that change a machine, or ask Google Cloud; called by the name of one. What it is like is in the
# files workers, slices, filesystem and broken of $FAKES; a worker's own notes are in its home folder.
program=$(basename "$0")
for last; do :; done
read_state() { cat "$FAKES/$1"; }

# shellcheck disable=SC2016 # for the shell that it is piped into
case "$program $last" in
  hostname*) echo "worker-$WORKER" ;;
  curl*/worker-network-endpoints)
    number=$(($(read_state workers) / $(read_state slices)))
    while [ "$number" -gt 1 ]; do
      printf 'unused:unused:10.0.0.%s,' "$number"
      number=$((number - 1))
    done
    echo unused:unused:10.0.0.1
    ;;
  curl*/tpu-env)
    echo "ACCELERATOR_TYPE: 'v5litepod-16'"
    [ "$(read_state slices)" = 1 ] || echo "MEGASCALE_NUM_SLICES: '$(read_state slices)'"
    ;;
  curl*astral.sh*) echo 'mkdir -p "$HOME/.local/bin" && ln -sf "$(command -v uv)" "$HOME/.local/bin/uv"' ;;
  uv*.venv) mkdir -p .venv/bin && ln -sf "$REAL_PYTHON" .venv/bin/python ;;
  uv*)
    broken=$(read_state broken)
    if [ "$broken" -gt 0 ]; then
      echo $((broken - 1)) >"$FAKES/broken"
      echo 'No solution found when resolving dependencies' >&2
      exit 1
    fi
    ;;
  sudo*gcsfuse) mkdir -p "$HOME/bin" && ln -sf "$FAKES/hidden/gcsfuse" "$HOME/bin/gcsfuse" ;;
  sudo*) [ "$1" != tee ] || cat >/dev/null ;;
  gcsfuse*) echo "$last" >>"$HOME/mounted" ;;
  mountpoint*) grep -qxF "$last" "$HOME/mounted" 2>/dev/null ;;
  findmnt*)
    kind=$(read_state filesystem)
    while read -r mounted; do
      case $last in "$mounted"*) kind=fuse.gcsfuse ;; esac
    done <"$HOME/mounted" 2>/dev/null || true
    echo "$kind"
    ;;
esac
code=$?
case $program in uv | sudo | gcsfuse | curl) echo "$WORKER $program $*" >>"$FAKES/machine.log" ;; esac
exit "$code"
