"""Numbers in a mapped file of which no tensor is made: to copy them, their place is enough, and a call of torch takes longer."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Stretch(NamedTuple):
    """A tensor whose numbers lie one after the other in ``memory`` [bytes] uint8, from the byte ``start`` on."""

    memory: np.ndarray
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, count: int) -> Stretch:
        """The first rows."""
        return self._replace(shape=(min(count, self.shape[0]), *self.shape[1:]))

    def tensor(self) -> Tensor:
        """The same as a tensor, not copied."""
        return (
            torch.from_numpy(self.memory[self.start : self.start + self.nbytes])
            .view(self.dtype)
            .view(self.shape)
        )


def stretch_of(tensor: Tensor) -> Stretch:
    """A tensor on the CPU as a stretch, copied if its numbers do not lie one after the other."""
    numbers = tensor.contiguous().view(-1)
    return Stretch(numbers.view(torch.uint8).numpy(), 0, tensor.dtype, tuple(tensor.shape))
