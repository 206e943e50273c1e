"""The one place where fairseq is changed: its loader of checkpoints is moekit's.

``checkpoint_utils.load_model_ensemble_and_task``, which every tool of fairseq calls, asks one function for a file's
name and another for what is in it. Both are replaced here. So ``model.pt``, which need not exist, works as a path, and
so does any file of the checkpoint or its folder.

fairseq's own loader never runs, whatever the path: it would trust what moekit refuses. A checkpoint that moekit cannot
read is an error of moekit's. The two other functions that open what a checkpoint's path names, one for averaged weights
and one for archives and addresses, refuse.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from fairseq import checkpoint_utils, file_utils
from fairseq.dataclass.utils import overwrite_args_by_name

from moekit import checkpoint
from moekit.checkpoint.files import NAME
from moekit.fairseq_data import mend_numpy
from moekit.plugin import options

ONLY = (
    "With moekit's plug-in a process opens language models ('transformer_lm') only; fairseq opens other checkpoints in a "
    "process without it."
)


def install() -> None:
    name_of, folder_of = checkpoint_utils.get_maybe_sharded_checkpoint_filename, file_utils.load_archive_file

    @functools.wraps(name_of)
    def get_maybe_sharded_checkpoint_filename(filename: str, *args: Any, **kwargs: Any) -> str:
        files = find(filename)
        return name_of(filename, *args, **kwargs) if files is None else str(files.shared)

    @functools.wraps(checkpoint_utils.load_checkpoint_to_cpu)
    def load_checkpoint_to_cpu(
        path: str, arg_overrides: dict | None = None, load_on_all_ranks: bool = False
    ) -> dict:
        files = find(path)
        if files is None:
            raise OSError(f"Model file not found: {path}")
        return state(files, arg_overrides or {})

    @functools.wraps(checkpoint_utils.load_ema_from_checkpoint)
    def load_ema_from_checkpoint(fpath: str) -> dict:
        raise ValueError(f"{fpath} is asked for averaged weights (EMA), which moekit's plug-in does not open")

    @functools.wraps(folder_of)
    def load_archive_file(archive_file: str) -> str:
        if not Path(archive_file).is_dir():
            raise ValueError(
                f"{archive_file} is not a folder; moekit's plug-in lets fairseq neither fetch nor unpack an archive: "
                "unpack it first and name the folder"
            )
        return folder_of(archive_file)

    for function in (
        get_maybe_sharded_checkpoint_filename,
        load_checkpoint_to_cpu,
        load_ema_from_checkpoint,
        load_archive_file,
    ):
        replace(function)
    mend_numpy()


def replace(function: Callable) -> None:
    """Put ``function`` in place of the one that it wraps, in every module that has that one by its own name."""
    name, original = function.__name__, function.__wrapped__
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType) and vars(module).get(name) is original:
            setattr(module, name, function)


def find(path: str) -> checkpoint.Files | None:
    """The files of the checkpoint that ``path`` names; None if nothing lies there.

    Raises:
        ValueError: what lies there is no checkpoint that moekit reads.
    """
    try:
        return checkpoint.find(path)
    except ValueError as error:
        if not lies(Path(path)):
            return None
        error.add_note(ONLY)
        raise


def lies(path: Path) -> bool:
    """Whether ``path`` or a file that belongs to the same checkpoint is there."""
    wanted = NAME.fullmatch(path.name)
    beside = (NAME.fullmatch(other.name) for other in path.parent.glob("*.pt"))
    return path.exists() or bool(wanted and wanted["stem"] in {match["stem"] for match in beside if match})


def state(files: checkpoint.Files, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What fairseq expects to find in a checkpoint file: ``cfg``, and under ``model`` the plan of what is to be read.

    Raises:
        ValueError: as :func:`moekit.checkpoint.survey` and :func:`moekit.plugin.options.config`.
    """
    try:
        plan = checkpoint.survey(files)
        first = files.first
        cfg = options.config(checkpoint.read(first), first, plan.config.final_norm)
    except ValueError as error:
        error.add_note(ONLY)
        raise
    overwrite_args_by_name(cfg, overrides)
    return {"args": None, "cfg": cfg, "model": plan, "optimizer_history": [], "extra_state": {}}


install()
