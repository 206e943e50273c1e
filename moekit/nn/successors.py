"""A forecast of the experts of the next layer that will be missed, from this layer's choices.

:func:`moekit.metrics.predictability` measures how well an expert tells the next layer's. Here only passes count in which the
next layer's expert was in no slot, since an expert in a slot needs no forecast.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

# An expert is copied ahead if it was missed after another one in more than this share of passes. A copy that is not needed
# delays those that are, so the forecast has to be right more often than not.
LIKELY = 0.5
# Successors of an expert that are remembered.
MOST = 16


class Successors:
    """For each of ``experts`` experts, how often experts of the next layer were missed after it."""

    def __init__(self, experts: int):
        # For each expert, by successor and from its first miss on: passes in which the successor was missed, and passes in
        # which it was in no slot.
        self.of: list[dict[int, list[int]]] = [{} for _ in range(experts)]

    def note(self, requested: Iterable[int], missed: Iterable[int], there: Container[int]) -> None:
        """Count a pass: ``requested`` here, and in the next layer ``missed`` experts, while ``there`` were in slots."""
        for expert in requested:
            known = self.of[expert]
            for successor, tally in known.items():
                if successor not in there:
                    tally[1] += 1
            for successor in missed:
                if successor in known:
                    known[successor][0] += 1
                    continue
                if len(known) == MOST:
                    del known[min(known, key=lambda one: known[one][0] / known[one][1])]
                known[successor] = [1, 1]

    def likely(self, requested: Iterable[int]) -> list[int]:
        """The experts of the next layer that are likely to be missed after ``requested``, unless they are in slots."""
        # "More" is by at least one standard deviation, sqrt(passes) / 2: that of the heads of a fair coin.
        return [
            successor
            for expert in requested
            for successor, (missed, passes) in self.of[expert].items()
            if missed > LIKELY * passes + passes**0.5 / 2
        ]
