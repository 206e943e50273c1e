# shellcheck shell=bash
# What build.sh and run.sh share: their messages, and whether there is an engine.

DOCKER=${DOCKER:-docker}

fail() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

# The comment at the head of the script is its help.
usage() {
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    case $1 in
    -h | --help) exit 0 ;;
    *) fail "$1 is none of its options" ;;
    esac
}

# The value after an option.
value() {
    [ -n "${2-}" ] || fail "$1 needs a value"
    printf '%s' "$2"
}

engine_answers() {
    local said
    command -v "$DOCKER" >/dev/null ||
        fail "there is no $DOCKER here. Debian and Ubuntu: sudo apt-get install docker.io. Others: docker/README.md, Install."
    said=$("$DOCKER" version 2>&1 >/dev/null) && return
    case $said in
    *"permission denied"*)
        fail "Docker runs, but you may not use it: sudo usermod -aG docker $(id -un), then log in again." ;;
    *) fail "Docker does not answer: sudo systemctl start docker. It said: ${said##*$'\n'}" ;;
    esac
}

is_podman() { [ "$(basename "$DOCKER")" = podman ]; }

# Whether root inside a container is the caller outside.
is_rootless() {
    if is_podman; then
        [ "$(id -u)" != 0 ]
    else
        "$DOCKER" info --format '{{.SecurityOptions}}' | grep -q name=rootless
    fi
}

# BuildKit (secrets and cache mounts) is inside the client up to Docker 22, and in its buildx plugin since.
builder_is_there() {
    local client
    if is_podman || "$DOCKER" buildx version >/dev/null 2>&1; then return; fi
    client=$("$DOCKER" version --format '{{.Client.Version}}')
    [ "${client%%.*}" -le 22 ] ||
        fail "Docker $client builds with its buildx plugin, which is missing: sudo apt-get install docker-buildx" \
            "(from Docker's own packages: docker-buildx-plugin)."
}
