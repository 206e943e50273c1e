"""Binarised data, and in which order it is scored: fairseq's own ``language_modeling`` task, data sets and batches.

fairseq is imported here, when it is needed, and nowhere near the model.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from moekit import paths
from moekit.batches import Batch
from moekit.interrupts import hold_interrupts

if TYPE_CHECKING:
    pass
if TYPE_CHECKING:
    pass


def is_data(what: object) -> bool:
    """Whether ``what`` names a folder of binarised data rather than being a text, texts or their ids.

    Raises:
        ValueError: it looks like a path, and nothing is there.
    """
    if isinstance(what, Path) or what == "demo":
        return True
    if not isinstance(what, str):
        return False
    if "\n" not in what and len(what) < 4096 and Path(what).expanduser().is_dir():
        return True
    if os.sep in what and not any(c.isspace() for c in what):
        raise ValueError(f"there is no folder {what}; to trace it as a text, put it into a list")
    return False


def _lines(prefix: Path) -> tuple[np.ndarray, np.ndarray]:
    """The lengths of the lines and all ids of a binarised text."""
    from fairseq.data.indexed_dataset import MMapIndexedDataset

    if not prefix.with_name(prefix.name + ".idx").is_file():
        raise ValueError(f"there is no file {prefix}.idx")
    index = MMapIndexedDataset.Index(f"{prefix}.idx")
    return np.array(index.sizes), np.fromfile(f"{prefix}.bin", dtype=index.dtype)


MAX_TOKENS = 36_000  # fairseq_cli/eval_lm.py: the tokens a batch may have, whatever its batch_size


BREAK_MODES = ("none", "complete", "complete_doc", "eos")


class Batches:
    """fairseq's batches of a data set, in its order; iterate to get them, any number of times.

    Attributes:
        order: the samples of each batch.
        asked: what :func:`open_data` was asked for, for the record.
        skipped: how many samples are longer than the model can take; fairseq leaves them out, with a warning.
    """

    def __init__(
        self, task, dataset, max_positions: int, batch_size: int | None, max_tokens: int, context_window: int
    ):
        from fairseq.data.data_utils import numpy_seed

        self.task, self.dataset, self.context_window = task, dataset, context_window
        with numpy_seed(1):  # the branch's seed; released fairseqs add the epoch to it and get another order
            order = self._contextual().ordered_indices()
        kept = task.filter_indices_by_size(order, dataset, max_positions, ignore_invalid_inputs=True)
        self.skipped = len(order) - len(kept)
        self.order = dataset.batch_by_size(kept, max_tokens=max_tokens, max_sentences=batch_size)
        self.asked: dict[str, Any] = {}

    @property
    def dictionary(self):
        """The ``fairseq.data.Dictionary`` of the data."""
        return self.task.target_dictionary

    def _contextual(self):
        """The data set; with a context window, one that remembers what came before and so serves one pass."""
        if not self.context_window:
            return self.dataset
        from fairseq.data import LMContextWindowDataset

        size, pad = self.task.args.tokens_per_sample, self.dictionary.pad()
        return LMContextWindowDataset(self.dataset, size, self.context_window, pad)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Batch]:
        # One shard whatever the world size, so that no batch and no context depends on it.
        dataset = self._contextual()
        for index, members in enumerate(self.order):
            sample = dataset.collater([dataset[i] for i in members])
            tokens = sample["net_input"]["src_tokens"].numpy().astype(np.int32)
            targets = sample["target"].numpy().astype(np.int32)
            starts = np.asarray(sample.get("start_indices", [0] * len(tokens)))
            yield Batch(index, sample["id"].numpy(), tokens, targets, starts)


def open_data(
    data: str | Path,
    subset: str,
    *,
    tokens_per_sample: int,
    batch_size: int | None,
    max_positions: int,
    sample_break_mode: str = "none",
    context_window: int = 0,
    add_bos: bool = False,
    max_tokens: int = MAX_TOKENS,
) -> Batches:
    """Open binarised data as ``fairseq_cli.eval_lm --is-moe`` does.

    Args:
        data: the folder with ``dict.txt``, ``{subset}.bin`` and ``{subset}.idx``; ``"demo"`` is the demo's.
        tokens_per_sample: tokens of a block, its context included.
        batch_size: samples of a batch at most; None: ``max_tokens`` alone decides.
        max_positions: tokens the model can take; longer samples are left out.
        max_tokens: a batch's samples times its longest one's tokens at most.

    Raises:
        ValueError: a file is missing, or an option makes no sense.
    """
    folder = data_folder(data)
    if sample_break_mode not in BREAK_MODES:
        raise ValueError(f"sample_break_mode={sample_break_mode!r}; expected {', '.join(BREAK_MODES)}")
    if not 0 <= context_window < tokens_per_sample:
        raise ValueError(
            f"context_window={context_window} leaves no room in tokens_per_sample={tokens_per_sample}: "
            "expected 0 <= context_window < tokens_per_sample"
        )
    check_files(folder, subset)
    task = _language_modeling(
        data=str(folder),
        tokens_per_sample=tokens_per_sample - context_window,  # eval_lm.py counts the context in
        sample_break_mode=sample_break_mode,
        add_bos_token=add_bos,
        pad_to_fixed_length=True,  # eval_lm.py always does for mixtures of experts: padding is routed too
    )
    task.load_dataset(subset)
    batches = Batches(task, task.dataset(subset), max_positions, batch_size, max_tokens, context_window)
    batches.asked = {
        "data": str(data),
        "subset": subset,
        "tokens_per_sample": tokens_per_sample,
        "batch_size": batch_size,
        "sample_break_mode": sample_break_mode,
        "context_window": context_window,
    }
    return batches


def check_files(data: str | Path, subset: str) -> None:
    """That the three files of ``data`` and ``subset`` are there; a ValueError that names the first that is not."""
    folder = data_folder(data)
    for name in ("dict.txt", f"{subset}.bin", f"{subset}.idx"):
        if not (folder / name).is_file():
            there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else "no such folder"
            raise ValueError(
                f"{folder} has no {name} (it has: {there}); prepare_data.ipynb makes such a folder"
            )


def data_folder(data: str | Path) -> Path:
    if str(data) == "demo":
        return paths.DEMO_DATA
    return Path(data).expanduser()


@contextlib.contextmanager
def importing_fairseq() -> Iterator[None]:
    """Import fairseq in here: it sets the whole process's logging to DEBUG, and half an import of it cannot be mended.

    So an interrupt waits for the import's end, and after an error what was imported is forgotten.
    """
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    logging.getLogger("fairseq").setLevel(logging.WARNING)
    mend_numpy()
    before = set(sys.modules)
    try:
        with hold_interrupts():
            yield
    except ImportError:
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in ("fairseq", "hydra", "omegaconf"):
                del sys.modules[name]
        raise
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


def mend_numpy() -> None:
    """Give NumPy 2.4 back the ``long`` that fairseq's data sets still ask it for."""
    if not hasattr(np, "compat"):
        np.compat = SimpleNamespace(long=int)


def _language_modeling(**options: object):
    with importing_fairseq():
        from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask

    defaults = {"max_target_positions": options["tokens_per_sample"], "seed": 1, "batch_size": None}
    defaults |= {"batch_size_valid": None, "dataset_impl": None, "data_buffer_size": 0, "tpu": False}
    defaults |= {"use_plasma_view": False, "plasma_path": "/tmp/plasma"}
    config = LanguageModelingConfig(**(defaults | options))
    return LanguageModelingTask.setup_task(config)
