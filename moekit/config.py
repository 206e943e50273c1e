"""What a checkpoint's ``cfg["model"]`` says about the model, in moekit's own words.

fairseq's ``moe`` branch writes about seventy options; most steer the training. ``ModelConfig`` holds those that
change what the model computes, ``REFUSED`` those that moekit does not have: a checkpoint that asks for one of them
is refused by name instead of being computed wrongly.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

PAD = 1  # fairseq's Dictionary puts <s> <pad> </s> <unk> first, in this order
EOS = 2


@dataclass(frozen=True)
class ModelConfig:
    """The options of fairseq's ``transformer_lm`` decoder that change its result at inference.

    ``ffn_dim`` is the width of the dense layers *and* of the experts (the branch never reads its own
    ``moe_expert_ffn_dim``). ``moe_freq`` 2 puts experts in every second layer, 0 in none.
    """

    layers: int
    dim: int
    ffn_dim: int
    heads: int
    vocab_rows: int  # rows of the embedding matrix; may exceed the dictionary
    input_dim: int
    output_dim: int
    max_positions: int  # tokens a sample may have
    activation: str = "relu"
    pre_norm: bool = False
    final_norm: bool = True
    before_final_norm: bool = False  # the file is older than the final norm: it has none, whatever it holds
    learned_positions: bool = False
    positions: bool = True
    scale_embedding: bool = True
    embedding_norm: bool = False
    share_output: bool = False
    moe_freq: int = 0
    experts: int = 0
    alternate_ffn_dim: int = 0  # > 0: the layers that would hold experts are dense and this wide
    top1: bool = False
    gate_fp32: bool = False
    second_expert: str = "sampling"  # all | sampling | random
    normalize_before_dropping: bool = False
    batch_prioritized: bool = False
    mask_padding: bool = False
    add_bos: bool = False

    def is_moe(self, layer: int) -> bool:
        """Whether layer ``layer`` (from 0) holds experts."""
        at_frequency = self.moe_freq > 0 and (layer + 1) % self.moe_freq == 0
        return at_frequency and self.alternate_ffn_dim == 0

    def dense_dim(self, layer: int) -> int:
        """Width of the dense feed-forward network of layer ``layer`` (from 0)."""
        at_frequency = self.moe_freq > 0 and (layer + 1) % self.moe_freq == 0
        return self.alternate_ffn_dim if at_frequency and self.alternate_ffn_dim else self.ffn_dim

    @property
    def moe_layers(self) -> list[int]:
        """The layers (from 0) that hold experts."""
        return [i for i in range(self.layers) if self.is_moe(i)]

    @property
    def top_k(self) -> int:
        return 1 if self.top1 else 2


ACTIVATIONS = ("relu", "gelu", "gelu_fast", "gelu_accurate", "tanh", "linear")
SECOND_EXPERT = ("all", "sampling", "random")
# Fields that a running model can change; the others give the weights their shapes.
CHANGEABLE = """max_positions activation pre_norm scale_embedding top1 gate_fp32 second_expert normalize_before_dropping
    batch_prioritized mask_padding add_bos""".split()
WORDS = {"activation": ACTIVATIONS, "second_expert": SECOND_EXPERT}

_truthy = bool
# option -> (does this value ask for it?, what it is)
REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "adaptive_input": (_truthy, "adaptive input embeddings"),
    "adaptive_softmax_cutoff": (lambda v: v not in (None, "", "None"), "an adaptive softmax"),
    "tie_adaptive_weights": (_truthy, "an adaptive softmax with tied weights"),
    "character_embeddings": (_truthy, "character embeddings"),
    "base_layers": (lambda v: (v or 0) > 0, "BASE layers"),
    "use_stable_embedding": (_truthy, "bitsandbytes' stable embedding"),
    "quant_noise_pq": (lambda v: (v or 0) > 0, "quantisation noise"),
    "quant_noise_scalar": (lambda v: (v or 0) > 0, "scalar quantisation"),
    "cross_self_attention": (_truthy, "cross-self-attention"),
    "decoder_layers_to_keep": (lambda v: v not in (None, "", "None"), "pruned layers"),
}


def changed(config: ModelConfig, fields: Mapping[str, Any]) -> ModelConfig:
    """``config`` with ``fields`` in place of its own.

    Raises:
        ValueError: a field is none of :data:`CHANGEABLE`, or its value none that it can have.
    """
    for name, value in fields.items():
        if name not in CHANGEABLE:
            raise ValueError(
                f"config={{{name!r}: ...}} cannot be changed; expected some of {', '.join(CHANGEABLE)}"
            )
        if name in WORDS:
            fits, expected = value in WORDS[name], ", ".join(WORDS[name])
        elif name == "max_positions":
            fits, expected = type(value) is int and value > 0, "a whole number of at least 1"
        else:
            fits, expected = isinstance(value, bool), "True or False"
        if not fits:
            raise ValueError(f"config={{{name!r}: {value!r}}}: expected {expected}")
    return replace(config, **fields)


def to_dict(node: Any, where: str) -> dict[str, Any]:
    """A config of any of the types that fairseq saved, as a plain dict; interpolations stay strings.

    Args:
        node: a dict, an ``argparse.Namespace`` or an omegaconf ``DictConfig``.
        where: its place, for the error.

    Raises:
        ValueError: ``node`` is something else.
    """
    if isinstance(node, argparse.Namespace):
        return dict(vars(node))
    if type(node).__module__.startswith("omegaconf"):
        from omegaconf import DictConfig, OmegaConf

        if isinstance(node, DictConfig):
            return OmegaConf.to_container(node, resolve=False)
    if isinstance(node, Mapping):
        return dict(node)
    raise ValueError(
        f"{where} is a {type(node).__name__}; expected a dict, an argparse.Namespace or an omegaconf DictConfig"
    )


INTERPOLATION = re.compile(r"\$\{(\w+)\.(\w+)\}")


def resolve(options: Mapping[str, Any], cfg: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` with values such as ``"${task.tokens_per_sample}"`` looked up in ``cfg``.

    fairseq saves such references unresolved. A reference that leads nowhere counts as an option that is not there.
    """

    def look_up(value: Any) -> Any:
        for _ in range(len(cfg)):  # a reference may name a reference, but not for ever
            match = INTERPOLATION.fullmatch(value) if isinstance(value, str) else None
            if match is None:
                return value
            section, option = match.groups()
            found = cfg.get(section)
            value = to_dict(found, section).get(option) if found is not None else None
        return None

    return {option: look_up(value) for option, value in options.items()}


