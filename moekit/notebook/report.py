"""What the notebooks show and write about a machine, a model and a result: tables as DataFrames, figures as files."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from matplotlib.figure import Figure

from moekit import checkpoint as ckpt
from moekit import ranks, results
from moekit.arguments import Choice, Whole
from moekit.arguments import Path as PathKind
from moekit.checked import Instance, Named, checked
from moekit.data.codec import Codec, Ids
from moekit.handle import MODEL, experts_dtype, weights_dtype
from moekit.nn.dispatch import owned
from moekit.nn.experts import TENSORS
from moekit.nn.gates import gate_of
from moekit.nn.quantise import dtype_name, name_of
from moekit.nn.transformer import weight_bytes
from moekit.notebook.pictures import DPI, TABLE
from moekit.notebook.pieces import CODEC, pieces
from moekit.notebook.quantisation import quantisation
from moekit.ranks.machine import free_memory, gpus, host_memory
from moekit.scoring import Evaluation
from moekit.units import GIB
from moekit.versions import versions

__all__ = [
    "files",
    "filled",
    "first_tokens",
    "machine",
    "model",
    "parts",
    "quantisation",
    "result",
    "save",
    "save_figures",
    "shares",
    "versions",
]

if TYPE_CHECKING:
    from moekit.api import Model

EVALUATION = Instance(Evaluation, "what model.evaluate gives")
PARAMETERS = Instance(Mapping, "parameters by name, as vars(p) has them")
FIGURES = Named(Figure, "figures by name")
TABLES = Named(pd.DataFrame, "tables by name")


def machine() -> pd.DataFrame:
    """The machine that this runs on, one fact per row."""
    facts = {
        "system": platform.platform(),
        "cores": ranks.usable_cores(),
        "host memory": f"{host_memory('MemAvailable') / GIB:.1f} of {host_memory('MemTotal') / GIB:.1f} GiB free",
    }
    facts |= {name: version for name, version in versions().items() if version}
    for i, gpu in enumerate(gpus()):
        facts[f"cuda:{i}"] = f"{gpu.name}, {gpu.free / GIB:.1f} of {gpu.total / GIB:.1f} GiB free"
    if not torch.cuda.is_available():
        facts["GPUs"] = "none that torch sees: everything runs on the CPU"
    return pd.DataFrame({"": facts})


def files(checkpoint: str | Path) -> pd.DataFrame:
    """The files in a checkpoint's folder, one row per file."""
    table = pd.DataFrame(ckpt.describe(checkpoint)).drop(columns="rank")
    table.insert(1, "MB", (table.pop("bytes") / 1e6).round(2))
    return table.set_index("file")


@checked(where=Choice(ranks.WHERE))
def shares(
    checkpoint: str | Path,
    world_size: int | None,
    device: str,
    dtype: str,
    where: str = "local",
    experts: str | None = None,
) -> pd.DataFrame:
    """What each rank will read, one row per rank: its files, its experts, and the memory that they take beside what is free.

    On the CPU the memory that is free is an equal share of the host's. Of ranks on a cluster (``where`` is "ray"), nothing is
    known before they start but their number: the memory that is free is NaN, and with ``world_size`` None the table is that of
    one rank.
    """
    files = ckpt.find(checkpoint)
    plan = ckpt.survey(files)
    devices = ranks.devices_to_come(world_size, device, where)
    free = [math.nan] * len(devices) if where == "ray" else free_memory(devices)
    world_size = len(devices)
    kinds = weights_dtype(dtype, devices[0], plan), experts_dtype(experts, files, plan.config)
    rows = []
    for rank, place in enumerate(devices):
        held = owned(plan.config.experts, world_size, rank)
        needed = plan.needed(held)
        rows.append(
            {
                "rank": rank,
                "device": str(place) if where == "local" else "of the cluster",
                "files": ", ".join(source.path.name for source in needed),
                "experts a layer": f"{held.start} to {held.stop - 1}" if len(held) else "none",
                "million parameters": round(plan.parameters(len(held)) / 1e6, 2),
                "experts' type": name_of(kinds[1]) or dtype_name(kinds[0]),
                "GiB": round(weight_bytes(plan.config, len(held), *kinds) / GIB, 3),
                "GiB free": round(free[rank] / GIB, 1),
            }
        )
    return pd.DataFrame(rows).set_index("rank")


