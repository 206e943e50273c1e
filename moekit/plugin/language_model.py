"""moekit's model in the clothes of a fairseq language model, registered under ``NAME``."""

from __future__ import annotations

from typing import Any

import torch
from fairseq.models import (
    FairseqIncrementalDecoder,
    FairseqLanguageModel,
    register_model,
    register_model_architecture,
)
from torch import Tensor

from moekit import checkpoint
from moekit.checkpoint.options import eval_capacity, from_fairseq, to_dict
from moekit.nn.cache import SLOTS, Cache
from moekit.nn.config import ModelConfig
from moekit.nn.noise import Noise
from moekit.nn.operations import choose_backend
from moekit.nn.passes import Pass
from moekit.nn.transformer import empty
from moekit.symbols import PAD

NAME = "transformer_lm_moekit"
# Its place in fairseq's incremental state.
CACHE = "moekit"


class Decoder(FairseqIncrementalDecoder):
    """Scoring routes a batch as the branch does, with its capacity; generation drops nothing."""

    def __init__(self, dictionary: Any, config: ModelConfig, fraction: float | None):
        super().__init__(dictionary)
        self.transformer = empty(config, torch.device("cpu"))
        self.fraction = fraction
        self.passes = 0
        # The device and dtype for which the back end was chosen.
        self.where: tuple[torch.device, torch.dtype] | None = None

    def forward(
        self,
        prev_output_tokens: Tensor,
        encoder_out: None = None,
        incremental_state: dict | None = None,
        **_: Any,
    ) -> tuple[Tensor, dict]:
        """[B, T] ids -> logits [B, T, dictionary], of the tokens after the ``incremental_state``'s where there is one."""
        features, extra = self.extract_features(prev_output_tokens, encoder_out, incremental_state)
        return self.output_layer(features), extra

    def extract_features(
        self, prev_output_tokens: Tensor, encoder_out: None = None, incremental_state: dict | None = None
    ) -> tuple[Tensor, dict]:
        self.passes += 1
        weight = self.transformer.embed.weight
        if (weight.device, weight.dtype) != self.where:
            # fairseq moves the model after it is loaded.
            self.where = weight.device, weight.dtype
            self.transformer.use(choose_backend("auto", *self.where))
        noise = Noise(torch.initial_seed(), [self.passes])
        if incremental_state is None:
            padding = prev_output_tokens == PAD
            padding = padding if padding.any() else None
            features = self.transformer(prev_output_tokens, Pass(self.fraction, padding=padding, noise=noise))
        else:
            cache = self.cache(incremental_state, prev_output_tokens)
            tokens = prev_output_tokens[:, int(cache.lengths[0]) :]
            features = self.transformer(tokens, Pass(noise=noise, cache=cache))
            cache.advance(tokens.shape[1])
        return features, {"attn": [None]}

    def output_layer(self, features: Tensor) -> Tensor:
        return self.transformer.logits(features, len(self.dictionary))

    def cache(self, incremental_state: dict, tokens: Tensor) -> Cache:
        """The cache of ``incremental_state``, with room for ``tokens`` [B, T]: it doubles when it is full."""
        batch, length = tokens.shape
        cache = incremental_state.get(CACHE)
        if cache is None or length > cache.slots:
            slots = min(max(SLOTS, 2 * length), max(length, self.transformer.config.max_positions))
            if cache is None:
                weight = self.transformer.embed.weight
                cache = Cache(self.transformer.config, batch, slots, weight.device, weight.dtype)
                incremental_state[CACHE] = cache
            else:
                cache.grow(slots)
        return cache

    def reorder_incremental_state(self, incremental_state: dict, new_order: Tensor) -> None:
        if CACHE in incremental_state:
            incremental_state[CACHE].select(new_order)

    def max_positions(self) -> int:
        return self.transformer.config.max_positions


@register_model(NAME)
class LanguageModel(FairseqLanguageModel):
    @classmethod
    def build_model(cls, args: Any, task: Any) -> LanguageModel:
        """A model by the checkpoint's options, ``--model-overrides`` included; its weights come afterwards."""
        options, rows = to_dict(args, "cfg['model']"), len(task.target_dictionary)
        config = from_fairseq(options, {}, vocab_rows=rows, before_final_norm=False)
        return cls(Decoder(task.target_dictionary, config, eval_capacity(options)))

    def load_state_dict(
        self, state_dict: Any, strict: bool = True, model_cfg: Any = None, args: Any = None
    ) -> None:
        """fairseq hands over what ``loading`` put in place of the weights: the plan of the files to read."""
        plan: checkpoint.Plan = state_dict
        config = self.decoder.transformer.config
        if config.vocab_rows > plan.config.vocab_rows:
            raise ValueError(
                f"{plan.sources[0].path} has rows for {plan.config.vocab_rows} types, too few for a dictionary of "
                f"{config.vocab_rows}: use the model's own dict.txt"
            )
        filled = checkpoint.fill(self.decoder.transformer, plan, range(config.experts))
        checkpoint.warn_nonfinite(filled.nonfinite)


@register_model_architecture(NAME, NAME)
def architecture(args: Any) -> None:
    """All options come from the checkpoint."""
