"""Train the demo models: ``python -m moekit.demo.train --data DIR --out moekit/demo/model``.

``python -m moekit.demo.corpus --out DIR`` writes ``DIR``. The models are moekit's, so the demos also show that the code
that runs checkpoints can train a model. The objective is fairseq's ``moe_cross_entropy``: cross-entropy
plus 0.01 times the sum of the layers' balance losses, which a model without experts does not have.

The defaults give the model in the repository on one H100 with torch 2.11, in 287 s. ``--kind dense`` trains its dense
sibling, which reads the same blocks in the same order with the same compute.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from moekit.checkpoint.export import save
from moekit.nn.config import ModelConfig
from moekit.nn.cost import flop_per_token
from moekit.nn.gate import balance_loss
from moekit.nn.passes import Pass
from moekit.nn.transformer import Attention, Transformer

# Tokens of a block.
BLOCK = 256
FILES = 8
# fairseq's ``moe_gate_loss_wt``.
GATE_LOSS_WEIGHT = 0.01


def demo_config(vocab: int) -> ModelConfig:
    return ModelConfig(
        layers=6,
        dim=128,
        ffn_dim=512,
        heads=4,
        vocab_rows=vocab,
        input_dim=128,
        output_dim=128,
        max_positions=BLOCK,
        activation="gelu",
        pre_norm=True,
        share_output=True,
        moe_freq=2,
        experts=16,
        gate_fp32=True,
        second_expert="all",
    )


def dense_config(vocab: int) -> ModelConfig:
    """The demo model without experts, and with feed-forward networks so wide that a token takes as many operations."""
    sparse = demo_config(vocab)
    dense = replace(sparse, moe_freq=0, experts=0)
    missing = flop_per_token(sparse, BLOCK) - flop_per_token(dense, BLOCK)
    # An output of each layer more takes two products and two sums of each of its inputs.
    wider = missing / (4 * dense.dim * dense.layers)
    return replace(dense, ffn_dim=dense.ffn_dim + round(wider))


# What can be trained: the demo model, and its dense sibling.
KINDS = {"sparse": demo_config, "dense": dense_config}


def initialize(model: Transformer) -> None:
    """fairseq's initialisation of the decoder, layer by layer."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, Attention):
            for part in module.qkv.weight.data.chunk(3):
                nn.init.xavier_uniform_(part, gain=1 / math.sqrt(2))
    for layer in model.config.moe_layers:
        experts = model.layers[layer].moe.experts
        for stack in experts.tensors.values():
            for tensor in stack.data:
                if tensor.dim() == 2:
                    nn.init.xavier_uniform_(tensor)
                else:
                    nn.init.zeros_(tensor)
    nn.init.normal_(model.embed.weight, std=model.config.input_dim**-0.5)


def sample(tokens: Tensor, batch: int, rng: np.random.Generator, device: str) -> tuple[Tensor, Tensor]:
    """``batch`` random blocks, and the next token of each of their tokens: two [B, T] int64."""
    starts = rng.integers(0, len(tokens) - BLOCK - 1, size=batch)
    blocks = torch.stack([tokens[s : s + BLOCK + 1] for s in starts]).long().to(device)
    return blocks[:, :-1], blocks[:, 1:]


@torch.no_grad()
def bits_a_token(model: Transformer, tokens: Tensor, device: str) -> float:
    """The mean bits per token over consecutive blocks."""
    model.eval()
    blocks = tokens[: (len(tokens) - 1) // BLOCK * BLOCK + 1].long().to(device)
    inputs, targets = blocks[:-1].view(-1, BLOCK), blocks[1:].view(-1, BLOCK)
    total = 0.0
    for x, y in zip(inputs.split(16), targets.split(16), strict=True):
        total += F.cross_entropy(model.logits(model(x)).flatten(0, 1), y.flatten(), reduction="sum").item()
    model.train()
    return total / targets.numel() / math.log(2)


def train(
    data: Path,
    out: Path,
    *,
    steps: int,
    batch: int,
    rate: float,
    device: str,
    seed: int,
    kind: str = "sparse",
) -> None:
    """Train a model of :data:`KINDS` for ``steps`` steps of ``batch`` blocks with peak learning rate ``rate``, then write
    the checkpoint."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    meta = json.loads((data / "meta.json").read_text())
    splits = {
        name: torch.from_numpy(np.load(data / f"{name}.npy").astype(np.int32)) for name in ("train", "valid")
    }
    config = KINDS[kind](meta["vocabulary"])
    model = Transformer(config).to(device)
    initialize(model)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, max(0.02, (steps - i) / (steps - warmup)))
    )
    autocast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
    start = time.perf_counter()
    with tqdm(
        total=steps * batch * BLOCK, unit=" tokens", unit_scale=True, desc="training", mininterval=10
    ) as bar:
        for step in range(steps):
            x, y = sample(splits["train"], batch, rng, device)
            routings = []
            with autocast:
                features = model(x, Pass(record=lambda _, routing: routings.append(routing)))  # noqa: B023
                loss = F.cross_entropy(model.logits(features).flatten(0, 1).float(), y.flatten())
                total = loss + GATE_LOSS_WEIGHT * sum(map(balance_loss, routings))
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.update(y.numel())
            if (step + 1) % 250 == 0 or step + 1 == steps:
                bits = bits_a_token(model, splits["valid"], device)
                bar.write(
                    f"step {step + 1}: train {loss.item() / math.log(2):.3f}, valid {bits:.3f} bits a token"
                )
                save(
                    model,
                    out,
                    FILES if config.moe_layers else 1,
                    dropout=0.0,
                    attention_dropout=0.0,
                    moe_eval_capacity_token_fraction=-1.0,
                )
    flop = 3 * flop_per_token(config, BLOCK) * steps * batch * BLOCK
    print(f"trained for {time.perf_counter() - start:.0f} s, {flop:.4g} operations; wrote {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kind", choices=KINDS, default="sparse")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=64, help="blocks of 256 tokens a step")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=1)
    train(**vars(parser.parse_args()))
