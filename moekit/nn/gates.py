"""The gates there are, by the name in :attr:`moekit.nn.config.ModelConfig.gate`: another one is a class more in the table.

Top-1 and top-2 are those of fairseq's ``moe`` branch (fairseq/modules/moe/top1gate.py and top2gate.py at ebea0072).
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor

from moekit.arguments import shown
from moekit.headlines import headline
from moekit.nn.config import ModelConfig
from moekit.nn.gate import Edit, Gate


class Top1(Gate):
    """Each token goes to the expert of the greatest probability, weighted by that."""

    top_k = 1
    softmax_top_k = True
    repeats = True

    def describe(self) -> str:
        return "top-1"

    def choose(
        self,
        logits: Tensor,
        noise: Callable[[str, Tensor], Tensor] | None = None,
        edit: Edit | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        _, probs, first = first_choice(logits, self.config, edit)
        experts = first[..., None]
        gate_probs = probs.gather(-1, experts)
        return probs, experts, gate_probs, gate_probs


class Top2(Gate):
    """Each token goes to two experts, weighted by their probabilities normalised to a sum of 1.

    The second one is the best of the others, or ``second_expert`` says that it is drawn: "sampling" adds noise to the
    logits, and "random" dispatches it with twice its weight as the probability.
    """

    top_k = 2
    repeats = True

    @property
    def draws(self) -> bool:
        return self.config.second_expert != "all"

    @property
    def softmax_top_k(self) -> bool:
        return self.config.second_expert != "sampling"

    def describe(self) -> str:
        return f"top-2, second expert: {self.config.second_expert}"

    def choose(
        self,
        logits: Tensor,
        noise: Callable[[str, Tensor], Tensor] | None = None,
        edit: Edit | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits, probs, first = first_choice(logits, self.config, edit)
        others = logits
        if self.config.second_expert == "sampling":
            others = logits + noise("gumbel", logits)
        second = others.scatter(-1, first[..., None], float("-inf")).argmax(dim=-1)
        if edit is not None:
            second = edit.choose(1, second)
        experts = torch.stack([first, second], dim=-1)
        gate_probs = probs.gather(-1, experts)
        return probs, experts, gate_probs, normalized(gate_probs)

    def dispatched(
        self,
        gate_probs: Tensor,
        weights: Tensor,
        noise: Callable[[str, Tensor], Tensor] | None,
        edit: Edit | None,
    ) -> Tensor | None:
        kept = super().dispatched(gate_probs, weights, noise, edit)
        if self.config.second_expert != "random":
            return kept
        kept = torch.ones_like(gate_probs, dtype=torch.bool) if kept is None else kept
        second = (weights if self.config.normalize_before_dropping else gate_probs)[..., 1]
        kept[..., 1] &= 2 * second > noise("uniform", second)
        return kept

    def order(self, probs: Tensor) -> Tensor | None:
        if not self.config.batch_prioritized:
            return None
        return (-probs.amax(dim=-1)).argsort(dim=1, stable=True)

    def weigh(self, gate_probs: Tensor, weights: Tensor, kept: Tensor) -> Tensor:
        return weights if self.config.normalize_before_dropping else normalized(gate_probs * kept)


def first_choice(logits: Tensor, config: ModelConfig, edit: Edit | None) -> tuple[Tensor, Tensor, Tensor]:
    """[..., E] -> the logits as they are used, their softmax [..., E], and each token's first choice [...]."""
    if config.gate_fp32:
        logits = logits.float()
    if edit is not None and edit.mask is not None:
        logits = logits.masked_fill(edit.mask, float("-inf"))
    probs = F.softmax(logits, dim=-1)
    # The greatest probability and not the greatest logit decides, as in fairseq: then ties fall alike.
    first = probs.argmax(dim=-1)
    return logits, probs, first if edit is None else edit.choose(0, first)


def normalized(weights: Tensor) -> Tensor:
    """[..., K] -> the same, divided by their sum."""
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).eps)


# Those of the branch, which files name. Another one is tried before a model is loaded with it.
PROVEN: dict[str, type[Gate]] = {"top1": Top1, "top2": Top2}
GATES = dict(PROVEN)


def top_k_of(config: ModelConfig) -> int:
    """K, the choices a token that the gate of ``config`` makes."""
    return _kind_of(config).top_k


def gate_of(config: ModelConfig) -> Gate:
    """The gate that ``config`` names.

    Raises:
        ValueError: what is entered under this name makes no gate.
    """
    kind = _kind_of(config)
    try:
        return kind(config)
    except Exception as error:
        raise ValueError(
            f"GATES[{config.gate!r}] raised {headline(error, 200)}; expected a class that makes a gate of a ModelConfig alone"
        ) from error


def _kind_of(config: ModelConfig) -> type[Gate]:
    kind = GATES[config.gate]
    if kind is not PROVEN.get(config.gate, kind):
        raise ValueError(
            f"GATES[{config.gate!r}]={shown(kind)}: expected the branch's gate, which files mean by this name and ranks in processes "
            "of their own have: enter another one by a name of its own"
        )
    if not (isinstance(kind, type) and issubclass(kind, Gate)):
        raise ValueError(f"GATES[{config.gate!r}]={shown(kind)}: expected a subclass of moekit.nn.gate.Gate")
    choices = getattr(kind, "top_k", None)
    if not (isinstance(choices, Integral) and choices > 0):
        raise ValueError(f"GATES[{config.gate!r}].top_k={shown(choices)}: expected an integer of at least 1")
    return kind


def interacts(config: ModelConfig, fraction: float | None) -> bool:
    """Whether it matters which tokens are routed together: a capacity is shared, and draws depend on the group."""
    return bool(config.moe_layers) and (fraction is not None or gate_of(config).draws)
