"""Start the processes of ranks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from moekit.ranks.base import Rank


def launch(me: Rank, folder: Path, pipe: socket.socket, log: int) -> subprocess.Popen:
    """Start the interpreter of the rank ``me``: ``pipe`` is its stdin, the descriptor ``log`` its stdout and stderr."""
    path = [os.path.abspath(entry) for entry in sys.path]
    options = dict(local_world_size=me.local_world_size, parent=os.getpid(), folder=str(folder))
    code = (
        f"import sys; sys.path[:] = {path!r}; from moekit.ranks.server import serve; "
        f"serve({me.rank}, {me.world_size}, {str(me.device)!r}, **{options!r})"
    )
    return subprocess.Popen(
        [sys.executable, "-u", "-X", "faulthandler", "-c", code],
        stdin=pipe,
        stdout=log,
        stderr=log,
        env=environment(me),
        process_group=0,  # out of reach of the interrupt key, and its own children end with it
    )


def environment(me: Rank) -> dict[str, str]:
    loopback = "lo" if sys.platform == "linux" else "lo0"
    return os.environ | {
        "OMP_NUM_THREADS": str(me.cores),
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
        "MPLBACKEND": "agg",
    }
