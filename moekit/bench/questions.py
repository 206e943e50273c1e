"""Questions: tokens per second of texts of many lengths, as tasks ask for them, against evaluate on as many tokens."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import numpy as np
import torch

from moekit.api import Model
from moekit.batches import Batch
from moekit.bench import measure
from moekit.bench.figures import Figure, spread
from moekit.bench.setting import Setting, whole
from moekit.likelihood import Text, score_texts
from moekit.scoring import score_batches
from moekit.symbols import EOS

# Tokens a rank, in passes of the scoring of blocks.
TOKENS = {"cpu": 8192, "cuda": 16 * 65_536}
# The rate on texts has to be this share of evaluate's at least.
SHARE = 0.8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--choices", type=whole(most=1000), default=4, help="answers of a question (default: 4)"
    )


def run(setting: Setting, args: argparse.Namespace) -> list[Figure]:
    """The rate of ``evaluate`` on blocks, of texts that share nothing, and of questions whose answers share them."""
    if why := setting.too_large():
        return [Figure("questions", None, "tokens/s", note=why)]
    with setting.model() as (model, _):
        total = TOKENS[setting.device] * setting.world_size
        rng = np.random.default_rng(0)
        blocks = _blocks(rng, model, total)
        rate, evaluated = _measured(
            "evaluate, whole blocks", total, setting.repeats, lambda: _scored(model, blocks)
        )
        rows = [evaluated]
        for name, choices in (
            ("texts, one ending each", 1),
            (f"questions, {args.choices} endings", args.choices),
        ):
            texts = questions(rng, total, model.vocab, choices, model.config.max_positions)
            count = sum(len(text.ids) - 1 for text in texts)
            _, row = _measured(
                f"{name}, {len(texts)} texts",
                count,
                setting.repeats,
                lambda texts=texts: score_texts(model, texts, fraction=None, seed=1, progress=False),
                goal=SHARE * rate,
            )
            rows.append(row)
    return rows


def questions(
    rng: np.random.Generator, total: int, vocab: int, choices: int, max_positions: int
) -> list[Text]:
    """Random texts of ``total`` ids or a few more: contexts of about 60 tokens (16 to 250), endings of about 12."""
    texts: list[Text] = []
    count = 0
    while count < total:
        length = int(np.clip(rng.lognormal(np.log(60), 0.6), 16, min(250, max_positions - 48)))
        context = (EOS, *rng.integers(4, vocab, length - 1).tolist())
        for _ in range(choices):
            ending = rng.integers(4, vocab, int(np.clip(rng.lognormal(np.log(12), 0.6), 2, 40))).tolist()
            texts.append(Text((*context, *ending), len(context)))
            count += len(context) + len(ending)
    return texts


def _blocks(rng: np.random.Generator, model: Model, total: int) -> list[Batch]:
    length = model.config.max_positions
    ids = rng.integers(4, model.vocab, (max(1, total // length), 1, length)).astype(np.int32)
    starts = np.zeros(1, np.int64)
    return [Batch(index, np.array([index]), block, block, starts) for index, block in enumerate(ids)]


def _scored(model: Model, batches: list[Batch]) -> None:
    score_batches(model, batches, fraction=None, vocab=model.vocab, seed=1, progress=False)


def _measured(
    name: str, tokens: int, repeats: int, work: Callable[[], object], goal: float | None = None
) -> tuple[float, Figure]:
    """The rate, counted as if nothing were shared, and its row; the first run does not count."""
    seconds = measure.seconds(work, torch.device("cpu"), repeats=repeats, warm_up=1)
    rate = tokens / statistics.median(seconds)
    return rate, Figure(name, rate, "tokens/s", goal=goal, note=f"{tokens} tokens; {spread(seconds)}")
