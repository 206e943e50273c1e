"""The devices that ranks run on."""

import atexit
import contextlib
import threading
from collections.abc import Iterator, Sequence

import torch

from moekit.arguments import Choice, Whole, check

# Where ranks run that load starts: on this machine, or on the Ray cluster that it belongs to.
WHERE = ("local", "ray")
# More ranks than this are a slip of the pen, and their processes a burden to the machine.
MOST = 4096
# Seconds that a GPU may take to come up before the block ends without it.
AWAKE = 20.0


def choose_devices(world_size: int | None, device: str) -> list[torch.device]:
    """One device a rank, or a ValueError that says what to ask for instead; None: a rank for every GPU, one without."""
    check("device", device, Choice(("auto", "cuda", "cpu")))
    if world_size is None:
        world_size = 1 if device == "cpu" else max(1, torch.cuda.device_count())
    world_size = check("world_size", world_size, Whole(most=MOST))
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return [torch.device("cpu")] * world_size
    count = torch.cuda.device_count()
    if world_size > count:
        instead = f'world_size={count} or device="cpu"' if count else 'device="cpu"'
        raise ValueError(f"world_size {world_size} needs as many GPUs, and torch sees {count}: use {instead}")
    return [torch.device("cuda", rank) for rank in range(world_size)]


def devices_to_come(world_size: int | None, device: str, where: str) -> list[torch.device]:
    """The devices of ranks that are not started yet, by :func:`choose_devices`.

    Args:
        where: "local" or "ray". Of a cluster nothing is known before it answers: its devices have no number, "auto" counts as
            "cuda", and None as one rank.
    """
    if where != "ray":
        return choose_devices(world_size, device)
    return [torch.device("cpu" if device == "cpu" else "cuda")] * (world_size or 1)


@contextlib.contextmanager
def waking(devices: Sequence[torch.device]) -> Iterator[None]:
    """In this block, the GPU of a single rank comes up in a thread: CUDA's context on it takes half a second. An error of the
    block does not wait for it.

    Of several devices nothing is done, as they belong to other processes. What goes wrong in the thread is not said here: it
    goes wrong again, and is said, where the GPU is used.
    """
    if len(devices) != 1 or devices[0].type != "cuda":
        yield
        return
    thread = threading.Thread(target=_wake, args=devices, name="waking", daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        # The error does not wait for the GPU; Python's end does, since a process that ends in the middle of CUDA's start may crash.
        atexit.register(thread.join, AWAKE)
        raise
    thread.join(AWAKE)


def _wake(device: torch.device) -> None:
    with contextlib.suppress(Exception):
        torch.empty(1, device=device)
        # Pinned memory has a start of its own.
        torch.empty(1, pin_memory=True)
