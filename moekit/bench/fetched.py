"""What happened to experts that are fetched, in all layers of a rank together."""

from __future__ import annotations

from moekit.nn.resident import Counts
from moekit.nn.transformer import Transformer
from moekit.units import GIB


def counts_of(model: Transformer) -> Counts:
    """The sum over layers; all zero for a model without slots."""
    layers = () if model.slots is None else model.slots.layers
    return sum((layer.counts for layer in layers), Counts())


def told(counts: Counts, times: int) -> str:
    """A note on ``times`` steps or calls."""
    said = f"{counts.hits / max(1, counts.requests):.1%} of {counts.requests / times:.0f} requests hit, {counts.nbytes / times / GIB:.3g} GiB fetched"
    return said + (f", {counts.used} of {counts.ahead} ahead were used" if counts.ahead else "")
