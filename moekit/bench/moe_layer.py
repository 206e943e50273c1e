"""One MoE layer (gate, dispatch, experts, combine), compared with other installed implementations on the same weights."""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import importlib.util
import statistics
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from moekit.bench import measure, shapes
from moekit.bench.figures import GIB, Figure, spread
from moekit.bench.measure import Ceilings
from moekit.bench.score import FRACTION, numbers
from moekit.bench.setting import Setting, ceiling_figures
from moekit.nn.config import DENSE
from moekit.nn.dispatch import Local
from moekit.nn.experts import Experts, QuantisedExperts
from moekit.nn.ffn import activation_fn
from moekit.nn.gate import Routing
from moekit.nn.gates import top_k_of
from moekit.nn.operations import use
from moekit.nn.passes import Pass
from moekit.nn.transformer import MoE, allocated
from moekit.ranks import Rank
from moekit.ranks.machine import host_memory

AGAINST = ("grouped_mm", "transformers", "loop")
Layer = Callable[[Tensor, Pass], Tensor]
# The accepted relative error of a token's output, by the dtype of the computation.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# The share of tokens that may differ: gates round differently, and with two tied experts another one may be chosen.
TIES = 1e-3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--against", type=names, default=list(AGAINST), help=f"of {','.join(AGAINST)} (default: all)"
    )
    parser.add_argument(
        "--tokens", type=numbers, help="tokens of a call (default: one block and 32; one without a GPU)"
    )


def names(text: str) -> list[str]:
    found = text.split(",")
    if unknown := sorted(set(found) - set(AGAINST)):
        raise argparse.ArgumentTypeError(f"{unknown} unknown; expected some of {','.join(AGAINST)}")
    return found


