"""Memory of a rank that its peers can address: NVLink between GPUs of one host, a shared file between processes on the CPU.

The CPU's stands in where kernels are interpreted, so that everything around them can be tested without a GPU.
"""

from __future__ import annotations

import os
import tempfile

import torch
import torch.distributed as dist
from torch import Tensor


def reachable(device: torch.device) -> bool:
    """Whether every rank of the default process group can address every other one's memory; a collective."""
    mine = torch.ones(1, dtype=torch.int32, device=device)
    if device.type == "cuda":
        hosts: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(hosts, os.uname().nodename)
        devices = torch.cuda.device_count()
        peers = [d for d in range(devices) if d != device.index]
        linked = all(torch.cuda.can_device_access_peer(device, d) for d in peers)
        if len(set(hosts)) > 1 or devices < dist.get_world_size() or not linked:
            mine.zero_()
    dist.all_reduce(mine, dist.ReduceOp.MIN)
    return bool(mine)


def symmetric(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A buffer of ``size`` bytes on every rank, zeroed; a collective of the default process group.

    Returns:
        This rank's buffer, [size] uint8; and [W] int64 on ``device``, the bytes from it to the buffer of each rank.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if device.type == "cuda":
        from torch.distributed import _symmetric_memory as symmetric_memory

        buffer = symmetric_memory.empty(size, dtype=torch.uint8, device=device).zero_()
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
        # A view keeps its own mapping alive alone.
        buffer.peers = shared
    reach = torch.tensor([address - addresses[rank] for address in addresses], device=device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier()
    return buffer, reach
