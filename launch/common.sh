# shellcheck shell=bash disable=SC2034 # variables are for the scripts that source it
# Shared by the scripts of this folder: arguments, dry runs, errors. For bash 3.2 and later, which is what macOS has.
#
# NAME, CONFIG and WORKDIR come as arguments, in this order, or from the environment. Flags are `--flag=value` or `--flag value`, and what
# follows `--` is for main.py. Exit codes are main.py's: 2 wrong usage, said in one sentence; 75 stopped early, start again; 1 failed.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly ROOT EXIT_FAILED=1 EXIT_USAGE=2 EXIT_TRY_AGAIN=75

more=() # what follows --, as it is

tell() { printf '%s\n' "$*" >&2; }

usage_error() {
  tell "${0##*/}: $*"
  exit "$EXIT_USAGE"
}

# The comment at the head of the script that was called.
print_help() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; }

# parse "NAME CONFIG" "zone= spot" "$@": the arguments a script takes, the flags (those with = have a value), and what it was given.
# --dry-run and --help are everybody's. --node-count=2 sets flag_node_count, and a flag without a value sets "yes".
parse() {
  local names=$1 flags=" $2 dry-run help " flag value given=()
  shift 2
  while (($#)); do
    case $1 in
      --)
        shift
        more=("$@")
        break
        ;;
      --*)
        flag=${1#--}
        flag=${flag%%=*}
        value=yes
        if [[ $flags == *" $flag= "* && $1 == *=* ]]; then
          value=${1#*=}
        elif [[ $flags == *" $flag= "* ]]; then
          value=${2:-}
          [[ $value != --* ]] || value=
          shift "$(($# > 1))"
        elif [[ $flags != *" $flag "* || $1 == *=* ]]; then
          # shellcheck disable=SC2086 # one word a flag
          usage_error "$1 is not a flag of this script; its flags are$(printf ' --%s' $flags). Overrides of the config come after a --."
        fi
        [[ -n $value ]] || usage_error "--$flag needs a value, as in --$flag=VALUE."
        printf -v "flag_${flag//-/_}" '%s' "$value"
        ;;
      *) given+=("$1") ;;
    esac
    shift
  done
  if [[ -n ${flag_help:-} ]]; then
    print_help
    exit 0
  fi
  take "$names" ${given[@]+"${given[@]}"}
}

# take "NAME CONFIG WORKDIR" VALUE ...: sets those variables, and checks what can be checked here.
take() {
  local names=$1 name
  shift
  for name in $names; do
    if (($#)); then
      printf -v "$name" '%s' "$1"
      shift
    fi
    [[ -n ${!name:-} ]] || usage_error "$name is missing: ${0##*/} $names [--flag=value ...] [-- --config.a.b=value ...]"
  done
  (($# == 0)) || usage_error "'$1' is one argument too many; this script takes $names, and what is for main.py comes after a --."
  if [[ " $names " == *" NAME "* ]]; then
    # shellcheck disable=SC2153 # set above
    # What Google Cloud, Kubernetes and Slurm all take, with room for what they append.
    [[ $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || usage_error "NAME=$NAME must be small letters, digits and -, begin with a letter, and have 40 characters at most."
  fi
  if [[ " $names " == *" CONFIG "* ]]; then
    [[ $CONFIG != /* && -f $ROOT/${CONFIG%%:*} ]] || usage_error "CONFIG=$CONFIG is not a recipe in $ROOT; configs/vitb16.py is one."
  fi
  if [[ " $names " == *" WORKDIR "* ]]; then
    [[ $WORKDIR != *://* || $WORKDIR =~ ^gs://[a-z0-9][-._a-z0-9]+/. ]] || usage_error "WORKDIR=$WORKDIR must be a path, or gs://BUCKET/PATH."
  fi
}

# whole FLAG LEAST: checks that a flag is a whole number, if it was given.
whole() {
  local flag=flag_${1//-/_}
  local value=${!flag:-$2}
  if ! [[ $value =~ ^(0|[1-9][0-9]{0,6})$ ]] || ((value < $2)); then
    usage_error "--$1=$value must be a whole number, $2 or more."
  fi
}

dry() { [[ -n ${flag_dry_run:-} ]]; }

# Words as a shell reads them again; only those are quoted that need it.
quoted() {
  local word words=() quote="'" inside="'\\''"
  for word; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word="'${word//$quote/$inside}'"
    words+=("$word")
  done
  printf '%s' "${words[*]}"
}

# Does something, or in a dry run prints it.
run() {
  if dry; then
    printf '%s\n' "$(quoted "$@")"
  else
    "$@"
  fi
}

# What a person who reads a dry run should know beside the commands.
note() { if dry; then printf '# %s\n' "$*"; fi; }

# Ends the script unless what would be sent is what is here: workers and images get the last commit, $commit.
check_code() {
  local changed
  changed=$(git -C "$ROOT" status --porcelain --untracked-files=no 2>/dev/null) || usage_error "$ROOT is no git repository, and its last commit is what is sent."
  [[ -z $changed ]] || usage_error "there are changes that are not committed ($(awk 'NR == 1 { print $2 }' <<<"$changed")), and the last commit is what is sent; commit or stash them."
  commit=$(git -C "$ROOT" rev-parse --short=12 HEAD)
  if [[ -n ${CONFIG:-} ]]; then
    git -C "$ROOT" cat-file -e "HEAD:${CONFIG%%:*}" 2>/dev/null || usage_error "CONFIG=$CONFIG is not in the last commit, which is what is sent; commit it."
  fi
}

# accelerator COLUMN VALUE WANTED: a cell of accelerators.txt, by the number of its column; fails where there is none.
accelerator() { awk -v by="$1" -v value="$2" -v want="$3" '!/^#/ && $by == value { print $want; found = 1 } END { exit !found }' "$ROOT/launch/accelerators.txt"; }
