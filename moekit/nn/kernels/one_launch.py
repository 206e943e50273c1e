"""A decode step of one sequence in one launch: a kernel whose programs walk through all layers together.

Each multiprocessor has one program. A layer has three or four phases, and a barrier of all programs between any two:

    qkv        norm, queries, keys and values
    attention  of one head, and this head's part of the output projection
    gate       norm and logits, in layers with experts
    ffn        norm, some units of the hidden layer, and their part of the result; of a chosen expert in place of a dense layer

Where several ranks share the experts, all of them run the kernel, and an exchange takes the place of the last phase of a layer
with experts (one_peers.py). A rank without a sequence takes part in these exchanges only.

Programs add their parts to the residual stream, whose numbers are integers (fixed_point.py). The first rows of the output
matrix come into the cache ahead of time (fetch.py), and matrices into registers before a program waits. Only experts have
to wait for their choice.

Shape letters: B sequences (0 or 1), D model dim, H heads, C head dim, M slots, F width, E experts, V dictionary.
"""

from __future__ import annotations

import math
import weakref
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from moekit.nn.cache import Cache
from moekit.nn.config import ModelConfig
from moekit.nn.dispatch import Local
from moekit.nn.gates import gate_of
from moekit.nn.kernels import grid_barrier, one_byte, one_peers
from moekit.nn.kernels.activations import ACTIVATIONS
from moekit.nn.kernels.gate import chooses, keeps
from moekit.nn.kernels.gpu import multiprocessors, since_hopper
from moekit.nn.kernels.one_kernel import (
    ALL,
    ATTENTION,
    BEGIN,
    CHOICES,
    FEED,
    FINISH,
    GATE,
    HAND_OUT,
    HOME,
    PROJECTION,
    serve,
    step,
)
from moekit.nn.kernels.one_parts import COLUMNS, Sizes, units_each
from moekit.nn.kernels.one_peers import Post, post_of
from moekit.nn.kernels.peer_dispatch import PeerDispatch
from moekit.nn.transformer import Block, Transformer

# Sequences of a rank; more of them would share weights, but each has its own norms, sums and experts.
FEW = 1
# The most numbers of a matrix that a program with FORM's warps has in its registers, those of the 15B on 132 multiprocessors:
# more would spill.
MOST = 48 * 768
# How the work is cut, see Sizes: what was fastest on an H200.
FORM = {
    "warps": 8,
    "chunk": 256,
    "slots": 256,
    "outputs": 128,
    "rows": 4,
    "ahead": 96,
}
# What the interpreter launches for a layer, one phase after the other.
EXCHANGE = (HAND_OUT, CHOICES, HOME)
PHASES = {
    "begin": (BEGIN,),
    "dense": (PROJECTION, ATTENTION, FEED),
    "experts": (PROJECTION, ATTENTION, GATE, FEED),
    "peers": (PROJECTION, ATTENTION, GATE, *EXCHANGE),
    "end": (FINISH,),
}
SERVED = {"begin": (), "dense": (), "peers": EXCHANGE, "end": ()}


class Plan(NamedTuple):
    """What the kernel keeps between steps.

    Attributes:
        addresses: those that ``table`` was made of.
        table: [layers + 1, COLUMNS] int64, the addresses of each layer's tensors.
        post: what ranks exchange through, if there are several.
    """

    addresses: tuple[int, ...]
    table: Tensor
    post: Post | None


_plans: weakref.WeakKeyDictionary[Transformer, Plan] = weakref.WeakKeyDictionary()


