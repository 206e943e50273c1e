"""A checkpoint as one plain ``nn.Module`` in this process, for other people's tools: hooks, adapters, fine-tuning.

    model = moekit.module("demo")                            # all experts, gradients
    logits = model(tokens)                                   # [B, T] -> [B, T, V]
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    moekit.checkpoint.export.save(model, Path("tuned"), 4)   # a checkpoint again

It computes on the plain path, which is slow, learns, and is what all others are checked against.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from moekit import checkpoint as ckpt
from moekit.arguments import Choice, check, shown
from moekit.nn.noise import from_torch
from moekit.nn.operations import DTYPES
from moekit.nn.passes import Pass
from moekit.nn.transformer import Transformer, with_room

# The names of the submodules, N a layer from 0, and what comes out of each. Shape letters: B samples, T tokens, D model dim,
# V rows of the embedding matrix, E experts, K choices a token.
NAMES = {
    "embed": "[B, T] ids -> [B, T, D], before the scale and the positions (input_dim, where it is not D)",
    "project_in": "from input_dim to D, where they differ",
    "positions": "[T, D] or [B, T, D], what is added for the places of tokens",
    "embed_norm": "[B, T, D], where the model has layernorm_embedding",
    "layers.N": "(residual stream [B, T, D], what the next norm adds to it)",
    "layers.N.attn_norm": "(the sum, its norm), [B, T, D] each: the first is the residual stream",
    "layers.N.attn": "[B, T, D]",
    "layers.N.attn.qkv": "[B, T, 3 D], queries, keys and values",
    "layers.N.attn.out": "[B, T, D]",
    "layers.N.ffn_norm": "(the sum, its norm), [B, T, D] each",
    "layers.N.ffn": "[B, T, D], in layers without experts",
    "layers.N.ffn.fc1": "[B, T, width]",
    "layers.N.ffn.fc2": "[B, T, D]",
    "layers.N.moe": "[B, T, K, D], the weighted output of each choice's expert, zero where it was dropped",
    "layers.N.moe.gate": "[B T, E], the logits of the experts",
    "layers.N.moe.experts": "rows of the experts' outputs; its parameters w1, b1, w2, b2 are [E, ...]",
    "norm": "(the sum, its norm), [B, T, D] each",
    "project_out": "from D to output_dim, where they differ",
    "output": "where the output matrix is not the embedding's",
}


class LanguageModel(Transformer):
    """A :class:`~moekit.nn.transformer.Transformer` whose output are logits; its submodules' names are in :data:`NAMES`."""

    def forward(self, tokens: Tensor, asked: Pass | None = None) -> Tensor:
        """Logits of the token after each position.

        Args:
            tokens: [B, T] int64 dictionary ids.
            asked: capacity, padding, a record of the routing, see :class:`~moekit.nn.passes.Pass`. Gates that draw their
                second expert draw from torch's generator, unless it says otherwise.

        Returns:
            [B, T, V]
        """
        asked = asked or Pass()
        if asked.noise is None:
            asked = replace(asked, noise=from_torch)
        return self.logits(super().forward(tokens, asked))


def module(
    checkpoint: str | Path, *, device: str | torch.device = "cpu", dtype: str = "float32"
) -> LanguageModel:
    """All of a checkpoint's model in this process.

    Args:
        checkpoint: as for :func:`moekit.load`.
        dtype: "float32", "float16" or "bfloat16"; training wants the first.

    Returns:
        The model in training mode, which changes nothing (it has no dropout); every parameter learns.

    Raises:
        ValueError: the checkpoint is not what it should be, or an argument makes no sense.
    """
    kind = DTYPES[check("dtype", dtype, Choice(tuple(DTYPES)))]
    place = _device(device)
    plan = ckpt.survey(ckpt.find(checkpoint))
    # Parameters that were made in a mode for inference could be neither filled nor trained.
    with torch.inference_mode(False):
        with torch.device("meta"):
            model = LanguageModel(plan.config)
        model = with_room(model.to(kind), place)
        filled = ckpt.fill(model, plan, range(plan.config.experts), threads=torch.get_num_threads())
    ckpt.warn_nonfinite(filled.nonfinite)
    return model


def _device(device: str | torch.device) -> torch.device:
    """A device that weights can be copied to: the CPU or a GPU of this machine."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError):
        place = None
    if place is None or place.type not in ("cpu", "cuda"):
        raise ValueError(f"device={shown(device)}: expected 'cpu', or a GPU as in 'cuda:0'")
    if place.type == "cuda" and (place.index or 0) >= gpus:
        raise ValueError(
            f"device={shown(device)}: this machine has {gpus} GPUs that torch can use; name 'cpu'"
        )
    return place
