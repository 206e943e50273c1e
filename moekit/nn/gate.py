"""The gate: which experts a token goes to, with what weight, and what a full buffer drops.

The rules are those of fairseq's ``moe`` branch (fairseq/modules/moe/top1gate.py and top2gate.py at ebea0072), after
GShard (arXiv 2006.16668, algorithm 1): first choices take their places in an expert's buffer before any second
choice does, each in token order; whoever finds the buffer full is dropped.

Shape letters: G routing groups, S tokens of a group, E experts, K choices a token (1 or 2).
A routing group is what fairseq routes together: the tokens of one forward call on one rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moekit.nn.config import ModelConfig


@dataclass(frozen=True)
class Routing:
    """What the gate decided, and exactly what the dispatch uses.

    Attributes:
        probs: [G, S, E], softmax of the gate's logits, float32 (or the model's dtype without ``gate_fp32``).
        experts: [G, S, K] int64, the chosen experts, best first.
        gate_probs: [G, S, K], ``probs`` of the chosen experts.
        kept: [G, S, K] bool, False where the choice was not dispatched: its expert's buffer was full, the second
            expert was sampled away, or the token is masked padding.
        weights: [G, S, K] in the model's dtype, the combine weights, zero where not kept.
        capacity: places a group has in an expert's buffer; None when nothing is dropped.
    """

    probs: Tensor
    experts: Tensor
    gate_probs: Tensor
    kept: Tensor
    weights: Tensor
    capacity: int | None


@dataclass(frozen=True)
class Edit:
    """What an experiment changes in the gate's decision (see moekit/nn/intervene.py).

    Attributes:
        mask: [E] bool, experts whose logits become -inf, or None.
        forced: [G, S, K] int64, the choices in place of the gate's; -1 leaves one to the gate. Or None.
        drop_second: second choices are not dispatched.
    """

    mask: Tensor | None = None
    forced: Tensor | None = None
    drop_second: bool = False

    def choose(self, k: int, chosen: Tensor) -> Tensor:
        """The k-th choices [G, S], those of the gate being ``chosen``."""
        if self.forced is None:
            return chosen
        return torch.where(self.forced[..., k] >= 0, self.forced[..., k], chosen)


def capacity(tokens: int, config: ModelConfig, fraction: float | None) -> int | None:
    """Places a routing group of ``tokens`` tokens has in each expert's buffer.

    ``None`` drops nothing. ``fraction > 0``: ``ceil(fraction * tokens)``. Otherwise the training's rule,
    ``ceil(tokens / experts)`` places for top-1 and twice that for top-2.
    """
    if fraction is None:
        return None
    if fraction > 0:
        return math.ceil(fraction * tokens)
    return config.top_k * math.ceil(tokens / config.experts)


def places(chosen: Tensor) -> Tensor:
    """Rank of each choice among those of its group that are of the same expert.

    Args:
        chosen: [G, P] int64, the expert of each choice in order of service.

    Returns:
        [G, P] int64: 0 for the first that an expert gets. Sorted, not one-hot: memory is O(G P), not O(G P E).
    """
    ordered, order = chosen.short().sort(dim=1, stable=True)  # sixteen bits take a quarter of the passes
    index = torch.arange(chosen.shape[1], device=chosen.device).expand_as(chosen)
    starts = torch.searchsorted(ordered, ordered)  # where each run of equal experts begins
    return torch.empty_like(chosen).scatter_(1, order, index - starts)


def choose(
    logits: Tensor,
    config: ModelConfig,
    noise: Callable[[str, Tensor], Tensor] | None = None,
    edit: Edit = Edit(),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which experts each token wants, whatever room they have.

    Args:
        logits: [..., E]; the others as in :func:`route`.

    Returns:
        ``probs`` [..., E], ``experts`` [..., K] and ``gate_probs`` [..., K] of a :class:`Routing`; and the weights
        [..., K] that the choices have if none of them is dropped: ``gate_probs`` normalised to a sum of 1, for top-1
        as they are.
    """
    if config.gate_fp32:
        logits = logits.float()
    if edit.mask is not None:
        logits = logits.masked_fill(edit.mask, float("-inf"))
    probs = F.softmax(logits, dim=-1)
    first = edit.choose(0, probs.argmax(dim=-1))  # of the probabilities, as fairseq does: ties fall alike
    if config.top1:
        experts = first[..., None]
    else:
        rest = logits
        if config.second_expert == "sampling":
            rest = logits + noise("gumbel", logits)
        second = edit.choose(1, rest.scatter(-1, first[..., None], float("-inf")).argmax(dim=-1))
        experts = torch.stack([first, second], dim=-1)
    gate_probs = probs.gather(-1, experts)
    return probs, experts, gate_probs, gate_probs if config.top1 else _normalize(gate_probs)


