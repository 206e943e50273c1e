"""What can be known to fail before anything is loaded: looked at in a notebook's first cell, said in one sentence."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from moekit import checkpoint as ckpt
from moekit import fairseq_data as batches
from moekit import ranks
from moekit.arguments import ParameterError
from moekit.nn.config import ModelConfig
from moekit.routing.trace import Trace


def load_shards(p: SimpleNamespace) -> ModelConfig:
    """The checkpoint is whole, the devices are there, and ``output_dir`` can be written to; ``p`` holds the checked
    parameters.

    Raises:
        ParameterError: what is wrong.
    """
    _said(ranks.choose_devices, p.world_size, p.device)
    config = _said(lambda: ckpt.survey(ckpt.find(p.checkpoint))).config
    _writable(p.output_dir)
    return config


def run_inference(p: SimpleNamespace) -> ModelConfig:
    """As :func:`load_shards`; the data is there too, and the settings fit the model and each other."""
    config = load_shards(p)
    _said(batches.check_files, p.data, p.subset)
    if p.tokens_per_sample is not None and p.tokens_per_sample > config.max_positions:
        raise ParameterError(
            f"tokens_per_sample={p.tokens_per_sample}: the model has {config.max_positions} positions"
        )
    block = p.tokens_per_sample or config.max_positions
    if p.context_window >= block:
        raise ParameterError(
            f"context_window={p.context_window}: expected less than a block's {block} tokens"
        )
    if p.max_new_tokens >= config.max_positions:
        raise ParameterError(
            f"max_new_tokens={p.max_new_tokens}: the model has {config.max_positions} positions"
        )
    if p.num_return_sequences > 1 and p.beam_size == 1 and p.temperature == 0:
        raise ParameterError(
            f"num_return_sequences={p.num_return_sequences}: at temperature 0 all would be the same; draw, or search "
            "with a beam"
        )
    if p.beam_size > 1 and p.num_return_sequences > p.beam_size:
        raise ParameterError(
            f"num_return_sequences={p.num_return_sequences}: expected at most beam_size={p.beam_size}"
        )
    return config


def inspect_routing(p: SimpleNamespace) -> ModelConfig:
    """As :func:`load_shards`; the data or texts, the layers and the other trace are there too."""
    config = load_shards(p)
    if p.texts is None:
        _said(batches.check_files, p.data, p.subset)
    elif not p.texts or "" in p.texts:
        raise ParameterError(f"texts={p.texts!r}: expected at least one text, and none of them empty")
    for layer in p.layers or []:
        if layer not in config.moe_layers:
            raise ParameterError(
                f"layers={p.layers}: layer {layer} holds no experts; those that do are {config.moe_layers}"
            )
    if p.compare_with is not None:
        _said(Trace.load, p.compare_with)
    return config


def generation(p: SimpleNamespace) -> dict[str, Any]:
    """The arguments of ``Model.generate`` that a notebook's parameters mean.

    A beam search draws nothing, so temperature, top-k and top-p do not count; nor do the last two at temperature 0.
    """
    given = {
        name: getattr(p, name)
        for name in ("max_new_tokens", "beam_size", "repetition_penalty", "num_return_sequences", "seed")
    }
    if p.beam_size > 1:
        return given
    draws = {"top_k": p.top_k, "top_p": p.top_p} if p.temperature > 0 else {}
    return given | {"temperature": p.temperature, "alternatives": 5} | draws


def _writable(output_dir: str) -> None:
    """Make the folder and try: what permissions say of a mount that is read-only, or of root, is not to be relied on."""
    folder = Path(output_dir).expanduser().resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ParameterError(
            f"output_dir={output_dir!r}: nothing can be written to {folder} ({error.strerror}); name another folder"
        ) from None


def _said(check: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return check(*arguments)
    except ValueError as error:
        raise ParameterError(str(error)) from None
