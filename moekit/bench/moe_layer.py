"""One MoE layer (gate, dispatch, experts, combine), compared with other installed implementations on the same weights."""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from moekit.bench import measure, shapes
from moekit.bench.figures import Figure, spread, too_large
from moekit.bench.measure import Ceilings
from moekit.bench.peers import PEERS, Missing, Peer, version, without_biases
from moekit.bench.score import FRACTION
from moekit.bench.setting import Setting, ceiling_figures, wholes
from moekit.headlines import headline
from moekit.nn import graphs
from moekit.nn.config import DENSE, ModelConfig
from moekit.nn.dispatch import Local
from moekit.nn.experts import QuantisedExperts
from moekit.nn.gate import Routing
from moekit.nn.gates import top_k_of
from moekit.nn.memory import Sizes
from moekit.nn.operations import use
from moekit.nn.passes import Pass
from moekit.nn.transformer import MoE, allocated
from moekit.ranks import Rank
from moekit.ranks.machine import free_memory

AGAINST = ("grouped_mm", "loop", *PEERS)
Layer = Callable[[Tensor, Pass], Tensor]
# The accepted relative error of a token's output, by the dtype of the computation.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# The share of tokens that may differ: gates round differently, and with two tied experts another one may be chosen.
TIES = 1e-3
# Tokens of a call.
MOST = 2**20
# Seconds of a measurement, of as many calls as it takes.
LEAST = 0.02
NO_BYTES = "{} has no product with these weights of one byte"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--against", type=names, default=list(AGAINST), help=f"of {','.join(AGAINST)} (default: all)"
    )
    parser.add_argument(
        "--tokens", type=wholes(MOST), help="tokens of a call (default: one block and 32; one without a GPU)"
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
        ValueError: tokens do not fill routing groups of one length, or a result differs from the result of the loop.
    """
    config = setting.config
    if not config.moe_layers:
        return [Figure("layer", None, "ms", note=DENSE)]
    block = config.max_positions
    asked = args.tokens or ([block, 32 * block] if setting.device == "cuda" else [block])
    groups = [max(1, tokens // block) for tokens in asked]
    for tokens, count in zip(asked, groups, strict=True):
        if odd := tokens % count:
            raise ValueError(
                f"--tokens {tokens}: they go through the gate in {count} groups of one length; expected a multiple of {count}, "
                f"such as {tokens - odd}"
            )
    if why := layer_too_large(setting, config, max(asked)):
        return [Figure("layer", None, "ms", note=why)]
    device = setting.devices[0]
    ceilings = measure.ceilings(Rank(0, 1, device), setting.kind)
    generator = torch.Generator(device).manual_seed(1)
    moe = random_layer(config, setting, generator)

    rows = ceiling_figures(ceilings, setting.dtype)
    if setting.world_size > 1:
        note = f"a layer has one rank; --world-size {setting.world_size} does not count here"
        rows.append(Figure("layer, ranks", 1, "", note=note))
    for tokens, count in zip(asked, groups, strict=True):
        x = torch.randn(count, tokens // count, config.dim, generator=generator, device=device)
        rows += compared(moe, x.to(setting.kind), setting, ceilings, args.against)
    return rows


def layer_too_large(setting: Setting, config: ModelConfig, tokens: int) -> str:
    """The reason why a layer and its rows do not fit into the free memory; "" if they fit.

    A choice has its row and its result, of the kernels and of the plain path, and its hidden layer.
    """
    needed = config.experts * Sizes(config, setting.kind, setting.experts is not None).expert
    needed += tokens * top_k_of(config) * (8 * config.dim + 2 * config.ffn_dim) * setting.itemsize
    return too_large(needed, "a layer and its rows", free_memory([setting.devices[0]])[0])


def random_layer(config: ModelConfig, setting: Setting, generator: torch.Generator) -> MoE:
    """A MoE layer with random weights, on the generator's device."""
    with torch.device("meta"):
        moe = MoE(config, config.moe_layers[0], config.experts, Local())
    moe = allocated(moe, generator.device, setting.kind)
    for name, parameter in moe.named_parameters():
        shapes.draw(name, parameter, config, generator)
    if setting.experts_kind is not None:
        moe.experts = QuantisedExperts.of(moe.experts, setting.experts_kind)
    return moe


def compared(moe: MoE, x: Tensor, setting: Setting, ceilings: Ceilings, against: list[str]) -> list[Figure]:
    """One row per implementation of the layer, on x [G, S, D].

    Raises:
        ValueError: a result of an implementation of moekit differs from the result of the loop.
    """
    groups, tokens = len(x), x.shape[0] * x.shape[1]
    seen: list[Routing] = []
    asked = Pass(FRACTION, groups)
    expected = plain(moe, x, replace(asked, record=lambda layer, routing: seen.append(routing)))
    least = limit(setting, ceilings, seen[0], x)
    rows = []
    for name, way in ways(setting, against).items():
        work = f"layer, {tokens} tokens: {name}"
        try:
            if isinstance(way, Peer):
                figure = of_peer(work, way, moe, x, asked, expected, setting)
            else:
                if setting.experts is not None and name == "grouped_mm":
                    raise Missing(NO_BYTES.format(name))
                figure = timed(work, name, way(moe), x, asked, expected, setting)
        except Missing as missing:
            rows.append(Figure(work, None, "ms", note=str(missing)))
        else:
            rows.append(figure if figure.value is None else replace(figure, limit=least * 1e3))
    return rows


def of_peer(
    work: str, peer: Peer, moe: MoE, x: Tensor, asked: Pass, expected: Tensor, setting: Setting
) -> Figure:
    """The row of somebody else's implementation: whatever goes wrong there is a note, and not the end of the bench.

    Raises:
        Missing: it is not there, or cannot do this.
    """
    if setting.experts is not None:
        raise Missing(NO_BYTES.format(peer.package))
    choices = x.shape[0] * x.shape[1] * top_k_of(setting.config)
    own = moe.experts
    try:
        if not peer.biases:
            moe.experts = without_biases(own)
            expected = plain(moe, x, asked)
        use(moe, setting.backend)
        return timed(work, peer.package, theirs(peer, moe, choices), x, asked, expected, setting)
    except Missing:
        raise
    except Exception as error:
        said = f"{peer.package}{version(peer.package)} failed: {headline(error, 160)}"
        return Figure(work, None, "ms", note=said)
    finally:
        moe.experts = own
        if x.is_cuda:
            measure.give_back(x.device)


def plain(moe: MoE, x: Tensor, asked: Pass) -> Tensor:
    """The result that all others have to have."""
    return ours("loop")(moe)(x, asked)


def timed(
    work: str, name: str, layer: Layer, x: Tensor, asked: Pass, expected: Tensor, setting: Setting
) -> Figure:
    """The row of ``layer``: its time in a CUDA graph, as in a pass of so many tokens, where it can be captured."""
    note = same(name, layer(x, asked), expected)
    call = functools.partial(layer, x, asked)
    with measure.memory(x.device) as peak:
        seconds = measure.seconds(call, x.device, repeats=setting.repeats, least=LEAST)
    if has_graph(x):
        launched = f"{statistics.median(seconds) * 1e3:.3g} ms with its launches"
        try:
            graph = graphs.Graph(lambda rows: layer(rows, asked), x)
        except Exception as error:
            # Libraries say in many ways that they cannot be captured.
            measure.synchronise(x.device)
            note += f"; {launched}, since it cannot be captured: {headline(error, 80)}"
        else:
            note = f"{same(name, graph(x), expected)}; {launched}"
            seconds = measure.seconds(graph.graph.replay, x.device, repeats=setting.repeats, least=LEAST)
    return Figure(
        work,
        statistics.median(seconds) * 1e3,
        "ms",
        lower=True,
        gpu_gib=peak.gpu_gib,
        host_gib=peak.host_gib,
        note=f"{spread(seconds)}; {note}",
    )


def has_graph(x: Tensor) -> bool:
    """Whether a pass of the tokens x [G, S, D] has a graph."""
    return x.is_cuda and x.shape[0] * x.shape[1] <= graphs.MOST_TOKENS


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
    # Not all tokens are ties, and a tie gives finite numbers.
    if wrong > min(max(1, TIES * len(error)), len(error) - 1) or not found.isfinite().all():
        raise ValueError(
            f"{name} computes something else than the loop: {wrong} of {len(error)} tokens are off by more than "
            f"{TOLERANCE[expected.dtype]}, the worst by {error.max():.3g}"
        )
    return f"error {error.median():.0e}"


Make = Callable[[MoE], Layer]


def ways(setting: Setting, against: list[str]) -> dict[str, Make | Peer]:
    """The implementations of the layer, moekit's first."""
    found: dict[str, Make | Peer] = {f"moekit's ({setting.backend})": ours(setting.backend)}
    for name in against:
        if name in PEERS:
            found |= PEERS[name]
        elif name != setting.backend:
            found[name] = ours(name)
    return found


def ours(backend: str) -> Make:
    def make(moe: MoE) -> Layer:
        use(moe, backend)
        return lambda x, asked: moe(x, asked).sum(dim=-2)

    return make


def theirs(peer: Peer, moe: MoE, choices: int) -> Layer:
    """The experts of ``peer`` after the gate of ``moe``, for ``choices`` choices a call."""
    call = peer.call(moe.experts, choices)

    def layer(x: Tensor, asked: Pass) -> Tensor:
        rows = x.flatten(0, 1)
        routing = moe.route(rows, asked)
        return call(rows, routing.experts.flatten(0, 1), routing.weights.flatten(0, 1)).view_as(x)

    return layer
