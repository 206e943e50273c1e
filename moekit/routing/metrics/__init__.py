"""Metrics of routing: each a function of a :class:`moekit.routing.trace.Trace`.

    from moekit.routing import metrics
    metrics.load(trace)                  # a table: pandas.DataFrame

A table has one row for each thing measured, with ``value``, a 95 % interval ``low`` to ``high``, and ``chance``: what
uniform random routing gives, where every token chooses K different experts and each set of K is equally probable.
Intervals of means are bootstrapped over samples, because the tokens of one sample are not independent. Those of single
counts are Wilson's and take the tokens as independent, which makes them somewhat narrow. NaN: unknown.

By default a metric looks at what the router chose; ``dispatched=True`` at what capacity kept. Every metric raises a
ValueError for a trace without tokens or layers. ``METRICS`` holds the metrics that need nothing but a trace, by name.

Letters: T tokens, L traced layers, K choices, E experts, N(.) a number of tokens.
"""

from moekit.routing.metrics.caching import cache_hits
from moekit.routing.metrics.certainty import gate
from moekit.routing.metrics.dropping import drop_chance, drop_probability, drops
from moekit.routing.metrics.loads import balance, counts, dead_experts, hot_set, load
from moekit.routing.metrics.overlap import agreement, repeats
from moekit.routing.metrics.pairs import Pairs, coactivation, predictability, transitions
from moekit.routing.metrics.registry import METRICS, measured
from moekit.routing.metrics.specialisation import (
    domain_information,
    domain_specialisation,
    top_tokens,
    vocabulary_specialisation,
)
from moekit.routing.statistics import wilson

__all__ = [
    "METRICS",
    "Pairs",
    "agreement",
    "balance",
    "cache_hits",
    "coactivation",
    "counts",
    "dead_experts",
    "domain_information",
    "domain_specialisation",
    "drop_chance",
    "drop_probability",
    "drops",
    "gate",
    "hot_set",
    "load",
    "measured",
    "predictability",
    "repeats",
    "top_tokens",
    "transitions",
    "vocabulary_specialisation",
    "wilson",
]
