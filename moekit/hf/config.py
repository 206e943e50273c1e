"""The configuration, by the names of transformers."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from moekit.checkpoint.hugging import config as folder
from moekit.nn.config import ModelConfig
from moekit.symbols import EOS, PAD


class FairseqMoeConfig(PreTrainedConfig):
    """:class:`~moekit.nn.config.ModelConfig` by the names of transformers, and what transformers wants to know.

    Attributes:
        dictionary_size: types of the dictionary: logits of the matrices' rows beyond it are -inf. None: all rows count.
        capacity_token_fraction: see :func:`moekit.nn.gate.capacity`; the tokens of a call are one routing group.
        router_aux_loss_coef: the weight of the balance loss, which is summed over the layers, where
            ``output_router_logits`` asks for it.
    """

    model_type = folder.MODEL_TYPE
    attribute_map = {"num_local_experts": "num_experts"}
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    num_hidden_layers: int = 12
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    vocab_size: int = 50264
    input_dim: int | None = None
    output_dim: int | None = None
    max_position_embeddings: int = 2048
    hidden_act: str = "gelu"
    pre_norm: bool = True
    final_norm: bool = True
    before_final_norm: bool = False
    learned_positions: bool = False
    positions: bool = True
    scale_embedding: bool = True
    embedding_norm: bool = False
    tie_word_embeddings: bool = True
    moe_freq: int = 2
    num_experts: int = 512
    num_experts_per_tok: int = 2
    alternate_ffn_dim: int = 0
    gate: str = "top2"
    gate_fp32: bool = True
    second_expert: str = "all"
    normalize_before_dropping: bool = False
    batch_prioritized: bool = False
    mask_padding: bool = False
    add_bos: bool = False
    dictionary_size: int | None = None
    capacity_token_fraction: float | None = None
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.01
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = EOS
    eos_token_id: int | list[int] | None = EOS
    pad_token_id: int | None = PAD

    def __post_init__(self, **kwargs: Any) -> None:
        self.input_dim = self.hidden_size if self.input_dim is None else self.input_dim
        self.output_dim = self.hidden_size if self.output_dim is None else self.output_dim
        self.auto_map = folder.AUTO_MAP
        super().__post_init__(**kwargs)

    def of_moekit(self) -> ModelConfig:
        """The :class:`~moekit.nn.config.ModelConfig` of the same model."""
        names = {field.name: folder.TRANSFORMERS.get(field.name, field.name) for field in fields(ModelConfig)}
        return ModelConfig(**{name: getattr(self, theirs) for name, theirs in names.items()})

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, *args, **kwargs)
        (Path(save_directory) / folder.BRIDGE).write_text(folder.BRIDGE_TEXT)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Do nothing: a saved folder refers to the installed moekit, and copies no code of it."""
