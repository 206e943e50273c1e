"""What fairseq's options say about the model, in moekit's own words, and which options are refused by name."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from moekit.arguments import Capacity, check
from moekit.checkpoint.contents import clip, short
from moekit.checkpoint.plain_data import Opaque
from moekit.nn.config import ACTIVATIONS, SECOND_EXPERT, ModelConfig


def _given(value: Any) -> bool:
    return value not in (None, "", "None")


def _some(value: Any) -> bool:
    """Whether a number other than 0 is asked for; text and the like are no number, and ask for something, too."""
    return value is not None and not (isinstance(value, (bool, int, float)) and value <= 0)


# Option -> (whether a value asks for it, its description).
REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "adaptive_input": (bool, "adaptive input embeddings"),
    "adaptive_softmax_cutoff": (_given, "an adaptive softmax"),
    "tie_adaptive_weights": (bool, "an adaptive softmax with tied weights"),
    "character_embeddings": (bool, "character embeddings"),
    "base_layers": (_some, "BASE layers"),
    "use_stable_embedding": (bool, "bitsandbytes' stable embedding"),
    "quant_noise_pq": (_some, "quantisation noise"),
    "quant_noise_scalar": (_some, "scalar quantisation"),
    "cross_self_attention": (bool, "cross-self-attention"),
    "decoder_layers_to_keep": (_given, "pruned layers"),
}
# The option that is the capacity in evaluation, and the branch's default of it.
CAPACITY, FRACTION = "moe_eval_capacity_token_fraction", 0.25
# The most dims, experts or positions of a model; LAYERS is the most layers.
MOST = 1_000_000
LAYERS = 10_000


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
            node = OmegaConf.to_container(node, resolve=False)
    if not isinstance(node, Mapping):
        raise ValueError(
            f"{where} is {_a(node)}; expected a dict, an argparse.Namespace or an omegaconf DictConfig"
        )
    odd = next((key for key in node if not isinstance(key, str)), None)
    if odd is not None or None in node:
        raise ValueError(f"{where} has the option {short(odd)}; expected a name")
    return dict(node)


def _a(value: Any) -> str:
    return short(value) if isinstance(value, Opaque) else f"a {type(value).__name__}"


INTERPOLATION = re.compile(r"\$\{(\w+)\.(\w+)\}")


def resolve(options: Mapping[str, Any], cfg: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` with values such as ``"${task.tokens_per_sample}"`` looked up in ``cfg``.

    fairseq saves such references unresolved. A reference that leads nowhere counts as an option that is not there.
    """

    def look_up(value: Any) -> Any:
        # A reference may name a reference, but not for ever.
        for _ in range(len(cfg)):
            match = INTERPOLATION.fullmatch(value) if isinstance(value, str) else None
            if match is None:
                return value
            section, option = match.groups()
            found = cfg.get(section)
            value = found.get(option) if isinstance(found, Mapping) else None
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
        there = clip(", ".join(sorted(cfg)) or "nothing")
        raise ValueError(f"cfg in {where} has no 'model'; it has {there}")
    # A reference may lead into any section, whatever form it was saved in.
    cfg = {name: vars(part) if isinstance(part, argparse.Namespace) else part for name, part in cfg.items()}
    model = to_dict(cfg["model"], f"cfg['model'] in {where}")
    task = {} if cfg.get("task") is None else to_dict(cfg["task"], f"cfg['task'] in {where}")
    return resolve(model, cfg), resolve(task, cfg)


class Options:
    """One section of options, each read as what it has to be.

    Args:
        options: by their names; None counts as an option that is not there.
        where: the file, for errors.
    """

    def __init__(self, options: Mapping[str, Any], where: str):
        self.options, self.where = options, where

    def error(self, name: str, expected: str) -> ValueError:
        return ValueError(f"{self.where}: {name}={short(self.options.get(name))}; expected {expected}")

    def whole(self, name: str, default: int | None, least: int, most: int) -> int:
        """A whole number from ``least`` to ``most``."""
        value = self.options.get(name)
        if value is None:
            value = default
        if value is None:
            raise ValueError(f"{self.where}: the model's options lack {name}")
        expected = f"a whole number from {least:,} to {most:,}"
        if isinstance(value, float) and math.isfinite(value) and value == int(value):
            value = int(value)
        if type(value) is not int or not least <= value <= most:
            raise self.error(name, expected)
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.options.get(name)
        if value is None:
            return default
        if type(value) not in (bool, int) or value not in (0, 1):
            raise self.error(name, "True or False")
        return bool(value)

    def word(self, name: str, default: str, known: tuple[str, ...]) -> str:
        value = self.options.get(name)
        if value is None:
            return default
        if not isinstance(value, str) or value not in known:
            raise ValueError(
                f"{self.where}: {name}={short(value)} is unknown; the branch has {', '.join(known)}"
            )
        return value


