"""What many ranks would send between machines, on paper: bytes a token, by the formula and by a trace's real routing."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moekit.arguments import Number, Whole, check
from moekit.bench import shapes
from moekit.bench.routing import synthetic
from moekit.bench.setting import whole
from moekit.routing.placement import contiguous
from moekit.routing.trace import Trace, need_layers, need_tokens

# Bytes of the number of an expert that goes along with each choice.
NUMBER = 4

# More ranks than this are a slip of the pen, for which the tables of who sends what have no room.
MOST = 2**12

# Tokens of the routing that is made up where no trace is given.
TOKENS = 100_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trace",
        type=Path,
        help="the Parquet file of a trace; without one, routing like a real one is made up",
    )
    parser.add_argument("--ranks", type=int, default=64, help="of all machines (64)")
    parser.add_argument("--per-machine", type=whole(), default=8, help="ranks of one machine (8)")
    parser.add_argument(
        "--shape", choices=shapes.SHAPES, default="15b", help="its width and its layers with experts (15b)"
    )
    parser.add_argument(
        "--itemsize", type=whole(most=16), default=2, help="bytes of a number (2, of float16)"
    )
    parser.add_argument(
        "--gbit",
        type=float,
        default=3200.0,
        help="Gbit/s of a machine's network, each way (3200: eight of 400)",
    )
    parser.add_argument(
        "--rate", type=float, default=100e3, help="tokens/s of a rank alone, to compare with (100000)"
    )


@dataclass(frozen=True)
class Cluster:
    """``ranks`` ranks, ``per_machine`` of them on each machine."""

    ranks: int
    per_machine: int

    def __post_init__(self) -> None:
        if self.ranks % self.per_machine:
            raise ValueError(
                f"{self.ranks} ranks are no multiple of {self.per_machine} a machine: the formula is of full machines"
            )

    @property
    def machines(self) -> int:
        return self.ranks // self.per_machine

    def machine_of_expert(self, experts: int) -> np.ndarray:
        """[E] the machine that holds each expert, as :func:`moekit.nn.dispatch.owned` deals them."""
        return contiguous(experts, self.ranks) // self.per_machine


def expected(cluster: Cluster, experts: int, top_k: int) -> tuple[float, float]:
    """Choices of a token on other machines, and other machines that it goes to, where all experts are equally likely.

    With C machines, a choice is on another one with probability 1 - 1/C: K (1 - 1/C) choices. A machine holds none of K
    distinct experts with probability binom(E - E/C, K) / binom(E, K): the token goes to (C - 1) (1 - that) others.
    """
    machines = cluster.machines
    elsewhere = experts - experts // machines
    none = math.comb(elsewhere, top_k) / math.comb(experts, top_k)
    return top_k * (1 - 1 / machines), (machines - 1) * (1 - none)


def counted(trace: Trace, cluster: Cluster) -> tuple[float, float, float]:
    """The same two of a trace, and how much more than the mean the machine that most rows come to gets.

    Samples are dealt to ranks in turn, as scoring deals them. Choices that were dropped do not travel. The means are over tokens and
    layers.
    """
    # [T]
    home = (trace.sample % cluster.ranks) // cluster.per_machine
    # [T, layers, K]
    there = cluster.machine_of_expert(trace.num_experts)[trace.experts]
    away = trace.kept & (there != home[:, None, None])
    goes = np.zeros((*there.shape[:2], cluster.machines), dtype=bool)
    for choice in range(there.shape[2]):
        np.put_along_axis(
            goes,
            there[..., choice, None],
            np.take_along_axis(goes, there[..., choice, None], axis=2) | away[..., choice, None],
            axis=2,
        )
    # [layers, machines]
    arriving = goes.sum(axis=0)
    places = there.shape[0] * there.shape[1]
    return (
        away.sum() / places,
        goes.sum() / places,
        float((arriving.max(axis=1) / arriving.mean(axis=1)).mean()),
    )


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Work it out.

    Returns:
        One row per figure: ``what``, ``formula``, ``trace`` (without one, ``made-up routing``) and ``unit``.
    """
    check("--ranks", args.ranks, Whole(most=MOST))
    for name in ("gbit", "rate"):
        check(f"--{name}", getattr(args, name), Number(above=0))
    cluster, config = Cluster(args.ranks, args.per_machine), shapes.SHAPES[args.shape]
    if not config.moe_layers:
        raise ValueError(
            f"--shape {args.shape} has no experts, so no row goes to another rank: name one that has"
        )
    if cluster.machines < 2:
        raise ValueError(
            f"{args.ranks} ranks with {args.per_machine} a machine share one machine: nothing crosses; give --ranks more"
        )
    source = "made-up routing" if args.trace is None else "trace"
    if args.trace is None:
        trace = synthetic(TOKENS, len(config.moe_layers), config.experts)
    else:
        trace = Trace.load(args.trace)
        need_tokens(trace, f"--trace {args.trace}")
        need_layers(trace, f"--trace {args.trace}")
    top_k = trace.experts.shape[2]
    flat, hierarchical = expected(cluster, trace.num_experts, top_k)
    real_flat, real_hierarchical, busiest = counted(trace, cluster)
    layers, row = len(config.moe_layers), config.dim * args.itemsize
    along = top_k * (NUMBER + args.itemsize)

    def both(what: str, unit: str, formula: float, found: float) -> dict[str, Any]:
        return {"what": what, "formula": rounded(formula), source: rounded(found), "unit": unit}

    # There and back; the numbers and weights of the choices go there only.
    flat_bytes = [2 * layers * row * choices for choices in (flat, real_flat)]
    bytes_ = [layers * machines * (2 * row + along) for machines in (hierarchical, real_hierarchical)]
    # The rows of a machine's ranks leave by its network; of a balanced exchange as many come in.
    network = args.gbit / 8 * 1e9
    most = [network / (cluster.per_machine * b) for b in bytes_]
    most[1] /= busiest
    share = [args.rate / (args.rate + m) for m in most]
    return [
        both("choices of a token on other machines, a layer", "choices", flat, real_flat),
        both("other machines that a token goes to, a layer", "machines", hierarchical, real_hierarchical),
        both("flat: bytes a token between machines, all layers", "kB", *(b / 1e3 for b in flat_bytes)),
        both("hierarchical: the same", "kB", *(b / 1e3 for b in bytes_)),
        both("hierarchical in parts of flat", "", bytes_[0] / flat_bytes[0], bytes_[1] / flat_bytes[1]),
        both(
            "decoding: bytes a token, each row to all machines",
            "kB",
            *[layers * 2 * (cluster.machines - 1) * row / 1e3] * 2,
        ),
        both("the machine that most rows come to, against the mean", "times", 1.0, busiest),
        both(f"the most tokens/s a rank at {args.gbit:g} Gbit/s a machine", "tokens/s", *most),
        both(
            f"share of the time in the network, at {args.rate:g} tokens/s without",
            "%",
            *(100 * s for s in share),
        ),
    ]


def rounded(value: float) -> float:
    return float(f"{value:.4g}")
