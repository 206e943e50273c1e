"""Profiles beside the benches: both time the same steps on the same tokens, in turns, and the profiler's own cost.

A profile tells the time of a step without the profiler. It has to be the one that "score" and "decode" of the bench tell.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from moekit.api import Model
from moekit.bench import decode, score
from moekit.bench.figures import Figure
from moekit.bench.setting import Setting, add_fetching, random_ids, random_work, whole, wholes
from moekit.profiling import Profile
from moekit.profiling.work import Size
from moekit.worker.steps import TIMED, seconds_a_step

# Steps of "score", as many as the bench makes on a GPU.
STEPS = 10
# The most per cent by which two times of one thing may differ.
APART = 3.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--blocks", type=wholes(score.MOST), default=[1], help="blocks of a scoring step and rank (1)"
    )
    parser.add_argument(
        "--batches", type=wholes(decode.MOST), default=[1, 64], help="sequences a rank that decode (1,64)"
    )
    parser.add_argument(
        "--steps", type=whole(most=1000), help="decode steps of a call; default: 64 on a GPU, 8 without"
    )
    add_fetching(parser)


def run(setting: Setting, args: argparse.Namespace) -> list[Figure]:
    """Measure a step of each kind and size, with both."""
    if why := setting.too_large():
        return [Figure("profile", None, "ms", note=why)]
    length = setting.config.max_positions
    asked = [("score", STEPS, blocks) for blocks in args.blocks]
    asked += [("decode", args.steps, batch) for batch in args.batches]
    sizes = [Size.of(setting.config, setting.device, *one, length) for one in asked]
    with setting.model() as (model, _):
        return [row for size in sizes for row in in_turns(model, setting, size).rows(setting)]


@dataclass(frozen=True)
class InTurns:
    """``bench``: seconds of a step in each turn, as the bench tells them; ``profiles``: the profile of each turn."""

    size: Size
    bench: Sequence[float]
    profiles: Sequence[Profile]

    def rows(self, setting: Setting) -> list[Figure]:
        many = f" on each of {setting.world_size} ranks" if setting.world_size > 1 else ""
        what = f"{self.size.mode} {self.size.blocks}{many}"
        goal = APART if setting.device == "cuda" else None
        profile = [one.step for one in self.profiles]
        bench, plain = statistics.median(self.bench), statistics.median(profile)
        each = ", ".join(f"{b / a - 1:+.1%}" for a, b in zip(self.bench, profile, strict=True))
        apart = Figure(
            f"{what}: these two differ by",
            100 * abs(plain / bench - 1),
            "%",
            goal=goal,
            lower=True,
            note=f"the profile's is {plain / bench - 1:+.1%}; in each turn {each}",
        )
        under = statistics.median(one.slowdown for one in self.profiles)
        sums = [
            own["exclusive"].sum() / one.profiled[rank].sum()
            for one in self.profiles
            for rank, own in one.frame.groupby("rank")
        ]
        parts = Figure(
            f"{what}: parts and step differ by",
            100 * float(max(abs(ratio - 1) for ratio in sums)),
            "%",
            goal=goal,
            lower=True,
            note="where they differ most",
        )
        return [
            Figure(f"{what}: the bench", 1e3 * bench, "ms a step"),
            Figure(f"{what}: a profile, without the profiler", 1e3 * plain, "ms a step"),
            apart,
            Figure(f"{what}: with the profiler", under, "times", note=f"{1e3 * under * plain:.2f} ms a step"),
            parts,
        ]


def in_turns(model: Model, setting: Setting, size: Size) -> InTurns:
    """Measure with the bench and with a profile, several times one after the other."""
    fraction = score.FRACTION if size.mode == "score" else None
    turns = range(max(2, setting.repeats // 3))
    # What is compiled, and a GPU that has rested, would count for the first turn.
    bench(model, size, fraction)
    each = [(bench(model, size, fraction), profiled(model, size, fraction)) for _ in turns]
    return InTurns(size, *zip(*each, strict=True))


def bench(model: Model, size: Size, fraction: float | None) -> float:
    """The seconds of a step, as "score" or "decode" of the bench measures them in as many calls as a profile."""
    work = random_work(model, size, fraction)
    found: list[score.Scored] | list[decode.Decoded]
    if size.mode == "score":
        found = model.ranks.call(score.score, work)
    else:
        found = model.ranks.call(decode.decode, work, TIMED)
    return seconds_a_step([one.seconds for one in found])


def profiled(model: Model, size: Size, fraction: float | None) -> Profile:
    """The profile of the same work, as a user asks for it."""
    return model.profile(
        random_ids(model, size).tolist(),
        size.mode,
        steps=size.steps,
        blocks=size.blocks,
        capacity_token_fraction=fraction,
        tokens_per_sample=size.length,
        progress=False,
    )
