"""What fairseq learns of a checkpoint's ``cfg`` (or its older ``args``).

fairseq trusts a config: it names classes to build, Python to evaluate, modules to import, files to open and addresses
to fetch. A checkpoint is untrusted. So fairseq gets a config of its own defaults, and of the file only plain values:
the options that :func:`moekit.checkpoint.options.from_fairseq` reads, the ones of the language modeling task that shape samples,
and how many tokens a batch has.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from fairseq.dataclass.configs import FairseqConfig
from fairseq.tasks.language_modeling import LanguageModelingConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moekit.checkpoint.options import CAPACITY, REFUSED, eval_capacity, options_of, to_dict
from moekit.headlines import first_line
from moekit.plugin.language_model import NAME

# The options of cfg["model"] that change what the model computes; any other steers the training.
MODEL = """activation_fn add_bos_token alternate_decoder_ffn_embed_dim decoder_attention_heads decoder_embed_dim
    decoder_ffn_embed_dim decoder_input_dim decoder_layers decoder_learned_pos decoder_moe_freq
    decoder_normalize_before decoder_output_dim layernorm_embedding max_target_positions
    moe_batch_prioritized_routing moe_expert_count moe_freq moe_gating_use_fp32
    moe_normalize_gate_prob_before_dropping moe_second_expert_policy moe_top1_expert no_decoder_final_norm
    no_scale_embedding no_token_positional_embeddings share_decoder_input_output_embed tokens_per_sample
    use_moe_pad_mask""".split()
# The task's own options. Those that refer to another section (plasma_path among them) keep fairseq's defaults, and the
# folder of the data is the caller's choice.
TASK = [
    field.name
    for field in dataclasses.fields(LanguageModelingConfig)
    if field.name not in ("_name", "data") and not str(field.default).startswith("${")
]
BATCH = ["batch_size", "max_tokens"]


def config(state: Mapping[str, Any], where: Path, final_norm: bool) -> DictConfig:
    """The config that fairseq gets in place of the file's.

    Args:
        state: the top level of a checkpoint file.
        where: the file, for the errors. fairseq looks for dict.txt beside it if the caller does not name the data.
        final_norm: whether the model has a final layer norm.

    Raises:
        ValueError: an option is not a plain value, or not of its kind.
    """
    model, task = options_of(state, str(where))
    if state.get("args") is not None:
        batch = model
    else:
        batch = to_dict(to_dict(state["cfg"], "cfg").get("dataset") or {}, f"cfg['dataset'] in {where}")

    built = OmegaConf.structured(FairseqConfig)
    built.model = None
    assign(built.dataset, plain(batch, BATCH, where), where)
    for option in BATCH:
        value = built.dataset[option]
        if value is not None and value < 1:
            raise ValueError(f"{where}: the option {option} is {value}; expected a number above 0, or None")
    for option in ("self_target", "past_target"):
        if task.get(option):
            raise ValueError(
                f"{where}: the option {option} is set; moekit runs models of the next token only"
            )
    built.task = OmegaConf.structured(LanguageModelingConfig)
    assign(built.task, plain(task, TASK, where), where)

    # A caller can override options that are there, so all are there.
    options = dict.fromkeys((*MODEL, *REFUSED)) | plain(model, (*MODEL, *REFUSED), where)
    options |= {"_name": NAME, "no_decoder_final_norm": not final_norm, CAPACITY: fraction(model, where)}
    sections = OmegaConf.to_container(built, resolve=False, enum_to_str=True) | {"model": options}
    sections["task"] |= {"_name": "language_modeling", "data": str(where.parent)}
    sections["criterion"] = {"_name": "cross_entropy"}
    return OmegaConf.create(sections, flags={"allow_objects": True})


def plain(options: Mapping[Any, Any], names: Iterable[str], where: Path) -> dict[str, Any]:
    """Of ``options`` those of ``names`` that are there and not None: int, float, bool or str.

    Raises:
        ValueError: a value of another type, or text that would be looked up elsewhere, such as ``${oc.env:HOME}``.
    """
    kept = {}
    for name in names:
        value = options.get(name)
        value = value.item() if isinstance(value, np.generic) else value
        if value is None:
            continue
        if isinstance(value, str):
            value = str(value)
        if type(value) not in (int, float, bool, str):
            found = f"a {type(value).__name__}"
        elif isinstance(value, str) and ("${" in value or value == "???"):
            found = reprlib.repr(value)
        else:
            kept[name] = value
            continue
        raise ValueError(
            f"{where}: the option {name} is {found}; expected a number, a word, True, False or None"
        )
    return kept


def assign(section: DictConfig, options: Mapping[str, Any], where: Path) -> None:
    """Set ``options`` in a section of fairseq's config, which knows the kind of each.

    Raises:
        ValueError: a value is of another kind.
    """
    for name, value in options.items():
        try:
            section[name] = value
        except OmegaConfBaseException as error:
            raise ValueError(
                f"{where}: the option {name} is {reprlib.repr(value)}, of a wrong kind ({reprlib.repr(first_line(error))})"
            ) from None


def fraction(model: Mapping[Any, Any], where: Path) -> float | None:
    """The capacity in evaluation (:func:`moekit.checkpoint.options.eval_capacity`)."""
    own = {CAPACITY: plain(model, [CAPACITY], where).get(CAPACITY)} if CAPACITY in model else {}
    try:
        return eval_capacity(own)
    except ValueError as error:
        raise ValueError(f"{where}: the option {error}") from None
