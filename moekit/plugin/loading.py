"""The one place where fairseq is changed: its checkpoint loader learns of checkpoints in several files.

``checkpoint_utils.load_model_ensemble_and_task``, which every tool of fairseq calls, asks one function for a file's
name and another for what is in it. Both are replaced here by functions that know better about checkpoints of the
``moe`` branch and leave all others to the originals. So ``model.pt``, which does not exist, works as a path, and so
does any file of the checkpoint or its folder.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping
from typing import Any

from fairseq import checkpoint_utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf, overwrite_args_by_name
from omegaconf import OmegaConf

from moekit import checkpoint
from moekit.checkpoint.options import options_of
from moekit.fairseq_data import mend_numpy
from moekit.plugin.language_model import NAME


def install() -> None:
    name_of, load = (
        checkpoint_utils.get_maybe_sharded_checkpoint_filename,
        checkpoint_utils.load_checkpoint_to_cpu,
    )

    @functools.wraps(name_of)
    def get_maybe_sharded_checkpoint_filename(filename: str, *args: Any, **kwargs: Any) -> str:
        files = find(filename)
        return name_of(filename, *args, **kwargs) if files is None else str(files.shared)

    @functools.wraps(load)
    def load_checkpoint_to_cpu(
        path: str, arg_overrides: dict | None = None, *args: Any, **kwargs: Any
    ) -> dict:
        files = find(path)
        return (
            load(path, arg_overrides, *args, **kwargs) if files is None else state(files, arg_overrides or {})
        )

    checkpoint_utils.get_maybe_sharded_checkpoint_filename = get_maybe_sharded_checkpoint_filename
    checkpoint_utils.load_checkpoint_to_cpu = load_checkpoint_to_cpu
    mend_numpy()


def find(path: str) -> checkpoint.Files | None:
    """The files of the checkpoint with experts that ``path`` names; None if it names none."""
    try:
        files = checkpoint.find(path)
    except ValueError:
        return None
    return files if files.ranks else None


def state(files: checkpoint.Files, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What fairseq expects to find in a checkpoint file: ``cfg``, and under ``model`` the plan of what is to be read."""
    plan = checkpoint.survey(files)
    read = checkpoint.read(files.ranks[0])  # fairseq heeds the config of rank 0's file
    model, task = options_of(read, str(files.ranks[0]))
    model |= {"no_decoder_final_norm": not plan.config.final_norm}
    if read.get("cfg") is None:
        cfg = convert_namespace_to_omegaconf(argparse.Namespace(**plain(model | {"arch": NAME})))
    else:
        sections = plain(read["cfg"]) | {"model": plain(model | {"_name": NAME}), "task": plain(task)}
        cfg = OmegaConf.create(sections, flags={"allow_objects": True})
    overwrite_args_by_name(cfg, overrides)
    return {"args": None, "cfg": cfg, "model": plan, "optimizer_history": [], "extra_state": {}}


def plain(node: Any) -> Any:
    """A config of any of fairseq's types as dicts, lists and plain values, its references to others unresolved."""
    if isinstance(node, argparse.Namespace):
        node = vars(node)
    elif OmegaConf.is_config(node):
        node = OmegaConf.to_container(node, resolve=False)
    if isinstance(node, Mapping):
        return {key: plain(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [plain(value) for value in node]
    return str(node) if isinstance(node, str) else node


install()
