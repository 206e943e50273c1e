"""Other people's layers of experts, on the same weights and after the same gate: each by its package's public calls.

A function here makes a layer of a MoE layer's experts: the rows [N, D], the experts [N, K] and their weights [N, K] go in,
and the sums over each row's choices [N, D] come out. A dropped choice has the weight 0, but it is computed, too.

Versions that these calls were written for: transformers 5.24, triton_kernels of Triton 3.4 to 3.7, vLLM 0.11 to 0.16, ScatterMoE
of 2025-10, MegaBlocks 0.10.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from moekit.headlines import first_line
from moekit.nn.experts import Experts
from moekit.nn.ffn import activation_fn
from moekit.nn.gate import sort_by_expert
from moekit.ranks.machine import free_memory
from moekit.units import GIB

# Rows, experts and weights to sums.
Call = Callable[[Tensor, Tensor, Tensor], Tensor]


class Missing(Exception):
    """An implementation cannot run here; the message gives the reason."""


@dataclass(frozen=True)
class Peer:
    """``make(experts, choices)`` gives the layer for that many choices a call; ``package`` has to be installed for it."""

    package: str
    make: Callable[[Experts, int], Call]
    # MegaBlocks' experts have none: its layer is compared with one without.
    biases: bool = True

    def call(self, experts: Experts, choices: int) -> Call:
        """The layer.

        Raises:
            Missing: the package is not installed, or has no such layer.
        """
        if importlib.util.find_spec(self.package) is None:
            raise Missing(f"{self.package} is not installed")
        try:
            return self.make(experts, choices)
        except ImportError as error:
            said = f"{self.package}{version(self.package)} cannot be imported: {first_line(error, 160)}"
            raise Missing(said) from None


def version(package: str) -> str:
    """The version of an installed package, with a space in front; "" where it has none."""
    try:
        return f" {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return ""


def without_biases(experts: Experts) -> Experts:
    named = experts.tensors
    return experts.over(named | {name: torch.zeros_like(named[name]) for name in ("b1", "b2")})


# ------------------------------------------------------------------------------------------------ transformers


def transformers(implementation: str) -> Callable[[Experts, int], Call]:
    def make(experts: Experts, choices: int) -> Call:
        w1 = experts.w1
        gathered = choices * w1[0].nbytes
        if implementation == "batched_mm" and gathered > free_memory([w1.device])[0] / 2:
            raise Missing(f"would copy {gathered / GIB:.0f} GiB of weights, one matrix for each choice")
        try:
            return _transformers(experts, implementation)
        except (ImportError, TypeError):
            said = f"transformers{version('transformers')}"
            raise Missing(f"{said} has no experts with biases and without gate") from None

    return make


def _transformers(experts: Experts, implementation: str) -> nn.Module:
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


# ---------------------------------------------------------------------------------------------- triton_kernels


def triton_kernels(experts: Experts, choices: int) -> Call:
    """Two products: the first gathers rows and ends with GELU, the second scatters and weights."""
    _only_gelu(experts, "triton_kernels")
    newer = importlib.util.find_spec("triton_kernels.matmul") is not None
    return (_by_matmul if newer else _by_matmul_ogs)(experts)


def _by_matmul(experts: Experts) -> Call:
    """By ``matmul``, of Triton 3.6 and newer; the choices of a row are added afterwards."""
    from triton_kernels.matmul import FnSpecs, FusedActivation, matmul
    from triton_kernels.tensor_details.ragged_tensor import make_ragged_tensor_metadata

    from moekit.bench.gelu import gelu

    w1, b1, w2, b2 = _transposed(experts)
    activation = FusedActivation(FnSpecs("gelu", gelu, ()), ())

    def call(rows: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        order, counts = sort_by_expert(chosen.flatten(), experts.held)
        where = make_ragged_tensor_metadata(counts.int(), len(order))
        read, order = (order // chosen.shape[1]).int(), order.int()
        gathered = weights.flatten()[order]
        hidden = matmul(rows, w1, b1, where, gather_indx=read, fused_activation=activation)
        done = matmul(hidden, w2, b2, where, scatter_indx=order, gammas=gathered)
        return done.view(len(rows), chosen.shape[1], -1).sum(dim=1)

    return call


def _by_matmul_ogs(experts: Experts) -> Call:
    """By ``matmul_ogs``, of Triton 3.4 and 3.5, which also adds up the choices of a row."""
    from triton_kernels import routing
    from triton_kernels.matmul_ogs import FnSpecs, FusedActivation, matmul_ogs

    from moekit.bench.gelu import gelu

    w1, b1, w2, b2 = _transposed(experts)
    activation = FusedActivation(FnSpecs("gelu", gelu, ()), (), **_where(FusedActivation, reduction_n=1))

    def call(rows: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        order, counts = sort_by_expert(chosen.flatten(), experts.held)
        there = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        order, there, counts = order.int(), there.int(), counts.int()
        gathered = weights.flatten()[order.long()]
        data = {}
        if hasattr(routing, "compute_expt_data"):
            found = routing.compute_expt_data(counts, experts.held, len(order))
            data = _where(routing.RoutingData, expt_data=found)
        plan = routing.RoutingData(gathered, counts, experts.held, chosen.shape[1], **data)
        gather = routing.GatherIndx(src_indx=order, dst_indx=there)
        scatter = routing.ScatterIndx(src_indx=there, dst_indx=order)
        hidden = matmul_ogs(rows, w1, b1, plan, gather_indx=gather, fused_activation=activation)
        return matmul_ogs(hidden, w2, b2, plan, scatter_indx=scatter, gammas=gathered).view_as(rows)

    return call


def _transposed(experts: Experts) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Matrices with the terms of the sums first, and biases in float32."""
    w1, b1, w2, b2 = experts.tensors.values()
    return w1.transpose(1, 2), b1.float(), w2.transpose(1, 2), b2.float()


