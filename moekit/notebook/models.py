"""A notebook's model: an earlier run's is closed before the next one is loaded, and its codec is looked for."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from moekit import api
from moekit import checkpoint as ckpt
from moekit.api import Model

if TYPE_CHECKING:
    from moekit.data.codec import Codec


def close_earlier(variables: Mapping[str, Any]) -> None:
    """Close the models among a notebook's variables, so that the next one finds their memory free."""
    for value in variables.values():
        if isinstance(value, Model):
            value.close()


def load(p: SimpleNamespace, checkpoint: str | None = None, progress: bool = True) -> Model:
    """``checkpoint``, or the parameters' own, loaded as they say; what they say of experts is left out where it has none."""
    checkpoint = p.checkpoint if checkpoint is None else checkpoint
    how = {name: getattr(p, name) for name in ("world_size", "device", "dtype", "bpe", "ranks", "gpu_memory")}
    of_experts = {"experts": p.experts, "resident": p.resident}
    # Only a question of experts needs a look at the headers that load does not take itself.
    if (
        any(one is not None for one in of_experts.values())
        and ckpt.survey(ckpt.find(checkpoint)).config.moe_layers
    ):
        how |= of_experts
    return api.load(checkpoint, progress=progress, **how)


def codec_of(model: Model) -> Codec | None:
    """The model's codec; where its files are missing, None and a sentence that says so: tokens are then shown by id."""
    if model.reads_text:
        return model.codec
    try:
        why = model.codec.why
    except ValueError as error:
        why = error
    print(f"Tokens are shown by their ids, and no text can be written: {why}.")
    return None
