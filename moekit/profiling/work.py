"""What measured steps work on: blocks and prompts, cut out of tokens. Profiles and benches have it from here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from moekit.batches import lengths_of, text_batches
from moekit.nn.config import ModelConfig
from moekit.worker.prompts import dealt
from moekit.worker.steps import STEPS_BEFORE, TIMED, Work

if TYPE_CHECKING:
    from moekit.handle import Handle

MODES = ("score", "prefill", "decode")
# Tokens of a prompt that is read before decode steps, if the model has twice as many positions.
PROMPT = 128
# Steps where nobody asks for another number, and those of a call of "decode" by device. A call takes the host some 0.3 ms, whatever
# the number of its steps: on a GPU that is more than a short step takes.
STEPS, DECODED = 3, {"cpu": 8, "cuda": 64}
# Calls of "decode" in a profile: one to warm up, those that are timed, and the one under the profiler.
CALLS = TIMED + 2


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        mode: "score", "prefill" or "decode".
        steps: how many steps; "decode" makes them in one call.
        blocks: blocks or sequences on each rank.
        length: tokens of a block.
        calls: of "decode": each has prompts of its own, whose experts are not in slots already.
    """

    mode: str
    steps: int
    blocks: int
    length: int
    calls: int = CALLS

    @classmethod
    def of(
        cls, config: ModelConfig, device: str, mode: str, steps: int | None, blocks: int, length: int
    ) -> Size:
        """``steps`` None: as many as usual, and as the model has positions for.

        Raises:
            ValueError: the steps need more positions than the model has.
        """
        asked = steps or (DECODED[device] if mode == "decode" else STEPS)
        size = cls(mode, asked, blocks, length)
        if steps is None:
            size = replace(size, steps=max(1, asked - max(0, size.last - config.max_positions)))
        size.check(config)
        return size

    @property
    def read(self) -> int:
        """Tokens of a block, or of a prompt."""
        return min(PROMPT, self.length // 2) if self.mode == "decode" else self.length

    @property
    def a_step(self) -> int:
        """Tokens of a sequence that a step reads."""
        return 1 if self.mode == "decode" else self.length

    @property
    def last(self) -> int:
        """Positions that the last step needs."""
        return self.read + (STEPS_BEFORE + self.steps if self.mode == "decode" else 0)

    def samples(self, world_size: int) -> int:
        """Blocks or prompts of all ranks, and of all calls that have prompts of their own."""
        return world_size * self.blocks * (self.calls if self.mode == "decode" else 1)

    def tokens(self, world_size: int) -> int:
        """Tokens that all blocks or prompts are cut out of."""
        return self.samples(world_size) * self.read

    def check(self, config: ModelConfig) -> None:
        """Raise a ValueError if the steps need more positions than the model has."""
        if self.last > config.max_positions:
            raise ValueError(
                f"steps={self.steps}: prompts of {self.read} tokens and the steps need {self.last} positions, and the model has "
                f"{config.max_positions}; ask for fewer steps"
            )


def work_of(
    model: Handle, size: Size, ids: np.ndarray, fraction: float | None, vocab: int, seed: int
) -> Work:
    """The work on ``ids``, which are repeated where they end.

    Raises:
        ValueError: an intervention forces a sample or a position that is not there.
    """
    samples = size.samples(model.world_size)
    # The model's first symbol has a place, too.
    texts = np.resize(ids, (samples, size.read))[:, : size.read - 1].tolist()
    work = {"fraction": fraction, "vocab": vocab, "seed": seed, "intervention": model.intervention}
    if size.mode == "score":
        batches = text_batches(texts, 1, model.config.max_positions + 1, model.first)
        _check_forced(model, lengths_of(batches))
        return Work(size.mode, size.steps, batches=batches, **work)
    ranks, each = range(model.world_size), model.world_size * size.blocks
    prompts = [[model.first, *text] for text in texts]
    _check_forced(model, dict.fromkeys(range(each), size.last))
    numbers = [range(rank, each, len(ranks)) for rank in ranks]
    calls = [
        dealt(numbers, [prompts[first + rank : first + each : len(ranks)] for rank in ranks])
        for first in range(0, samples, each)
    ]
    return Work(size.mode, size.steps, prompts=calls, **work)


def _check_forced(model: Handle, lengths: dict[int, int]) -> None:
    if model.intervention is not None:
        model.intervention.check(lengths)