def options_of(state: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The (model options, task options) of a checkpoint file's top level.

    ``cfg["model"]`` and ``cfg["task"]``; older files hold one flat ``args`` for both, which wins if a file has both.
    """
    if state.get("args") is not None:
        args = to_dict(state["args"], f"args in {where}")
        return args, args
    if state.get("cfg") is None:
        raise ValueError(f"{where} has neither 'cfg' nor 'args', so the model's shape is unknown")
    cfg = to_dict(state["cfg"], f"cfg in {where}")
    if cfg.get("model") is None:
        raise ValueError(f"cfg in {where} has no 'model'; it has {', '.join(sorted(map(str, cfg)))}")
    model, task = (to_dict(cfg.get(part) or {}, f"cfg['{part}'] in {where}") for part in ("model", "task"))
    return resolve(model, cfg), resolve(task, cfg)


def from_fairseq(
    model: Mapping[str, Any], task: Mapping[str, Any], *, vocab_rows: int, before_final_norm: bool
) -> ModelConfig:
    """Translate fairseq's options.

    Args:
        model: the options of ``cfg["model"]``; what is missing gets the branch's default
            (``TransformerLanguageModelConfig`` in fairseq/models/transformer_lm.py).
        task: the options of ``cfg["task"]``.
        vocab_rows: rows of ``decoder.embed_tokens.weight``, which no option tells.
        before_final_norm: the files are of a version that had no final layer norm (see ``checkpoint``).

    Raises:
        ValueError: an option is missing, malformed, or asks for what moekit does not have.
    """
    name = model.get("_name") or model.get("arch") or "transformer_lm"
    if not str(name).startswith("transformer_lm"):
        raise ValueError(f"the checkpoint holds a '{name}'; moekit runs fairseq's 'transformer_lm' models")
    for option, (asks, what) in REFUSED.items():
        if asks(model.get(option)):
            raise ValueError(
                f"the checkpoint asks for {what} ({option}={model[option]!r}), which moekit has not"
            )
    activation = str(model.get("activation_fn") or "relu")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation_fn={activation!r} is unknown; the branch has {', '.join(ACTIVATIONS)}")
    second = str(model.get("moe_second_expert_policy") or "sampling")
    if second not in SECOND_EXPERT:
        raise ValueError(
            f"moe_second_expert_policy={second!r} is unknown; expected {', '.join(SECOND_EXPERT)}"
        )

    def number(option: str, default: int | None = None) -> int:
        value = model.get(option)
        value = default if value is None else value
        if value is None:
            raise ValueError(f"the checkpoint's model options lack '{option}'")
        try:
            return int(value)
        except (TypeError, ValueError):
            raise ValueError(f"the checkpoint's option {option}={value!r} is no whole number") from None

    dim = number("decoder_embed_dim", 512)
    tokens_per_sample = model.get("tokens_per_sample") or task.get("tokens_per_sample") or 1024
    return ModelConfig(
        layers=number("decoder_layers", 6),
        dim=dim,
        ffn_dim=number("decoder_ffn_embed_dim", 2048),
        heads=number("decoder_attention_heads", 8),
        vocab_rows=vocab_rows,
        input_dim=number("decoder_input_dim", dim),
        output_dim=number("decoder_output_dim", dim),
        max_positions=number("max_target_positions", int(tokens_per_sample)),
        activation=activation,
        pre_norm=bool(model.get("decoder_normalize_before", False)),
        final_norm=not (before_final_norm or model.get("no_decoder_final_norm", False)),
        before_final_norm=before_final_norm,
        learned_positions=bool(model.get("decoder_learned_pos", False)),
        positions=not model.get("no_token_positional_embeddings", False),
        scale_embedding=not model.get("no_scale_embedding", False),
        embedding_norm=bool(model.get("layernorm_embedding", False)),
        share_output=bool(model.get("share_decoder_input_output_embed", False)),
        moe_freq=max(number("moe_freq", 0), number("decoder_moe_freq", 0)),
        experts=number("moe_expert_count", 0),
        alternate_ffn_dim=number("alternate_decoder_ffn_embed_dim", 0),
        top1=bool(model.get("moe_top1_expert", False)),
        gate_fp32=bool(model.get("moe_gating_use_fp32", False)),
        second_expert=second,
        normalize_before_dropping=bool(model.get("moe_normalize_gate_prob_before_dropping", False)),
        batch_prioritized=bool(model.get("moe_batch_prioritized_routing", False)),
        mask_padding=bool(model.get("use_moe_pad_mask", False)),
        add_bos=bool(task.get("add_bos_token") or model.get("add_bos_token") or False),
    )
