"""Ranks on the machines of a Ray cluster: an actor each, which starts the same process as on one machine.

The driver talks to each rank over a TCP connection of its own, on which the messages of a pipe go. Ray places, starts and ends;
it is spoken to by a process beside the driver (broker.py). Whatever is lost, a rank, a node, the link to it or Ray's head, ends
the call with an error that names it, and ends all ranks: the ranks by themselves once their connection breaks.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import socket
import sys
import weakref
from typing import Any

import torch

from moekit.arguments import Choice, Flag, Number, Text, Whole, check
from moekit.ranks import links
from moekit.ranks.base import RankError
from moekit.ranks.cluster import Cluster
from moekit.ranks.piped import START_LIMIT, PipedRanks
from moekit.ranks.watch import Watch, silence_limit, time_limit

# Seconds without a sign of life, less than on one machine: an error comes within 30 s of its cause.
SILENCE = 20.0

# Seconds to join the cluster.
JOIN_LIMIT = 60.0

# Seconds for the ranks' processes to connect to the driver, and for a rank to reach rank 0's store.
CONNECT_LIMIT, STORE_LIMIT = 60.0, 15.0

# What ranks read of the driver's environment; the rest is their node's.
PASSED_ON = ("MOEKIT_", "NCCL_", "TORCH_", "TRITON_", "OMP_WAIT_POLICY")


class RayRanks(PipedRanks):
    """Ranks on a Ray cluster, each with a GPU or with cores, as long as this object lives.

    The driver runs on a machine of the cluster (its head or another node). All nodes have moekit in the same version, and
    see a checkpoint under the same path. Messages between the driver and the ranks are not encrypted, like Ray's own.

    Args:
        world_size: None: a rank for every GPU of the cluster; without GPUs one for each node.
        device: "cuda", "cpu", or "auto": GPUs if the cluster has any.
        address: of Ray's head, "host:port"; "auto": the cluster that this machine belongs to.
        gpus_per_node: exactly so many ranks on each node (the last one may have fewer), each with a GPU, or with its cores on
            the CPU. None: as few nodes as possible (PACK).
        cores_per_rank: what Ray reserves. A rank's threads share all cores that its node lends.
        spread: each rank on a node of its own (STRICT_SPREAD).
        interface: the network interface that ranks talk over, such as "ib0"; None: the one with Ray's address of the node.
        placement_seconds: how long to wait for a place; more where a cluster grows on demand.
        timeout: seconds that a collective may wait, and that a call without a limit of its own may make no progress.
        silence: seconds that a rank may give no sign of life. None: those of the environment's ``MOEKIT_SILENCE``, or 20. One
            that a signal stops ends a call after about a second.

    Attributes:
        nodes: the name of each rank's node.

    Raises:
        ValueError: an argument makes no sense, Ray is not installed, no cluster answers, or it has no such place.
        RuntimeError: the nodes cannot talk to one another, or are not alike; a :class:`RankError` where one rank is to blame.
    """

    def __init__(
        self,
        world_size: int | None = None,
        *,
        device: str = "auto",
        address: str = "auto",
        gpus_per_node: int | None = None,
        cores_per_rank: int = 1,
        spread: bool = False,
        interface: str | None = None,
        placement_seconds: float = 15.0,
        timeout: float = 1800.0,
        silence: float | None = None,
    ):
        if silence is None and "MOEKIT_SILENCE" not in os.environ:
            silence = SILENCE
        super().__init__([], time_limit(timeout), silence_limit(silence))
        if importlib.util.find_spec("ray") is None:
            raise ValueError('ranks="ray" needs the package ray: pip install "moekit[cluster]"')
        asked = {
            "world_size": check("world_size", world_size, Whole(optional=True)),
            "device": check("device", device, Choice(("auto", "cuda", "cpu"))),
            "per_node": check("gpus_per_node", gpus_per_node, Whole(optional=True)),
            "cores": check("cores_per_rank", cores_per_rank, Whole()),
            "spread": check("spread", spread, Flag()),
            "interface": check("interface", interface, Text(optional=True)),
            "wait": check("placement_seconds", placement_seconds, Number()),
        }
        if asked["spread"] and asked["per_node"] not in (None, 1):
            raise ValueError("gpus_per_node and spread contradict each other: give one of them")
        self._cluster = Cluster()
        self._end = weakref.finalize(self, _end_all, self._owner, self._pipes, self._cluster)
        try:
            self._start(check("address", address, Text()), asked)
        except BaseException:
            self.close()
            raise

    def _start(self, address: str, asked: dict[str, Any]) -> None:
        self._cluster.ask("join", JOIN_LIMIT, address=address)
        found = self._cluster.ask("place", asked["wait"] + START_LIMIT, **asked)
        places = found["places"]
        _check_alike(places, asked["interface"])
        for start, to, why in self._cluster.ask("separate", CONNECT_LIMIT):
            raise RuntimeError(
                f"node {places[start]['host']} ({places[start]['address']}) cannot reach node {places[to]['host']} at "
                f"{places[to]['address']} over {places[start]['interface']} ({why}): see what separates them, or name another "
                "network with RayRanks(interface=...)"
            )
        self.nodes, machines, devices = layout(places, found["device"])
        self.devices, self.world_size = devices, len(places)
        secret = secrets.token_bytes(32)
        with links.listen(found["here"]) as listener:
            driver = listener.getsockname()[:2]
            orders = [
                self._order(rank, places, machines) | {"driver": driver, "secret": secret}
                for rank in range(self.world_size)
            ]
            self._cluster.start(orders, self.nodes)
            self._members[:] = self._cluster.members
            self._pipes[:] = self._accept(listener, secret)
        self._meet(places[0]["address"], STORE_LIMIT)

    def _order(self, rank: int, places: list[dict], machines: tuple[int, ...]) -> dict[str, Any]:
        """What the supervisor of ``rank`` is to start."""
        place, here = places[rank], [p for p, m in zip(places, machines, strict=True) if m == machines[rank]]
        path = [os.path.abspath(entry) for entry in sys.path]
        rank_of = (rank, len(places), str(self.devices[rank]))
        code = (
            # Packages of the node come first, then what only the driver's path has.
            f"import sys; sys.path += [entry for entry in {path!r} if entry not in sys.path]; "
            "from moekit.ranks.server import serve; "
            f"serve(*{rank_of!r}, machines={machines!r}, node={self.nodes[rank]!r}, {{own}})"
        )
        environment = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
        environment |= {
            "OMP_NUM_THREADS": str(max(1, place["cores"] // len(here))),
            "GLOO_SOCKET_IFNAME": place["interface"],
            # Exactly this one, and not all whose names begin so.
            "NCCL_SOCKET_IFNAME": f"={place['interface']}",
            "MPLBACKEND": "agg",
        }
        if place["gpus"]:
            # Ranks of one node see each other's GPUs, so that they can exchange rows through their memory.
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpu for p in here for gpu in p["gpus"])
        return {
            "rank": rank,
            "code": code,
            "environment": environment,
            "cwd": os.getcwd(),
            "silence": self._silence,
        }

    def _accept(self, listener: socket.socket, secret: bytes) -> list[socket.socket]:
        """The connection of each rank; the process of one that cannot start is named."""

        def meanwhile(missing: set[int]) -> None:
            self._cluster.listen()
            for rank in sorted(missing):
                if (why := self._members[rank].why) is not None:
                    raise RankError(rank, f"does not start: {why}", self._members[rank].node)

        ranks = list(range(self.world_size))
        came = links.accept_all(listener, secret, ranks, self._silence, CONNECT_LIMIT, meanwhile)
        return [came[rank] for rank in range(self.world_size)]

    def _run(self, *asked):
        self._cluster.listen()
        return super()._run(*asked)

    def _fault(self, watch: Watch) -> Exception | None:
        """What the cluster says of nodes, links and its head. A node's fault is its first rank's."""
        for rank, why in self._cluster.faults:
            if rank is None:
                return RuntimeError(
                    f"{why}, and the ranks stopped while they ran '{watch.operation}': start the cluster again, and load the "
                    "model again"
                )
            of = [other for other, node in enumerate(self.nodes) if node == self.nodes[rank]]
            return watch.error(
                rank,
                f"is lost while it ran '{watch.operation}': its node {why}"
                + (f"; so are ranks {of[1:]}" if of[1:] else ""),
            )
        return None


def _check_alike(places: list[dict[str, Any]], interface: str | None) -> None:
    """That nodes have the interface and the same versions as the driver's first node; RuntimeError that names one."""
    for place in places:
        if not place["address"]:
            raise ValueError(
                f"interface={interface!r} has no IPv4 address on node {place['host']}, which has {place['interfaces']}: name "
                "one that all nodes have"
            )
        if not place["interface"]:
            raise RuntimeError(
                f"node {place['host']} has Ray's address {place['address']} on none of its interfaces {place['interfaces']}: "
                "name one with RayRanks(interface=...)"
            )
        if place["versions"] != places[0]["versions"]:
            raise RuntimeError(
                f"nodes {places[0]['host']} ({places[0]['address']}) and {place['host']} ({place['address']}) have different "
                f"versions, {places[0]['versions']} and {place['versions']}: install the same on all"
            )


