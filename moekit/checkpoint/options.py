"""What fairseq's options say about the model, in moekit's own words, and which options are refused by name."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from typing import Any

from moekit.nn.config import ACTIVATIONS, SECOND_EXPERT, ModelConfig

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
