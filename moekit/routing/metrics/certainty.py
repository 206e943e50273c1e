"""How sure the gate is."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from moekit.routing.metrics.registry import measured
from moekit.routing.metrics.tables import table_of_rows
from moekit.routing.statistics import mean_of, units
from moekit.routing.trace import Trace

if TYPE_CHECKING:
    import pandas as pd


@measured
def gate(trace: Trace) -> pd.DataFrame:
    """How sure the gate is, means over tokens.

    - ``entropy`` = - sum p ln p over all experts, nats (fairseq's ``entropy_gating``); chance ln E;
    - ``normalised_entropy`` = entropy / ln E; chance 1;
    - ``confidence`` = the first choice's probability; chance 1/E;
    - ``margin`` = the first's minus the second's; chance 0;
    - ``mass`` = the sum of the choices'; chance K/E.

    ``chance`` is that of a gate with equal logits. Interval: bootstrap over units.

    Returns:
        One row per (layer, ``statistic``): ``layer``, ``statistic``, ``value``, ``low``, ``high``, ``chance``.
    """
    experts, k = trace.num_experts, trace.top_k
    log = math.log(experts) if experts > 1 else math.nan
    found_units = units(trace)
    rows = []
    for layer_index, layer in enumerate(trace.layers):
        probs, entropy = trace.probs[:, layer_index], trace.entropy[:, layer_index]
        found = [
            ("entropy", entropy, log),
            ("normalised_entropy", entropy / log, 1.0),
            ("confidence", probs[:, 0], 1 / experts),
            ("mass", probs.sum(axis=1), k / experts),
        ]
        if k > 1:
            found.append(("margin", probs[:, 0] - probs[:, 1], 0.0))
        for name, values, chance in found:
            rows.append((layer, name, *mean_of(values, found_units.unit, found_units), chance))
    return table_of_rows(rows, "layer statistic value low high chance")
