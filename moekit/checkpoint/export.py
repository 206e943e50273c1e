"""Write a model in the layout of the released checkpoints: ``model-shared.pt`` and ``model-rank-N.pt``, float16.

The reverse of checkpoint.py, by the same key table. It serves the demo, the bench and the tests.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moekit.checkpoint.keys import KEYS, Place
from moekit.nn.config import ModelConfig
from moekit.nn.dispatch import owned
from moekit.nn.experts import QuantisedExperts
from moekit.nn.transformer import Transformer

# Every key that the branch writes into ``cfg``, with its defaults.
TEMPLATE = Path(__file__).with_name("branch_cfg.json")


def save(
    model: Transformer, folder: Path, files: int, *, dtype: torch.dtype = torch.float16, **options: Any
) -> None:
    """Write ``model``, which holds all its experts, into ``folder``.

    Args:
        files: how many files the experts are spread over.
        dtype: of the weights written.
        options: entries of ``cfg["model"]`` that the model's config does not tell, such as ``dropout``.

    Raises:
        ValueError: more files than experts, or experts with numbers of one byte.
    """
    if any(isinstance(module, QuantisedExperts) for module in model.modules()):
        raise ValueError(
            f"the model for {folder} has quantised experts: write the one that they were made of, and load it with experts=..."
        )
    parameters = {name: p.detach().to("cpu", dtype) for name, p in model.named_parameters()}
    write(
        model.config,
        folder,
        files,
        parameters,
        lambda held: {
            name: stacked[held.start : held.stop]
            for name, stacked in parameters.items()
            if ".moe.experts." in name
        },
        dtype=dtype,
        **options,
    )


def write(
    config: ModelConfig,
    folder: Path,
    files: int,
    shared: dict[str, torch.Tensor],
    experts: Callable[[range], dict[str, torch.Tensor]],
    *,
    dtype: torch.dtype,
    **options: Any,
) -> None:
    """Write a model that need not be in memory as a whole; the arguments not told here are those of :func:`save`.

    Args:
        shared: by our names, what is no expert's, in ``dtype`` on the CPU.
        experts: called once for each file: our names of the experts' stacked weights, and those of the experts held.
    """
    if not 1 <= files <= config.experts:
        raise ValueError(f"files={files}: expected 1 to {config.experts}, the number of experts")
    folder.mkdir(parents=True, exist_ok=True)
    top = {
        "args": None,
        "cfg": fairseq_cfg(config, files, **options),
        "optimizer_history": HISTORY,
        "extra_state": {"epoch": 1},
    }
    _write(top | {"model": shared_part(shared, config, dtype)}, folder / "model-shared.pt")
    for rank in range(files):
        part = expert_part(experts(owned(config.experts, files, rank)))
        _write(top | {"model": part}, folder / f"model-rank-{rank}.pt")


HISTORY = [
    {
        "criterion_name": "MoECriterion",
        "optimizer_name": "FP16Optimizer",
        "lr_scheduler_state": {},
        "num_updates": 0,
    }
]


def shared_part(
    parameters: dict[str, torch.Tensor], config: ModelConfig, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """What every rank of fairseq needs, by fairseq's names."""
    part = {"decoder.version": torch.tensor([3.0], dtype=dtype)}
    if config.positions and not config.learned_positions:
        part["decoder.embed_positions._float_tensor"] = torch.zeros(1, dtype=dtype)
    for key, target in KEYS.items():
        for layer in range(config.layers) if "{}" in key else [0]:
            name, _, kind = (target or "").format(layer).rstrip("]").partition("[")
            if kind != "expert" and name in parameters:
                part[key.format(layer)] = Place(name, kind).of(parameters[name]).clone()
    if config.share_output:
        part["decoder.output_projection.weight"] = part["decoder.embed_tokens.weight"]
    return part


def expert_part(stacks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts by fairseq's names, counted from 0 as it does in every file."""
    part = {}
    for name, stacked in stacks.items():
        layer = name.split(".")[1]
        key = next(k for k, target in KEYS.items() if target == name.replace(layer, "{}", 1) + "[expert]")
        for local, expert in enumerate(stacked):
            part[key.format(layer, local)] = expert.clone()
    return part


def fairseq_cfg(config: ModelConfig, files: int, **options: Any) -> dict[str, Any]:
    """The ``cfg`` that the branch would have saved for this model, trained on ``files`` ranks."""
    cfg = copy.deepcopy(json.loads(TEMPLATE.read_text()))
    cfg["model"] |= {
        "activation_fn": config.activation,
        "decoder_embed_dim": config.dim,
        "decoder_input_dim": config.input_dim,
        "decoder_output_dim": config.output_dim,
        "decoder_ffn_embed_dim": config.ffn_dim,
        "decoder_layers": config.layers,
        "decoder_attention_heads": config.heads,
        "decoder_normalize_before": config.pre_norm,
        "no_decoder_final_norm": not config.final_norm,
        "no_token_positional_embeddings": not config.positions,
        "share_decoder_input_output_embed": config.share_output,
        "decoder_learned_pos": config.learned_positions,
        "layernorm_embedding": config.embedding_norm,
        "no_scale_embedding": not config.scale_embedding,
        "alternate_decoder_ffn_embed_dim": config.alternate_ffn_dim,
        "moe_freq": config.moe_freq,
        "moe_expert_count": config.experts,
        "moe_gating_use_fp32": config.gate_fp32,
        "moe_second_expert_policy": config.second_expert,
        "moe_normalize_gate_prob_before_dropping": config.normalize_before_dropping,
        "moe_top1_expert": config.gate == "top1",
        "moe_batch_prioritized_routing": config.batch_prioritized,
        "use_moe_pad_mask": config.mask_padding,
        "add_bos_token": config.add_bos,
        "tokens_per_sample": config.max_positions,
        "max_target_positions": config.max_positions,
        "world_size": files,
    }
    unknown = sorted(set(options) - set(cfg["model"]))
    assert not unknown, f"no such option of the branch: {unknown}"
    cfg["model"] |= options
    cfg["task"] |= {
        "tokens_per_sample": config.max_positions,
        "add_bos_token": config.add_bos,
        "data": "data-bin",
    }
    cfg["task"]["max_target_positions"] = config.max_positions
    cfg["distributed_training"]["distributed_world_size"] = files
    return cfg


def _write(state: dict[str, Any], path: Path) -> None:
    part = path.with_name(path.name + ".part")
    torch.save(state, part)
    os.replace(part, path)