@checked(model=MODEL)
def model(model: Model) -> pd.DataFrame:
    """The model, one fact per row."""
    c = model.config
    every = f"every {c.moe_freq}{'nd' if c.moe_freq == 2 else 'th'}" if c.moe_freq > 1 else "every"
    facts = {
        "checkpoint": str(model.files.shared.parent),
        "layers": c.layers,
        "model dim": c.dim,
        "heads": c.heads,
        "width of dense layers and experts": c.ffn_dim,
        "experts": f"{c.experts} in {every} layer: {len(c.moe_layers)} layers" if c.moe_layers else "none",
        "gate": gate_of(c).describe() if c.moe_layers else "none",
        "positions": c.max_positions,
        "rows of the embedding": c.vocab_rows,
        "million parameters": round(model.plan.parameters(c.experts) / 1e6, 2),
        "ranks": f"{model.world_size} on {model.device}, {dtypes(model)}",
        "seconds to load": round(model.load_seconds, 2),
    }
    if model.changes:
        facts["changed in its config"] = ", ".join(
            f"{name}={value!r}" for name, value in model.changes.items()
        )
    return pd.DataFrame({"": facts})


@checked(model=MODEL)
def dtypes(model: Model) -> str:
    """The type of the weights, and of the experts' where it is another."""
    kind = dtype_name(model.dtype)
    return kind if model.experts is None else f"{kind}, experts in {model.experts}"


@checked(model=MODEL)
def parts(model: Model) -> pd.DataFrame:
    """What each rank holds, one row per rank: "MiB" on its device, and in host memory those of experts that are fetched."""
    rows = [
        {
            "rank": part["rank"],
            "node": part["node"],
            "device": part["device"],
            "files read": len(part["files"]),
            "experts a layer": len(part["experts"]),
            "experts' type": model.experts or dtype_name(model.dtype),
            "million parameters": round(part["parameters"] / 1e6, 2),
            "MiB": round(part["bytes"] / 2**20, 1),
            "MiB of experts on the host": round(part["host_bytes"] / 2**20, 1),
            "seconds": round(part["seconds"], 2),
        }
        for part in model.parts
    ]
    return pd.DataFrame(rows).set_index("rank")


@checked(model=MODEL)
def filled(model: Model) -> pd.DataFrame:
    """How many of its tensors each expert got, over all ranks: layers x experts, 4 everywhere.

    Raises:
        ValueError: an expert got fewer or more.
    """
    c = model.config
    table = pd.DataFrame(0, index=pd.Index(c.moe_layers, name="layer"), columns=range(c.experts))
    for part in model.parts:
        for where, count in part["filled"].items():
            if where is not None:
                table.loc[where] += count
    if c.moe_layers and not (table == TENSORS).all(axis=None):
        layer, expert = next(zip(*(table != TENSORS).to_numpy().nonzero(), strict=True))
        raise ValueError(
            f"expert {expert} of layer {c.moe_layers[layer]} got {table.iat[layer, expert]} tensors; expected {TENSORS}, each "
            "once: load the checkpoint again"
        )
    return table


@checked(evaluation=EVALUATION)
def result(evaluation: Evaluation) -> pd.DataFrame:
    """A result's figures, one per row."""
    facts = {
        "loss, bits a token": f"{evaluation.loss_base2:.4f}",
        "perplexity": f"{evaluation.perplexity:.2f}",
        "tokens": f"{evaluation.ntokens:,}",
        "seconds": f"{evaluation.seconds:.2f}",
        "tokens a second": f"{evaluation.tokens_per_second:,.0f}",
    }
    return pd.DataFrame({"": facts})


