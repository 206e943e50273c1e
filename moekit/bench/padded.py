"""Padded and unpadded dispatch on the same work: the branch pads each expert's rows to the capacity, and ours moves what is there.

The padded way is that of fairseq's branch (fairseq/modules/moe/moe_layer.py at ebea0072, after GShard, arXiv 2006.16668): masks
[tokens, experts, capacity] and two products with them, the experts one after the other, and an all-to-all of all places,
whether filled or not. Huang et al. (arXiv 2303.06182) report 6.2 to 11.6 times the speed and 1.36 times less memory from
leaving the padding out, with models of this family. Both ways have to give the same log-probabilities.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moekit.api import Model
from moekit.batches import shares
from moekit.bench import measure, shapes
from moekit.bench.figures import Figure, spread
from moekit.bench.score import FRACTION, MOST, random_batch
from moekit.bench.setting import Setting, number, wholes
from moekit.nn import gate, graphs
from moekit.nn.config import DENSE
from moekit.nn.dispatch import Dispatch
from moekit.nn.experts import Assignment, Experts, expert_of
from moekit.nn.ffn import activation_fn
from moekit.nn.gates import gate_of
from moekit.ranks import Rank
from moekit.units import GIB
from moekit.worker import scoring as worker

# Differences of a log-probability that rounding explains, by the dtype. A token between two experts may go to the other one
# by rounding, and displace others: up to FEW of all tokens may differ by more.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.3}
FEW = 0.02


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--blocks", type=wholes(MOST), default=[1], help="a call and rank, such as 1,4 (default: 1)"
    )
    parser.add_argument(
        "--fraction", type=number(above=0, most=1), default=FRACTION, help="capacity (default: %(default)s)"
    )


def run(setting: Setting, args: argparse.Namespace) -> list[Figure]:
    """Measure both ways at each number of blocks.

    Raises:
        ValueError: the experts cannot be dealt evenly, or the two ways give different log-probabilities.
    """
    if why := setting.too_large():
        return [Figure("padded", None, "tokens/s", note=why)]
    if not setting.config.moe_layers:
        return [Figure("padded", None, "tokens/s", note=DENSE)]
    if setting.experts is not None:
        raise ValueError(
            f"--experts {setting.experts}: the padded way computes in plain torch, with all weights of --dtype; leave it out"
        )
    if setting.config.experts % setting.world_size:
        raise ValueError(
            f"--world-size {setting.world_size}: expected a divisor of {setting.config.experts}, the experts, which the "
            "padded way deals evenly"
        )
    rows = []
    with setting.model() as (model, _):
        for blocks in args.blocks:
            ours, padded = (both(model, setting, blocks, args.fraction, how) for how in (False, True))
            apart = np.concatenate([abs(a.logprobs - b.logprobs) for a, b in zip(ours, padded, strict=True)])
            share = float((~(apart <= TOLERANCE[setting.kind])).mean())
            if share > FEW:
                raise ValueError(
                    f"{share:.1%} of the padded way's log-probabilities differ by more than {TOLERANCE[setting.kind]:g} in "
                    f"{setting.dtype}; expected at most {FEW:.0%}"
                )
            rows += figures(setting, blocks, ours, padded, apart)
    return rows


def figures(
    setting: Setting, blocks: int, ours: list[Measured], padded: list[Measured], apart: np.ndarray
) -> list[Figure]:
    tokens = setting.world_size * blocks * setting.config.max_positions
    found, times, memory = [], [], []
    for name, ranks in (("ours", ours), ("padded", padded)):
        seconds = max(statistics.median(one.seconds) for one in ranks)
        beyond = max(one.beyond for one in ranks)
        times.append(seconds)
        memory.append(beyond)
        note = f"{1e3 * seconds:.2f} ms a call ({spread(ranks[0].seconds)})"
        work = f"{name}, {blocks} x {setting.config.max_positions} tokens a call"
        found.append(Figure(work, tokens / seconds, "tokens/s", note=note))
        if beyond > 0:
            found.append(Figure(f"{name}: GPU memory beyond the weights", beyond, "GiB", lower=True))
    note = f"log-probabilities differ by {apart.mean():.1g} on average, {apart.max():.1g} at most"
    found.append(Figure("speed, ours to padded", times[1] / times[0], "times", note=note))
    if memory[0] > 0:
        found.append(Figure("memory beyond the weights, padded to ours", memory[1] / memory[0], "times"))
    return found


def both(model: Model, setting: Setting, blocks: int, fraction: float, padded: bool) -> list[Measured]:
    return model.ranks.call(
        measured, setting.config, setting.kind, setting.backend, blocks, fraction, setting.repeats, padded
    )


# ------------------------------------------------------------------------------------------------- on a rank


@dataclass(frozen=True)
class Measured:
    """Seconds of each call; the peak of GPU memory beyond the weights, in GiB, 0 on the CPU; log-probabilities [blocks, T]."""

    seconds: list[float]
    beyond: float
    logprobs: np.ndarray


def measured(
    rank: Rank,
    config,
    dtype: torch.dtype,
    backend: str,
    blocks: int,
    fraction: float,
    repeats: int,
    padded: bool,
) -> Measured:
    """Time scoring with a model of random weights, which are the same for both ways."""
    rank.state.clear()
    measure.give_back(rank.device)
    # As the branch, the padded way computes in plain torch, and without CUDA graphs.
    shapes.build(rank, config, dtype, "loop" if padded else backend)
    model = rank.state["model"]
    length = config.max_positions
    if padded:
        capacity = gate_of(config).capacity(length, fraction)
        dispatch = Padded(length, length if capacity is None else capacity, config.experts)
        model.dispatch = dispatch
        for layer in model.layers:
            if layer.moe is not None:
                layer.moe.dispatch = dispatch
    step = [random_batch(i, length, config.vocab_rows) for i in range(blocks * rank.world_size)]
    share = shares(step, rank.world_size)[rank.rank]

    def work() -> list[tuple[int, np.ndarray]]:
        return worker.scores_of(rank, [share], fraction=fraction, vocab=config.vocab_rows, seed=1)[0]

    before = torch.cuda.memory_allocated(rank.device) / GIB if rank.device.type == "cuda" else 0.0
    with measure.memory(rank.device) as peak:
        warm_up = graphs.AFTER + 1 if rank.device.type == "cuda" else 1
        seconds = measure.seconds(work, rank.device, repeats=repeats, warm_up=warm_up)
    logprobs = np.concatenate([found for _, found in sorted(work(), key=lambda pair: pair[0])])
    return Measured(seconds, (peak.gpu_gib or 0.0) - before, logprobs)


class Padded(Dispatch):
    """The branch's dispatch: every expert gets ``capacity`` places of each routing group, filled or not.

    Shape letters: S tokens of a group, E experts, C capacity, D model dim, W ranks, e experts held here.
    """

    def __init__(self, tokens: int, capacity: int, experts: int):
        self.tokens, self.capacity, self.experts = tokens, capacity, experts
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1

    def __call__(
        self, experts: Experts, x: Tensor, assignment: Assignment, rows_expected: int | None = None
    ) -> Tensor:
        choices = assignment.choices
        chosen = expert_of(assignment).view(-1, self.tokens, choices)
        places = gate.buffer_positions(chosen, None)
        weights = assignment.weights.view_as(chosen)
        done = [
            self.group(experts, *one)
            for one in zip(x.view(len(chosen), self.tokens, -1), chosen, places, weights, strict=True)
        ]
        # The sum over a token's choices is in the first of its K results.
        out = x.new_zeros(len(x), choices, x.shape[1])
        out[:, 0] = torch.cat(done)
        return out.flatten(0, 1)

    def group(self, experts: Experts, x: Tensor, chosen: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        """The tokens [S, D] of a group through their experts [S, K], at their places [S, K] in the buffers."""
        combine = x.new_zeros(self.tokens, self.experts, self.capacity)
        mask = torch.zeros_like(combine, dtype=torch.bool)
        token, choice = (chosen < self.experts).nonzero(as_tuple=True)
        at = token, chosen[token, choice], places[token, choice]
        combine[at], mask[at] = weights[token, choice], True
        # [E C, D]
        buffers = mask.flatten(1).T.to(x.dtype) @ x
        buffers = self.exchanged(buffers).view(self.world_size, experts.held, self.capacity, -1)
        activation = activation_fn(experts.activation)
        done = []
        for held in range(experts.held):
            w1, b1, w2, b2 = experts.expert(held)
            done.append(F.linear(activation(F.linear(buffers[:, held], w1, b1)), w2, b2))
        home = self.exchanged(torch.stack(done, dim=1).flatten(0, 2))
        return combine.flatten(1) @ home

    def exchanged(self, buffers: Tensor) -> Tensor:
        """[E C, D]: the buffers of this rank's experts from all ranks, or back."""
        if self.world_size == 1:
            return buffers
        received = torch.empty_like(buffers)
        dist.all_to_all_single(received, buffers.contiguous())
        return received
