"""What a pass records of the routing: options say what, and a recorder keeps it on its rank. A dense model has no routing.

Shape letters: T tokens, L recorded MoE layers, K choices a token, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moekit.arguments import Flag, Wholes, check
from moekit.nn.config import DENSE, ModelConfig

if TYPE_CHECKING:
    import torch

    from moekit.nn.gate import Routing


# [T, L, K]
CHOICE_COLUMNS = {
    "experts": np.int16,
    "probs": np.float32,
    "weights": np.float32,
    "kept": np.bool_,
}


@dataclass(frozen=True)
class Options:
    """What to record.

    Attributes:
        layers: MoE layers (model layer numbers); None: all of them, which in a dense model is none.
        full: layers whose full gate distribution is kept: T x E float16 each.
        predicted: also the output's most probable next token and the entropy of its distribution, which costs about as much
            as scoring once more. Of a dense model they are recorded anyway, since there is little else.

    Raises:
        ValueError: one of them makes no sense.
    """

    layers: Iterable[int] | int | None = None
    full: Iterable[int] | int = ()
    predicted: bool = False

    def __post_init__(self) -> None:
        # An iterator would be used up by the first call.
        layers = check("layers", self.layers, Wholes(optional=True))
        object.__setattr__(self, "layers", None if layers is None else tuple(layers))
        object.__setattr__(self, "full", tuple(check("full", self.full, Wholes())))
        object.__setattr__(self, "predicted", check("predicted", self.predicted, Flag()))

    @classmethod
    def asked(cls, trace: bool | Options) -> Options | None:
        """What the argument ``trace`` of a call asks for: True is all layers; None for False.

        Raises:
            ValueError: it is something else.
        """
        if isinstance(trace, cls):
            return trace
        return cls() if check("trace", trace, Flag()) else None

    def of(self, config: ModelConfig) -> Options:
        """With the layers of a model filled in.

        Raises:
            ValueError: the model has no such MoE layer.
        """
        if self.layers == ():
            raise ValueError("layers=[]: expected at least one layer, or None for all")
        there = config.moe_layers
        if not there:
            if self.layers or self.full:
                name = "layers" if self.layers else "full"
                raise ValueError(
                    f"{name}={list(getattr(self, name))}: {DENSE}; leave {name} out, and the trace holds log-probabilities"
                )
            return Options((), (), predicted=True)
        for name, asked in (("layers", self.layers or ()), ("full", self.full)):
            for layer in asked:
                config.check_moe(name, layer)
        layers = tuple(there) if self.layers is None else tuple(sorted({*self.layers, *self.full}))
        return Options(layers, tuple(self.full), self.predicted)


class Recorder:
    """The function in ``Pass.record`` for one forward pass: it keeps each layer's routing, compactly, on its device.

    A layer that never calls it is an error in :meth:`rows`: a trace cannot silently lack what an execution path
    forgot to record.

    Args:
        first: also called in every layer, recorded or not, before anything of the layer is kept.
    """

    def __init__(self, options: Options, first: Callable[[int, Routing], None] | None = None):
        self.options, self.first = options, first
        self.found: dict[int, dict[str, torch.Tensor]] = {}

    def __call__(self, layer: int, routing: Routing) -> None:
        import torch

        # A function that changes the routing is seen in what is kept, as the layer computes with it.
        if self.first is not None:
            self.first(layer, routing)
        if layer not in self.options.layers:
            return
        assert layer not in self.found, f"layer {layer} recorded twice in one forward pass"
        probs = routing.probs.float().flatten(0, 1)
        self.found[layer] = {
            "experts": routing.experts.flatten(0, 1).to(torch.int16),
            "probs": routing.gate_probs.flatten(0, 1).float(),
            "weights": routing.weights.flatten(0, 1).float(),
            "kept": routing.kept.flatten(0, 1),
            "entropy": torch.special.entr(probs).sum(dim=-1),
        }
        if layer in self.options.full:
            self.found[layer]["full"] = probs.half()

    def rows(self, real: torch.Tensor) -> dict[str, np.ndarray]:
        """What was recorded of the tokens where ``real`` ([B, T] bool) is true, B samples after one another.

        Returns:
            ``experts``, ``probs``, ``weights``, ``kept`` [n, L, K], ``entropy`` [n, L], ``full.{layer}`` [n, E]. L and K are
            0 if no layer was asked for.
        """
        import torch

        if not self.options.layers:
            return nothing(int(real.sum()))
        missing = [layer for layer in self.options.layers if layer not in self.found]
        assert not missing, f"layers {missing} took part in the forward pass and recorded nothing"
        rows = real.flatten().nonzero()[:, 0]
        table = {
            name: torch.stack([self.found[layer][name] for layer in self.options.layers], dim=1)[rows]
            for name in (*CHOICE_COLUMNS, "entropy")
        }
        table |= {f"full.{layer}": self.found[layer]["full"][rows] for layer in self.options.full}
        return {name: column.cpu().numpy() for name, column in table.items()}


def nothing(tokens: int) -> dict[str, np.ndarray]:
    """What :meth:`Recorder.rows` returns of a model without experts."""
    columns = {name: np.empty((tokens, 0, 0), dtype) for name, dtype in CHOICE_COLUMNS.items()}
    return columns | {"entropy": np.empty((tokens, 0), np.float32)}


class LoadRecorder:
    """The function in ``Pass.record`` that only counts: choices that ask for a place, those that find none, and the fullest expert.

    It keeps two numbers for each token and two for each routing group, whatever the number of layers.
    """

    def __init__(self) -> None:
        self.made: torch.Tensor | None = None
        self.dropped: torch.Tensor | None = None
        self.fullest: torch.Tensor | None = None

    def __call__(self, layer: int, routing: Routing) -> None:
        import torch

        # [G, S K]
        kept = routing.kept.flatten(1)
        counts = torch.zeros(len(kept), routing.probs.shape[-1], dtype=torch.int32, device=kept.device)
        counts.scatter_add_(1, routing.experts.flatten(1), kept.int())
        fullest = counts.amax(dim=1)
        sought = torch.ones_like(routing.kept) if routing.sought is None else routing.sought
        made = sought.sum(dim=-1, dtype=torch.int16)
        dropped = (sought & ~routing.kept).sum(dim=-1, dtype=torch.int16)
        first = self.fullest is None
        self.fullest = fullest if first else torch.maximum(self.fullest, fullest)
        self.made = made if first else self.made + made
        self.dropped = dropped if first else self.dropped + dropped

    def counts(self, groups: int, tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """``fullest`` [G], the most choices that an expert of any layer got of a group; and over all layers, ``made`` [G, S] int16,
        the choices of a token that asked for a place in a buffer, and ``dropped`` [G, S] int16, those of them that found none.
        Zeros for a model without experts."""
        if self.fullest is None:
            none = np.zeros((groups, tokens), np.int16)
            return np.zeros(groups, np.int64), none, none
        return (
            self.fullest.cpu().numpy().astype(np.int64),
            self.made.cpu().numpy(),
            self.dropped.cpu().numpy(),
        )
