"""What happened to experts that are fetched, in all layers of a rank together."""

from __future__ import annotations

from dataclasses import dataclass, fields

from moekit.bench.figures import GIB
from moekit.nn.transformer import Transformer


@dataclass(frozen=True)
class Fetched:
    """Sums of :class:`moekit.nn.resident.Counts` over layers; all zero for a model without slots."""

    requests: int = 0
    hits: int = 0
    copied: int = 0
    ahead: int = 0
    used: int = 0
    nbytes: int = 0

    @classmethod
    def of(cls, model: Transformer) -> Fetched:
        layers = () if model.slots is None else model.slots.layers
        return cls(*(sum(getattr(layer.counts, f.name) for layer in layers) for f in fields(cls)))

    def __add__(self, other: Fetched) -> Fetched:
        return Fetched(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: Fetched) -> Fetched:
        return Fetched(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    def told(self, times: int) -> str:
        """A note on ``times`` steps or calls."""
        told = f"{self.hits / max(1, self.requests):.1%} of {self.requests / times:.0f} requests hit, {self.nbytes / times / GIB:.3g} GiB fetched"
        return told + (f", {self.used} of {self.ahead} ahead were used" if self.ahead else "")
