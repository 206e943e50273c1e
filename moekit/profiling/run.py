"""``Model.profile``: a few steps of the real path under the profiler."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moekit.arguments import Choice, Whole, check
from moekit.fairseq_data import Data, is_data
from moekit.interrupts import import_whole
from moekit.nn.memory import Sizes
from moekit.nn.quantise import dtype_name
from moekit.profiling.events import Seen, events_of, seen
from moekit.profiling.least import Cost, Pass, least, routed
from moekit.profiling.profile import Profile
from moekit.profiling.table import table
from moekit.profiling.work import MODES, Size, work_of
from moekit.progress import bar as progress_bar
from moekit.ranks.machine import free_memory
from moekit.routing.placement import contiguous
from moekit.symbols import PAD
from moekit.units import GIB
from moekit.worker import profiling as worker
from moekit.worker.measuring import Ceilings, ceilings, slowest
from moekit.worker.profiling import Recorded
from moekit.worker.steps import STEPS_BEFORE, Work

if TYPE_CHECKING:
    import pandas as pd

    from moekit.handle import Handle

# Kernels of exchanges in which the experts have written their results home already.
HOMEWARD = ("_meet", "_collect")
# A profile of more steps takes minutes and gigabytes, and could not be saved.
STEPS = Whole(most=1000, optional=True)


def profile(
    self: Handle,
    data_or_texts: str | Path | Iterable[str] | Iterable[int] | Iterable[Iterable[int]] = "demo",
    mode: str = "score",
    steps: int | None = None,
    blocks: int = 1,
    capacity_token_fraction: float | str | None = None,
    subset: str = "valid",
    tokens_per_sample: int | None = None,
    seed: int = 1,
    progress: bool = True,
) -> Profile:
    """Run a few steps under torch's profiler on every rank, and tell where their time goes.

    The steps are those of :meth:`evaluate` and :meth:`generate`, on the same kernels, and those that the benches time. They run
    without the profiler, too, and the profile tells how much slower they are with it.

    Args:
        data_or_texts: where the tokens come from: a folder of binarised data or "demo"; or a text, or texts, or their ids. They
            are cut into blocks of one length, and repeated if there are too few.
        mode: "score": a step scores ``blocks`` blocks on each rank. "prefill": a step reads as many prompts of a block's
            length into a cache. "decode": a step writes one token of as many sequences, after prompts of 128 tokens and 8 steps
            more. All steps are one call, and each call without the profiler, and that under it, has the next prompts. A new token
            has no capacity, as in :meth:`generate`, and ``tokens_per_sample`` no effect.
        steps: how many steps, up to 1,000. None: 3, and of "decode" 64 on GPUs and 8 without, as the bench has them: a call of few
            steps takes longer a step.
        blocks: blocks or sequences on each rank.
        tokens_per_sample: tokens of a block; None: as many as the model has positions.

    The other arguments are those of :meth:`evaluate`.

    Returns:
        The profile, see :class:`moekit.profiling.Profile`.

    Raises:
        ValueError: an argument makes no sense, or a file is missing.
        moekit.ranks.RankError: a rank failed.
    """
    import_whole("pandas")
    mode = check("mode", mode, Choice(MODES))
    steps, blocks = check("steps", steps, STEPS), check("blocks", blocks, Whole())
    length = check("tokens_per_sample", tokens_per_sample, Whole(optional=True)) or self.config.max_positions
    if not 2 <= length <= self.config.max_positions:
        raise ValueError(
            f"tokens_per_sample={length}: expected 2 to the model's {self.config.max_positions} positions"
        )
    seed = check("seed", seed, Whole(0))
    size = Size.of(self.config, self.device, mode, steps, blocks, length)
    fraction = self.capacity(capacity_token_fraction)
    _room(self, size)
    ids, vocab = _tokens(self, data_or_texts, subset, size.tokens(self.world_size))
    work = work_of(self, size, ids, fraction, vocab, seed)
    with progress_bar("profiling", 2, " passes", show=progress, delay=1.0) as bar:
        found: list[Recorded] = self.ranks.call(worker.profile, work)
        bar.update(1)
        # Last, since large products make a GPU hot: the steps after them took up to 5 % longer.
        chip = slowest(self.ranks.call(ceilings, self.dtype))
        bar.update(1)
    return _profile(self, size, work, chip, found)


def _tokens(model: Handle, data_or_texts: Any, subset: str, wanted: int) -> tuple[np.ndarray, int]:
    """The tokens of the data, ``wanted`` or a few more if there are as many, or those of the texts; and the vocabulary."""
    if is_data(data_or_texts):
        batches = model.open_data(Data(data_or_texts, subset))
        parts, found = [], 0
        for batch in batches:
            parts.append(batch.tokens[batch.tokens != PAD])
            found += len(parts[-1])
            if found >= wanted:
                break
        vocab = len(batches.dictionary)
    else:
        parts, vocab = model.ids("data_or_texts", data_or_texts), model.vocab
    ids = np.concatenate(parts) if parts else np.array([])
    if not len(ids):
        raise ValueError("data_or_texts has no tokens to profile with; expected at least one")
    return ids, vocab


def _room(model: Handle, size: Size) -> None:
    """Raise a ValueError if so many blocks surely do not fit: a rank that runs out of memory may take the model with it."""
    if any(model.ranks.nodes) or not model.parts:
        return
    sizes = Sizes(model.config, model.dtype, model.experts is not None)
    read = size.blocks * size.read
    needed = sizes.workspace(read, model.config.vocab_rows, model.parts[0]["backend"], model.device)
    if size.mode != "score":
        needed += sizes.cache(size.blocks, size.last)
    # The weights lie on a GPU that counts as empty, and not in what is free of the host's memory.
    held = [part["bytes"] if model.device == "cuda" else 0 for part in model.parts]
    free = min(map(operator.sub, free_memory(model.ranks.devices, lent=True), held))
    if needed > free:
        raise ValueError(
            f"blocks={size.blocks}: a step needs {needed / GIB:.3g} GiB on each rank, and {free / GIB:.3g} GiB are free; ask for fewer "
            "blocks"
        )


def _profile(model: Handle, size: Size, work: Work, chip: Ceilings, found: Sequence[Recorded]) -> Profile:
    on_device = model.device == "cuda"
    events = [events_of(one) for one in found]
    ranks: list[Seen] = [seen(own, on_device) for own in events]
    held = holders(model)
    # [W, steps or 1, L, E]
    counts = np.stack([one.counts for one in found])
    homeward = any(kernel.name.startswith(HOMEWARD) for kernel in ranks[0].kernels)
    passes = [
        [_pass(model, size, work.vocab, counts, held, r, step, homeward) for step in range(size.steps)]
        for r in range(len(found))
    ]
    costs = [[least(model.config, one) for one in own] for own in passes]
    by_step: list[dict[int, dict[tuple[int, str], Cost]]] = [dict(enumerate(own)) for own in costs]
    meta = {
        "mode": size.mode,
        "blocks": size.blocks,
        "tokens": size.blocks * size.a_step,
        "world_size": model.world_size,
        "device": model.device,
        "dtype": dtype_name(model.dtype),
        "experts": model.experts,
        "resident": model.parts[0]["resident"] if model.parts else None,
        "backend": model.parts[0]["backend"] if model.parts else None,
        "capacity_token_fraction": work.fraction,
        "seed": work.seed,
        "chip": chip.device.split(" x ", 1)[-1],
        "copy": chip.copy,
        "matmul": chip.matmul,
        "link": chip.fetch,
        "jitter": max(one.jitter for one in found) / 1e9,
        "versions": model.versions,
    }
    plain, profiled = (np.array([getattr(one, name) for one in found]) for name in ("plain", "profiled"))
    return Profile(table(ranks, on_device, by_step), plain, profiled, _rows(model, passes), meta, events)


def holders(model: Handle) -> list[np.ndarray]:
    """For each MoE layer [E], the rank that holds each expert."""
    config, ranks = model.config, model.world_size
    rank_of = contiguous(config.experts, ranks)
    every = range(config.experts)
    return [rank_of[list(model.plan.physical.get(layer, every))] for layer in config.moe_layers]


def _pass(
    model: Handle,
    size: Size,
    vocab: int,
    counts: np.ndarray,
    held: list[np.ndarray],
    rank: int,
    step: int,
    homeward: bool,
) -> Pass:
    blocks, read = size.blocks, size.a_step
    before = size.read + STEPS_BEFORE + step if size.mode == "decode" else 0
    received, sent, taken = routed(counts[:, min(step, counts.shape[1] - 1)], held, rank)
    tokens = blocks * read
    return Pass(
        tokens=tokens,
        keys=blocks * (read * before + read * (read + 1) / 2),
        cached=blocks * before,
        outputs=tokens if size.mode == "score" else blocks,
        scored=size.mode == "score",
        vocab=vocab,
        itemsize=model.dtype.itemsize,
        received=received,
        sent=sent,
        taken=taken,
        homeward=homeward,
        matrices=None if model.experts is None else 1,
    )


def _rows(model: Handle, passes: Sequence[Sequence[Pass]]) -> pd.DataFrame:
    """The rows that each rank's experts get, by step and layer."""
    import pandas as pd

    records = [
        (rank, step, layer, int(one.received[place].sum()), int((one.received[place] > 0).sum()))
        for rank, own in enumerate(passes)
        for step, one in enumerate(own)
        for place, layer in enumerate(model.config.moe_layers)
    ]
    return pd.DataFrame(records, columns=["rank", "step", "layer", "rows", "experts"])
