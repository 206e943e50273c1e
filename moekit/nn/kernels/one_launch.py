"""A decode step of one sequence in one launch: a kernel whose programs walk through all layers together.

Each multiprocessor has one program. A layer has three or four phases, and a barrier of all programs between any two:

    qkv        norm, queries, keys and values
    attention  of one head, and this head's part of the output projection
    gate       norm and logits, in layers with experts
    ffn        norm, some units of the hidden layer, and their part of the result; of a chosen expert in place of a dense layer

Programs add their parts to the residual stream, whose numbers are integers (fixed_point.py). The first rows of the output
matrix come into the cache ahead of time (fetch.py), and matrices into registers before a program waits. Only experts have
to wait for their choice.

Shape letters: B sequences, D model dim, H heads, C head dim, M slots, F width, E experts, V dictionary.
"""

from __future__ import annotations

import math
import weakref
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit.nn.cache import Cache
from moekit.nn.dispatch import Local
from moekit.nn.gates import gate_of
from moekit.nn.kernels import grid_barrier, one_byte
from moekit.nn.kernels.activations import ACTIVATIONS
from moekit.nn.kernels.gpu import capability, multiprocessors
from moekit.nn.kernels.grid_barrier import arrive, begun, wait
from moekit.nn.kernels.one_parts import COLUMNS, FFN, OUT, PROJECT, Sizes, addresses
from moekit.nn.kernels.one_phases import (
    ask_gate,
    attend,
    attend_weights,
    begin,
    feed,
    feed_experts,
    feed_weights,
    fetch_output,
    finish,
    finish_weights,
    gate_weights,
    length_of,
    normed_rows,
    project,
    project_weights,
)
from moekit.nn.transformer import Block, Transformer

# The kernels are written for B sequences; from two on, batch_step.py is faster.
FEW = 1
# The most numbers of a matrix that a program has in its registers, those of the 15B on 132 multiprocessors: more would
# spill.
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
# All phases in one launch.
ALL = tl.constexpr(-1)


class Plan(NamedTuple):
    """What the kernel keeps between steps.

    Attributes:
        addresses: those that ``table`` was made of.
        table: [layers + 1, COLUMNS] int64, the addresses of each layer's tensors.
        count: the counter of the kernel's barrier.
    """

    addresses: tuple[int, ...]
    table: Tensor
    count: Tensor


_plans: weakref.WeakKeyDictionary[Transformer, Plan] = weakref.WeakKeyDictionary()


