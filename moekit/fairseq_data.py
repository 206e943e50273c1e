"""Binarised data, and in which order it is scored: fairseq's own ``language_modeling`` task, data sets and batches.

fairseq is imported here, when it is needed, and nowhere near the model.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from moekit import paths
from moekit.arguments import Choice, Text, Whole, check, reading, shown
from moekit.arguments import Path as PathKind
from moekit.batches import Batch
from moekit.data import verify
from moekit.data.dictionary import Dictionary
from moekit.interrupts import hold_interrupts
from moekit.mapped import whole_files

# fairseq_cli/eval_lm.py: the tokens a batch may have, whatever its batch_size.
MAX_TOKENS = 36_000
BREAK_MODES = ("none", "complete", "complete_doc", "eos")
# The greatest number that fairseq's Cython code takes.
INT32 = 2**31 - 1
# The characters of a subset's name; its files have four more.
LONGEST_NAME = 251


@dataclass(frozen=True)
class Data:
    """Which binarised data is asked for, and how it is cut into samples and batches.

    Attributes:
        data: the folder with ``dict.txt``, ``{subset}.bin`` and ``{subset}.idx``; "demo" is the demo's; of several with
            colons between, the first, as in fairseq.
        tokens_per_sample: tokens of a block, its context included; None: as many as the model has positions.
        batch_size: samples of a batch at most.
        sample_break_mode: "none", "complete", "complete_doc" or "eos", as in fairseq.
        context_window: tokens of context that are not scored again.
        max_tokens: a batch's samples times its longest one's tokens at most.

    Raises:
        ValueError: one of them makes no sense.
    """

    data: str | Path
    subset: str = "valid"
    tokens_per_sample: int | None = None
    batch_size: int = 1
    sample_break_mode: str = "none"
    context_window: int = 0
    max_tokens: int = MAX_TOKENS

    def __post_init__(self) -> None:
        kinds = {
            "subset": Text(),
            "tokens_per_sample": Whole(optional=True, most=INT32),
            "batch_size": Whole(most=INT32),
            "sample_break_mode": Choice(BREAK_MODES),
            "context_window": Whole(0, most=INT32),
            "max_tokens": Whole(most=INT32),
        }
        data_folder(self.data)
        for name, kind in kinds.items():
            object.__setattr__(self, name, check(name, getattr(self, name), kind))
        name = Path(self.subset)
        if not name.name or name.is_absolute() or "\0" in self.subset or len(self.subset) > LONGEST_NAME:
            raise ValueError(f"subset={shown(self.subset)}: expected the name of a subset, such as 'valid'")

    @property
    def prefix(self) -> Path:
        return data_folder(self.data) / self.subset

    def asked(self) -> dict[str, Any]:
        """For a trace's meta."""
        told = asdict(self) | {"data": str(self.data)}
        del told["max_tokens"]
        return told


def is_data(what: object) -> bool:
    """Whether ``what`` names a folder of binarised data rather than being a text, texts or their ids.

    Raises:
        ValueError: it looks like a path, and nothing is there.
    """
    if isinstance(what, Path) or paths.of_demo(what, "data") is not None:
        return True
    # An empty path would be the current folder.
    if not isinstance(what, str) or not what or "\0" in what:
        return False
    if "\n" not in what and _is_folder(what.split(os.pathsep)[0]):
        return True
    if os.sep in what and not any(c.isspace() for c in what):
        raise ValueError(f"there is no folder {what}; to trace it as a text, put it into a list")
    return False


def _is_folder(name: str) -> bool:
    with reading(name):
        try:
            # Unlike Path.expanduser, this leaves the name of an unknown user as it is.
            return Path(os.path.expanduser(name)).is_dir()
        except UnicodeEncodeError:
            # Half of a surrogate pair is part of no name.
            return False
        except OSError as error:
            # An ordinary text is longer than a name can be.
            if error.errno == errno.ENAMETOOLONG:
                return False
            raise


