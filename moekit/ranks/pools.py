"""Which pool of ranks is started."""

from moekit.ranks.base import Ranks
from moekit.ranks.devices import choose_devices
from moekit.ranks.spawned import SpawnedRanks
from moekit.ranks.this_process import ThisProcess


def start(world_size: int, device: str = "auto", timeout: float = 1800.0) -> Ranks:
    """Start `world_size` ranks on this machine; a collective may wait for `timeout` seconds.

    `device` is "cuda" (rank r on cuda:r), "cpu" (the usable cores dealt evenly) or "auto" ("cuda" if there is
    one). Raises ValueError for a world size or device that cannot be, RankError or TimeoutError when a rank
    does not come up.
    """
    devices = choose_devices(world_size, device)
    return ThisProcess(devices) if world_size == 1 else SpawnedRanks(devices, timeout)