def _where(kind: type, **named: object) -> dict[str, object]:
    """Those of the fields that this version's dataclass has."""
    known = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in named.items() if name in known}


def _only_gelu(experts: Experts, package: str) -> None:
    if experts.activation != "gelu":
        raise Missing(f"{package} is called with gelu only, and this activation is {experts.activation}")


# -------------------------------------------------------------------------------------------------------- vLLM


def vllm(experts: Experts, choices: int) -> Call:
    """``fused_experts`` with the configuration that vLLM has for the shape, or its default."""
    from vllm.model_executor.layers.fused_moe import fused_experts
    from vllm.model_executor.layers.fused_moe.config import biased_moe_quant_config

    _only_gelu(experts, "vllm")
    activation: object = "gelu_no_mul"
    with contextlib.suppress(ImportError):
        # Where it is missing, the name is a text.
        from vllm.model_executor.layers.fused_moe.activation import MoEActivation

        activation = MoEActivation(activation)
    w1, b1, w2, b2 = experts.tensors.values()
    config = biased_moe_quant_config(b1, b2)

    def call(rows: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        named = {"topk_weights": weights.float(), "topk_ids": chosen.int()}
        return fused_experts(rows, w1, w2, **named, activation=activation, quant_config=config)

    return call


# -------------------------------------------------------------------------------------- ScatterMoE, MegaBlocks


def scattermoe(experts: Experts, choices: int) -> Call:
    from scattermoe.mlp import MLP

    w1, b1, w2, b2 = experts.tensors.values()

    def call(rows: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return mlp(chosen.shape[1])(rows, weights.to(rows.dtype), chosen)

    def mlp(top_k: int) -> nn.Module:
        if top_k not in made:
            with torch.device("meta"):
                layer = MLP(
                    input_size=w1.shape[2],
                    hidden_size=experts.width,
                    num_experts=experts.held,
                    top_k=top_k,
                    bias=True,
                    activation=activation_fn(experts.activation),
                )
            for module, weight, bias in ((layer.experts, w1, b1), (layer.output_experts, w2, b2)):
                module.weight, module.bias = _parameter(weight), _parameter(bias)
            made[top_k] = layer
        return made[top_k]

    made: dict[int, nn.Module] = {}
    return call


def megablocks(experts: Experts, choices: int) -> Call:
    """Its dropless layer with grouped products; the sparse ones do not run with today's Triton."""
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import ParallelDroplessMLP

    w1, _, w2, _ = experts.tensors.values()
    made: dict[int, nn.Module] = {}

    def layer(top_k: int) -> nn.Module:
        if top_k not in made:
            arguments = Arguments(
                hidden_size=w1.shape[2],
                ffn_hidden_size=experts.width,
                bias=False,
                return_bias=False,
                activation_fn=activation_fn(experts.activation),
                moe_num_experts=experts.held,
                moe_top_k=top_k,
                mlp_impl="grouped",
                fp16=w1.dtype == torch.float16,
                bf16=w1.dtype == torch.bfloat16,
                device=w1.device,
                # The weights are put into their places below.
                init_method=lambda weight: weight,
                output_layer_init_method=lambda weight: weight,
            )
            made[top_k] = ParallelDroplessMLP(arguments)
            made[top_k].mlp.w1 = _parameter(w1.reshape(-1, w1.shape[2]))
            made[top_k].mlp.w2 = _parameter(w2.transpose(1, 2).reshape(-1, w2.shape[1]))
        return made[top_k]

    def call(rows: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        found, _ = layer(chosen.shape[1]).forward_once(rows, weights.to(rows.dtype), chosen)
        return found

    return call


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


# By the name that ``--against`` takes; transformers has two implementations.
PEERS: dict[str, dict[str, Peer]] = {
    "transformers": {
        f"transformers' {name}": Peer("transformers", transformers(name))
        for name in ("grouped_mm", "batched_mm")
    },
    "triton_kernels": {"triton_kernels": Peer("triton_kernels", triton_kernels)},
    "vllm": {"vLLM": Peer("vllm", vllm)},
    "scattermoe": {"ScatterMoE": Peer("scattermoe", scattermoe)},
    "megablocks": {"MegaBlocks, without biases": Peer("megablocks", megablocks, biases=False)},
}
