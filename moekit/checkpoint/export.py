"""Write a model in the layout of the released checkpoints: ``model-shared.pt`` and ``model-rank-N.pt``, float16.

A model without experts is one file, ``model.pt``, which the released fairseq reads, too. This is the reverse of plan.py, by
the same key table. It serves the demos, the bench and the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moekit import results
from moekit.arguments import Path as PathKind
from moekit.arguments import Whole, check, reading
from moekit.checkpoint import branch, writing
from moekit.checkpoint.belonging import written_as
from moekit.checkpoint.files import NAME
from moekit.checkpoint.keys import fairseq_parts
from moekit.nn.config import DENSE, ModelConfig
from moekit.nn.dispatch import owned
from moekit.nn.experts import QuantisedExperts
from moekit.nn.transformer import Transformer


def save(
    model: Transformer,
    folder: str | Path,
    files: int = 1,
    *,
    dtype: torch.dtype = torch.float16,
    **options: Any,
) -> None:
    """Write ``model``, which holds all its experts, into ``folder``, where its files appear together.

    Args:
        files: how many files the experts are spread over; 1 for a model without experts.
        dtype: of the weights written.
        options: entries of ``cfg["model"]`` that the model's config does not tell, such as ``dropout``.

    Raises:
        ValueError: more files than experts, experts with numbers of one byte, or ``folder`` holds another checkpoint, which
            would be read in place of this one.
        moekit.results.NotWritten: (a ValueError) the folder cannot be written to, or its disk is full.
    """
    if not isinstance(model, Transformer):
        raise ValueError(f"model is a {type(model).__name__}; expected a model of moekit.module")
    if any(isinstance(module, QuantisedExperts) for module in model.modules()):
        raise ValueError(
            f"the model for {folder} has quantised experts: write the one that they were made of, and load it with experts=..."
        )
    parameters = {name: p.detach().to("cpu", dtype) for name, p in model.named_parameters()}
    write(
        model.config,
        folder,
        files,
        parameters,
        lambda held: {
            name: stacked[held.start : held.stop]
            for name, stacked in parameters.items()
            if ".moe.experts." in name
        },
        dtype=dtype,
        **options,
    )


def write(
    config: ModelConfig,
    folder: str | Path,
    files: int,
    shared: dict[str, torch.Tensor],
    experts: Callable[[range], dict[str, torch.Tensor]],
    *,
    dtype: torch.dtype,
    **options: Any,
) -> None:
    """Write a model that need not be in memory as a whole; the arguments not told here are those of :func:`save`.

    Args:
        shared: by our names, what is no expert's, in ``dtype`` on the CPU.
        experts: called once for each file: our names of the experts' stacked weights, and those of the experts held.
    """
    folder, files = check("folder", folder, PathKind()), check("files", files, Whole(0))
    dense = config.dense
    if dense and files != 1:
        raise ValueError(f"files={files}: {DENSE} to spread over files; expected 1")
    if not dense and not 1 <= files <= config.experts:
        raise ValueError(f"files={files}: expected 1 to {config.experts}, the number of experts")
    name = "model.pt" if dense else "model-shared.pt"
    ranks = {} if dense else {f"model-rank-{rank}.pt": rank for rank in range(files)}
    _check_alone(folder, {name, *ranks})
    top = {"args": None} | branch.settings(config, files, **options)
    with results.together(folder) as place:
        with open(place / name, "wb") as file:
            writing.save(top | {"model": shared_part(shared, config, dtype)}, file)
        for path, rank in ranks.items():
            part = expert_part(experts(owned(config.experts, files, rank)))
            with open(place / path, "wb") as file:
                writing.save({**written_as(path, top), "model": part}, file)


def _check_alone(folder: Path, names: set[str]) -> None:
    """Refuse a folder with files that would be read with those of ``names`` or in place of them."""
    with reading(folder):
        there = [path.name for path in sorted(folder.iterdir())] if folder.is_dir() else []
    for other in there:
        match = NAME.fullmatch(other)
        if other == "config.json" or (match and match["stem"] == "model" and other not in names):
            raise ValueError(f"{folder} holds another checkpoint ({other}): remove it or name another folder")


def shared_part(
    parameters: dict[str, torch.Tensor], config: ModelConfig, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """What every rank of fairseq needs, by fairseq's names."""
    part = {"decoder.version": torch.tensor([3.0], dtype=dtype)}
    if config.positions and not config.learned_positions:
        part["decoder.embed_positions._float_tensor"] = torch.zeros(1, dtype=dtype)
    for name, parameter in parameters.items():
        if ".moe.experts." not in name:
            part |= {key: tensor.clone() for key, tensor in fairseq_parts(name, parameter)}
    if config.share_output:
        part["decoder.output_projection.weight"] = part["decoder.embed_tokens.weight"]
    return part


def expert_part(stacks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts by fairseq's names, counted from 0 as it does in every file."""
    return {
        key: tensor.clone()
        for name, stacked in stacks.items()
        for key, tensor in fairseq_parts(name, stacked)
    }
