"""Metrics of routing: each a function of a :class:`moekit.routing.trace.Trace`.

    from moekit.routing import metrics
    metrics.load(trace)                  # a table: pandas.DataFrame

A table has one row for each thing measured, with ``value``, a 95 % interval ``low`` to ``high``, and ``chance``: what
uniform random routing gives, where every token chooses K different experts and each set of K is equally probable.
Intervals are bootstrapped over samples, because the tokens of one sample are not independent; :func:`bootstrap` takes other
units and more resamples. The tables of single pairs, types and caches (``Pairs.top``, ``top_tokens``, ``cache_hits``,
``vocabulary_specialisation``) have intervals that take the tokens as independent, which is too narrow: ``bootstrap`` gives
those over units. NaN: unknown, or too few units.

Of a trace of generated text a metric counts the new tokens, and with ``prompt=True`` the prompt's as well. By default a
metric looks at what the router chose; ``dispatched=True`` at what capacity kept. Every metric raises a
ValueError for a trace without tokens or layers. ``METRICS`` holds the metrics that need nothing but a trace, by name.

Letters: T tokens, L traced layers, K choices, E experts, N(.) a number of tokens.
"""

from moekit.routing.metrics.by_domain import domain_information, domain_specialisation
from moekit.routing.metrics.caching import cache_hits
from moekit.routing.metrics.certainty import gate
from moekit.routing.metrics.dropping import (
    drop_chance,
    drop_probability,
    drops,
    drops_name,
    made_and_dropped,
)
from moekit.routing.metrics.information import classes_of, information
from moekit.routing.metrics.loads import balance, counts, dead_experts, hot_set, load
from moekit.routing.metrics.overlap import agreement, repeats
from moekit.routing.metrics.pairs import Pairs, coactivation, predictability, transitions
from moekit.routing.metrics.placing import fitted_placement, placement
from moekit.routing.metrics.registry import METRICS, counted, measured, new_tokens
from moekit.routing.metrics.resampling import bootstrap, permutation
from moekit.routing.metrics.specialisation import top_tokens, vocabulary_specialisation
from moekit.routing.statistics import wilson

__all__ = [
    "METRICS",
    "Pairs",
    "agreement",
    "balance",
    "bootstrap",
    "cache_hits",
    "classes_of",
    "coactivation",
    "counted",
    "counts",
    "dead_experts",
    "domain_information",
    "domain_specialisation",
    "drop_chance",
    "drop_probability",
    "drops",
    "drops_name",
    "fitted_placement",
    "gate",
    "hot_set",
    "information",
    "load",
    "made_and_dropped",
    "measured",
    "new_tokens",
    "permutation",
    "placement",
    "predictability",
    "repeats",
    "top_tokens",
    "transitions",
    "vocabulary_specialisation",
    "wilson",
]
