"""The actor that Ray runs for each rank: it starts the rank's process beside it, and tells of it.

The rank is a process of its own, so that its death, its state and its log can be told of, and so that it can be ended while it
is stopped. Python's own library suffices: Ray sends this code to the nodes, and an actor starts without importing torch.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from moekit.processes import system
from moekit.ranks import links

# Seconds after which an actor whose rank has ended, or that was never told to start one, ends by itself.
FORGOTTEN = 60.0

# Packages that all nodes have in one version, as functions and results are pickled.
ALIKE = ("moekit", "torch", "numpy", "cloudpickle")


class Supervisor:
    """One rank's process on this node; its methods run beside one another, each in a thread."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._folder: str | None = None
        self._since = time.monotonic()
        self._listener: socket.socket | None = None
        threading.Thread(target=self._end_when_forgotten, daemon=True).start()

    def about(self, interface: str | None) -> dict[str, Any]:
        """What this node is and has, and the ``gpus`` that are this actor's, by their numbers on the node.

        ``address`` is Ray's of the node; with an ``interface``, that one's is used instead, "" if it has none.
        """
        import ray

        context, address, names = (
            ray.get_runtime_context(),
            ray.util.get_node_ip_address(),
            links.interfaces(),
        )
        if interface is not None:
            address = names.get(interface, "")
        else:
            interface = next((name for name, own in names.items() if own == address), "")
        if address:
            # Other nodes connect to it, to see that the link stands. Nothing is read or sent.
            self._listener = links.listen(address)
            threading.Thread(target=self._accept, daemon=True).start()
        versions = {"Python": "{}.{}".format(*sys.version_info)}
        for name in ALIKE:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[name] = importlib.metadata.version(name)
        return {
            "id": context.get_node_id(),
            "host": socket.gethostname(),
            "gpus": context.get_accelerator_ids().get("GPU", []),
            "address": address,
            "interface": interface,
            "interfaces": names,
            "port": self._listener.getsockname()[1] if self._listener else 0,
            "cores": system.usable_cores(),
            "versions": versions,
        }

    def _accept(self) -> None:
        while True:
            with contextlib.suppress(OSError):
                self._listener.accept()[0].close()

    def reach(self, addresses: list[tuple[str, int]], seconds: float) -> list[str | None]:
        return links.reach(addresses, seconds)

    def start(self, order: dict[str, Any]) -> int:
        """Connect to the driver and start the rank with this connection as its stdin; returns its process id.

        ``order``: ``rank``, ``driver`` (host and port), ``secret``, ``silence`` (seconds), ``code`` (what the interpreter
        runs, with ``{own}`` for the arguments that only this node knows), ``environment`` and ``cwd``.
        """
        try:
            pipe = links.connect(
                order["driver"], order["secret"], order["rank"], order["silence"], links.GREETING
            )
        except OSError as error:
            raise OSError(
                f"cannot reach the driver at {order['driver'][0]}:{order['driver'][1]} ({error})"
            ) from None
        self._folder = str(system.temporary_folder())
        code = order["code"].replace("{own}", f"parent={os.getpid()}, folder={self._folder!r}")
        # A node may lack the driver's folder.
        cwd = order["cwd"] if os.path.isdir(order["cwd"]) else None
        with pipe, open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-X", "faulthandler", "-c", code],
                stdin=pipe,
                stdout=log,
                stderr=log,
                env=os.environ | order["environment"],
                cwd=cwd,
                process_group=0,
            )
        return self._process.pid

    @property
    def _log(self) -> Path:
        return Path(self._folder) / "rank.log"

    def news(self, stopped: bool) -> tuple[Any, ...]:
        """Once the rank has ended: "ended", its exit code, and the end of its log. Once a signal has stopped its process, or, if it
        was ``stopped``, once it goes on: "stopped", and whether it is."""
        tail = ""
        while True:
            # The rank removes its log when the driver is gone.
            tail = self.log_tail() or tail
            with contextlib.suppress(subprocess.TimeoutExpired):
                return "ended", self._process.wait(timeout=system.LOOK), self.log_tail() or tail
            seen = system.Process.of(self._process.pid)
            if seen is not None and seen.stopped != stopped:
                return "stopped", seen.stopped

    def log_tail(self) -> str:
        return system.end_of(self._log).decode(errors="replace")

    def look(self) -> tuple[str, float, bool] | None:
        """The state and the processor time of the rank's process, and whether one of its threads could run."""
        seen = system.Process.of(self._process.pid)
        return seen and (seen.state, seen.seconds, system.any_ready(self._process.pid))

    def end(self) -> None:
        """End the rank, whatever it does."""
        if self._process is not None:
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=5)
            shutil.rmtree(self._folder, ignore_errors=True)

    def _end_when_forgotten(self) -> None:
        while time.monotonic() - self._since < FORGOTTEN:
            if self._process is not None and self._process.poll() is None:
                self._since = time.monotonic()
            time.sleep(1)
        os._exit(0)
