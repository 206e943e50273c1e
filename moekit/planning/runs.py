"""A planned run: what it takes, and the room that there is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moekit.nn.config import ModelConfig
from moekit.nn.dispatch import owned
from moekit.nn.memory import TOKENS_A_PASS, Sizes
from moekit.nn.slots import transit
from moekit.ranks.machine import free_memory, host_memory
from moekit.units import GIB

# What a process has on a GPU beside torch's tensors: CUDA's context, and the workspace of cuBLAS (32 MiB on Hopper).
CONTEXT, CUBLAS = 0.7 * GIB, GIB // 32


@dataclass(frozen=True)
class Run:
    """What is planned: a model on ``devices``, one a rank, and how it is used.

    Attributes:
        dtype: of the weights, but for the experts' matrices where ``one_byte`` holds.
        one_byte: whether the experts' matrices have numbers of one byte.
        vocab: types of the dictionary.
        tokens: of a pass, per rank.
        sequences, length: the sequences that a rank decodes at once, and the tokens that each of them will have.
        resident: experts a layer on the device of their rank; None: all.
    """

    config: ModelConfig
    devices: tuple[torch.device, ...]
    dtype: torch.dtype
    backend: str
    one_byte: bool
    vocab: int
    tokens: int
    sequences: int
    length: int
    resident: int | None = None

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        devices: Sequence[torch.device],
        dtype: torch.dtype,
        backend: str,
        vocab: int | None,
        one_byte: bool = False,
        tokens: int | None = None,
        sequences: int = 1,
        length: int | None = None,
    ) -> Run:
        """A run in which None stands for the default of :func:`moekit.plan`."""
        return cls(
            config,
            tuple(devices),
            dtype,
            backend,
            one_byte,
            config.vocab_rows if vocab is None else vocab,
            TOKENS_A_PASS[devices[0].type] if tokens is None else tokens,
            sequences,
            config.max_positions if length is None else length,
        )

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.config, self.dtype, self.one_byte)

    @property
    def held(self) -> list[int]:
        """The experts a layer of each rank."""
        return [len(owned(self.config.experts, len(self.devices), r)) for r in range(len(self.devices))]

    @property
    def fetched(self) -> bool:
        """Whether any rank has experts that are not on its device."""
        return self.resident is not None and self.resident < max(self.held)

    def parts(self, rank: int) -> dict[str, float]:
        """The bytes of each part on the device of ``rank``, by its name in the table."""
        sizes = self.sizes
        on_gpu = self.devices[rank].type == "cuda"
        held = self.held[rank]
        there = sizes.layers * (min(self.resident, held) if self.fetched else held) * sizes.expert
        moving = transit(held) * sizes.expert if self.fetched and sizes.layers else 0
        return {
            "weights": sizes.shared + (0 if self.fetched else there),
            "slots": there + moving if self.fetched else 0,
            "workspace": self.workspace(rank) + (CUBLAS if on_gpu else 0),
            "keys and values": sizes.cache(self.sequences, self.length),
            "CUDA": CONTEXT if on_gpu else 0,
        }

    def workspace(self, rank: int) -> int:
        share = self.resident / max(self.held) if self.fetched else 1.0
        return self.sizes.workspace(self.tokens, self.vocab, self.backend, self.devices[rank].type, share)

    def home(self, rank: int) -> int:
        """The bytes of the experts of ``rank`` in host memory, from where they are fetched."""
        sizes = self.sizes
        return sizes.layers * self.held[rank] * sizes.expert if self.fetched else 0


@dataclass(frozen=True)
class Room:
    """Free memory in bytes: on the device of each rank, and on the host; NaN where it is unknown.

    ``limited``: whether that of a device is what ``gpu_memory`` leaves of it.
    """

    devices: tuple[float, ...]
    host: float
    limited: bool = False

    def takes(self, run: Run) -> bool:
        """Whether ``run`` fits; what is unknown is taken to be enough."""
        return not self.short(run)

    def short(self, run: Run) -> str:
        """What does not fit, with the numbers; "" if all fits."""
        for rank, device in enumerate(run.devices):
            parts = run.parts(rank)
            total = sum(parts.values())
            if total > self.devices[rank]:
                told = ", ".join(f"{name} {size / GIB:.3g}" for name, size in parts.items() if size)
                there = f"{self.devices[rank] / GIB:.3g} GiB"
                there = f"gpu_memory leaves {there}" if self.limited else f"{there} are free"
                return f"rank {rank} needs {total / GIB:.3g} GiB on {device} ({told}), and {there}"
        needed = self.host_needed(run)
        if needed > self.host:
            return f"the ranks need {needed / GIB:.3g} GiB of host memory, and {self.host / GIB:.3g} GiB are free"
        return ""

    @staticmethod
    def host_needed(run: Run) -> float:
        """The bytes of host memory that all ranks take: on the CPU, everything."""
        on_cpu = run.devices[0].type == "cpu"
        return sum(
            run.home(rank) + (sum(run.parts(rank).values()) if on_cpu else 0)
            for rank in range(len(run.devices))
        )


def room(devices: Sequence[torch.device], lent: bool = False) -> Room:
    """What is free on all devices of this machine of the kind of ``devices``, and on the host.

    Args:
        lent: whether ranks exist on them already. An earlier model may still be there, whose memory becomes free, so the
            devices count as empty.
    """
    host = host_memory("MemAvailable")
    if devices[0].type == "cpu":
        # There, the device's memory is the host's, which all ranks share.
        return Room((math.inf,) * len(devices), host)
    all_gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return Room(tuple(free_memory(all_gpus, lent)), host)


def unknown(ranks: int) -> Room:
    """The room of ranks on other machines, of which nothing is known here."""
    return Room((math.nan,) * ranks, math.nan)
