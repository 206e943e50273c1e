#!/usr/bin/env bash
# JupyterLab in a container, or one command in it: docker/run.sh [options] [-- command ...]
#
#   --gpus all|0,2|none   the GPUs it sees         (default: all, or none where nvidia-smi finds none)
#   --data DIR            seen inside as /data, read-only
#   --work DIR            seen inside as /work, kept when the container goes      (default: ~/moekit)
#   --port N              JupyterLab's port        (default: 8888)
#   --bind ADDRESS        who reaches that port    (default: 127.0.0.1, this machine only)
#   --shm SIZE            shared memory at most    (default: 16g; the ranks on one machine talk through it)
#   --name NAME           the container's name     (default: moekit)
#   --image NAME          the image                (default: moekit)
#
#   docker/run.sh --gpus 0,2 --data /scratch/moe_lm
#   docker/run.sh -- papermill notebooks/run_inference.ipynb /work/out.ipynb -p world_size 4
#
# DOCKER names another client.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=engine.sh
. "$here/engine.sh"

gpus='' data='' work=${HOME:+$HOME/moekit} port=8888 bind=127.0.0.1 shm=16g name=moekit image=moekit
while [ $# -gt 0 ]; do
    case $1 in
    --gpus) gpus=$(value "$@") ;;
    --data) data=$(value "$@") ;;
    --work) work=$(value "$@") ;;
    --port) port=$(value "$@") ;;
    --bind) bind=$(value "$@") ;;
    --shm) shm=$(value "$@") ;;
    --name) name=$(value "$@") ;;
    --image) image=$(value "$@") ;;
    --) shift && break ;;
    *) usage "$1" ;;
    esac
    shift 2
done

if [ -z "$gpus" ]; then
    if nvidia-smi --list-gpus >/dev/null 2>&1; then gpus=all; else gpus=none; fi
fi
options=(--shm-size "$shm" --security-opt no-new-privileges)
[[ $gpus =~ ^(all|none|[0-9]+(,[0-9]+)*)$ ]] || fail "--gpus $gpus: expected all, none, or numbers such as 0,2"
if [ "$gpus" = none ]; then
    options+=(--env NVIDIA_VISIBLE_DEVICES=void)
elif is_podman; then
    # By the names in its CDI specification.
    for one in ${gpus//,/ }; do options+=(--device "nvidia.com/gpu=$one"); done
elif [ "$gpus" = all ]; then
    options+=(--gpus all)
else
    # Docker reads the value as CSV, so the quotes are part of it.
    options+=(--gpus "\"device=$gpus\"")
fi

[[ $port =~ ^[0-9]+$ ]] || fail "--port $port: expected a number such as 8888"
[ -n "$work" ] || fail "HOME is not set, so there is no ~/moekit to work in; name a folder: --work DIR"
[ -z "$data" ] || [ -d "$data" ] || fail "--data $data: no such folder"
[ ! -e "$work" ] || [ -d "$work" ] || fail "--work $work is a file; expected a folder, or a name for a new one"
for option in work data; do
    folder=$(realpath --canonicalize-missing "${!option:-/}")
    [[ $folder != *:* ]] || fail "--$option $folder: Docker mounts no folder with a colon in its path; rename it"
done

engine_answers
"$DOCKER" image inspect "$image" >/dev/null 2>&1 || fail "there is no image $image yet: docker/build.sh makes it."

# The container's user gets the caller's ids, so that files in the work folder are the caller's. Root outside stays an
# ordinary user inside; in a rootless engine root inside is the caller.
uid=$(id -u) gid=$(id -g)
if is_rootless; then
    uid=0 gid=0
elif [ "$uid" = 0 ]; then
    uid=${SUDO_UID:-1000} gid=${SUDO_GID:-1000}
fi
[ -z "$data" ] || options+=(--volume "$(realpath "$data"):/data:ro")
if [ ! -e "$work" ]; then
    mkdir -p "$work" 2>/dev/null || fail "--work $work: there is no such folder, and none can be made; name another"
    [ "$(id -u)" != 0 ] || [ "$uid" = 0 ] || chown "$uid:$gid" "$work"
fi
work=$(realpath "$work")
options+=(--volume "$work:/work" --user root --env "NB_UID=$uid" --env "NB_GID=$gid")

# explain MESSAGE: ends with what to do about Docker's message.
explain() {
    case $1 in
    *"could not select device driver"* | *"unknown or invalid runtime name: nvidia"*)
        fail "Docker cannot give GPUs to containers: install the NVIDIA Container Toolkit (docker/README.md, GPUs)," \
            "or go without: docker/run.sh --gpus none." ;;
    *nvidia-container-cli* | *libnvidia-ml*)
        fail "the NVIDIA driver on this machine does not answer: does nvidia-smi? Docker said: $1" ;;
    *"port is already allocated"* | *"address already in use"*)
        fail "port $port is taken; take another: docker/run.sh --port $((port + 1))." ;;
    *"cannot assign requested address"*) fail "--bind $bind: this machine has no such address." ;;
    *) fail "Docker said: $1" ;;
    esac
}

