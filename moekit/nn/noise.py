"""Random numbers that depend only on their keys: the same bits on any device and at any world size."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


class Noise:
    """The random numbers for the choice of the second expert, by seed, batch and layer."""

    def __init__(self, seed: int, batches: Sequence[int]):
        self.seed, self.batches = seed, batches

    def __call__(self, layer: int, kind: str, like: Tensor) -> Tensor:
        """Noise of ``kind`` "uniform", in (0, 1), or "gumbel": float32, with the shape [G, ...] and device of ``like``."""
        keys = [(self.seed, batch, layer) for batch in self.batches]
        drawn = (_bits(keys, like[0].numel(), like.device, 23).float() + 0.5) * 2.0**-23
        if kind == "gumbel":
            drawn = -torch.log(-torch.log(drawn))
        return drawn.view(like.shape)


def uniform(keys: Sequence[tuple[int, ...]], count: int, device: torch.device) -> Tensor:
    """[len(keys), count] float64 in (0, 1): independent numbers for each key, of three numbers."""
    return (_bits(keys, count, device, 53).double() + 0.5) * 2.0**-53


def _bits(keys: Sequence[tuple[int, ...]], count: int, device: torch.device, wanted: int) -> Tensor:
    starts = [int(np.random.SeedSequence(_words(key)).generate_state(1, np.uint64)[0]) for key in keys]
    return _shifted(splitmix64(starts, count, device), 64 - wanted)


def _words(key: tuple[int, ...]) -> Sequence[int]:
    """The words of 32 bits of a key of three numbers, one of each or two of each: other such keys have other words.

    NumPy gives a number as many words as it needs, and those of a short key end in zeros: other keys may have the same ones.
    """
    if max(key) < 1 << 32:
        return key
    return [word for number in key for word in (number & 0xFFFFFFFF, number >> 32)]


def splitmix64(starts: Sequence[int], count: int, device: torch.device) -> Tensor:
    """[len(starts), count] int64, 64 random bits each: the first numbers of the generator from each initial state.

    Steele, Lea, Flood: Fast splittable pseudorandom number generators (OOPSLA 2014), figures 13 and 14.
    """
    x = torch.tensor([_signed(start) for start in starts]).to(device)[:, None]
    x = x + torch.arange(1, count + 1, device=device) * _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift ``x`` to the right by ``bits``, filling with zeros from the left."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def from_torch(layer: int, kind: str, like: Tensor) -> Tensor:
    """Noise of ``kind``, as :class:`Noise` has it, drawn anew in each call from torch's own generator."""
    drawn = torch.rand(like.shape, device=like.device).clamp(2.0**-24, 1 - 2.0**-24)
    return -torch.log(-torch.log(drawn)) if kind == "gumbel" else drawn


@contextmanager
def unchanged(device: torch.device) -> Iterator[None]:
    """Leave the generators that all code of a process shares as they are: torch's, for ``device`` too, NumPy's and Python's."""
    numpy_state, python_state = np.random.get_state(legacy=False), random.getstate()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
