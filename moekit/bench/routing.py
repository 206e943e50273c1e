"""The seconds of every routing metric and the megabytes of a trace, on a synthetic trace, with limits."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moekit.bench.setting import whole
from moekit.routing import metrics
from moekit.routing.trace import Trace

# The limit for a metric on 2 cores.
SECONDS = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=whole(most=10**8), default=250_000, help="of the trace (250000)")
    parser.add_argument("--layers", type=whole(most=1000), default=6, help="with experts (6)")
    parser.add_argument("--experts", type=whole(2, 32_767), default=512, help="of a layer (512)")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the metrics and the size of the trace.

    Returns:
        One row per figure: ``what``, ``value``, ``unit``, ``limit`` (None for a figure without a limit).
    """
    trace = synthetic(args.tokens, args.layers, args.experts)
    domains = (trace.sample % 8).astype(str)
    work = metrics.METRICS | {
        "domain_specialisation": lambda t: metrics.domain_specialisation(t, domains),
        "domain_information": lambda t: metrics.domain_information(t, domains),
        "top_tokens": lambda t: metrics.top_tokens(t, t.layers[0], 0),
        "agreement": lambda t: metrics.agreement(t, t),
    }
    rows = [row("trace in memory", megabytes(trace), "MB")]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.parquet"
        rows.append(row("save", seconds(lambda: trace.save(path)), "s"))
        rows.append(row("trace on disk", path.stat().st_size / 1e6, "MB"))
        rows.append(row("load, all columns", seconds(lambda: megabytes(Trace.load(path))), "s"))
    for name, metric in work.items():
        rows.append(row(name, seconds(functools.partial(metric, trace)), "s", SECONDS))
    return rows


def row(what: str, value: float, unit: str, limit: float | None = None) -> dict[str, Any]:
    return {"what": what, "value": round(value, 3), "unit": unit, "limit": limit}


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def megabytes(trace: Trace) -> float:
    arrays = [getattr(trace, field.name) for field in dataclasses.fields(trace)]
    return sum(a.nbytes for a in [*arrays, *trace.full.values()] if isinstance(a, np.ndarray)) / 1e6


def synthetic(tokens: int, layers: int, experts: int, seed: int = 0) -> Trace:
    """A trace similar to a real one: top-2 routing, in samples of 2,048 tokens.

    Types have the frequencies of text. Experts depend on type and domain, with unequal loads, and a capacity drops choices.
    """
    rng = np.random.default_rng(seed)
    sample, position = np.divmod(np.arange(tokens), 2048)
    token = np.minimum(rng.zipf(1.2, tokens), 50_000) + 3
    popular = rng.lognormal(0, 0.7, experts)
    first = np.empty((tokens, layers), dtype=np.int16)
    second = np.empty((tokens, layers), dtype=np.int16)
    for layer in range(layers):
        by_type = rng.choice(experts, 50_004, p=popular / popular.sum())
        by_domain = rng.choice(experts, (8, 16))[sample % 8, rng.integers(0, 16, tokens)]
        anyone = rng.choice(experts, tokens, p=popular / popular.sum())
        draw = rng.random(tokens)
        first[:, layer] = np.select([draw < 0.4, draw < 0.7], [by_type[token], by_domain], anyone)
        second[:, layer] = np.where(anyone == first[:, layer], (anyone + 1) % experts, anyone)
    chosen = np.stack([first, second], axis=2)
    top = rng.beta(2, 2, (tokens, layers)).astype(np.float32)
    probs = np.stack([top, (1 - top) * np.minimum(top, 0.5)], axis=2).astype(np.float32)
    kept = rng.random(chosen.shape) < 0.9
    weights = probs * kept
    weights /= np.maximum(weights.sum(axis=2, keepdims=True), 1e-9)
    return Trace(
        sample=sample.astype(np.int32),
        position=position.astype(np.int32),
        token=token.astype(np.int32),
        target=np.roll(token, -1).astype(np.int32),
        generated=np.zeros(tokens, dtype=bool),
        logprob=-rng.exponential(2, tokens).astype(np.float32),
        predicted=np.full(tokens, -1, dtype=np.int32),
        layers=tuple(2 * n + 1 for n in range(layers)),
        experts=chosen,
        probs=probs,
        weights=weights.astype(np.float32),
        kept=kept,
        entropy=rng.uniform(0, math.log(experts), (tokens, layers)).astype(np.float32),
        full={},
        num_experts=experts,
        meta={"capacity_token_fraction": 0.05, "groups": [[1, 2048, -(-tokens // 2048)]]},
    )
