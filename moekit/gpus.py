"""The GPUs and their free memory, asked of ``nvidia-smi``.

Asking CUDA itself would put a context of some half a GiB on every GPU for as long as this process lives, and the memory
belongs to the ranks.
"""

from __future__ import annotations

import csv
import math
import subprocess
from dataclasses import dataclass

import torch

QUERY = "--query-gpu=uuid,memory.free,memory.total"
TIMEOUT = 20  # seconds; it takes one or two where the driver has to wake the GPUs


@dataclass(frozen=True)
class Gpu:
    """A GPU in torch's order; ``free`` and ``total`` are bytes, NaN where ``nvidia-smi`` does not tell."""

    name: str
    free: float
    total: float


def gpus() -> list[Gpu]:
    """The GPUs that torch sees."""
    seen = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    memory = _memory() if seen else {}
    return [Gpu(gpu.name, *memory.get(str(gpu.uuid), (math.nan, math.nan))) for gpu in seen]


def _memory() -> dict[str, tuple[float, float]]:
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
        except ValueError:  # such as "[N/A]"
            continue
    return found
