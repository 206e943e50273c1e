"""How often a cache of experts holds the one that is requested."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from moekit.routing import expert_caches
from moekit.routing.metrics.registry import measured
from moekit.routing.metrics.tables import chosen_experts, set_sizes, table_of_rows
from moekit.routing.statistics import SEED, random_choices, wilson
from moekit.routing.trace import Trace

if TYPE_CHECKING:
    import pandas as pd

# requests of the simulation that gives the oracle's chance value
RANDOM_REQUESTS = 50_000


@measured
def cache_hits(trace: Trace, sizes: Sequence[int] | None = None, *, dispatched: bool = True) -> pd.DataFrame:
    """Hit rates of a cache of experts for each layer, for machines that keep the other experts elsewhere.

    Requests are the choices in the order of the trace, a token's first before its second; at the start the cache is
    empty. ``policy``:

    - ``lru``: keeps the experts requested last (Mattson et al. 1970: one pass gives every size);
    - ``lfu``: keeps those requested most often so far, of equals those requested last (counts are never forgotten);
    - ``oracle``: Belady 1966: keeps those that are needed again soonest, the most hits that any policy can have; of
      long traces in pieces (:func:`moekit.routing.expert_caches.oracle_hits`).

    ``chance``: lru the mean over choices k = 0, ... of (size - k) / (E - k), lfu size / E, oracle simulated. Wilson's
    interval. After ljcleo/moe-lrc (arXiv 2505.16056).

    Args:
        sizes: experts that the cache holds. None: about E/32, E/16, ... E/2.
        dispatched: only choices that were kept need their expert.

    Returns:
        One row per (layer, policy, size): ``layer``, ``policy``, ``size``, ``requests``, ``value``, ``low``, ``high``,
        ``chance``.
    """
    experts, k = trace.num_experts, trace.top_k
    sizes = np.array(set_sizes(sizes, experts))
    streams = []
    for layer_index in range(len(trace.layers)):
        flat = chosen_experts(trace, layer_index, None, dispatched).ravel()
        streams.append(flat[flat < experts])
    # NumPy releases the interpreter's lock, so two threads use two cores.
    with ThreadPoolExecutor(2) as pool:
        oracle = pool.submit(expert_caches.oracle_hits, streams, experts, sizes)
        lru = list(
            pool.map(lambda stream: expert_caches.hits(expert_caches.lru_distance(stream), sizes), streams)
        )
        lfu = list(
            pool.map(lambda stream: expert_caches.hits(expert_caches.lfu_rank(stream), sizes), streams)
        )
        oracle_chance = _oracle_chance(k, experts, tuple(sizes.tolist()))
    best = oracle.result()
    chance = {
        "lru": np.mean([np.maximum(sizes - i, 0) / (experts - i) for i in range(min(k, experts))], axis=0),
        "lfu": sizes / experts,
        "oracle": oracle_chance,
    }
    rows = []
    for layer_index, (layer, stream) in enumerate(zip(trace.layers, streams, strict=True)):
        for policy, hits in (
            ("lru", lru[layer_index]),
            ("lfu", lfu[layer_index]),
            ("oracle", best[layer_index]),
        ):
            low, high = wilson(hits, np.full(len(sizes), len(stream)))
            for i, size in enumerate(sizes):
                value = hits[i] / len(stream) if len(stream) else math.nan
                rows.append((layer, policy, size, len(stream), value, low[i], high[i], chance[policy][i]))
    return table_of_rows(rows, "layer policy size requests value low high chance")


@functools.lru_cache(maxsize=64)
def _oracle_chance(k: int, experts: int, sizes: tuple[int, ...]) -> tuple[float, ...]:
    """The oracle's hit rate of each size in random requests. No trace changes it, and each resample of a bootstrap asks for it."""
    random = random_choices(np.random.default_rng(SEED), RANDOM_REQUESTS // k, k, experts).ravel()
    return tuple(expert_caches.oracle_hits([random], experts, np.array(sizes))[0] / len(random))
