#!/usr/bin/env bash
# What every start of the container does: become the caller's user, fill the work folder, run the command.
set -euo pipefail

# docker/run.sh starts this as root: take the caller's ids and start again as that user. In a rootless engine root already
# is the caller, and NB_UID is 0.
if [ "$(id -u)" = 0 ] && [ "$NB_UID" != 0 ]; then
    groupmod --non-unique --gid "$NB_GID" moekit
    usermod --non-unique --uid "$NB_UID" --gid "$NB_GID" moekit >/dev/null
    # A work folder that the engine just made belongs to root.
    if [ -z "$(ls -A /work)" ]; then chown "$NB_UID:$NB_GID" /work; fi
    exec setpriv --reuid "$NB_UID" --regid "$NB_GID" --init-groups -- "$0" "$@"
fi

# Jupyter takes an empty token for the wish to have none, and lets anyone in.
if [ -z "${JUPYTER_TOKEN-}" ] && [ -n "${JUPYTER_TOKEN_FILE-}" ] && ! grep -q '[^[:space:]]' "$JUPYTER_TOKEN_FILE" 2>/dev/null; then
    echo "moekit: JUPYTER_TOKEN_FILE=$JUPYTER_TOKEN_FILE holds no token that this container's user can read; put one into it," \
        "or leave the variable out, and one is made." >&2
    exit 1
fi

export USER=moekit LOGNAME=moekit
# After docker run --user the ids own nothing in here.
if [ ! -w "$HOME" ]; then
    HOME=$(mktemp -d /tmp/home.XXXXXX)
    export HOME
fi
if [ ! -w /work ]; then
    echo "moekit: cannot write to the work folder: it belongs to $(stat -c %u:%g /work) and this container runs as" \
        "$(id -u):$(id -g). Start it with docker/run.sh, or with --user root -e NB_UID=... -e NB_GID=... of the owner." >&2
    exit 1
fi

# The notebooks are copied into the work folder. A copy that was changed there is never overwritten; the others are updated.
mkdir -p /work/notebooks /work/.jupyter/originals
for new in /opt/moekit/notebooks/*.ipynb; do
    mine=/work/notebooks/${new##*/}
    original=/work/.jupyter/originals/${new##*/}
    if [ ! -e "$mine" ] || cmp -s "$mine" "$original"; then
        cp "$new" "$mine"
        cp "$new" "$original"
    elif ! cmp -s "$new" "$original"; then
        echo "moekit: notebooks/${new##*/} was changed by you and stays; this image's version is $new" >&2
    fi
done

# A random token, made once and kept beside the work, readable by its owner only.
if [ -z "${JUPYTER_TOKEN-}${JUPYTER_TOKEN_FILE-}" ]; then
    export JUPYTER_TOKEN_FILE=/work/.jupyter/token
    if [ ! -s "$JUPYTER_TOKEN_FILE" ]; then
        (umask 077 && python -c 'import secrets; print(secrets.token_hex(24), end="")' >"$JUPYTER_TOKEN_FILE")
    fi
fi

exec "$@"
