"""Which runs fit: as many experts on the devices as there is room for, and what to change where there is none."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from moekit.arguments import Whole, check, shown
from moekit.nn.config import ModelConfig
from moekit.planning.runs import Room, Run
from moekit.units import Memory

# The share of a GPU's memory that a run leaves free, since the spaces between tensors cannot be used.
SPARE = 0.03


def asked(
    config: ModelConfig, resident: int | None, gpu_memory: str | float | None, known: bool = True
) -> tuple[int | None, float | str | None]:
    """The arguments ``resident`` and ``gpu_memory`` of :func:`moekit.load`, checked.

    Args:
        known: whether something tells what is free on the devices.

    Raises:
        ValueError: they make no sense, both are given, or the model has no experts.
    """
    count = check("resident", resident, Whole(optional=True))
    limit = check("gpu_memory", gpu_memory, Memory(optional=True))
    if count is not None and limit is not None:
        told = shown(limit) if isinstance(limit, str) else f"{limit / 2**20:.0f}MiB"
        raise ValueError(f"resident={count} and gpu_memory={told}: give one of them, the other follows")
    if count is not None and not config.moe_layers:
        raise ValueError(f"resident={count} is a number of experts, and this model has none: leave it out")
    if limit == "auto" and not known:
        raise ValueError(
            'gpu_memory="auto": nothing tells what is free on the devices; name it, such as "14GiB"'
        )
    return count, limit


def chosen(run: Run, free: Room, resident: int | None, gpu_memory: str | float | None) -> tuple[Run, Room]:
    """The run with as many experts on the device as was asked for, and the memory within which it has to stay.

    Args:
        resident, gpu_memory: :func:`moekit.load`'s.

    Raises:
        ValueError: they make no sense, or both are given.
    """
    known = not any(math.isnan(one) for one in free.devices)
    resident, limit = asked(run.config, resident, gpu_memory, known)
    if resident is not None:
        run = replace(run, resident=resident)
        return (run if run.fetched else replace(run, resident=None)), free
    if limit is None:
        return run, free
    if limit != "auto":
        left = tuple(limit if math.isnan(one) else min(limit, one) for one in free.devices)
        free = Room(left, free.host, limited=left != free.devices)
    within = replace(free, devices=tuple(one * (1 - SPARE) for one in free.devices))
    return most_resident(run, within) or replace(run, resident=1), free


def most_resident(run: Run, within: Room) -> Run | None:
    """The run with the most experts on the devices that fits ``within``; None if none does."""
    every = replace(run, resident=None)
    if within.takes(every):
        return every
    if not run.config.moe_layers:
        return None
    low, high = 0, max(run.held) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if within.takes(replace(run, resident=middle)) else (low, middle - 1)
    return replace(run, resident=low) if low else None


def changes(run: Run, free: Room) -> Iterator[tuple[str, Run]]:
    """Changes of :func:`moekit.load`'s arguments that would make a run fit, the smallest first."""
    best = most_resident(run, free)
    if best is not None and best.resident is not None:
        yield f"resident={best.resident}", best
    if not run.one_byte and run.config.moe_layers:
        yield 'experts="int8"', replace(run, one_byte=True)
    if run.devices[0].type == "cuda":
        for ranks in range(len(run.devices) + 1, len(free.devices) + 1):
            yield (
                f"world_size={ranks}",
                replace(run, devices=tuple(torch.device("cuda", r) for r in range(ranks))),
            )
    if run.dtype == torch.float32:
        yield 'dtype="bfloat16"', replace(run, dtype=torch.bfloat16)
        half = most_resident(replace(run, dtype=torch.bfloat16), free)
        if half is not None and half.resident is not None:
            yield f'dtype="bfloat16" and resident={half.resident}', half


def advice(run: Run, free: Room, within: Room) -> str:
    """What to do about a run that does not fit ``within``, which is ``free`` or what ``gpu_memory`` leaves of it."""
    short = within.short(run)
    if within.limited and (least := least_limit(run, free)) is not None:
        return f'{short}: gpu_memory="{least}MiB" is the least that would fit'
    change = next((name for name, other in changes(run, free) if free.takes(other)), None)
    if change is None:
        return f"{short}: no change of load's arguments would fit this machine"
    return f"{short}: {change} would fit"


def least_limit(run: Run, free: Room) -> int | None:
    """The least ``gpu_memory`` in MiB with which a run fits, with one expert a layer on each device or with all; None: none."""
    needed = []
    for resident, spare in ((1, 0.0), (None, SPARE)):
        one = replace(run, resident=resident)
        if free.takes(one):
            most = max(sum(one.parts(rank).values()) for rank in range(len(one.devices)))
            needed.append(math.ceil(most / (1 - spare) / 2**20))
    return min(needed, default=None)


def cached_tokens(run: Run, within: Room) -> int:
    """The tokens that a rank's pass may have where all of their keys and values are in a cache, up to those of any pass.

    They take no more than is free, or than ``gpu_memory``; where nothing is known, no more than the plan of the run says.
    """
    devices = [
        sum(run.parts(rank).values()) if math.isnan(one) else one * (1 - SPARE)
        for rank, one in enumerate(within.devices)
    ]
    within = replace(within, devices=tuple(devices))

    def too_many(tokens: int) -> bool:
        # While texts are given the keys and values of their beginnings, those of at most half as many are there beside them.
        return not within.takes(replace(run, tokens=tokens, sequences=1, length=tokens + tokens // 2))

    return bisect.bisect_left(range(1, run.tokens + 1), True, key=too_many)


def fitting(run: Run, free: Room, resident: int | None, gpu_memory: str | float | None) -> tuple[Run, Room]:
    """The run as :func:`moekit.load` makes it, which fits at least as long as its passes are short; and within what.

    Raises:
        ValueError: it does not fit, or an argument makes no sense.
    """
    run, within = chosen(run, free, resident, gpu_memory)
    short = replace(run, tokens=min(run.tokens, run.config.max_positions), sequences=0)
    if not within.takes(short):
        raise ValueError(
            f"the model does not fit: {advice(short, free, within)}; moekit.plan(...) has the table"
        )
    return run, within


def too_long(run: Run, free: Room, within: Room) -> str | None:
    """What to say of a run whose longest passes do not fit ``within``, as :func:`fitting` gives both; None if they do.

    Short texts still fit. What packs passes knows no limit, so that evaluate may take more than the plan leaves it.
    """
    if within.takes(run):
        return None
    return (
        f"a pass of {run.tokens:,} tokens, as evaluate makes them, does not fit: {advice(run, free, within)}"
    )
