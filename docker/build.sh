#!/usr/bin/env bash
# Builds the image from this repository: docker/build.sh [options]
#
#   --tag NAME     the image's name                            (default: moekit)
#   --base IMAGE   another Debian 12 to build on               (default: debian:bookworm-slim)
#   --ca FILE      CA bundle of a proxy that opens TLS; a build secret, in no layer
#   --wheels DIR   wheels that are preferred to downloads, such as a torch for another CUDA
#
# DOCKER names another client: DOCKER=podman docker/build.sh
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=engine.sh
. "$here/engine.sh"

tag=moekit base=debian:bookworm-slim ca='' wheels=''
while [ $# -gt 0 ]; do
    case $1 in
    --tag) tag=$(value "$@") ;;
    --base) base=$(value "$@") ;;
    --ca) ca=$(value "$@") ;;
    --wheels) wheels=$(value "$@") ;;
    *) usage "$1" ;;
    esac
    shift 2
done
[ -z "$ca" ] || [ -s "$ca" ] || fail "--ca $ca: no such file"
[ -z "$wheels" ] || [ -d "$wheels" ] || fail "--wheels $wheels: no such folder"
engine_answers
builder_is_there

# The digest of the base, where a registry gave it one, is recorded in the image.
"$DOCKER" image inspect "$base" >/dev/null 2>&1 || "$DOCKER" pull "$base"
digest=$("$DOCKER" image inspect --format '{{range .RepoDigests}}{{println .}}{{end}}' "$base" | sed -n '1s/.*@//p')

options=()
if [ -n "$ca" ]; then options+=(--secret "id=ca,src=$ca"); fi
if [ -n "$wheels" ]; then
    # The wheels go into an image, because the builder of Docker 20.10, which Debian 12 ships, does not know --build-context.
    tar --create --directory "$wheels" --mtime=@0 --sort=name --owner=0 --group=0 . |
        "$DOCKER" import - "$tag-wheels" >/dev/null
    options+=(--build-arg "WHEELS_IMAGE=$tag-wheels")
fi

cd "$here/.."
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
revision=$(git describe --always --dirty --abbrev=40 --match='' 2>/dev/null || echo unknown)
created=$(git log -1 --format=%cI 2>/dev/null || echo unknown)
# Docker passes HTTP_PROXY and the like on by itself.
DOCKER_BUILDKIT=1 "$DOCKER" build --file docker/Dockerfile --tag "$tag" \
    --build-arg "BASE_IMAGE=$base" --build-arg "BASE_NAME=$base" --build-arg "BASE_DIGEST=${digest:-unknown}" \
    --build-arg "VERSION=$version" --build-arg "REVISION=$revision" --build-arg "CREATED=$created" \
    "${options[@]}" .

if [ -n "$wheels" ]; then "$DOCKER" image rm "$tag-wheels" >/dev/null; fi
"$DOCKER" image inspect --format "$tag: {{.Size}} bytes" "$tag" |
    awk '{printf "%s %.2f GB. Start it: docker/run.sh\n", $1, $2 / 1e9}'
