"""Small checkpoints with every option of the branch, made from seeds; what the branch computes on them is recorded.

``tests/data/branch/{name}.npz`` holds, for the case of that name, what ``fairseq_cli.eval_lm`` of the ``moe`` branch
(commit ebea0072, torch 1.9.1, CPU, float32) printed and routed when it read the very files that ``build`` writes.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from moekit.checkpoint.export import save
from moekit.nn.config import ModelConfig
from moekit.nn.transformer import Transformer

BASE = ModelConfig(
    layers=4,
    dim=32,
    ffn_dim=48,
    heads=4,
    vocab_rows=200,
    input_dim=32,
    output_dim=32,
    max_positions=64,
    activation="gelu",
    pre_norm=True,
    share_output=True,
    moe_freq=2,
    experts=8,
    gate_fp32=True,
    second_expert="all",
)


@dataclass(frozen=True)
class Case:
    """``options`` change the model, ``evaluate`` what is asked of it; ``files`` holds the experts."""

    options: dict = field(default_factory=dict)
    evaluate: dict = field(default_factory=dict)
    files: int = 2

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(**{**vars(BASE), **self.options})


def scoring(fraction: float, batch_size: int, **more) -> dict:
    return {"capacity_token_fraction": fraction, "batch_size": batch_size, "tokens_per_sample": 64} | more


CASES = {
    "top1": Case({"gate": "top1"}, scoring(-1.0, 3)),
    "top1_mask_padding": Case(
        {"gate": "top1", "mask_padding": True}, scoring(0.05, 4, sample_break_mode="eos")
    ),
    "before_dropping": Case({"normalize_before_dropping": True}, scoring(0.05, 2)),
    "prioritized": Case({"batch_prioritized": True}, scoring(0.05, 3)),
    "prioritized_before": Case(
        {"batch_prioritized": True, "normalize_before_dropping": True, "mask_padding": True}, scoring(-1.0, 2)
    ),
    "mask_padding": Case({"mask_padding": True}, scoring(-1.0, 3, sample_break_mode="eos")),
    "pads_take_places": Case({}, scoring(-1.0, 3, sample_break_mode="eos")),
    "complete_blocks": Case({}, scoring(0.1, 2, sample_break_mode="complete")),
    "context": Case({}, scoring(0.05, 2, context_window=16)),
    "short_blocks": Case({}, scoring(0.25, 4, tokens_per_sample=24)),
    "gate_in_weights_dtype": Case({"gate_fp32": False}, scoring(0.05, 2)),
    "every_layer": Case({"moe_freq": 1}, scoring(0.05, 2), files=8),
    "every_third_layer": Case({"moe_freq": 3, "layers": 5}, scoring(0.05, 2), files=1),
    "twelve_experts": Case({"experts": 12}, scoring(0.1, 2), files=3),
    "alternate_ffn": Case({"alternate_ffn_dim": 20}, scoring(0.05, 2), files=1),
    "post_norm": Case({"pre_norm": False}, scoring(0.05, 2)),
    "no_final_norm": Case({"final_norm": False}, scoring(0.05, 2)),
    "learned_positions": Case({"learned_positions": True}, scoring(-1.0, 3)),
    "no_positions": Case({"positions": False}, scoring(0.05, 2)),
    "odd_dim": Case({"dim": 33, "input_dim": 33, "output_dim": 33, "heads": 3}, scoring(0.05, 2)),
    "unscaled": Case({"scale_embedding": False, "embedding_norm": True}, scoring(0.05, 2)),
    "own_output": Case({"share_output": False}, scoring(0.05, 2)),
    "projections": Case({"input_dim": 24, "output_dim": 40, "share_output": False}, scoring(0.05, 2)),
    "relu": Case({"activation": "relu"}, scoring(0.05, 2)),
    "gelu_accurate": Case({"activation": "gelu_accurate"}, scoring(0.05, 2)),
    "tanh": Case({"activation": "tanh"}, scoring(0.05, 2)),
    "linear": Case({"activation": "linear"}, scoring(0.05, 2)),
    "begin_of_sentence": Case({"add_bos": True}, scoring(0.05, 2, tokens_per_sample=60)),
    "mixture": Case(
        {
            "pre_norm": False,
            "learned_positions": True,
            "embedding_norm": True,
            "normalize_before_dropping": True,
            "mask_padding": True,
            "share_output": False,
            "moe_freq": 1,
            "activation": "relu",
        },
        scoring(0.25, 3, sample_break_mode="complete"),
        files=4,
    ),
}


def build(name: str, folder: Path) -> None:
    """Write the checkpoint of a case: weights large enough that routing, biases and norms matter."""
    case = CASES[name]
    rng = np.random.RandomState(sum(name.encode()))
    model = Transformer(case.config)
    for key, parameter in model.named_parameters():
        values = rng.standard_normal(tuple(parameter.shape))
        if "norm" in key:
            values = 0.2 * values + (1.0 if key.endswith("weight") else 0.0)
        elif parameter.dim() == 1 or key.endswith((".b1", ".b2")):
            values *= 0.2
        elif key.endswith("gate.weight"):
            values *= 0.5
        elif "embed" in key or "positions" in key:
            values *= 0.3
        else:
            values *= 1.5 / parameter.shape[-1] ** 0.5
        parameter.data = torch.tensor(values, dtype=torch.float32)
    save(model, folder, case.files, batch_size=2, batch_size_valid=2)
