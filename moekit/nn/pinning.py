"""Host memory that a GPU reads by itself, while the host and the GPU go on."""

from __future__ import annotations

import contextlib
import mmap
import warnings
import weakref

import torch
from torch import Tensor, nn

from moekit.units import GIB


def paged(like: Tensor) -> Tensor:
    """Uninitialised host memory for a tensor like this one, in pages that no other tensor has a part of.

    ``Tensor.pin_memory`` would take memory of the next power of two of bytes.
    """
    if like.nbytes == 0:
        return torch.empty_like(like, device="cpu")
    pages = mmap.mmap(-1, like.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):
        # Fewer, larger pages are found and pinned sooner. Not every system has them.
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8).view(like.dtype).view(like.shape)


def pin(module: nn.Module) -> None:
    """Pin the memory of a module's tensors, which :func:`paged` made, for as long as the module lives.

    Where memory cannot be pinned, a warning says so: copies to the GPU then are slower.
    """
    cudart = torch.cuda.cudart()
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.nbytes == 0:
            continue
        error = cudart.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
        if int(error) == 0:
            weakref.finalize(module, cudart.cudaHostUnregister, tensor.data_ptr()).atexit = False
            continue
        warnings.warn(
            f"{tensor.nbytes / GIB:.2f} GiB of host memory cannot be pinned ({error}): experts are copied to the GPU "
            "more slowly",
            stacklevel=2,
        )
        with contextlib.suppress(RuntimeError):
            # CUDA tells its last error once more.
            torch.zeros(1, device="cuda")