def fits(model: Transformer, sequences: int) -> bool:
    """Whether :func:`read_on` supports this model, with at most ``sequences`` sequences on each rank."""
    config, embed = model.config, model.embed.weight
    gate = gate_of(config)
    widths = {config.dense_dim(layer) for layer in range(config.layers) if not config.is_moe(layer)}
    supported = (
        0 < sequences <= FEW
        and (isinstance(model.dispatch, Local) or _through_peers(model))
        and model.slots is None
        and config.pre_norm
        and config.input_dim == config.dim == config.output_dim
        and not config.embedding_norm
        and widths <= {config.ffn_dim}
        and (config.dense or (chooses(gate) and keeps(gate)))
        # Memory is read 16 bytes at a time.
        and config.dim % 16 == config.ffn_dim % 16 == config.dim // config.heads % 8 == 0
        and embed.dtype.itemsize == 2
    )
    if not supported or not since_hopper(embed.device):
        return False
    programs = multiprocessors(embed.device)
    rows = max(-(-3 * config.dim // programs), units_each(config.ffn_dim, programs))
    return rows * config.dim <= _room(model)


def _through_peers(model: Transformer) -> bool:
    """Whether the ranks reach one another's memory, and experts are found by the numbers that the gate gives them."""
    in_order = all(layer.moe is None or layer.moe.numbers is None for layer in model.layers)
    return isinstance(model.dispatch, PeerDispatch) and in_order and one_peers.fits(model.dispatch)


def read_on(
    model: Transformer,
    tokens: Tensor,
    cache: Cache,
    vocab: int,
    programs: int | None = None,
) -> Tensor | None:
    """Run one token of a sequence after the tokens in the cache; for inference.

    With several ranks it is a collective, also for a rank where B is 0.

    Args:
        tokens: [B] int64.
        vocab: V, types of the dictionary.
        programs: for tests under the interpreter.

    Returns:
        [B, V] logits; None if B is 0.
    """
    config, device, kind = model.config, tokens.device, model.embed.weight.dtype
    # The counter of the barrier is for as many programs as there are.
    assert len(tokens) <= FEW and (programs is None or device.type != "cuda")
    sizes = sizes_of(model, vocab, programs or multiprocessors(device))
    plan, count, moe = plan_of(model), grid_barrier.counter(model, device), config.moe_layers
    exchange = (None, 0, 0, 0)
    if plan.post is not None:
        held = model.layers[moe[0]].moe.experts.held
        exchange = (plan.post.table, model.dispatch.rank, model.dispatch.first, held)
    if len(tokens) == 0:
        serving = (plan.table, count, model.embed.weight, *exchange)
        _launched(serve, serving, SERVED, config, sizes, device)
        return None
    out = torch.empty(len(tokens), vocab, dtype=kind, device=device)
    assert tokens.is_contiguous() and cache.kv.is_contiguous() and model.output_weight.is_contiguous()
    norm = model.norm
    given = (
        tokens,
        model.embed.weight,
        None if model.positions is None else model.positions.rows(cache.slots, device),
        out,
        plan.table,
        count,
        cache.kv,
        cache.lengths,
        torch.empty(2, config.dim, dtype=torch.long, device=device),
        out.new_empty(3 * config.dim),
        out.new_empty(max(config.experts, 1)),
        None if norm is None else norm.weight,
        None if norm is None else norm.bias,
        model.output_weight,
        *exchange,
        cache.slots,
        math.sqrt(config.dim) if config.scale_embedding else 1.0,
        model.layers[0].attn_norm.eps,
        torch.finfo(torch.float32 if config.gate_fp32 else kind).eps,
        (config.dim // config.heads) ** -0.5,
    )
    _launched(step, given, PHASES, config, sizes, device)
    return out


def _launched(
    kernel: triton.JITFunction,
    given: tuple,
    phases: dict[str, tuple[int, ...]],
    config: ModelConfig,
    sizes: Sizes,
    device: torch.device,
) -> None:
    """Launch a kernel for all layers, or under the interpreter, which runs one program after the other, for each phase."""
    moe = config.moe_layers
    how = {"DENSE": len(moe) < config.layers, "MOE": bool(moe), "s": sizes, "num_warps": sizes.warps}
    if device.type == "cuda":
        kernel[(sizes.programs,)](
            *given, 0, config.layers, ONLY=ALL.value, launch_cooperative_grid=True, **how
        )
        return
    with_experts = "experts" if sizes.ranks == 1 else "peers"
    kinds = {layer: with_experts if layer in moe else "dense" for layer in range(config.layers)}
    turns = [
        (0, 0, "begin"),
        *((n, n + 1, kind) for n, kind in kinds.items()),
        (config.layers, config.layers, "end"),
    ]
    for first, last, kind in turns:
        for phase in phases[kind]:
            kernel[(sizes.programs,)](*given, first, last, ONLY=phase.value, **how)


def sizes_of(model: Transformer, vocab: int, programs: int) -> Sizes:
    config, gate = model.config, gate_of(model.config)
    moe, kind = config.moe_layers, model.embed.weight.dtype
    experts = model.layers[moe[0]].moe.experts if moe else None
    bytes_of = {"ONE_BYTE": 0, "PTX": False} if experts is None else one_byte.layers(experts)[0].options
    gate_dtype = torch.float32 if config.gate_fp32 else kind
    return Sizes(
        d=config.dim,
        h=config.heads,
        c=config.dim // config.heads,
        f=config.ffn_dim,
        e=config.experts,
        v=vocab,
        k=gate.top_k if moe else 1,
        activation=ACTIVATIONS[config.activation],
        exact=kind == torch.float32,
        half=gate_dtype == torch.float16,
        brain=gate_dtype == torch.bfloat16,
        one_byte=bytes_of["ONE_BYTE"],
        ptx=bytes_of["PTX"],
        ranks=_ranks(model),
        programs=programs,
        of_a_choice=_of_a_choice(model, programs, gate.top_k if moe else 1),
        **form_of(model),
    )


def form_of(model: Transformer) -> dict[str, int]:
    """:data:`FORM` for this model: chunks, and rows of the output projection, have to divide D."""
    form = FORM | {name: math.gcd(FORM[name], model.config.dim) for name in ("chunk", "outputs")}
    return form if _ranks(model) == 1 else form | {"warps": one_peers.warps_of(form["chunk"])}


def _ranks(model: Transformer) -> int:
    return model.dispatch.world_size if isinstance(model.dispatch, PeerDispatch) else 1


def _room(model: Transformer) -> int:
    """The most numbers of a matrix that a program of this model has in its registers."""
    return MOST * form_of(model)["warps"] // FORM["warps"]


def _of_a_choice(model: Transformer, programs: int, choices: int) -> int:
    """Programs for each of ``choices``: a share of ``programs`` if its part of an expert fits, else all, which take turns."""
    own = max(programs // choices, 1)
    return own if units_each(model.config.ffn_dim, own) * model.config.dim <= _room(model) else programs


def plan_of(model: Transformer) -> Plan:
    """The plan of the model; a new one if its tensors have moved. With several ranks, the first one is a collective."""
    addresses = tuple(address for layer in model.layers for address in _addresses(layer))
    plan = _plans.get(model)
    if plan is None or plan.addresses != addresses:
        device, dispatch = model.embed.weight.device, model.dispatch
        # The kernel looks at the addresses of one more layer, and does not use them.
        table = torch.tensor(addresses + (0,) * COLUMNS.value, dtype=torch.long, device=device)
        shared = post_of(dispatch) if isinstance(dispatch, PeerDispatch) else None
        plan = _plans[model] = Plan(addresses, table, shared)
    return plan


def _addresses(layer: Block) -> list[int]:
    """The addresses of a layer's tensors, in the order of the table (one_parts.py)."""
    attn, ffn = layer.attn, layer.ffn
    tensors = [layer.attn_norm.weight, layer.attn_norm.bias, attn.qkv.weight, attn.qkv.bias, attn.out.weight]
    tensors += [attn.out.bias, layer.ffn_norm.weight, layer.ffn_norm.bias]
    if ffn is not None:
        tensors += [None, ffn.fc1.weight, ffn.fc1.bias, None, ffn.fc2.weight, ffn.fc2.bias, None]
    else:
        tensors.append(layer.moe.gate.weight)
        for linear in one_byte.layers(layer.moe.experts):
            tensors += [linear.weights, linear.bias, linear.scale]
    assert all(tensor is None or tensor.is_contiguous() for tensor in tensors)
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
