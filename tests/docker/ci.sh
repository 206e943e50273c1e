#!/usr/bin/env bash
# Builds the image and tries it as a user would: a Docker engine if none answers (stopped again in the end), a base from
# debootstrap where the registry's cannot be pulled, docker/build.sh, tests/test_docker.py. Layers are kept for the next time.
#
# PYTHON runs the tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

skip() {
    echo "image: skipped: $1"
    exit 0
}
seconds() { # since it was last asked
    echo "image: $1 in $((SECONDS - ${before:-0})) s"
    before=$SECONDS
}

export DOCKER=docker
if ! "$DOCKER" version >/dev/null 2>&1; then
    [ "$(id -u)" = 0 ] || skip "no Docker engine answers, and only root can start one"
    export DEBIAN_FRONTEND=noninteractive
    [ -x /usr/sbin/dockerd ] ||
        { apt-get update -qq && apt-get install -y -qq --no-install-recommends docker.io docker-compose debootstrap; } >/dev/null ||
        skip "no Docker engine answers, and Debian's could not be installed"
    DOCKER=/usr/bin/docker # Debian's client, whose builder is Debian's engine's
    log=$(mktemp)
    dockerd >"$log" 2>&1 &
    engine=$!
    trap 'kill "$engine" 2>/dev/null && wait "$engine"; rm -f "$log"' EXIT
    for _ in $(seq 60); do
        if "$DOCKER" version >/dev/null 2>&1 || ! kill -0 "$engine" 2>/dev/null; then break; fi
        sleep 0.5
    done
    "$DOCKER" version >/dev/null 2>&1 || skip "dockerd did not start: $(grep -E 'level=(error|fatal)|failed' "$log" | tail -n 1)"
fi
seconds "engine there"

base=debian:bookworm-slim
if ! "$DOCKER" image inspect "$base" >/dev/null 2>&1 && ! timeout 30 "$DOCKER" pull --quiet "$base" >/dev/null 2>&1; then
    base=moekit-base:bookworm
    if ! "$DOCKER" image inspect "$base" >/dev/null 2>&1; then
        command -v debootstrap >/dev/null || skip "no base: debian:bookworm-slim cannot be pulled and debootstrap is missing"
        root=$(mktemp -d)
        mount -t tmpfs tmpfs "$root" # dpkg waits for the disk after every file
        debootstrap --variant=minbase bookworm "$root" >/dev/null
        rm -rf "$root"/var/cache/apt/archives/*.deb
        tar --create --directory "$root" . | "$DOCKER" import - "$base" >/dev/null
        umount "$root" && rmdir "$root"
    fi
fi
seconds "base there"

# This machine's own way to packages, if it has one: pip's certificate bundle and folders of wheels.
options=(--base "$base")
for setting in ca:cert wheels:find-links; do
    found=$("$PYTHON" -m pip config list | sed -n "s/^[^=]*\.${setting#*:}='\(.*\)'$/\1/p" | head -n 1)
    [ ! -e "$found" ] || options+=("--${setting%:*}" "$found")
done
MOEKIT_BUILD_OPTIONS="${options[*]}" && export MOEKIT_BUILD_OPTIONS
built=$(docker/build.sh "${options[@]}" 2>&1) || { echo "$built"; exit 1; }
echo "${built##*$'\n'}"
seconds "built"

MOEKIT_TEST_IMAGE=moekit "$PYTHON" -m pytest tests/test_docker.py -m slow --durations=10
seconds "tried"
