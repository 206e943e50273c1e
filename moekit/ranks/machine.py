"""How much memory this machine's host and GPUs have, and how much of it is free.

GPUs are asked for through NVIDIA's management library, or its command ``nvidia-smi``: asking CUDA itself would put a context of some half a GiB on every GPU for as
long as this process lives, and the memory belongs to the ranks.
"""

from __future__ import annotations

import contextlib
import csv
import math
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

QUERY = "--query-gpu=uuid,memory.free,memory.total"
# Seconds. It takes one or two where the driver has to wake the GPUs.
TIMEOUT = 20


def host_memory(what: str) -> int:
    """``MemTotal``, or ``MemAvailable`` (free, or cached and easily given back), of the machine in bytes."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(what)).split()[1]) * 1024
    except (OSError, StopIteration):
        return total


@dataclass(frozen=True)
class Gpu:
    """A GPU in torch's order; ``free`` and ``total`` are bytes, NaN where they cannot be asked."""

    name: str
    free: float
    total: float


def gpus() -> list[Gpu]:
    """The GPUs that torch sees."""
    seen = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    memory = (_told_by_library() or _told_by_command()) if seen else {}
    return [Gpu(gpu.name, *memory.get(str(gpu.uuid), (math.nan, math.nan))) for gpu in seen]


def free_memory(devices: Sequence[torch.device], lent: bool = False) -> list[float]:
    """The free bytes on the device of each rank, NaN where they cannot be asked.

    On the CPU the ranks have equal shares of the host's memory. On a GPU, what torch keeps in this process for tensors to
    come is free, too.

    Args:
        lent: whether ranks exist on the devices already. An earlier model may still be there, whose memory becomes free, so
            GPUs count as empty.
    """
    if devices[0].type == "cpu":
        return [host_memory("MemAvailable") / len(devices)] * len(devices)
    asked = gpus()
    if lent:
        return [asked[device.index].total for device in devices]
    kept = [0] * len(asked)
    if torch.cuda.is_initialized():
        kept = [torch.cuda.memory_reserved(i) - torch.cuda.memory_allocated(i) for i in range(len(asked))]
    return [asked[device.index].free + kept[device.index] for device in devices]


def _told_by_library() -> dict[str, tuple[float, float]]:
    """As :func:`_told_by_command`, in milliseconds; nothing without the package nvidia-ml-py."""
    try:
        import pynvml
    except ImportError:
        return {}
    found = {}
    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            uuid = pynvml.nvmlDeviceGetUUID(handle)
            name = uuid if isinstance(uuid, str) else uuid.decode()
            found[name.removeprefix("GPU-")] = float(memory.free), float(memory.total)
    return found


def _told_by_command() -> dict[str, tuple[float, float]]:
    """UUID (without its prefix) -> free and total bytes; what cannot be asked or read is left out."""
    command = ["nvidia-smi", QUERY, "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    found = {}
    for row in csv.reader(said.splitlines(), skipinitialspace=True):
        try:
            uuid, free, total = row
            found[uuid.removeprefix("GPU-")] = float(free) * 2**20, float(total) * 2**20
        except ValueError:
            # The value may be "[N/A]".
            continue
    return found