@torch.inference_mode()
def run(setting: Setting, args: argparse.Namespace) -> list[Figure]:
    """Time the layer on one rank.

    The limit is the longer of two times. One is to read the weights of the chosen experts once and to read and write the
    tokens. The other is to compute two operations per parameter of an expert and kept choice, and those of the gate.

    Raises:
        ValueError: a result differs from the result of the loop.
    """
    config = setting.config
    if not config.moe_layers:
        return [Figure("layer", None, "ms", note=DENSE)]
    device = torch.device(setting.device, 0) if setting.device == "cuda" else torch.device("cpu")
    ceilings = measure.ceilings(Rank(0, 1, device), setting.kind)
    with torch.device("meta"):
        moe = MoE(config, config.moe_layers[0], config.experts, Local())
    moe = allocated(moe, device, setting.kind)
    generator = torch.Generator(device).manual_seed(1)
    for name, parameter in moe.named_parameters():
        shapes.draw(name, parameter, config, generator)
    if setting.experts_kind is not None:
        moe.experts = QuantisedExperts.of(moe.experts, setting.experts_kind)

    block = config.max_positions
    rows = ceiling_figures(ceilings, setting.dtype)
    for tokens in args.tokens or ([block, 32 * block] if setting.device == "cuda" else [block]):
        groups = max(1, tokens // block)
        x = torch.randn(groups, tokens // groups, config.dim, generator=generator, device=device)
        rows += compared(moe, x.to(setting.kind), setting, ceilings, args.against)
    return rows


def compared(moe: MoE, x: Tensor, setting: Setting, ceilings: Ceilings, against: list[str]) -> list[Figure]:
    """One row per implementation of the layer, on x [G, S, D]."""
    groups, tokens = len(x), x.shape[0] * x.shape[1]
    seen: list[Routing] = []
    expected = ours("loop")(moe)(
        x, Pass(FRACTION, groups, record=lambda layer, routing: seen.append(routing))
    )
    least = limit(setting, ceilings, seen[0], x)
    asked = Pass(FRACTION, groups)
    rows = []
    for name, make in ways(setting, against, tokens).items():
        work = f"layer, {tokens} tokens: {name}"
        try:
            layer = make(moe)
            note = same(name, layer(x, asked), expected)
        except Missing as missing:
            rows.append(Figure(work, None, "ms", note=str(missing)))
            continue
        with measure.memory(x.device) as peak:
            seconds = measure.seconds(
                functools.partial(layer, x, asked), x.device, repeats=setting.repeats, least=0.02
            )
        rows.append(
            Figure(
                work,
                statistics.median(seconds) * 1e3,
                "ms",
                least * 1e3,
                lower=True,
                gpu_gib=peak.gpu_gib,
                host_gib=peak.host_gib,
                note=f"{spread(seconds)}; {note}",
            )
        )
    return rows


def limit(setting: Setting, ceilings: Ceilings, routing: Routing, x: Tensor) -> float:
    """The limit in seconds; :func:`run` explains it."""
    config = setting.config
    gate = config.dim * config.experts
    kept = int(routing.kept.sum())
    reached = len(routing.experts[routing.kept].unique())
    read = reached * setting.sizes.expert + (gate + 2 * x.numel()) * setting.itemsize
    tokens = x.shape[0] * x.shape[1]
    return ceilings.seconds(read, 2 * (kept * 2 * config.dim * config.ffn_dim + tokens * gate))


def same(name: str, found: Tensor, expected: Tensor) -> str:
    """The difference between ``found`` and ``expected``, both [G, S, D], as text for a note.

    Raises:
        ValueError: the difference is too large.
    """
    found, wanted = found.flatten(0, 1).float(), expected.flatten(0, 1).float()
    # The mean is over all tokens, since dropped tokens are zero.
    scale = wanted.norm(dim=1).mean()
    error = (found - wanted).norm(dim=1) / scale
    # With this form of the comparison, NaN counts as wrong, too.
    wrong = int((~(error < TOLERANCE[expected.dtype])).sum())
    if wrong > max(1, TIES * len(error)):
        raise ValueError(
            f"{name} computes something else than the loop: {wrong} of {len(error)} tokens are off by more than "
            f"{TOLERANCE[expected.dtype]}, the worst by {error.max():.3g}"
        )
    return f"error {error.median():.0e}"


class Missing(Exception):
    """An implementation cannot run here; the message gives the reason."""


Make = Callable[[MoE], Layer]


def ways(setting: Setting, against: list[str], tokens: int) -> dict[str, Make]:
    """The implementations of the layer, moekit's first. Each may raise :class:`Missing`."""
    found: dict[str, Make] = {f"moekit's ({setting.backend})": ours(setting.backend)}
    # Only the loop has a product with weights of one byte.
    for name in against if setting.experts is None else {"loop"} & set(against):
        if name == "transformers":
            for implementation in ("grouped_mm", "batched_mm"):
                found[f"transformers' {implementation}"] = theirs(implementation, setting, tokens)
        elif name != setting.backend:
            found[name] = ours(name)
    return found


def ours(backend: str) -> Make:
    def make(moe: MoE) -> Layer:
        use(moe, backend)
        return lambda x, asked: moe(x, asked).sum(dim=-2)

    return make


def theirs(implementation: str, setting: Setting, tokens: int) -> Make:
    """The experts of the package transformers, after the gate of this model."""

    def make(moe: MoE) -> Layer:
        if importlib.util.find_spec("transformers") is None:
            raise Missing("not installed")
        version = importlib.metadata.version("transformers")
        config = setting.config
        gathered = tokens * top_k_of(config) * config.dim * config.ffn_dim * setting.itemsize
        on_gpu = setting.device == "cuda"
        free = torch.cuda.mem_get_info()[0] if on_gpu else host_memory("MemAvailable")
        if implementation == "batched_mm" and gathered > free / 2:
            raise Missing(f"would copy {gathered / GIB:.0f} GiB of weights, one matrix for each choice")
        try:
            experts = transformers_experts(moe.experts, implementation)
        except (ImportError, TypeError):
            raise Missing(f"transformers {version} has no experts with biases and without gate") from None
        use(moe, setting.backend)

        def layer(x: Tensor, asked: Pass) -> Tensor:
            rows = x.flatten(0, 1)
            routing = moe.route(rows, asked)
            # A dropped choice has the weight 0, but it is computed, too.
            return experts(rows, routing.experts.flatten(0, 1), routing.weights.flatten(0, 1)).view_as(x)

        return layer

    return make


def transformers_experts(experts: Experts, implementation: str) -> nn.Module:
    """``experts``, without a copy of their weights, as a module that transformers' implementations run on."""
    from transformers.integrations.moe import use_experts_implementation

    @use_experts_implementation(has_bias=True, has_gate=False)
    class Theirs(nn.Module):
        def __init__(self, config: SimpleNamespace):
            super().__init__()
            self.num_experts = experts.held
            names = "up_proj", "up_proj_bias", "down_proj", "down_proj_bias"
            for name, tensor in zip(names, experts.tensors.values(), strict=True):
                setattr(self, name, tensor)
            self.act_fn = activation_fn(experts.activation)

        def forward(self, rows: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
            # The decorator replaces this method by an implementation.
            raise NotImplementedError

    return Theirs(SimpleNamespace(_experts_implementation=implementation))
