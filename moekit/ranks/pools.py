"""Which pool of ranks is started."""

from moekit.ranks.base import Rank, Ranks
from moekit.ranks.devices import choose_devices
from moekit.ranks.spawned import SpawnedRanks
from moekit.ranks.this_process import ThisProcess
from moekit.ranks.watch import silence_limit, time_limit


def start(
    world_size: int | None,
    device: str = "auto",
    timeout: float = 1800.0,
    silence: float | None = None,
    wait: bool = True,
) -> Ranks:
    """Start ``world_size`` ranks on this machine.

    Args:
        world_size: None: a rank for every GPU, one on the CPU.
        device: "cuda" (rank r on cuda:r), "cpu" (the usable cores dealt evenly) or "auto" ("cuda" if there is one).
        timeout: seconds that a collective may wait, and that a call without a limit of its own may make no progress.
        silence: seconds that a rank may give no sign of life before a call ends with its name. None: those of the
            environment's ``MOEKIT_SILENCE``, or 30. One that a signal stops, such as SIGSTOP, ends it after half a second.
        wait: whether to return only when all ranks have come up; otherwise the first call waits for them, and raises
            what went wrong.

    Raises:
        ValueError: a world size, device or limit that cannot be.
        RuntimeError: the system starts no process; a :class:`RankError` when a rank does not come up.
        TimeoutError: the ranks do not come up in three minutes.
    """
    devices = choose_devices(world_size, device)
    limits = time_limit(timeout), silence_limit(silence)
    pool = ThisProcess(devices) if len(devices) == 1 else SpawnedRanks(devices, *limits)
    if wait:
        pool.call(come_up)
    return pool


def come_up(rank: Rank) -> None:
    """Nothing: it can only be run by a rank that has come up."""
