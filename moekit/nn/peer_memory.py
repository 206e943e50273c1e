"""Memory of a rank that its peers can address: over NVLink between GPUs of one host, or a shared file on the CPU.

The shared file serves interpreted kernels, so that the code around them can be tested without a GPU.
"""

from __future__ import annotations

import os
import tempfile

import torch
import torch.distributed as dist
from torch import Tensor


def reachable(device: torch.device, world_size: int) -> bool:
    """Whether each of ``world_size`` ranks of one host, rank r on GPU r, can address the memory of every other rank.

    The result is the same on every rank, without communication.
    """
    if device.type != "cuda":
        return True
    count = torch.cuda.device_count()
    pairs = [(a, b) for a in range(world_size) for b in range(world_size) if a != b]
    return count >= world_size and all(torch.cuda.can_device_access_peer(a, b) for a, b in pairs)


def symmetric(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Allocate a zeroed buffer of ``size`` bytes on every rank; a collective of the default process group.

    Returns:
        The buffer of this rank, [size] uint8; and [W] int64 on ``device``, the bytes from it to the buffer of each rank.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if device.type == "cuda":
        from torch.distributed import _symmetric_memory as symmetric_memory

        buffer = symmetric_memory.empty(size, dtype=torch.uint8, device=device).zero_()
        # A peer may write as soon as it has the address.
        torch.cuda.synchronize(device)
        addresses = list(symmetric_memory.rendezvous(buffer, dist.group.WORLD).buffer_ptrs)
    else:
        folder = [tempfile.mkdtemp(prefix="moekit-peers-") if rank == 0 else ""]
        dist.broadcast_object_list(folder)
        paths = [os.path.join(folder[0], str(r)) for r in range(world_size)]
        torch.from_file(paths[rank], shared=True, size=size, dtype=torch.uint8).zero_()
        dist.barrier()
        shared = [torch.from_file(path, shared=True, size=size, dtype=torch.uint8) for path in paths]
        dist.barrier()
        os.unlink(paths[rank])
        dist.barrier()
        if rank == 0:
            os.rmdir(folder[0])
        buffer, addresses = shared[rank], [one.data_ptr() for one in shared]
        # A view keeps only one mapping alive, so the buffer holds a reference to the others.
        buffer.peers = shared
    reach = torch.tensor([address - addresses[rank] for address in addresses], device=device)
    return buffer, reach
