"""What all gates share: which experts a token goes to, with what weight, and what a full buffer drops.

The rules are those of fairseq's ``moe`` branch (fairseq/modules/moe at ebea0072), after GShard (arXiv 2006.16668,
algorithm 1): an expert's buffer takes all first choices before any second one, each in the order of tokens; a choice
that finds the buffer full is dropped. The gates themselves are in gates.py.

Shape letters: G routing groups, S tokens of a group, E experts, K choices a token, P choices.
A routing group is what fairseq routes together: the tokens of one forward call on one rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.nn.config import ModelConfig

# Groups, tokens of each, and the capacity's fraction, in the calls of a trial: several texts, one, and a decode step of two.
# A gate may be slow, so they are few.
TRIED = (2, 3, None), (1, 3, 0.5), (2, 1, None)

# What a gate says of itself, and the methods of which it says that.
CHOICE = frozenset({"choose", "chosen"})
WORDS = {
    "softmax_top_k": CHOICE,
    "repeats": CHOICE | {"dispatched", "order", "weigh", "capacity", "fill", "route"},
}


@dataclass(frozen=True)
class Routing:
    """What a gate decided, and exactly what the dispatch uses.

    Attributes:
        probs: [G, S, E], softmax of the gate's logits, float32 (or the model's dtype without ``gate_fp32``).
        experts: [G, S, K] int64, the chosen experts, best first.
        gate_probs: [G, S, K], ``probs`` of the chosen experts.
        kept: [G, S, K] bool, False where the choice was not dispatched: its expert's buffer was full, the second
            expert was sampled away, or the token is masked padding.
        weights: [G, S, K] in the model's dtype, the combine weights, zero where not kept.
        capacity: choices of a group that an expert's buffer takes; None where the capacity drops nothing.
        sorted: what :func:`by_expert` makes of it, where filling the buffers found that, too; else None.
        sought: [G, S, K] bool, False where the gate or an experiment left the choice out, so that it asked for no place in a
            buffer; None where all did.
    """

    probs: Tensor
    experts: Tensor
    gate_probs: Tensor
    kept: Tensor
    weights: Tensor
    capacity: int | None
    sorted: tuple[Tensor, Tensor] | None = None
    sought: Tensor | None = None


@dataclass(frozen=True)
class Edit:
    """What an experiment changes in the gate's decision (see moekit/nn/intervene.py).

    Attributes:
        mask: [E] bool, experts whose logits become -inf, or None.
        forced: [G, S, K] int64, the choices in place of the gate's; -1 leaves one to the gate. Or None.
        drop_second: only first choices are dispatched.
    """

    mask: Tensor | None = None
    forced: Tensor | None = None
    drop_second: bool = False

    def choose(self, k: int, chosen: Tensor) -> Tensor:
        """The k-th choices [G, S], those of the gate being ``chosen``."""
        if self.forced is None:
            return chosen
        return torch.where(self.forced[..., k] >= 0, self.forced[..., k], chosen)


def capacity(tokens: int, fraction: float | None, top_k: int, experts: int) -> int | None:
    """Choices of a routing group of ``tokens`` tokens that an expert's buffer takes.

    ``None`` drops nothing. ``fraction > 0``: ``ceil(fraction * tokens)``. Any other number is the training's rule,
    ``top_k * ceil(tokens / experts)``.
    """
    if fraction is None:
        return None
    if fraction > 0:
        return math.ceil(fraction * tokens)
    return top_k * math.ceil(tokens / experts)


class Gate:
    """How logits become a :class:`Routing`; a subclass (see gates.py) says what differs between gates.

    A subclass defines :meth:`describe` and :meth:`choose`. It overrides the others where the defaults do not fit: choices are served in the
    order of the text, none is dropped but for the capacity and for padding, and weights do not depend on drops.

    Attributes:
        config: the model's.
        top_k: K, choices a token.
        draws: whether routing draws random numbers, from the ``noise`` that :meth:`route` is given.
        softmax_top_k: whether :meth:`choose` is the softmax and its K best experts, with weights normalised to a sum
            of 1 where K is 2: then a fused kernel may take its place, where K is 1 or 2.
        repeats: whether :meth:`route` computes on the device alone, and the same each time, so that a CUDA graph may replay it:
            Python then runs once for many steps.

    The last two count for the methods they were said of (:meth:`says`): a subclass with another :meth:`choose` says ``softmax_top_k``
    anew, and one that routes in another way ``repeats``.
    """

    top_k: int
    draws = False
    softmax_top_k = False
    repeats = False

    def __init__(self, config: ModelConfig):
        self.config = config

    def says(self, word: str) -> bool:
        """Whether the gate says ``softmax_top_k`` or ``repeats`` of the methods it has.

        The nearest of the instance and its classes that has the word or one of its methods decides: a method that is nearer is another
        one than the word was said of.
        """
        for scope in (vars(self), *map(vars, type(self).__mro__)):
            if word in scope:
                return bool(getattr(self, word))
            if not WORDS[word].isdisjoint(scope):
                return False
        return False

    def describe(self) -> str:
        """The gate in a few words, for tables."""
        raise NotImplementedError

    def choose(
        self,
        logits: Tensor,
        noise: Callable[[str, Tensor], Tensor] | None = None,
        edit: Edit | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Which experts each token chooses, whatever the capacity.

        Args:
            logits: [..., E]; the others as in :meth:`route`.

        Returns:
            ``probs`` [..., E], ``experts`` [..., K], of any integer type, and ``gate_probs`` [..., K] of a :class:`Routing`; and
            the weights [..., K] that the choices have if none of them is dropped.
        """
        raise NotImplementedError

    def chosen(
        self,
        logits: Tensor,
        noise: Callable[[str, Tensor], Tensor] | None = None,
        edit: Edit | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What :meth:`choose` returns, with ``experts`` in int64."""
        probs, experts, gate_probs, weights = self.choose(logits, noise, edit)
        # Fractions would become wrong numbers in silence: the trial refuses them.
        return probs, experts if experts.is_floating_point() else experts.long(), gate_probs, weights

    def dispatched(
        self,
        gate_probs: Tensor,
        weights: Tensor,
        noise: Callable[[str, Tensor], Tensor] | None,
        edit: Edit | None,
    ) -> Tensor | None:
        """[G, S, K] bool, the choices that are dispatched where the capacity allows it; None for all.

        Args:
            gate_probs, weights: [G, S, K], what :meth:`choose` returned; the others as in :meth:`route`.
        """
        if edit is None or not edit.drop_second:
            return None
        kept = torch.ones_like(gate_probs, dtype=torch.bool)
        kept[..., 1:] = False
        return kept

    def order(self, probs: Tensor) -> Tensor | None:
        """[G, S] int64, the tokens of a group in the order in which buffers take them; None for that of the text."""
        return None

    def weigh(self, gate_probs: Tensor, weights: Tensor, kept: Tensor) -> Tensor:
        """[G, S, K] combine weights of the choices that are ``kept``; what it returns for the others is ignored."""
        return weights

    def capacity(self, tokens: int, fraction: float | None) -> int | None:
        """:func:`capacity` of this gate; it is asked only where there is a fraction."""
        return capacity(tokens, fraction, self.top_k, self.config.experts)

    def route(
        self,
        logits: Tensor,
        *,
        fraction: float | None,
        padding: Tensor | None = None,
        noise: Callable[[str, Tensor], Tensor] | None = None,
        edit: Edit | None = None,
        choose: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] | None = None,
        fill: Callable[..., tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]] | None = None,
    ) -> Routing:
        """Route the tokens of each group.

        Args:
            logits: [G, S, E], the output of the gate's matrix in the model's dtype.
            fraction: ``capacity_token_fraction``, see :func:`capacity`.
            padding: [G, S] bool, tokens that are not routed (only with ``config.mask_padding``).
            noise: ``noise("gumbel" or "uniform", like)`` draws a tensor of the shape, dtype and device of ``like``;
                only a gate that :attr:`draws` needs it.
            edit: an experiment's changes.
            choose: called as ``choose(gate, logits, noise, edit)`` in place of :meth:`chosen`; must return the same.
            fill: called as ``fill(gate, probs, experts, gate_probs, weights, kept, padding, capacity, dtype)`` in place of
                :meth:`fill`; must return the same, and may sort the choices, too.

        Returns:
            The routing. No number is read back from the device.
        """
        asked = logits, noise, edit
        probs, experts, gate_probs, weights = choose(self, *asked) if choose else self.chosen(*asked)
        sought = self.dispatched(gate_probs, weights, noise, edit)
        capacity = None if fraction is None else self.capacity(logits.shape[1], fraction)
        dtype = logits.dtype
        if sought is None and padding is None and capacity is None:
            kept, weights, ordered = torch.ones_like(experts, dtype=torch.bool), weights.to(dtype), None
        else:
            # A gate of the user's may write into what it is given.
            own = sought is not None and getattr(self.fill, "__func__", None) is not Gate.fill
            wanted = sought.clone() if own else sought
            asked = probs, experts, gate_probs, weights, wanted, padding, capacity, dtype
            kept, weights, ordered = fill(self, *asked) if fill else self.fill(*asked)
        return Routing(probs, experts, gate_probs, kept, weights, capacity, ordered, sought)

    def fill(
        self,
        probs: Tensor,
        experts: Tensor,
        gate_probs: Tensor,
        weights: Tensor,
        kept: Tensor | None,
        padding: Tensor | None,
        capacity: int | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, None]:
        """Fill the experts' buffers.

        Args:
            kept: what :meth:`dispatched` returned; another ``fill`` than this one gets a copy. The others are as in
                :class:`Routing` and :meth:`route`, ``weights`` as :meth:`choose` returned them.
            dtype: the model's.

        Returns:
            ``kept``, ``weights`` and ``sorted`` of a :class:`Routing`.
        """
        kept = torch.ones_like(experts, dtype=torch.bool) if kept is None else kept
        if padding is not None:
            kept = kept & ~padding[..., None]
        if capacity is not None:
            wanted = torch.where(kept, experts, self.config.experts)
            kept = kept & (buffer_positions(wanted, self.order(probs)) < capacity)
        # A gate that divides by the sum of what is kept says NaN where nothing is.
        return kept, torch.where(kept, self.weigh(gate_probs, weights, kept), 0).to(dtype), None

    @torch.inference_mode()
    def try_out(self, device: torch.device, dtype: torch.dtype) -> None:
        """Route a few tokens on ``device`` in the ways in which a model of this ``dtype`` does, without an experiment.

        Raises:
            ValueError: what comes of it is no :class:`Routing` of a model; or whatever the gate raises.
        """
        self.describe()
        experts, choices = self.config.experts, self.top_k
        sizes = {"probs": experts} | dict.fromkeys(
            ("experts", "gate_probs", "kept", "weights", "sought"), choices
        )
        for groups, tokens, fraction in TRIED:
            numbers = torch.arange(groups * tokens * experts, device=device)
            logits = numbers.view(groups, tokens, experts).sin().to(dtype)
            found = self.route(logits, fraction=fraction, noise=lambda _, like: torch.full_like(like, 0.5))
            for name, size in sizes.items():
                value = getattr(found, name)
                if name == "sought" and value is None:
                    continue
                shape, wanted = list(value.shape), [groups, tokens, size]
                if shape != wanted:
                    raise ValueError(f"{name} have the shape {shape}, expected {wanted}")
                if name in ("kept", "sought") and value.dtype != torch.bool:
                    raise ValueError(f"{name} are {value.dtype}, expected torch.bool")
            kind, chosen = found.experts.dtype, found.experts.unique().tolist()
            if kind != torch.long or not 0 <= min(chosen) <= max(chosen) < experts:
                raise ValueError(
                    f"experts are {chosen} in {kind}, expected 0 to {experts - 1} in {torch.long}"
                )


def buffer_positions(experts: Tensor, order: Tensor | None) -> Tensor:
    """The position of each choice in its expert's buffer: all first choices come before any second one.

    Args:
        experts: [G, S, K] int64, the experts chosen; E for none.
        order: [G, S] int64, the tokens of a group in the order in which buffers take them; None for that of the text.

    Returns:
        [G, S, K] int64, from 0.
    """
    groups, tokens, top_k = experts.shape
    if order is not None:
        order = order[..., None].expand_as(experts)
        experts = experts.gather(1, order)
    # A group's first choices, then its second ones.
    in_turn = experts.transpose(1, 2).flatten(1)
    position = _earlier_of_same(in_turn).view(groups, top_k, tokens).transpose(1, 2)
    return position if order is None else torch.empty_like(position).scatter_(1, order, position)


def _earlier_of_same(experts: Tensor) -> Tensor:
    """[G, P] int64 -> [G, P] int64: how many earlier elements of the row are the same expert.

    It sorts and makes no one-hot rows, so the memory is O(G P) and not O(G P E).
    """
    # Sorting sixteen bits takes a quarter of the passes.
    ordered, order = experts.short().sort(dim=1, stable=True)
    index = torch.arange(experts.shape[1], device=experts.device).expand_as(experts)
    # Where each run of equal experts begins.
    starts = torch.searchsorted(ordered, ordered)
    return torch.empty_like(experts).scatter_(1, order, index - starts)


def by_expert(routing: Routing, experts: int) -> tuple[Tensor, Tensor]:
    """The choices of all groups sorted by expert.

    Returns:
        ``order`` [G S K] int64, indices of the choices, those that are not kept at the end; ``counts`` [E] int64, how
        many choices of each expert are kept.
    """
    return sort_by_expert(torch.where(routing.kept, routing.experts, experts).flatten(), experts)


def sort_by_expert(expert: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The expert of each choice, [P] integers, E for none -> what :func:`by_expert` returns."""
    assert experts < torch.iinfo(torch.int16).max
    # Sorting sixteen bits takes a quarter of the passes.
    ordered, order = expert.short().sort(stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(experts + 1, device=expert.device, dtype=ordered.dtype))
    return order, bounds.diff()


def balance_loss(routing: Routing) -> Tensor:
    """fairseq's auxiliary loss of one layer: E * sum over experts of (mean gate probability * share of first choices).

    GShard's l_aux (arXiv 2006.16668, section 2.2; ``l_aux`` in fairseq/modules/moe/top2gate.py). 1 when balanced.
    """
    # [N, E]
    probs = routing.probs.flatten(0, 1)
    experts = probs.shape[1]
    first = routing.experts[..., 0].flatten()
    share = torch.bincount(first, minlength=experts).to(probs.dtype) / len(first)
    return experts * (probs.mean(dim=0) * share).sum()
