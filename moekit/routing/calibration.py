"""Whether intervals hold what they promise, and whether tests keep their level: on routing whose truth is known.

    python -m moekit.routing.calibration
    python -m moekit.routing.calibration --draws 3000 --tests 3000

The second makes the table of the metrics' page, in about a quarter of an hour.

A synthetic source gives each expert, each domain and each sample a shift of the gate's logits; the shift of a sample makes its
tokens alike. Traces are drawn from the source. The truth is computed from the source's probabilities over many more samples. An
interval is right if it holds the truth. A test errs if it marks anything although the labels tell nothing.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moekit.routing import metrics
from moekit.routing.statistics import FEW, paired
from moekit.routing.trace import Trace

if TYPE_CHECKING:
    import pandas as pd

EXPERTS, CHOICES, DOMAINS = 8, 2, 4
# samples of the source that its truth is computed from
MANY = 40_000
# A metric says "too few" almost always where it gives less than this part of its intervals, or makes less of its tests.
SELDOM = 0.1
# Tests draw from other seeds than the traces: two generators of one seed give the same numbers.
OTHER = 10**6


@dataclass(frozen=True)
class Source:
    """Routing with known structure.

    Attributes:
        samples: the samples of a trace, each of a random domain; every domain has at least one.
        tokens: the fewest and the most tokens of a sample; lengths are uniform between them.
        skew: the standard deviation of the experts' logits, which makes loads unequal.
        of_domain, of_sample: the standard deviations of the shifts of these logits by domain and by sample.
    """

    samples: int = 60
    tokens: tuple[int, int] = (64, 64)
    skew: float = 0.5
    of_domain: float = 0.7
    of_sample: float = 0.5

    def logits(self, rng: np.random.Generator, domain: np.ndarray) -> np.ndarray:
        """[n, E] of samples with these domains [n]."""
        fixed = np.random.default_rng(1)
        popular = fixed.normal(0, self.skew, EXPERTS)
        prefers = fixed.normal(0, self.of_domain, (DOMAINS, EXPERTS))
        return popular + prefers[domain] + rng.normal(0, self.of_sample, (len(domain), EXPERTS))

    def draw(self, seed: int) -> tuple[Trace, np.ndarray]:
        """A trace of one layer, and its labels [T]."""
        rng = np.random.default_rng(seed)
        domain = rng.integers(0, DOMAINS, self.samples)
        domain[:DOMAINS] = np.arange(DOMAINS)
        length = rng.integers(self.tokens[0], self.tokens[1] + 1, self.samples)
        sample = np.repeat(np.arange(self.samples), length)
        logits = self.logits(rng, domain)[sample]
        # The K largest of logits + Gumbel noise are K draws without replacement from the softmax.
        noisy = logits + rng.gumbel(size=logits.shape)
        chosen = np.argsort(-noisy, axis=1)[:, :CHOICES].astype(np.int16)[:, None]
        position = np.arange(len(sample)) - np.repeat(np.cumsum(length) - length, length)
        known = np.zeros(chosen.shape, np.float32)
        ids = np.full(len(sample), 4, np.int32)
        trace = Trace(
            sample=sample.astype(np.int32),
            position=position.astype(np.int32),
            token=ids,
            target=ids,
            generated=np.zeros(len(sample), bool),
            logprob=np.zeros(len(sample), np.float32),
            predicted=ids,
            layers=(0,),
            experts=chosen,
            probs=known,
            weights=known,
            kept=rng.random(chosen.shape) > (1 / (1 + np.exp(1.5 - logits[:, :1])))[..., None],
            entropy=known[:, :, 0],
            full={},
            num_experts=EXPERTS,
            meta={},
        )
        return trace, domain[sample]

    def truth(self) -> dict[str, np.ndarray]:
        """What a metric's table would hold for endless text, by the names of :func:`_measured`."""
        rng = np.random.default_rng(2)
        domain = np.arange(MANY) % DOMAINS
        logits = self.logits(rng, domain)
        first = np.exp(logits - logits.max(axis=1, keepdims=True))
        first /= first.sum(axis=1, keepdims=True)
        odds = first / (1 - first)
        either = first + first * (odds.sum(axis=1, keepdims=True) - odds)
        share = np.stack([either[domain == d].mean(axis=0) for d in range(DOMAINS)])
        joint = np.stack([first[domain == d].mean(axis=0) for d in range(DOMAINS)]) / DOMAINS
        outer = joint.sum(axis=0) * joint.sum(axis=1, keepdims=True)
        load = either.mean(axis=0) / CHOICES
        lost = 1 / (1 + np.exp(1.5 - logits[:, :1]))
        return {
            "load": load,
            "drops": np.array([lost.mean()]),
            "repeats": np.array([(first**2).sum(axis=1).mean()]),
            "balance: cv": np.array([load.std() * EXPERTS]),
            "balance: effective_experts": np.array([np.exp(-(load * np.log(load)).sum())]),
            "balance: top_20_share": np.array([np.sort(load)[-2:].sum()]),
            "domain_specialisation": share.ravel(),
            "domain_specialisation: lift": (share / either.mean(axis=0)).ravel(),
            "domain_information": np.array([(joint * np.log2(joint / outer)).sum()]),
        }


