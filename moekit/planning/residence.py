"""Experts that are fetched: what the ranks need to know to fetch them, and the table of what they fetched."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from moekit import arguments
from moekit.arguments import Flag, check, shown
from moekit.handle import Handle
from moekit.nn.config import DENSE
from moekit.nn.policies import POLICIES, USUAL
from moekit.nn.resident import Counts, Residence
from moekit.planning.runs import Run
from moekit.routing.trace import Trace
from moekit.units import GIB
from moekit.worker import loading

if TYPE_CHECKING:
    import pandas as pd


def residence(run: Run, policy: str | Trace | Path, prefetch: bool, limited: bool) -> Residence | None:
    """What the ranks have to know of a run whose experts are fetched; None if all are on their devices.

    Args:
        limited: whether ``resident`` or ``gpu_memory`` was asked for, of which it may follow that all stay on their devices.

    Raises:
        ValueError: there is no such policy, it is a trace of another model, or nothing was asked for that has experts fetched.
    """
    prefetch = check("prefetch", prefetch, Flag())
    unknown = isinstance(policy, str) and policy not in POLICIES and not policy.endswith(".parquet")
    if unknown or not isinstance(policy, str | Trace | Path):
        raise ValueError(
            f"policy={shown(policy)}: expected {', '.join(POLICIES)}, a trace or the path of one's .parquet file"
        )
    usual = isinstance(policy, str) and policy == USUAL
    if not (limited or (usual and prefetch)):
        told = f"prefetch={prefetch}" if usual else f"policy={shown(policy)}"
        if not run.config.moe_layers:
            raise ValueError(f"{told} says how experts are fetched, and {DENSE}: leave it out")
        raise ValueError(
            f"{told} says how experts are fetched, and all stay on their devices: give resident or gpu_memory, too, or leave it out"
        )
    if isinstance(policy, str) and policy in POLICIES:
        return Residence(run.resident, policy, prefetch) if run.fetched else None
    trace = policy if isinstance(policy, Trace) else Trace.load(check("policy", policy, arguments.Path()))
    if (trace.num_experts, list(trace.layers)) != (run.config.experts, run.config.moe_layers):
        raise ValueError(
            f"policy is a trace of {trace.num_experts} experts and the layers {list(trace.layers)}; the model has "
            f"{run.config.experts} and {run.config.moe_layers}: name a trace of this model with all of its layers"
        )
    from moekit.routing.metrics import counts

    return Residence(run.resident, counts(trace, dispatched=True), prefetch) if run.fetched else None


def residency(model: Handle, clear: bool) -> pd.DataFrame:
    """:meth:`moekit.api.Model.residency`."""
    import pandas as pd

    if not model.config.moe_layers:
        raise ValueError(f"residency: {DENSE}, so nothing is fetched; ask it of a model with experts")
    if model.parts[0]["resident"] is None:
        raise ValueError(
            "all experts are on their devices: nothing is fetched; load(resident=...) leaves some out"
        )
    ranks = model.ranks.call(loading.residency, clear)
    rows = []
    for layer, found in zip(model.config.moe_layers, zip(*ranks, strict=True), strict=True):
        total = sum(found, Counts())
        value = total.hits / total.requests if total.requests else math.nan
        rows.append({"layer": layer, **vars(total), "value": value, "GiB": total.nbytes / GIB})
    return pd.DataFrame(rows)[["layer", "requests", "hits", "value", "copied", "GiB", "ahead", "used"]]
