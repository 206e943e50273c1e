"""What the branch writes into a file besides the weights, made anew for a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moekit.arguments import shown
from moekit.nn.config import ModelConfig

# Every key that the branch writes into ``cfg``, with its defaults.
TEMPLATE = Path(__file__).with_name("branch_cfg.json")


def settings(config: ModelConfig, files: int, **options: Any) -> dict[str, Any]:
    """What a file holds besides the weights; the arguments are those of :func:`fairseq_cfg`."""
    return {
        "cfg": fairseq_cfg(config, files, **options),
        "optimizer_history": history(config),
        "extra_state": {"epoch": 1},
    }


def history(config: ModelConfig) -> list[dict[str, Any]]:
    """The ``optimizer_history`` of a training that has not begun."""
    criterion = "CrossEntropyCriterion" if config.dense else "MoECriterion"
    told = {"criterion_name": criterion, "optimizer_name": "FP16Optimizer"}
    return [told | {"lr_scheduler_state": {}, "num_updates": 0}]


def fairseq_cfg(config: ModelConfig, files: int, **options: Any) -> dict[str, Any]:
    """The ``cfg`` that the branch would have saved for this model, trained on ``files`` ranks.

    Raises:
        ValueError: the branch has no such option.
    """
    cfg = json.loads(TEMPLATE.read_text())
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
    if unknown:
        raise ValueError(f"{shown(unknown)}: no such option of the branch; expected those of {TEMPLATE.name}")
    cfg["model"] |= options
    if config.dense:
        cfg["criterion"] = {"_name": "cross_entropy", "sentence_avg": False}
    cfg["task"] |= {
        "tokens_per_sample": config.max_positions,
        "add_bos_token": config.add_bos,
        "data": "data-bin",
    }
    cfg["task"]["max_target_positions"] = config.max_positions
    cfg["distributed_training"]["distributed_world_size"] = files
    return cfg