SOURCES = {
    "60 samples of 64": Source(60),
    "40 samples of 16 to 200": Source(40, (16, 200)),
    "60 samples, very unequal loads": Source(60, skew=1.5),
    "40 samples: 10 a domain": Source(40),
    "12 samples: 3 a domain": Source(12),
}


def _measured(trace: Trace, labels: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """``low`` and ``high`` of each metric that :meth:`Source.truth` knows."""
    balance = metrics.balance(trace).set_index("statistic")
    repeats = metrics.repeats(trace).set_index("statistic")
    domains = metrics.domain_specialisation(trace, labels)
    found = {
        "load": metrics.load(trace),
        "drops": metrics.drops(trace),
        "repeats": repeats.loc[["first"]],
        "domain_specialisation": domains,
        "domain_information": metrics.domain_information(trace, labels),
    }
    names = ("cv", "effective_experts", "top_20_share")
    found |= {f"balance: {name}": balance.loc[[name]] for name in names}
    ends = {name: (frame["low"].to_numpy(), frame["high"].to_numpy()) for name, frame in found.items()}
    lift = domains["lift_low"].to_numpy(), domains["lift_high"].to_numpy()
    return ends | {"domain_specialisation: lift": lift}


def coverage(source: Source, draws: int, seed: int = 0) -> dict[str, float]:
    """The share of intervals that hold the truth, over ``draws`` traces and all rows; NaN where nearly all say "too few"."""
    truth = source.truth()
    held: dict[str, list] = {name: [] for name in truth}
    for number in range(draws):
        for name, (low, high) in _measured(*source.draw(seed + number)).items():
            there = ~np.isnan(low)
            held[name].extend(((low <= truth[name]) & (truth[name] <= high))[there])
    few = {name: len(hits) < draws * len(truth[name]) * SELDOM for name, hits in held.items()}
    return {name: np.nan if few[name] else float(np.mean(hits)) for name, hits in held.items()}


def level(source: Source, draws: int, permutations: int = 500, seed: int = 0) -> dict[str, float]:
    """How often tests at 5 % mark anything where labels and runs make no difference, over ``draws`` traces; NaN where nearly
    all say "too few"."""
    null = Source(source.samples, source.tokens, source.skew, 0.0, source.of_sample)
    marked: dict[str, list] = {"permutation: lift": [], "permutation: information": [], "paired": []}
    for number in range(draws):
        trace, labels = null.draw(seed + number)
        for statistic in ("lift", "information"):
            told = metrics.permutation(
                trace, labels, statistic=statistic, draws=permutations, seed=OTHER + number
            )
            if (told["note"] == "").all():
                marked[f"permutation: {statistic}"].append(told["survives"].any())
        rng = np.random.default_rng([OTHER, seed + number])
        change = (rng.normal(0, 1, source.samples)[trace.sample] + rng.normal(0, 1, len(trace))) ** 3
        told = paired(change, trace.sample, draws=permutations, seed=OTHER + number)
        if told.units >= FEW:
            marked["paired"].append(told.p <= 0.05)
    return {
        name: float(np.mean(hits)) if len(hits) >= draws * SELDOM else np.nan for name, hits in marked.items()
    }


def table(draws: int, tests: int) -> pd.DataFrame:
    """Coverage and levels, in percent: one row per metric or test, one column per source."""
    import pandas as pd

    found = {name: coverage(one, draws) | level(one, tests) for name, one in SOURCES.items()}
    return (100 * pd.DataFrame(found)).round(1)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m moekit.routing.calibration", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--draws", type=int, default=1000, help="traces of each source for the intervals (1000)"
    )
    parser.add_argument("--tests", type=int, default=1000, help="traces of each source for the tests (1000)")
    given = parser.parse_args()
    found = table(given.draws, given.tests)
    print("| | " + " | ".join(found.columns) + " |")
    print("| --- " * (1 + found.shape[1]) + "|")
    for name, row in found.iterrows():
        print(f"| {name} | " + " | ".join("too few" if np.isnan(x) else f"{x:.1f}" for x in row) + " |")


if __name__ == "__main__":
    main()