def layout(
    places: list[dict[str, Any]], device: str
) -> tuple[list[str], tuple[int, ...], list[torch.device]]:
    """Of each rank: the name of its node, the number of its machine, and its device there."""
    ids = list(dict.fromkeys(place["id"] for place in places))
    by_host = len({place["host"] for place in places}) == len(ids)
    by_address = len({place["address"] for place in places}) == len(ids)
    nodes, devices = [], []
    for rank, place in enumerate(places):
        if by_host:
            nodes.append(f"{place['host']} ({place['address']})")
        else:
            nodes.append(place["address"] if by_address else f"{place['address']}/{place['id'][:8]}")
        local = sum(other["id"] == place["id"] for other in places[:rank])
        devices.append(torch.device("cuda", local) if device == "cuda" else torch.device("cpu"))
    return nodes, tuple(ids.index(place["id"]) for place in places), devices


def _end_all(owner: int, pipes: list[socket.socket], cluster: Cluster) -> None:
    """End the ranks, their actors and the broker; a fork of the driver leaves them alone."""
    if os.getpid() != owner:
        return
    for pipe in pipes:
        # The rank ends itself when its connection does, whatever Ray is able to do.
        with contextlib.suppress(OSError):
            pipe.shutdown(socket.SHUT_RDWR)
        pipe.close()
    cluster.end()