# The options that make up the config; see `from_fairseq`.
READ = frozenset(
    """_name arch decoder_layers decoder_embed_dim decoder_ffn_embed_dim decoder_attention_heads decoder_input_dim
    decoder_output_dim max_target_positions tokens_per_sample activation_fn decoder_normalize_before
    no_decoder_final_norm decoder_learned_pos no_token_positional_embeddings no_scale_embedding layernorm_embedding
    share_decoder_input_output_embed moe_freq decoder_moe_freq moe_expert_count alternate_decoder_ffn_embed_dim
    moe_top1_expert moe_gating_use_fp32 moe_second_expert_policy moe_normalize_gate_prob_before_dropping
    moe_batch_prioritized_routing use_moe_pad_mask add_bos_token""".split()
) | set(REFUSED)


def eval_capacity(options: Mapping[str, Any]) -> float | None:
    """The capacity in evaluation: a share of a batch's tokens, below 0 for the training's rule, None for no limit.

    Raises:
        ValueError: ``options`` have something else.
    """
    return check(CAPACITY, options.get(CAPACITY, FRACTION), Capacity(zero=True))


def from_fairseq(
    model: Mapping[str, Any],
    task: Mapping[str, Any],
    *,
    vocab_rows: int,
    before_final_norm: bool,
    where: str = "the checkpoint",
) -> ModelConfig:
    """Translate fairseq's options.

    Args:
        model: the options of ``cfg["model"]``; what is missing gets the branch's default
            (``TransformerLanguageModelConfig`` in fairseq/models/transformer_lm.py).
        task: the options of ``cfg["task"]``.
        vocab_rows: rows of ``decoder.embed_tokens.weight``, which no option tells.
        before_final_norm: the files are of a version that had no final layer norm (see ``checkpoint``).
        where: the file that the options are from, for errors.

    Raises:
        ValueError: an option is missing, malformed, or asks for what moekit does not have.
    """
    said = "_name" if model.get("_name") else "arch"
    name = model.get(said) or "transformer_lm"
    if not str(name).startswith("transformer_lm"):
        raise ValueError(
            f"{where} holds a {short(name)} ({said}); moekit runs fairseq's 'transformer_lm' models"
        )
    for option, (asks, what) in REFUSED.items():
        if asks(model.get(option)):
            raise ValueError(
                f"{where} asks for {what} ({option}={short(model[option])}), which moekit has not"
            )
    options, of_task = Options(model, where), Options(task, where)
    dim = options.whole("decoder_embed_dim", 512, 1, MOST)
    heads = options.whole("decoder_attention_heads", 8, 1, MOST)
    if dim % heads:
        raise options.error("decoder_attention_heads", f"a number that divides decoder_embed_dim={dim}")
    positions = not options.flag("no_token_positional_embeddings")
    learned = options.flag("decoder_learned_pos")
    if dim in (2, 3) and positions and not learned:
        # fairseq divides by dim // 2 - 1 there.
        raise options.error("decoder_embed_dim", "4 or more, as its positions are sinusoids")
    tokens_per_sample = of_task.whole("tokens_per_sample", 1024, 1, MOST)
    # An option that is not there is the task's; one that is None is not.
    of_limit = options if "max_target_positions" in model else of_task
    config = ModelConfig(
        layers=options.whole("decoder_layers", 6, 1, LAYERS),
        dim=dim,
        ffn_dim=options.whole("decoder_ffn_embed_dim", 2048, 1, MOST),
        heads=heads,
        vocab_rows=vocab_rows,
        input_dim=options.whole("decoder_input_dim", dim, 1, MOST),
        output_dim=options.whole("decoder_output_dim", dim, 1, MOST),
        max_positions=of_limit.whole(
            "max_target_positions", options.whole("tokens_per_sample", tokens_per_sample, 1, MOST), 1, MOST
        ),
        activation=options.word("activation_fn", "relu", ACTIVATIONS),
        pre_norm=options.flag("decoder_normalize_before"),
        final_norm=not (options.flag("no_decoder_final_norm") or before_final_norm),
        before_final_norm=before_final_norm,
        learned_positions=learned,
        positions=positions,
        scale_embedding=not options.flag("no_scale_embedding"),
        embedding_norm=options.flag("layernorm_embedding"),
        share_output=options.flag("share_decoder_input_output_embed"),
        moe_freq=max(options.whole("moe_freq", 0, 0, MOST), options.whole("decoder_moe_freq", 0, 0, MOST)),
        experts=options.whole("moe_expert_count", 0, 0, MOST),
        alternate_ffn_dim=options.whole("alternate_decoder_ffn_embed_dim", 0, 0, MOST),
        gate="top1" if options.flag("moe_top1_expert") else "top2",
        gate_fp32=options.flag("moe_gating_use_fp32"),
        second_expert=options.word("moe_second_expert_policy", "sampling", SECOND_EXPERT),
        normalize_before_dropping=options.flag("moe_normalize_gate_prob_before_dropping"),
        batch_prioritized=options.flag("moe_batch_prioritized_routing"),
        mask_padding=options.flag("use_moe_pad_mask"),
        add_bos=of_task.flag("add_bos_token") or options.flag("add_bos_token"),
    )
    # The branch's default options name experts for dense models, too.
    return config if config.moe_layers else replace(config, experts=0)