def fits(model: Transformer, sequences: int) -> bool:
    """Whether :func:`read_on` supports this model and ``sequences`` sequences."""
    config, embed = model.config, model.embed.weight
    gate = gate_of(config)
    widths = {config.dense_dim(layer) for layer in range(config.layers) if not config.is_moe(layer)}
    supported = (
        0 < sequences <= FEW
        and isinstance(model.dispatch, Local)
        and model.slots is None
        and config.pre_norm
        and config.input_dim == config.dim == config.output_dim
        and not config.embedding_norm
        and widths <= {config.ffn_dim}
        and (config.dense or (gate.softmax_top_k and gate.top_k <= 2))
        # Memory is read 16 bytes at a time.
        and config.dim % 16 == config.ffn_dim % 16 == config.dim // config.heads % 8 == 0
        and embed.dtype.itemsize == 2
    )
    if not supported or not on_hopper(embed.device):
        return False
    programs = multiprocessors(embed.device)
    of_a_matrix = max(
        3 * config.dim / programs, config.ffn_dim / (programs // (1 if config.dense else gate.top_k))
    )
    return of_a_matrix * config.dim <= MOST


def on_hopper(device: torch.device) -> bool:
    """Whether ``device`` has what the kernel uses: Hopper's instructions."""
    return capability(device) >= (9, 0)


def check(model: Transformer) -> None:
    """Raise an error if a step of ``model`` since the last check did not run through; it waits for the device."""
    if model in _plans:
        grid_barrier.check(_plans[model].count)


def forget(model: Transformer) -> None:
    """Begin with another counter, which knows of no barrier that gave up."""
    _plans.pop(model, None)


def read_on(
    model: Transformer,
    tokens: Tensor,
    cache: Cache,
    vocab: int,
    programs: int | None = None,
) -> Tensor:
    """Run one token of each sequence after the tokens in the cache; for inference.

    Args:
        tokens: [B] int64.
        vocab: V, types of the dictionary.
        programs: for tests under the interpreter.

    Returns:
        [B, V] logits.
    """
    config, device, kind = model.config, tokens.device, model.embed.weight.dtype
    on_gpu = device.type == "cuda"
    # The counter of the barrier is for as many programs as there are.
    assert programs is None or not on_gpu
    programs = programs or multiprocessors(device)
    sizes = sizes_of(model, len(tokens), vocab, programs)
    plan = plan_of(model)
    out = torch.empty(len(tokens), vocab, dtype=kind, device=device)
    residual = torch.empty(2, len(tokens), config.dim, dtype=torch.long, device=device)
    qkv = out.new_empty(len(tokens), 3 * config.dim)
    logits = out.new_empty(len(tokens), max(config.experts, 1))
    assert tokens.is_contiguous() and cache.kv.is_contiguous() and model.output_weight.is_contiguous()
    positions = None if model.positions is None else model.positions.rows(cache.slots, device)
    norm, moe = model.norm, config.moe_layers
    gate_dtype = torch.float32 if config.gate_fp32 else kind

    def launch(only: int, first: int, last: int) -> None:
        _step[(programs,)](
            tokens,
            model.embed.weight,
            positions,
            out,
            plan.table,
            plan.count,
            cache.kv,
            cache.lengths,
            residual,
            qkv,
            logits,
            None if norm is None else norm.weight,
            None if norm is None else norm.bias,
            model.output_weight,
            cache.slots,
            first,
            last,
            math.sqrt(config.dim) if config.scale_embedding else 1.0,
            model.layers[0].attn_norm.eps,
            torch.finfo(gate_dtype).eps,
            (config.dim // config.heads) ** -0.5,
            ONLY=only,
            DENSE=len(moe) < config.layers,
            MOE=bool(moe),
            s=sizes,
            num_warps=sizes.warps,
            **({"launch_cooperative_grid": True} if on_gpu else {}),
        )

    if on_gpu:
        launch(-1, 0, config.layers)
        return out
    # The interpreter runs one program after the other, so each phase is a launch.
    launch(0, 0, 0)
    for layer in range(config.layers):
        for phase in (1, 2, 3, 4) if layer in moe else (1, 2, 4):
            launch(phase, layer, layer + 1)
    launch(5, config.layers, config.layers)
    return out


def sizes_of(model: Transformer, rows: int, vocab: int, programs: int) -> Sizes:
    config, gate = model.config, gate_of(model.config)
    moe, kind = config.moe_layers, model.embed.weight.dtype
    experts = model.layers[moe[0]].moe.experts if moe else None
    bytes_of = {"ONE_BYTE": 0, "PTX": False} if experts is None else one_byte.layers(experts)[0].options
    gate_dtype = torch.float32 if config.gate_fp32 else kind
    return Sizes(
        b=rows,
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
        programs=programs,
        # Chunks, and rows of the output projection, have to divide D.
        **FORM | {name: math.gcd(FORM[name], config.dim) for name in ("chunk", "outputs")},
    )


def plan_of(model: Transformer) -> Plan:
    """The plan of the model; a new one if its tensors have moved."""
    addresses = tuple(address for layer in model.layers for address in _addresses(layer))
    plan = _plans.get(model)
    if plan is None or plan.addresses != addresses:
        device = model.embed.weight.device
        # The kernel looks at the addresses of one more layer, and does not use them.
        table = torch.tensor(addresses + (0,) * COLUMNS.value, dtype=torch.long, device=device)
        plan = _plans[model] = Plan(addresses, table, grid_barrier.counter(device))
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


# tokens [B]; embed [V or more, D]; positions [M + 2 or more, D] or None; out [B, V].
# table [layers + 1, COLUMNS]; count [1]; kv [layers, 2, B, H, M, C]; lengths [B].
# residual [2, B, D] int64; qkv [B, 3 D]; logits [B, E]: room for what programs tell each other.
# gain and shift: the last norm's weight and bias, [D] or None; output [V or more, D].
@triton.jit(do_not_specialize=["slots", "first", "last"])
def _step(
    tokens, embed, positions, out, table, count, kv, lengths, residual, qkv, logits, gain, shift, output,
    slots, first, last, embed_scale, eps, gate_eps, scale,
    ONLY: tl.constexpr, DENSE: tl.constexpr, MOE: tl.constexpr, s: tl.constexpr,
):  # fmt: skip
    slots = slots.to(tl.int64)
    kind: tl.constexpr = embed.dtype.element_ty
    # Where each phase is a launch of its own, no program waits for another one, and nothing comes ahead of time.
    meeting: tl.constexpr = s.programs if ONLY == ALL else 1
    stream: tl.constexpr = s.b * s.d
    target = begun(count, meeting)
    if ONLY == ALL or ONLY == 0:
        begin(tokens, embed, positions, lengths, residual, embed_scale, s)
        arrive(count, meeting)
    at = addresses(table, first, PROJECT, 4)
    length = length_of(tl.program_id(0), lengths, s)
    for layer in range(first, last):
        here, there = residual + layer % 2 * stream, residual + (1 - layer % 2) * stream
        if ONLY == ALL or ONLY == 1:
            ready = project_weights(at, kind, s)
            target = wait(count, target, meeting)
        of_out = addresses(table, layer, OUT, 2)
        if ONLY == ALL or ONLY == 1:
            project(ready, here, there, qkv, eps, s)
            arrive(count, meeting)
        if ONLY == ALL or ONLY == 2:
            seen = attend_weights(tl.program_id(0), length, of_out, kv, slots, layer, s)
            target = wait(count, target, meeting)
        of_ffn = addresses(table, layer, FFN, 9)
        following = addresses(table, layer + 1, PROJECT, 4)
        if ONLY == ALL or ONLY == 2:
            attend(seen, of_out, here, qkv, kv, lengths, slots, layer, scale, s)
            arrive(count, meeting)
        if ONLY == ALL:
            if layer + 1 == last:
                fetch_output(output, s)
        moe = MOE
        if MOE and DENSE:
            moe = of_ffn[2] != 0
        if moe:
            if ONLY == ALL or ONLY == 3:
                gate = gate_weights(of_ffn, kind, s)
                target = wait(count, target, meeting)
                rows = ask_gate(gate, here, logits, eps, s)
                arrive(count, meeting)
            if ONLY == ALL or ONLY == 4:
                if ONLY != ALL:
                    rows = normed_rows(of_ffn, here, eps, kind, s)
                target = wait(count, target, meeting)
                feed_experts(of_ffn, rows, here, there, logits, gate_eps, s)
                arrive(count, meeting)
        elif ONLY == ALL or ONLY == 4:
            fed = feed_weights(of_ffn, kind, s)
            target = wait(count, target, meeting)
            feed(fed, here, there, eps, kind, s)
            arrive(count, meeting)
        at = (following[0], following[1], following[2], following[3])
    if ONLY == ALL or ONLY == 5:
        done = finish_weights(gain, shift, output, s)
        target = wait(count, target, meeting)
        finish(done, residual + last % 2 * stream, output, out, eps, ONLY == ALL, s)
        arrive(count, meeting)
