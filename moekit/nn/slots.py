"""Slots: places for experts on a device, which all layers of a rank share, and the copies from host memory to them.

A slot of a cache (cache.py) is another thing: it holds the key and the value of a token.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from moekit.nn.experts import Experts

if TYPE_CHECKING:
    from moekit.nn.resident import Resident

# Experts that are fetched together, while those before are computed with.
CHUNK = 8


def transit(held: int) -> int:
    """The slots that a rank has beside those for the experts that stay; it holds ``held`` experts a layer."""
    return 2 * min(CHUNK, held)


class Slots:
    """Room for ``count`` experts on ``device``, of the kind of ``like``.

    Attributes:
        experts: the slots as experts.
        layers: those that share the slots, in the order of the model.
        nbytes: of all slots.
        each: bytes of an expert.
        previous: the layer that ran last, and the experts that it requested; None where they tell nothing of the next layer,
            as they are many, none is fetched ahead, or there is no next layer.
    """

    def __init__(self, like: Experts, count: int, device: torch.device):
        self.stacks = {
            name: torch.empty(count, *stack.shape[1:], dtype=stack.dtype, device=device)
            for name, stack in like.stacks().items()
        }
        self.experts = like.over(self.stacks)
        self.count, self.device = count, device
        self.nbytes = sum(stack.nbytes for stack in self.stacks.values())
        self.each = self.nbytes // max(1, count)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # Free slots, and what has to be over on the device before each is written to.
        self.free: deque[tuple[int, torch.cuda.Event | None]] = deque((slot, None) for slot in range(count))
        # What a step in parts has still to do once its products are under way.
        self.open: Iterator[object] | None = None
        self.layers: list[Resident] = []
        self.previous: tuple[Resident, list[int]] | None = None

    def fetch(self, homes: dict[str, torch.Tensor], wanted: Sequence[int]) -> dict[int, int]:
        """Begin to copy experts from the stacks ``homes``; returns the slot of each."""
        if not wanted:
            return {}
        found = {}
        with torch.cuda.stream(self.stream):
            for expert in wanted:
                slot, over = self.free.popleft()
                if over is not None:
                    self.stream.wait_event(over)
                for name, stack in homes.items():
                    self.stacks[name][slot].copy_(stack[expert], non_blocking=True)
                found[expert] = slot
        return found

    def arrival(self) -> torch.cuda.Event | None:
        """An event that is over once all copies begun so far are complete; None on the CPU, where they are."""
        return None if self.stream is None else self.stream.record_event()

    def wait(self, arrival: torch.cuda.Event | None) -> None:
        """Let all later work of the device wait for ``arrival``."""
        if arrival is not None:
            torch.cuda.current_stream(self.device).wait_event(arrival)

    def release(self, slots: Sequence[int]) -> None:
        """Give slots back; each is free once all work that the device was given so far is over."""
        if slots:
            over = None if self.stream is None else torch.cuda.current_stream(self.device).record_event()
            self.free.extend((slot, over) for slot in slots)

    def settle(self) -> None:
        """Finish the round of a step in parts, whose slots are still in use."""
        if self.open is not None:
            next(self.open, None)
            self.open = None

    def forget(self) -> None:
        """Begin again: all slots are free, and the policies have seen no request."""
        self.open = self.previous = None
        self.free.clear()
        self.release(range(self.count))
        for layer in self.layers:
            layer.where, layer.ahead = {}, {}
            layer.policy.clear()


def grow_in_place() -> None:
    """Let torch's memory on GPUs grow and shrink page by page, unless the user has chosen how.

    Otherwise a pass of another size leaves gaps that no tensor fits into: near the limit, 32 blocks of the 15B found no 384 MiB
    in 439 MiB of gaps.
    """
    if not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & set(os.environ):
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
