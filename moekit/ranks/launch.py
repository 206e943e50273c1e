"""Start the process of a rank: forked from a server where there can be one, else an interpreter of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from moekit.processes import forkserver
from moekit.ranks.base import Rank


def prepare() -> None:
    """Let a server start meanwhile, from which ranks are forked: worth it before a second of other work."""
    forkserver.prepare_if_possible()


def ready() -> bool:
    """Whether ranks can be forked at once."""
    try:
        return forkserver.available() and forkserver.prepare().ready
    except OSError:
        return False


def await_server() -> forkserver.Server | None:
    """The server once it can fork; None where there is none."""
    if not forkserver.available():
        return None
    try:
        server = forkserver.prepare()
        server.wait_ready()
    except (OSError, forkserver.Unavailable):
        return None
    return server


def launch(
    me: Rank,
    folder: Path,
    pipe: socket.socket,
    log: int,
    server: forkserver.Server | None,
    local: bool = True,
) -> subprocess.Popen | forkserver.Forked:
    """Start the rank ``me``: ``pipe`` is its stdin, the descriptor ``log`` its stdout and stderr.

    ``local``: whether the other ranks run on this machine, too, and nothing needs to leave it.
    """
    path = [os.path.abspath(entry) for entry in sys.path]
    rank = (me.rank, me.world_size, str(me.device))
    options = {"machines": me.machines, "sharing": me.sharing, "folder": str(folder)}
    if server is not None:
        order = {
            "environment": environment(me, local),
            "path": path,
            "cwd": os.getcwd(),
            "rank": rank,
            "options": options,
        }
        try:
            return server.fork(order, pipe.fileno(), log)
        except forkserver.Unavailable:
            pass
    options["parent"] = os.getpid()
    code = f"import sys; sys.path[:] = {path!r}; from moekit.ranks.server import serve; serve(*{rank!r}, **{options!r})"
    return subprocess.Popen(
        [sys.executable, "-u", "-X", "faulthandler", "-c", code],
        stdin=pipe,
        stdout=log,
        stderr=log,
        env=environment(me, local),
        # The interrupt key does not reach it, and its children end with it.
        process_group=0,
    )


def environment(me: Rank, local: bool = True) -> dict[str, str]:
    """The environment of a rank."""
    own = {"OMP_NUM_THREADS": str(me.cores), "MPLBACKEND": "agg"}
    if local:
        own |= dict.fromkeys(
            ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), "lo" if sys.platform == "linux" else "lo0"
        )
    return os.environ | own
