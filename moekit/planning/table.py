"""``moekit.plan``: a run as a table and a sentence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moekit import checkpoint as ckpt
from moekit.arguments import Choice, Whole, check
from moekit.handle import experts_dtype, find_dictionary, weights_dtype
from moekit.nn.config import ModelConfig
from moekit.nn.operations import choose_backend
from moekit.planning.fitting import advice, chosen
from moekit.planning.runs import Room, Run, room, unknown
from moekit.ranks import WHERE, devices_to_come
from moekit.units import GIB

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class MemoryPlan:
    """What a run takes, and whether it fits; it shows itself as a table and a sentence.

    Attributes:
        table: one row per rank, in GiB: ``device``, ``experts a layer``, ``on the device`` (of those); ``weights``, ``slots``
            (for experts that are fetched), ``workspace`` (of a pass), ``keys and values``, ``CUDA`` (its context),
            their ``total``, and ``free`` (or ``gpu_memory``, if that is less; on the CPU what the host has); ``host`` (experts
            at home in host memory; on the CPU everything) and ``host free``, for all ranks of this machine together. NaN: the
            machine does not tell, or is one of a cluster.
        fits: whether everything does.
        resident: experts a layer on the device of their rank; None: all.
        advice: one sentence: what fits, or the numbers and the smallest change that would fit.
    """

    table: pd.DataFrame
    fits: bool
    resident: int | None
    advice: str

    def __repr__(self) -> str:
        return f"{self.table.to_string()}\n{self.advice}"

    def _repr_html_(self) -> str:
        import html

        return f"{self.table.to_html()}<p>{html.escape(self.advice)}</p>"


def plan(
    checkpoint: str | Path,
    world_size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    *,
    experts: str | None = None,
    resident: int | None = None,
    gpu_memory: str | float | None = None,
    tokens: int | None = None,
    sequences: int = 1,
    length: int | None = None,
    backend: str = "auto",
    dictionary: str | Path | None = None,
    ranks: str | None = None,
) -> MemoryPlan:
    """The memory that ``moekit.load`` and a run with its model would take, beside what is free; reads headers only.

    The run is scoring and decoding. Tasks read texts into a cache: their passes are as long as what is free allows, or
    ``gpu_memory``.

    Args:
        checkpoint, world_size, device, dtype, resident, gpu_memory, backend, dictionary: as for :func:`moekit.load`.
        experts: "int8" or "fp8": the bytes of experts of that type. None: they are of ``dtype``.
        tokens: of a pass, per rank; None: as many as ``evaluate`` makes of them (65,536 on a GPU, 4,096 on the CPU).
        sequences: that a rank decodes at once.
        length: tokens that each of them will have, the prompt's included; None: as many as the model has positions.
        ranks: "local" (as None), or "ray": then what is free is unknown, and everything fits.

    Raises:
        ValueError: the checkpoint is not what it should be, or an argument makes no sense, such as more tokens than positions.
    """
    files = ckpt.find(checkpoint)
    known = find_dictionary(files, dictionary)
    types = None if known is None else len(known)
    found = ckpt.survey(files, types)
    where = check("ranks", ranks, Choice(WHERE, optional=True)) or "local"
    devices = devices_to_come(check("world_size", world_size, Whole(optional=True)), device, where)
    weights = weights_dtype(dtype, devices[0], found)
    kind = experts_dtype(experts, files, found.config)
    run = Run.of(
        found.config,
        devices,
        weights,
        choose_backend(backend, devices[0], weights, kind),
        types,
        kind is not None,
        check("tokens", tokens, Whole(optional=True)),
        check("sequences", sequences, Whole(0)),
        _length(length, found.config),
    )
    free = room(devices) if where == "local" else unknown(len(devices))
    run, within = chosen(run, free, resident, gpu_memory)
    return described(run, free, within)


def _length(length: int | None, config: ModelConfig) -> int | None:
    length = check("length", length, Whole(optional=True))
    # The last token that is written takes no position.
    if length is not None and length > config.max_positions + 1:
        raise ValueError(
            f"length={length}: the model has {config.max_positions} positions; plan for fewer tokens"
        )
    return length


def described(run: Run, free: Room, within: Room) -> MemoryPlan:
    """The table and the sentence of a run."""
    import pandas as pd

    rows = []
    for rank, device in enumerate(run.devices):
        parts = run.parts(rank)
        held = run.held[rank]
        total = sum(parts.values())
        # On the CPU, the device's memory is the host's.
        there = min(within.devices[rank], free.host) if device.type == "cpu" else within.devices[rank]
        rows.append(
            {"rank": rank, "device": str(device), "experts a layer": held}
            | {"on the device": min(held, run.resident) if run.fetched else held}
            | {name: size / GIB for name, size in parts.items()}
            | {"total": total / GIB, "free": there / GIB}
            | {"host": free.host_needed(run) / GIB, "host free": free.host / GIB}
        )
    fits = within.takes(run)
    if not fits:
        said = f"Does not fit: {advice(run, free, within)}."
    elif run.fetched:
        said = f"Fits, with {run.resident} of {max(run.held)} experts a layer on each device; the others are fetched."
    else:
        said = "Fits, with all experts on their devices." if run.config.moe_layers else "Fits."
    table = pd.DataFrame(rows).set_index("rank").round(3)
    return MemoryPlan(table, fits, run.resident if run.fetched else None, said)
