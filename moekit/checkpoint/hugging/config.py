"""A ``config.json``: which layout it is of, and the model it describes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from moekit import json_text
from moekit.checkpoint import branch
from moekit.checkpoint.contents import clip, short
from moekit.checkpoint.options import from_fairseq, options_of
from moekit.nn.config import ACTIVATIONS, ModelConfig
from moekit.nn.gates import top_k_of
from moekit.symbols import EOS, PAD

FILE, GENERATION = "config.json", "generation_config.json"
MOEKIT, LIGHT = "moekit", "light-fairseq"
# What a config.json calls its model's class, and the layout of the files beside it.
ARCHITECTURES = {
    "FairseqMoeForCausalLM": MOEKIT,
    "FairseqMoeModel": MOEKIT,
    "FSGPTMoEForCausalLM": LIGHT,
    "FSGPTForCausalLM": LIGHT,
}
MODEL_TYPE = "fairseq_moe"
# Fields of ModelConfig -> what transformers calls them; the others keep their names.
TRANSFORMERS = {
    "layers": "num_hidden_layers",
    "dim": "hidden_size",
    "ffn_dim": "intermediate_size",
    "heads": "num_attention_heads",
    "vocab_rows": "vocab_size",
    "max_positions": "max_position_embeddings",
    "activation": "hidden_act",
    "share_output": "tie_word_embeddings",
    "experts": "num_experts",
}
# A file of the folder in which transformers finds the classes where nobody has imported moekit.hf.
BRIDGE = "modeling_moekit.py"
BRIDGE_TEXT = """# transformers reads this file with trust_remote_code=True. The classes are those of the installed package moekit.
from moekit.hf import FairseqMoeConfig, FairseqMoeForCausalLM, FairseqMoeModel, FairseqMoeTokenizer
"""
AUTO_MAP = {
    "AutoConfig": "modeling_moekit.FairseqMoeConfig",
    "AutoModel": "modeling_moekit.FairseqMoeModel",
    "AutoModelForCausalLM": "modeling_moekit.FairseqMoeForCausalLM",
}
# bytes of a config.json
MOST = 10_000_000


@dataclass(frozen=True)
class Described:
    """What a folder's ``config.json`` tells."""

    layout: str
    config: ModelConfig
    path: Path

    def settings(self) -> dict[str, Any]:
        """What a file of fairseq's would hold besides the weights."""
        return branch.settings(self.config, 1)


def layout_of(folder: Path) -> str | None:
    """The layout that a folder's ``config.json`` names; None where there is none, or one of another model."""
    found = _told(folder)
    return None if found is None else found[0]


def described(folder: Path) -> Described | None:
    """What a folder's ``config.json`` tells; None where :func:`layout_of` is None.

    Raises:
        ValueError: it is no JSON, lacks an entry, or has a value that makes no sense.
    """
    found = _told(folder)
    if found is None:
        return None
    (layout, told), path = found, folder / FILE
    return Described(layout, _ours(told, path) if layout == MOEKIT else _light(told, path), path)


def _told(folder: Path) -> tuple[str, dict[str, Any]] | None:
    """The layout and the entries of a folder's ``config.json``; None as for :func:`layout_of`."""
    path = folder / FILE
    # A folder that may not be read has none; what reads its other files says so.
    if not os.path.isfile(path):
        return None
    told = json_of(path, MOST, "a config")
    if not isinstance(told, dict):
        raise ValueError(f"{path} holds {short(told)}; expected an object with the model's config")
    names = told.get("architectures")
    words = [one for one in names if type(one) is str] if isinstance(names, list) else []
    known = [ARCHITECTURES[one] for one in words if one in ARCHITECTURES]
    return (known[0], told) if known else None


def json_of(path: Path, most: int, what: str) -> Any:
    """What a JSON file holds.

    Args:
        most: bytes that it may have.
        what: it is, for errors.

    Raises:
        ValueError: it is larger, cannot be read, or is no JSON.
    """
    try:
        size = path.stat().st_size
        found = json_text.loads(path.read_bytes()) if size <= most else None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
    except ValueError as error:
        raise ValueError(f"{path} {error}: fetch it again") from None
    if size > most:
        raise ValueError(f"{path} has {size:,} bytes; {what} has {most:,} at most")
    return found


KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "int": (lambda value: type(value) is int, "a whole number"),
    "bool": (lambda value: type(value) is bool, "true or false"),
    "str": (lambda value: type(value) is str, "a word"),
}


def _value(told: Mapping[str, Any], name: str, kind: str, path: Path, default: Any = None) -> Any:
    if name not in told and default is None:
        raise ValueError(f"{path} lacks {name}")
    value = told.get(name, default)
    fits, expected = KINDS[kind]
    if not fits(value):
        raise ValueError(f"{path}: {name}={short(value)}; expected {expected}")
    return value


def _ours(told: Mapping[str, Any], path: Path) -> ModelConfig:
    values = {}
    for field in fields(ModelConfig):
        values[field.name] = _value(told, TRANSFORMERS.get(field.name, field.name), str(field.type), path)
    return ModelConfig(**values)


# transformers' names of activations.
ACTIVATION = {"gelu_new": "gelu_accurate", "gelu_pytorch_tanh": "gelu_accurate"}


def _light(told: Mapping[str, Any], path: Path) -> ModelConfig:
    """The options of light-fairseq's classes ``FSGPTConfig`` and ``FSGPTMoEConfig``, with their defaults."""

    def whole(name: str, default: int) -> int:
        return _value(told, name, "int", path, default)

    def flag(name: str, default: bool = False) -> bool:
        return _value(told, name, "bool", path, default)

    activation = _value(told, "activation_function", "str", path, "gelu")
    activation = ACTIVATION.get(activation, activation)
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{path}: activation_function={short(activation)}; expected one of {', '.join(ACTIVATIONS)}"
        )
    moe = "FSGPTMoEForCausalLM" in told["architectures"]
    if moe and told.get("moe_token_dropout", 0.2):
        warnings.warn(
            f"{path}: moe_token_dropout is ignored: the branch, which trained the model, weighs its experts' outputs with the "
            "gate alone",
            stacklevel=4,
        )
    dim = whole("hidden_size", 768)
    return ModelConfig(
        layers=whole("num_layers", 12),
        dim=dim,
        ffn_dim=whole("intermediate_size", 3072),
        heads=whole("num_heads", 12),
        vocab_rows=whole("vocab_size", 51200),
        input_dim=dim,
        output_dim=dim,
        max_positions=whole("max_position_embeddings", 2048),
        activation=activation,
        pre_norm=True,
        scale_embedding=not flag("no_scale_embedding"),
        share_output=True,
        moe_freq=whole("sparse_step", 2) if moe else 0,
        experts=whole("num_experts", 512) if moe else 0,
        gate_fp32=_value(told, "router_dtype", "str", path, "float32") == "float32",
        second_expert=_value(told, "second_expert_policy", "str", path, "all"),
        normalize_before_dropping=flag("normalize_router_prob_before_dropping"),
        batch_prioritized=flag("batch_prioritized_routing"),
        mask_padding=not flag("router_ignore_padding_tokens", True),
    )


def told_of(config: ModelConfig, dtype: str, dictionary: int | None) -> dict[str, Any]:
    """The ``config.json`` of a model.

    Args:
        dtype: of the weights, as torch calls it.
        dictionary: types of the dictionary, if that is known.
    """
    values = {
        TRANSFORMERS.get(field.name, field.name): getattr(config, field.name) for field in fields(config)
    }
    return {
        "architectures": ["FairseqMoeForCausalLM"],
        "auto_map": AUTO_MAP,
        "model_type": MODEL_TYPE,
        "dtype": dtype,
        "bos_token_id": config.first,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "dictionary_size": dictionary,
        "num_experts_per_tok": 0 if config.dense else top_k_of(config),
        **values,
    }


def generation(config: ModelConfig) -> dict[str, Any]:
    """The ``generation_config.json`` of a model. Nothing ends a text: ``</s>`` is the end of a line."""
    return {"bos_token_id": config.first, "pad_token_id": PAD}


def same_model(settings: Mapping[str, Any], found: Described) -> bool:
    """Whether fairseq's settings describe the model that ``config.json`` does, or whether somebody has changed the latter."""
    config = found.config
    told = from_fairseq(
        *options_of(settings, clip(str(found.path))),
        vocab_rows=config.vocab_rows,
        before_final_norm=config.before_final_norm,
        where=clip(str(found.path)),
    )
    return told == config
