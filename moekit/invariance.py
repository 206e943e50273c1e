"""How much the scores of a text depend on the texts that are routed with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moekit.arguments import Capacity, Number, Wholes, check, listed, sequences, shown
from moekit.checked import checked
from moekit.fairseq_data import is_data
from moekit.handle import MODEL
from moekit.routing.compare import compare
from moekit.routing.metrics import made_and_dropped

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from moekit.api import Model
    from moekit.routing.trace import Trace


@dataclass(frozen=True)
class Invariance:
    """How much scores depend on the company that a text is scored in.

    Attributes:
        summary: one row per setting: ``batch_size``, ``capacity_token_fraction``, ``loss_base2`` (bits a token), ``dropped``
            (share of choices dropped, of those that asked for a place: :func:`moekit.routing.metrics.made_and_dropped`; NaN
            of a dense model), and against the same texts alone at the same capacity ``experts_changed``, ``kept_changed``
            (shares of tokens x layers), ``mean_abs_delta``, ``max_abs_delta`` (of the log-probability, nats),
            ``tokens_changed`` (share of tokens whose log-probability moved by more than ``tolerance``).
        traces: (batch_size, capacity_token_fraction) -> trace.
    """

    summary: pd.DataFrame
    traces: dict[tuple[int, float | None], Trace]


@checked(model=MODEL, batch_sizes=Wholes(), tolerance=Number(0))
def batch_invariance(
    model: Model,
    texts: str | Path | Sequence[str] | Sequence[Sequence[int]],
    batch_sizes: Sequence[int] = (1, 2, 4),
    capacities: float | str | Sequence[float | str | None] | None = (None, 0.05),
    tolerance: float = 1e-3,
    **options: Any,
) -> Invariance:
    """Score the same texts alone, in batches and at several capacities.

    Args:
        texts: whatever :meth:`moekit.api.Model.trace` takes; ``options`` are further arguments of it.
        batch_sizes: texts routed together; "alone" (1) is always run.
        capacities: each a ``capacity_token_fraction``, or one of them; one that is given twice is run once.

    Raises:
        ValueError, moekit.ranks.RankError: as :meth:`moekit.api.Model.trace`; or an option is one of those that are compared.
    """
    import pandas as pd

    # An iterator can be read only once.
    texts = texts if is_data(texts) else sequences("texts", texts)
    given = []
    for one in listed(capacities):
        number = check("capacities", one, Capacity())
        # A word stays one in the table.
        given.append(one if isinstance(one, str) else number)
    for name, own in (("batch_size", "batch_sizes"), ("capacity_token_fraction", "capacities")):
        if name in options:
            raise ValueError(
                f"{name}={shown(options[name])}: expected {own}, which has all that are compared"
            )
    if not given:
        raise ValueError("capacities=[]: expected one or more, such as (None, 0.05)")
    given = list(dict.fromkeys(given))
    sizes = sorted({1, *batch_sizes})
    traces, rows = {}, []
    for fraction in given:
        for size in sizes:
            traces[size, fraction] = trace = model.trace(
                texts, batch_size=size, capacity_token_fraction=fraction, **options
            )
            change = compare(traces[1, fraction], trace)
            moved = change.tokens["delta"].abs().dropna()
            made, dropped = made_and_dropped(trace)
            rows.append(
                {
                    "batch_size": size,
                    "capacity_token_fraction": math.nan if fraction is None else fraction,
                    "loss_base2": -float(np.nanmean(trace.logprob, dtype=np.float64)) / math.log(2),
                    "dropped": dropped.sum() / max(1, made.sum()) if trace.layers else math.nan,
                    "experts_changed": float(change.layers["experts_changed"].mean()),
                    "kept_changed": float(change.layers["kept_changed"].mean()),
                    "mean_abs_delta": float(moved.mean()),
                    "max_abs_delta": float(moved.max()),
                    "tokens_changed": float((moved > tolerance).mean()),
                }
            )
    return Invariance(pd.DataFrame(rows), traces)
