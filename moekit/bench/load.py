"""Loading: a checkpoint in the released layout, from page cache to the device, through ``moekit.load``."""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

import moekit
from moekit import arguments, checkpoint, results
from moekit.api import Model
from moekit.bench import measure, shapes
from moekit.bench.figures import Figure, spread, too_large
from moekit.bench.setting import Setting, ceiling_figures
from moekit.checkpoint.contents import clip
from moekit.checkpoint.files import NAME
from moekit.nn.dispatch import owned
from moekit.ranks import Rank
from moekit.ranks.machine import host_memory
from moekit.units import GIB


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--folder",
        help="a new or empty one: write the checkpoint there and leave it; or take the one that lies there",
    )


def run(setting: Setting, args: argparse.Namespace) -> list[Figure]:
    """Write the shape's files, unless they exist, and load them several times.

    The limit of a load is the files' bytes at the rate at which the device fetches them from pinned memory.

    Raises:
        ValueError: the folder holds something else, or cannot be written to.
    """
    size = 2 * shapes.parameters(setting.config)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.check(
            "--folder", temporary if args.folder is None else args.folder, arguments.Path()
        )
        there = holds(setting, folder)
        if not there:
            free = shutil.disk_usage(folder).free
            if why := too_large(size, "files", free, spare=0.05 * size):
                return [Figure("load", None, "s", note=f"{why} in {folder}: give another with --folder")]
        if why := setting.too_large():
            return [Figure("load", None, "s", note=why)]
        sums = None
        if not there:
            files = shapes.FILES[setting.shape]
            device, kind = torch.device(setting.device), setting.experts_kind
            sums = shapes.write(setting.config, folder, files, device, setting.kind, kind)
        return measured(setting, folder, sums)


def holds(setting: Setting, folder: Path) -> bool:
    """Whether files with the setting's layers, dims and experts lie in ``folder``; if not, it is there, empty, and can be written to.

    Raises:
        ValueError: something else is there, or it cannot be written to.
    """
    hint = "name a folder that is new, empty, or has a checkpoint"
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"--folder {folder} is no folder: {hint}")
    with arguments.reading(folder):
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    # What a run that was killed has left is taken away by the next one that writes.
    names = [name for name in names if not name.startswith(results.PREFIX)]
    if not any(map(NAME.fullmatch, names)):
        if names:
            raise ValueError(f"--folder {folder} holds {clip(names[0])} and no checkpoint: {hint}")
        results.check_writable(folder)
        return False
    found = checkpoint.survey(checkpoint.find(folder)).config
    for name in ("layers", "dim", "ffn_dim", "experts"):
        got, wanted = getattr(found, name), getattr(setting.config, name)
        if got != wanted:
            raise ValueError(
                f"--folder {folder} has a checkpoint with {name}={got}, and --shape {setting.shape} has {wanted}: name the shape "
                "of the files, or another folder"
            )
    return True


def measured(setting: Setting, folder: Path, sums: shapes.Sums | None) -> list[Figure]:
    device = setting.devices[0]
    ceilings = measure.ceilings(Rank(0, 1, device), setting.kind)
    measure.give_back(device)
    paths = checkpoint.find(folder).all
    size = sum(path.stat().st_size for path in paths)
    # The free memory is read before the files are; cached pages count as free.
    cached = host_memory("MemAvailable")
    warm(paths)

    loads: list[Loaded] = []
    repeats = min(3, setting.repeats)
    with measure.memory(device) as peak:
        for _ in range(repeats):
            with moekit.load(
                folder,
                setting.world_size,
                setting.device,
                setting.dtype,
                backend=setting.backend,
                progress=False,
                experts=setting.experts,
            ) as model:
                if sums is not None:
                    check(model, sums)
                host = max(found or 0 for found in model.ranks.call(rank_host_bytes))
                loads.append(Loaded(model.load_seconds, max(part["seconds"] for part in model.parts), host))
            measure.give_back(device)
    seconds, reading, host = (statistics.median(column) for column in zip(*loads, strict=True))
    surveying = measure.median(
        lambda: checkpoint.survey(checkpoint.find(folder)), torch.device("cpu"), repeats=repeats, warm_up=0
    )
    note = f"{size / 1e9:.1f} GB in {len(paths)} files, {spread([one.seconds for one in loads])}"
    if cached < 1.1 * size:
        note += "; too large for the page cache"
    least = size / setting.world_size / ceilings.fetch
    rows = [
        *ceiling_figures(ceilings, setting.dtype),
        Figure("load", seconds, "s", least, setting.goal("load", ceilings), lower=True, note=note),
        Figure(
            "of that, reading on the slowest rank",
            reading,
            "s",
            least,
            setting.goal("reading", ceilings),
            lower=True,
        ),
        Figure("of that, all headers", surveying, "s", lower=True, note="before ranks read"),
    ]
    # A single rank is this process, whose peak is known. Other ranks report their memory at the end, including buffers.
    host = (peak.host_gib or 0.0) if setting.world_size == 1 else host / GIB
    if host:
        held = setting.rank_bytes() / GIB if setting.device == "cpu" else 0.0
        goal = setting.goal("load memory", ceilings)
        note = "a process beyond mapped files" + (" and weights" if held else "")
        left = max(0.0, host - held)
        rows.append(Figure("host memory", left, "GiB", None, goal, lower=True, note=note))
    return rows


class Loaded(NamedTuple):
    """The total ``seconds``, the seconds of ``reading`` on the slowest rank, and the most ``host`` bytes of any rank."""

    seconds: float
    reading: float
    host: float


def warm(paths: tuple[Path, ...]) -> None:
    """Read the files into the page cache."""
    buffer = memoryview(bytearray(16 << 20))
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def check(model: Model, sums: shapes.Sums) -> None:
    """Check that every expert is at its place, by the sum of its numbers.

    Raises:
        ValueError: an expert has another sum.
    """
    for rank, found in enumerate(model.ranks.call(rank_sums)):
        held = owned(model.config.experts, model.world_size, rank)
        for name, values in found.items():
            for expert, value in zip(held, values, strict=True):
                if value != sums[name][expert]:
                    raise ValueError(
                        f"{name}, expert {expert}: its numbers add up to {value}, but those written to {sums[name][expert]}"
                    )


@torch.inference_mode()
def rank_sums(rank: Rank) -> shapes.Sums:
    named = rank.state["model"].named_parameters()
    return {name: shapes.expert_sums(p) for name, p in named if ".experts." in name}


def rank_host_bytes(rank: Rank) -> int | None:
    return measure.host_bytes()