@checked(evaluation=EVALUATION, codec=CODEC, rows=Whole())
def first_tokens(evaluation: Evaluation, codec: Codec | Ids | None, rows: int = 5) -> pd.DataFrame:
    """The beginning of ``Evaluation.tokens``, with the target as text in the column ``piece``, as ``model.score`` has it."""
    table = evaluation.tokens.head(rows).copy()
    table.insert(4, "piece", pieces(codec, table["target"]))
    return table


@checked(
    output_dir=PathKind(),
    model=MODEL,
    evaluation=EVALUATION,
    parameters=PARAMETERS,
    figures=FIGURES,
    written=TABLE,
)
def save(
    output_dir: str | Path,
    model: Model,
    evaluation: Evaluation,
    parameters: dict[str, Any],
    figures: Mapping[str, Figure] = MappingProxyType({}),
    written: pd.DataFrame | None = None,
) -> Path:
    """Write ``results.json``, ``tokens.parquet``, ``{name}.png`` of each figure, and of ``written`` ``generations.jsonl``, a JSON
    object a line; they appear together, at the end.

    Args:
        parameters: the notebook's, as ``vars(p)`` has them.
        written: of :func:`moekit.notebook.playground.written`; one without rows makes an empty file.

    Returns:
        The folder, absolute.

    Raises:
        moekit.results.NotWritten: the folder cannot be written to, or its disk is full; earlier files are as they were.
    """
    found = {
        "loss_base2": evaluation.loss_base2,
        "perplexity": evaluation.perplexity,
        "ntokens": evaluation.ntokens,
        "tokens_per_second": evaluation.tokens_per_second,
        "seconds": evaluation.seconds,
        "load_seconds": model.load_seconds,
        "world_size": model.world_size,
        "dtype": dtype_name(model.dtype),
        "experts": model.experts,
        "device": model.device,
        "versions": model.versions,
        "parameters": parameters,
    }

    def more(folder: Path) -> None:
        (folder / "results.json").write_text(json.dumps(found, indent=2) + "\n")
        evaluation.tokens.to_parquet(folder / "tokens.parquet", index=False)
        if written is not None:
            # Empty lines are no JSON.
            lines = written.to_json(orient="records", lines=True, force_ascii=False, double_precision=15)
            (folder / "generations.jsonl").write_text(lines if len(written) else "", "utf-8")

    return write(output_dir, figures, {}, more)


@checked(output_dir=PathKind(), figures=FIGURES, tables=TABLES)
def save_figures(
    output_dir: str | Path,
    figures: Mapping[str, Figure],
    tables: Mapping[str, pd.DataFrame] = MappingProxyType({}),
) -> Path:
    """Write ``{name}.png`` of each figure and ``{name}.csv`` of each table with its index, as :func:`save` does."""

    def more(folder: Path) -> None:
        for name, table in tables.items():
            if table is not None:
                table.to_csv(folder / f"{name}.csv")

    return write(output_dir, figures, {}, more)


@checked(output_dir=PathKind(), figures=FIGURES, tables=TABLES)
def write(
    output_dir: str | Path,
    figures: Mapping[str, Figure | None],
    tables: Mapping[str, pd.DataFrame | None],
    more: Callable[[Path], object],
) -> Path:
    """Write ``{name}.png`` of each figure and ``{name}.csv`` of each table, without its index, and what ``more`` writes into the
    folder that it is given. They appear together, at the end; None stands for a figure or a table that was not made.

    Returns:
        The folder, absolute.

    Raises:
        moekit.results.NotWritten: the folder cannot be written to, or its disk is full; earlier files are as they were.
    """
    with results.together(output_dir) as folder:
        for name, figure in figures.items():
            if figure is not None:
                figure.savefig(folder / f"{name}.png", dpi=DPI, bbox_inches="tight")
        for name, table in tables.items():
            if table is not None:
                table.to_csv(folder / f"{name}.csv", index=False)
        more(folder)
    return output_dir.resolve()
