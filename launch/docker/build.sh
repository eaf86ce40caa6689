#!/bin/bash
# Builds an image of the last commit, and pushes it to Artifact Registry; prints what it is called.
#
#   launch/docker/build.sh KIND REPOSITORY [flags]
#
# KIND is tpu or cuda, REPOSITORY is REGION-docker.pkg.dev/PROJECT/NAME; launch/README.md says how to make one.
#
#   --user=U                   whom it runs as, 1000; xpk needs 0 for TPUs, which are reached through locked memory
#   --no-push                  builds only
#   --dry-run                  prints the commands
#
# launch/docker/build.sh tpu us-west4-docker.pkg.dev/my-project/clip
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../common.sh
source "$(dirname "$0")/../common.sh"

# The commit comes through a pipe: what is not in it cannot get in.
build() {
  local archive=(git -C "$ROOT" archive "$commit")
  local command=(docker build "--file=launch/docker/Dockerfile.$KIND" "--tag=$image" "--label=org.opencontainers.image.revision=$commit")
  [[ -z ${flag_user:-} ]] || command+=("--build-arg=RUN_AS=$flag_user")
  command+=(-)
  if dry; then
    printf '%s | %s\n' "$(quoted "${archive[@]}")" "$(quoted "${command[@]}")"
  else
    "${archive[@]}" | "${command[@]}" >&2
  fi
}

parse "KIND REPOSITORY" "user= no-push" "$@"
[[ -f $ROOT/launch/docker/Dockerfile.$KIND ]] || usage_error "KIND=$KIND is not tpu or cuda."
[[ $REPOSITORY =~ ^[a-z0-9.-]+(:[0-9]+)?(/[a-z0-9._-]+)+$ ]] || usage_error "REPOSITORY=$REPOSITORY is not like us-west4-docker.pkg.dev/my-project/clip."
check_code
whole user 0
image=$REPOSITORY/$KIND:$commit${flag_user:+-user$flag_user}
build
if [[ -z ${flag_no_push:-} ]]; then
  run docker push "$image"
fi
if ! dry; then
  printf '%s\n' "$image"
fi
