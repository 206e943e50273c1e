"""The shapes of the benches, their random weights, and the number of their parameters.

A download is not needed: a model with random weights takes as long as a trained one, if its numbers stay finite and its
gates choose many experts. score.py checks both.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from moekit.checkpoint import export
from moekit.nn import resident, transformer
from moekit.nn.config import ModelConfig
from moekit.nn.dispatch import owned
from moekit.nn.quantise import quantise
from moekit.nn.resident import Residence
from moekit.nn.transformer import Transformer
from moekit.ranks import Rank
from moekit.worker import loading

EN_MOE_LM_15B = ModelConfig(
    layers=12,
    dim=768,
    ffn_dim=3072,
    heads=12,
    vocab_rows=50_264,
    input_dim=768,
    output_dim=768,
    max_positions=2048,
    activation="gelu",
    pre_norm=True,
    share_output=True,
    moe_freq=2,
    experts=512,
    gate_fp32=True,
    second_expert="all",
)
SHAPES = {
    "15b": EN_MOE_LM_15B,
    "52b": replace(
        EN_MOE_LM_15B, layers=24, dim=1024, ffn_dim=4096, heads=16, input_dim=1024, output_dim=1024
    ),
    "15b-64e": replace(EN_MOE_LM_15B, experts=64),
    "tiny": replace(
        EN_MOE_LM_15B,
        layers=4,
        dim=64,
        ffn_dim=128,
        heads=4,
        vocab_rows=500,
        input_dim=64,
        output_dim=64,
        max_positions=256,
        experts=16,
    ),
}
# en_dense_lm_1_3b of the release: its layers and dim are those of fairseq's examples/moe_lm/README.md, its heads and widths
# those of fairseq's architecture transformer_lm_gpt3_xl.
SHAPES["dense-1.3b"] = replace(
    EN_MOE_LM_15B,
    layers=24,
    dim=2048,
    ffn_dim=8192,
    heads=32,
    input_dim=2048,
    output_dim=2048,
    moe_freq=0,
    experts=0,
)
SHAPES["dense-tiny"] = replace(SHAPES["tiny"], moe_freq=0, experts=0)
# The number of files with experts; one more file holds the other tensors. A dense model is one file.
FILES = {"15b": 64, "52b": 64, "15b-64e": 8, "tiny": 4, "dense-1.3b": 1, "dense-tiny": 1}

# ------------------------------------------------------------------------------------------------ random weights

# The length of the constant part of a skewed gate's input, whose other part has a length of sqrt(dim).
CONSTANT = 4.0


def draw(name: str, parameter: Tensor, config: ModelConfig, generator: torch.Generator) -> None:
    """Fill the parameter called ``name`` with uniform numbers.

    Inputs of variance 1 give outputs of variance 1. Outputs that are added to the residual stream are scaled down by the
    depth (GPT-2's rule). The embeddings are larger than the positions, which are the same for all tokens and would lead
    all tokens to a few experts.
    """
    if name == "norm.weight":
        # The signs are random, since with gains of one sign the best next token would be the input token.
        parameter.uniform_(-1, 1, generator=generator).sign_()
        return
    if "norm." in name:
        parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        return
    if name.startswith("embed."):
        std = 3 / math.sqrt(config.dim)
    elif name.endswith("bias") or parameter.dim() == (2 if "experts." in name else 1):
        std = 0.02
    else:
        std = 1 / math.sqrt(parameter.shape[-1])
        if name.endswith((".out.weight", ".fc2.weight", "experts.w2")):
            std /= math.sqrt(2 * config.layers)
    parameter.uniform_(-math.sqrt(3) * std, math.sqrt(3) * std, generator=generator)


@torch.no_grad()
def build(
    rank: Rank,
    config: ModelConfig,
    dtype: torch.dtype,
    backend: str,
    kind: torch.dtype | None = None,
    residence: Residence | None = None,
    zipf: float = 0.0,
) -> None:
    """Put a model with random weights into ``rank.state["model"]``: this rank's experts, and the shared parameters.

    Args:
        kind: of the experts' matrices; None for ``dtype``.
        residence: where the experts are; the numbers do not depend on it.
        zipf: of :func:`skew`.
    """
    model = loading.empty(rank, config, dtype, backend, kind, residence is not None)
    shared, own = (torch.Generator(rank.device).manual_seed(seed) for seed in (1, 2 + rank.rank))
    for name, parameter in model.named_parameters():
        if kind is None or ".experts." not in name:
            drawn = torch.empty_like(parameter, device=rank.device)
            draw(name, drawn, config, own if ".experts." in name else shared)
            parameter.data = drawn if parameter.device == rank.device else parameter.data.copy_(drawn)
            continue
        path, _, field = name.rpartition(".")
        experts = model.get_submodule(path)
        drawn = torch.empty((1, *parameter.shape[1:]), dtype=dtype, device=rank.device)
        for number in range(experts.held):
            draw(name, drawn, config, own)
            experts.fill(field, number, drawn[0])
    if zipf:
        skew(model, zipf)
    if residence is not None:
        held = owned(config.experts, rank.world_size, rank.rank)
        resident.install(model, residence, held, rank.device)
    rank.state["model"] = model


@torch.no_grad()
def skew(model: Transformer, exponent: float) -> None:
    """Make the gates choose about as Zipf's law says: the n-th most frequent expert with a share of n ** -exponent.

    A gate has no biases, so each gate's input gets a constant part, and the gate's matrix an answer to it: the logarithm
    of the share, on the scale of the logits' spread. The most frequent experts are others in each layer.
    """
    for layer in model.config.moe_layers:
        block = model.layers[layer]
        weight, bias = block.moe.gate.weight, block.ffn_norm.bias
        generator = torch.Generator().manual_seed(layer)
        way = F.normalize(torch.randn(weight.shape[1], generator=generator), dim=0)
        frequency = 1 + torch.randperm(len(weight), generator=generator).float()
        # A choice is the best of sums of logits and noise. With noise of Gumbel's distribution, whose standard deviation
        # is pi / sqrt(6), the shares are the exponentials of the logits; the spread of these logits is about 1.
        logits = -exponent * frequency.log() * math.sqrt(6) / math.pi
        bias += (CONSTANT * way).to(bias)
        weight += (logits[:, None] * way / CONSTANT).to(weight)


# For each stack of experts, the sum of each expert's numbers.
Sums = dict[str, list[float]]


@torch.no_grad()
def write(
    config: ModelConfig,
    folder: Path,
    files: int,
    device: torch.device,
    read_as: torch.dtype,
    kind: torch.dtype | None = None,
) -> Sums:
    """Write a float16 checkpoint with random weights in the released layout, one file in memory at a time.

    Returns:
        The sums of the experts' numbers after conversion to the dtype ``read_as``, or for matrices to ``kind``.
    """
    generator = torch.Generator(device).manual_seed(1)
    with torch.device("meta"):
        parameters = dict(Transformer(config).named_parameters())
    sums: Sums = {name: [] for name in parameters if ".experts." in name}

    def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = torch.empty(shape, device=device)
        draw(name, tensor, config, generator)
        return tensor.half()

    def stacks(held: range) -> dict[str, Tensor]:
        found = {}
        for name in sums:
            stack = drawn(name, (len(held), *parameters[name].shape[1:]))
            if kind is None or stack.dim() == 2:
                sums[name] += expert_sums(stack.to(read_as))
            else:
                for matrix in stack:
                    numbers = torch.empty_like(matrix, dtype=kind)
                    quantise(matrix, numbers, torch.empty(len(matrix), device=device))
                    sums[name] += expert_sums(numbers[None])
            found[name] = stack.cpu()
        return found

    shared = {name: drawn(name, p.shape).cpu() for name, p in parameters.items() if name not in sums}
    export.write(config, folder, files, shared, stacks, dtype=torch.float16)
    return sums


def expert_sums(stack: Tensor) -> list[float]:
    """[E, ...] -> the sum of each expert's numbers, which does not depend on the order of the additions.

    The sum is exact in float64: every float16 is a multiple of 2**-24, also after conversion to bfloat16 or float32, and
    so is every number of one byte.
    """
    return [(e.float() if e.itemsize == 1 else e).sum(dtype=torch.float64).item() for e in stack]


# ------------------------------------------------------------------------------------------------- parameters


def parameters(config: ModelConfig) -> int:
    """The parameters of the model; a pass whose tokens reach every expert reads each of them once."""
    return transformer.parameters(config)