def route(
    logits: Tensor,
    config: ModelConfig,
    *,
    fraction: float | None,
    padding: Tensor | None = None,
    noise: Callable[[str, Tensor], Tensor] | None = None,
    edit: Edit | None = None,
    choose_fast: Callable[[Tensor, ModelConfig], tuple[Tensor, Tensor, Tensor, Tensor]] | None = None,
) -> Routing:
    """Route the tokens of each group.

    Args:
        logits: [G, S, E], the gate's output in the model's dtype.
        fraction: ``capacity_token_fraction``, see :func:`capacity`.
        padding: [G, S] bool, tokens that are not routed (only with ``config.mask_padding``).
        noise: draws what ``second_expert`` "sampling" and "random" need: ``noise("gumbel" or "uniform", like)``
            returns a tensor of the shape, dtype and device of ``like``.
        edit: an experiment's changes.
        choose_fast: takes the place of :func:`choose` where there is neither noise nor an edit in it.

    Returns:
        The routing, with K = ``config.top_k``. Nothing here asks the device for a number.
    """
    if choose_fast is None or edit is not None or config.second_expert == "sampling":
        probs, experts, gate_probs, undropped = choose(logits, config, noise, edit or Edit())
    else:
        probs, experts, gate_probs, undropped = choose_fast(logits, config)

    kept = torch.ones_like(experts, dtype=torch.bool)
    room = capacity(logits.shape[1], config, fraction)
    drop_second = edit is not None and edit.drop_second and not config.top1
    random = config.second_expert == "random" and not config.top1
    if room is None and padding is None and not drop_second and not random:
        return Routing(probs, experts, gate_probs, kept, undropped.to(logits.dtype), None)

    weights = undropped if config.normalize_before_dropping else gate_probs
    if drop_second:
        kept[..., 1] = False
    if random:
        kept[..., 1] &= 2 * weights[..., 1] > noise("uniform", weights[..., 1])
    if padding is not None:
        kept &= ~padding[..., None]
    if room is not None:
        served = torch.where(kept, experts, config.experts)
        order = None
        if config.batch_prioritized and not config.top1:  # the branch's top-1 gate has no such option
            order = (-probs.amax(dim=-1)).argsort(dim=1, stable=True)
        kept &= queue(served, order) < room

    if not config.top1 and not config.normalize_before_dropping:
        weights = _normalize(weights * kept)
    return Routing(probs, experts, gate_probs, kept, (weights * kept).to(logits.dtype), room)


def queue(served: Tensor, order: Tensor | None) -> Tensor:
    """The place of each choice in its expert's buffer: all first choices come before any second one.

    Args:
        served: [G, S, K] int64, the experts in question; E for "none".
        order: [G, S] int64, the tokens of a group in order of service; None for that of the text.

    Returns:
        [G, S, K] int64.
    """
    groups, tokens, choices = served.shape
    if order is not None:
        order = order[..., None].expand_as(served)
        served = served.gather(1, order)
    line = served.transpose(1, 2).flatten(1)  # a group's first choices, then its second ones
    place = places(line).view(groups, choices, tokens).transpose(1, 2)
    return place if order is None else torch.empty_like(place).scatter_(1, order, place)


def by_expert(routing: Routing, experts: int) -> tuple[Tensor, Tensor]:
    """The choices of all groups sorted by expert: ``order`` [G S K] int64, what was not kept at the end; ``counts`` [E]."""
    return sort_by_expert(torch.where(routing.kept, routing.experts, experts).flatten(), experts)


def sort_by_expert(expert: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The expert of each place, [P] integers, E for none -> what :func:`by_expert` returns."""
    assert experts < torch.iinfo(torch.int16).max
    ordered, order = expert.short().sort(stable=True)  # sixteen bits take a quarter of the passes
    bounds = torch.searchsorted(ordered, torch.arange(experts + 1, device=expert.device, dtype=ordered.dtype))
    return order, bounds.diff()


def _normalize(weights: Tensor) -> Tensor:
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).eps)


def balance_loss(routing: Routing) -> Tensor:
    """fairseq's auxiliary loss of one layer: E * sum over experts of (mean gate probability * share of first choices).

    GShard's l_aux (arXiv 2006.16668, section 2.2; ``l_aux`` in fairseq/modules/moe/top2gate.py). 1 when balanced.
    """
    probs = routing.probs.flatten(0, 1)  # [N, E]
    experts = probs.shape[1]
    first = routing.experts[..., 0].flatten()
    share = torch.bincount(first, minlength=experts).to(probs.dtype) / len(first)
    return experts * (probs.mean(dim=0) * share).sum()