if [ $# -gt 0 ]; then
    options+=(--rm --interactive --no-healthcheck)
    if [ -t 0 ] && [ -t 1 ]; then options+=(--tty); fi
    code=0
    "$DOCKER" run "${options[@]}" "$image" "$@" || code=$?
    # 125: Docker itself failed, and has printed why.
    if [ "$code" = 125 ] && [ "$gpus" != none ]; then
        echo "If it could not select a device driver: docker/README.md, GPUs; or go without: --gpus none." >&2
    fi
    exit "$code"
fi

about() { "$DOCKER" container inspect --format '{{.State.Status}} {{.Config.Image}}' "$name" 2>/dev/null || true; }
state() { about | cut -d ' ' -f 1; }
# Podman tells the whole name of an image. Its tags are of one image: a container of an older one may be replaced. An image
# without a name has only its number.
short() { sed 's,^localhost/,,; s,^docker.io/,,; s,^library/,,; s,@sha256:.*,,; /^sha256:/!s,:[^:/]*$,,' <<<"$1"; }

other=$(about) other=${other#* }
[ -z "$other" ] || [ "$(short "$other")" = "$(short "$image")" ] ||
    fail "the container $name is of another image, $other: take another name, docker/run.sh --name NAME, or remove it" \
        "if nobody needs it: docker stop $name; docker rm $name."

case $(state) in
running) echo "$name runs already, from $other; for another tag or other options end it first: docker stop $name" ;;
*)
    # A container of that name and image that has ended is removed.
    [ -z "$(state)" ] || "$DOCKER" rm "$name" >/dev/null
    said=$("$DOCKER" run --detach --name "$name" --publish "$bind:$port:8888" "${options[@]}" "$image" 2>&1) || {
        "$DOCKER" rm "$name" >/dev/null 2>&1 || true
        explain "$said"
    }
    ;;
esac

for _ in $(seq 120); do
    [ "$(state)" = running ] || fail "the container ended: $("$DOCKER" logs --tail 20 "$name" 2>&1)"
    if "$DOCKER" exec "$name" python -I /opt/moekit/healthcheck.py 2>/dev/null; then
        published=$("$DOCKER" port "$name" 8888/tcp | head -n 1)
        token=$("$DOCKER" exec "$name" cat /work/.jupyter/token)
        echo "JupyterLab:  http://${published/0.0.0.0/$(hostname)}/?token=$token"
        echo "Your work:   $work (/work inside); the log: docker logs $name; to end it: docker stop $name"
        case $published in
        127.*) ;;
        *) echo "Anyone who can reach this machine and has the token can run programs on it: mind who sees the URL." ;;
        esac
        exit
    fi
    sleep 0.5
done
fail "JupyterLab has not answered for a minute; the log: docker logs $name"
