"""Persistent ranks: functions that run on every rank of a process group, for as long as a notebook lives.

``start`` gives a pool; ``pool.call(fn, ...)`` runs ``fn(rank, ...)`` on each rank, and what ``fn`` keeps in
``rank.state`` is there in the next call. One rank is this very process; several are new interpreters on this
machine, each at the end of a duplex pipe. They are launched directly, since ``multiprocessing`` would run the
caller's ``__main__`` again in each of them. No rank outlives its driver, however the driver ends.

Another kind of pool is another subclass of :class:`Ranks`: functions that run on a rank see a :class:`Rank` alone.
"""

from moekit.processes.system import usable_cores
from moekit.ranks.base import Each, Rank, RankError, Ranks, Stream
from moekit.ranks.devices import WHERE, choose_devices, devices_to_come
from moekit.ranks.launch import prepare, ready
from moekit.ranks.lent import LentRanks
from moekit.ranks.pools import start
from moekit.ranks.ray_ranks import RayRanks
from moekit.ranks.spawned import SpawnedRanks
from moekit.ranks.this_process import ThisProcess

__all__ = [
    "WHERE",
    "Each",
    "LentRanks",
    "Rank",
    "RankError",
    "Ranks",
    "RayRanks",
    "SpawnedRanks",
    "Stream",
    "ThisProcess",
    "choose_devices",
    "devices_to_come",
    "prepare",
    "ready",
    "start",
    "usable_cores",
]