class Batches:
    """fairseq's batches of a data set, in its order; iterate to get them, any number of times.

    Attributes:
        data: what was asked for.
        order: the samples of each batch.
        skipped: how many samples are longer than the model can take; fairseq leaves them out, with a warning.
    """

    def __init__(self, data: Data, task, dataset, max_positions: int):
        from fairseq.data.data_utils import numpy_seed

        self.data, self.task, self.dataset = data, task, dataset
        with numpy_seed(1):
            # This is the branch's seed. Released versions of fairseq add the epoch to it and get another order.
            order = self._contextual().ordered_indices()
        kept = task.filter_indices_by_size(order, dataset, max_positions, ignore_invalid_inputs=True)
        self.skipped = len(order) - len(kept)
        self.order: list = []
        if len(kept):
            limits = {"max_tokens": data.max_tokens, "max_sentences": data.batch_size}
            try:
                self.order = dataset.batch_by_size(kept, **limits)
            except AssertionError:
                longest = max(dataset.num_tokens(i) for i in kept)
                raise ValueError(
                    f"{data.prefix}: max_tokens={data.max_tokens} is less than the {longest} tokens of the longest sample"
                ) from None
            if dataset.supports_prefetch:
                # The "cached" format can only be read after a prefetch.
                dataset.prefetch(kept)

    @property
    def dictionary(self):
        """The ``fairseq.data.Dictionary`` of the data."""
        return self.task.target_dictionary

    def _contextual(self):
        """The data set; with a context window, one that remembers what came before and so serves one pass."""
        if not self.data.context_window:
            return self.dataset
        from fairseq.data import LMContextWindowDataset

        size, pad = self.task.args.tokens_per_sample, self.dictionary.pad()
        return LMContextWindowDataset(self.dataset, size, self.data.context_window, pad)

    def __len__(self) -> int:
        return len(self.order)

    @whole_files()
    def read(self, numbers: Iterable[int]) -> dict[int, np.ndarray]:
        """What the model reads of the samples with these numbers, without a context; those that it does not read are left out."""
        there = np.intersect1d(numbers, np.concatenate([*self.order, []]).astype(np.int64)).tolist()
        return {number: self.dataset[number]["source"].numpy() for number in there}

    def __iter__(self) -> Iterator[Batch]:
        # One shard whatever the world size, so that no batch and no context depends on it.
        dataset = self._contextual()
        for index, members in enumerate(self.order):
            # The overflow is in targets that lie in the past (TokenBlockDataset), which nothing reads.
            with whole_files(), np.errstate(over="ignore"):
                sample = dataset.collater([dataset[i] for i in members])
            tokens = sample["net_input"]["src_tokens"].numpy().astype(np.int32)
            targets = sample["target"].numpy().astype(np.int32)
            starts = np.asarray(sample.get("start_indices", [0] * len(tokens)))
            yield Batch(index, sample["id"].numpy(), tokens, targets, starts)


@whole_files()
def open_data(
    data: Data | str | Path,
    subset: str = "valid",
    *,
    max_positions: int,
    add_bos: bool = False,
    dictionary: Dictionary | None = None,
    **options: Any,
) -> Batches:
    """Open binarised data as ``fairseq_cli.eval_lm --is-moe`` does, once it is found whole.

    Args:
        data: what is asked for; or its folder, and ``options`` are the other fields of :class:`Data`.
        max_positions: tokens the model can take; longer samples are left out.
        add_bos: the model was trained with ``add_bos_token``: each sample begins with ``<s>``.
        dictionary: the model's own, which the data's has to be.

    Raises:
        ValueError: a file is missing or damaged, or an option makes no sense.
    """
    data = data if isinstance(data, Data) else Data(data, subset, **options)
    if data.tokens_per_sample is None:
        data = replace(data, tokens_per_sample=max_positions)
    block = data.tokens_per_sample
    if data.context_window >= block:
        raise ValueError(
            f"context_window={data.context_window} leaves no room in tokens_per_sample={block}: "
            "expected 0 <= context_window < tokens_per_sample"
        )
    folder = data_folder(data.data)
    kind = verify.verify(folder, data.subset, dictionary)
    task = _language_modeling(
        data=str(folder),
        dataset_impl=kind,
        # eval_lm.py counts the context as part of the block.
        tokens_per_sample=block - data.context_window,
        sample_break_mode=data.sample_break_mode,
        add_bos_token=add_bos,
        # eval_lm.py always sets it for mixtures of experts, so padding is routed too.
        pad_to_fixed_length=True,
    )
    try:
        task.load_dataset(data.subset)
    except (IndexError, ValueError):
        # fairseq finds no block in blank lines, since these part documents.
        if data.sample_break_mode != "complete_doc":
            raise
        raise ValueError(
            f"{data.prefix} has only blank lines: sample_break_mode={data.sample_break_mode!r} leaves no sample"
        ) from None
    return Batches(data, task, task.dataset(data.subset), max_positions)


def check_files(data: str | Path, subset: str, dictionary: Dictionary | None = None) -> None:
    """Check that the files of ``data`` and ``subset`` are there and whole; a ValueError names the first that is not."""
    verify.verify(data_folder(data), check("subset", subset, Text()), dictionary)


@whole_files()
def lines(prefix: Path) -> tuple[np.ndarray, np.ndarray]:
    """The lengths of the lines and all ids of a binarised text."""
    sizes, ids = verify.lines(prefix)
    return np.array(sizes), ids - 1 if verify.kind_of(prefix) == "cached" else np.array(ids)


def data_folder(data: str | Path) -> Path:
    """The folder that ``data`` names: "demo" is the demo's; of several with colons between, the first."""
    if (demo := paths.of_demo(data, "data")) is not None:
        return demo
    folder = check("data", data, PathKind())
    first = Path(str(folder).split(os.pathsep)[0])
    if first != folder and folder.is_dir():
        raise ValueError(
            f"data={str(data)!r}: fairseq reads a colon as the end of a folder's name; rename the folder"
        )
    return first


@contextlib.contextmanager
def importing_fairseq() -> Iterator[None]:
    """Import fairseq in here: it sets the whole process's logging to DEBUG, and half an import of it cannot be mended.

    So an interrupt waits for the import's end, and after an error what was imported is forgotten. Warnings of fairseq are ignored: they tell what
    torch and NumPy will lack one day, which nobody here can change, and they would end the import where warnings are errors.
    """
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    logging.getLogger("fairseq").setLevel(logging.WARNING)
    mend_numpy()
    before = set(sys.modules)
    try:
        with warnings.catch_warnings(action="ignore"), hold_interrupts():
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
