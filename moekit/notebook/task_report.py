"""The tables of evaluate_tasks.ipynb: a model and its baseline on tasks and domains, side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pandas as pd

from moekit import api
from moekit.domains import OTHER, WHOLE, DomainScores, compare_domains, score_domains
from moekit.fairseq_data import Data
from moekit.notebook import models
from moekit.notebook.report import write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from moekit.tasks import TaskResults

# Characters of a text in a table; the end of what a model read counts most.
SHOWN = 70


@dataclass(frozen=True)
class Measured:
    """A model's results: those of the tasks, and those of the domains; None where none were asked for."""

    tasks: TaskResults
    domains: DomainScores | None


def tasks(p: SimpleNamespace, model: api.Model) -> TaskResults:
    """The notebook's tasks on ``model``, with the change of the routing that holds."""
    from moekit.tasks import evaluate_tasks

    options = {"data": p.task_data, "limit": p.limit, "num_fewshot": p.num_fewshot}
    return evaluate_tasks(model, p.tasks, **options)


def domains(p: SimpleNamespace, model: api.Model, fractions: list[float]) -> DomainScores | None:
    """The notebook's domains without a capacity and at each of ``fractions``; None where none are given."""
    if p.domains is None:
        return None
    how = Data("demo", p.subset, p.tokens_per_sample)
    return score_domains(model, p.domains, how, [None, *fractions], p.max_batches)


def baseline(p: SimpleNamespace) -> Measured | None:
    """The baseline on the same tasks and domains, without a capacity; None where none is given."""
    if p.baseline is None:
        return None
    with models.load(p, p.baseline) as model:
        return Measured(tasks(p, model), domains(p, model, []))


def masked(p: SimpleNamespace, model: api.Model) -> TaskResults | None:
    """The tasks without the experts of ``mask``; None where no mask is given."""
    if not p.mask:
        return None
    with model.route(mask=p.mask):
        return tasks(p, model)


def task_table(found: TaskResults, other: Measured | None) -> pd.DataFrame:
    """One row per task and metric: ``value`` and ``stderr``, those of the baseline, the ``difference`` with its paired 95 %
    interval, and an empty column for the figures of a paper."""
    from moekit.tasks import compare

    table = found.tasks
    if other is not None:
        told = other.tasks.tasks[["task", "metric", "value", "stderr"]]
        table = table.merge(told, on=["task", "metric"], how="left", suffixes=("", "_baseline"))
        paired = compare(other.tasks, found)[["task", "metric", "change", "low", "high"]]
        table = table.merge(paired, on=["task", "metric"], how="left").rename(
            columns={"change": "difference"}
        )
    return table.assign(paper="")


def domain_table(found: DomainScores | None, other: Measured | None) -> pd.DataFrame | None:
    """One row per domain, without a capacity: tokens, bits, the baseline's bits, and the paired difference."""
    if found is None:
        return None
    names = ["domain", "tokens", "bytes", "bits_per_token", "low", "high", "bits_per_byte", "perplexity"]
    table = found.table[found.table["capacity"].isna()][names]
    if other is not None and other.domains is not None:
        told = ["domain", "bits_per_token", "low", "high", "bits_per_byte"]
        table = table.merge(other.domains.table[told], "left", "domain", suffixes=("", "_baseline"))
        # Both have columns of these names, which are those of one model in this table.
        paired = domain_differences(found, other).rename(
            columns={"low": "difference_low", "high": "difference_high"}
        )
        told = ["difference", "difference_low", "difference_high", "p", "survives", "units", "note"]
        table = table.merge(paired[["domain", *told]], "left", "domain")
    return table.reset_index(drop=True)


def domain_differences(found: DomainScores | None, other: Measured | None) -> pd.DataFrame | None:
    """:func:`moekit.domains.compare_domains` of the baseline and the checkpoint without a capacity; None without one of them."""
    if found is None or other is None or other.domains is None:
        return None
    return compare_domains(other.domains, found)


def unpaired(table: pd.DataFrame | None) -> str:
    """The sentence that names the domains of which the two models did not read the same; "" where there is none."""
    if table is None or "note" not in table or not (here := table["note"] == OTHER).any():
        return ""
    return (
        f"No difference for {', '.join(table['domain'][here])}: the two models did not read the same samples with the same "
        "tokens. Set tokens_per_sample to what both models can read, where their positions differ."
    )


def capacity_table(found: DomainScores | None) -> pd.DataFrame | None:
    """One row per capacity, over all domains: bits, the share of dropped choices, and how many batches ran for it."""
    if found is None:
        return None
    names = ["capacity", "bits_per_token", "low", "high", "bits_per_byte", "dropped", "run", "batches"]
    table = found.table[found.table["domain"] == WHOLE][names]
    return table.fillna({"capacity": "none"}).reset_index(drop=True)


def changes(before: TaskResults, after: TaskResults | None) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """What a mask did: the table of :func:`moekit.tasks.compare`, and the items whose answer is another one."""
    from moekit.tasks.evaluation import changed_items, compare

    if after is None:
        return None
    items = changed_items(before, after)
    first = items.query("changed").drop_duplicates(["task", "item"])
    names = ["task", "item", "text", "target", "answer_before", "answer_after"]
    return compare(before, after), first[names].reset_index(drop=True)


def shortened(table: pd.DataFrame) -> pd.DataFrame:
    """The table with only the ends of its long texts."""
    return table.map(
        lambda cell: f"…{cell[-SHOWN:]}" if isinstance(cell, str) and len(cell) > SHOWN else cell
    )


def save(
    p: SimpleNamespace,
    found: TaskResults,
    other: Measured | None,
    after: TaskResults | None,
    effect: tuple[pd.DataFrame, pd.DataFrame] | None,
    swept: DomainScores | None,
    figures: Sequence[Figure | None],
) -> Path:
    """Write ``tasks.csv``, ``domains.csv``, ``domain_differences.csv``, ``mask.csv`` and ``changed.csv``, ``items.parquet`` with a
    column ``run``, ``run.json`` and the figures ``tasks.png``, ``domains.png`` and ``capacities.png``; what was not made is left out.
    Files appear as :func:`moekit.notebook.report.write` says.
    """
    runs = {"checkpoint": found, "baseline": other and other.tasks, "masked": after}
    items = [run.items.assign(run=name) for name, run in runs.items() if run is not None]
    tables = {"tasks": task_table(found, other), "domain_differences": domain_differences(swept, other)}
    if swept is not None:
        both = [swept.table.assign(model="checkpoint")]
        if other is not None and other.domains is not None:
            both.append(other.domains.table.assign(model="baseline"))
        tables["domains"] = pd.concat(both, ignore_index=True)
    if effect is not None:
        tables |= {"mask": effect[0], "changed": effect[1]}
    told = {name: run.meta for name, run in runs.items() if run is not None}

    def more(folder: Path) -> None:
        pd.concat(items, ignore_index=True).to_parquet(folder / "items.parquet", index=False)
        (folder / "run.json").write_text(json.dumps({"parameters": vars(p), "runs": told}, indent=2) + "\n")

    drawn = dict(zip(("tasks", "domains", "capacities"), figures, strict=True))
    return write(p.output_dir, drawn, tables, more)
