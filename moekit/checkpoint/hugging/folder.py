"""Which files of a folder hold the weights: one, or those that an index names."""

from __future__ import annotations

import os
from pathlib import Path

from moekit.checkpoint.contents import clip, short
from moekit.checkpoint.hugging.config import FILE, json_of, layout_of
from moekit.checkpoint.hugging.names import PREFIX
from moekit.checkpoint.keys import SHARED_KEY

ONE = ("model.safetensors", "pytorch_model.bin")
# bytes of an index
MOST = 30_000_000
EMBEDDINGS = (PREFIX + "embed.weight", SHARED_KEY)


def find(path: Path) -> list[Path] | None:
    """The files with weights of the Hugging Face folder that ``path`` names, that with the embedding first.

    Args:
        path: the folder or a file in it.

    Returns:
        None, if it is no such folder, or ``path`` is another file.

    Raises:
        ValueError: the folder lacks a file.
    """
    folder = path if os.path.isdir(path) else path.parent
    if not os.path.isdir(folder) or layout_of(folder) is None:
        return None
    indices = [folder / f"{name}.index.json" for name in ONE if (folder / f"{name}.index.json").is_file()]
    whole = [folder / name for name in ONE if (folder / name).is_file()]
    files = whole[:1] or (_indexed(indices[0]) if indices else [])
    # A folder that has a config.json and yet fairseq's files is one of fairseq's.
    others = {FILE, *(index.name for index in indices), *(file.name for file in whole)}
    if path != folder and path.name not in others | {file.name for file in files}:
        return None
    if not files:
        if any(folder.glob("*-shared.*")):
            return None
        raise ValueError(f"{folder} has a {FILE} and no weights: expected {ONE[0]} or {ONE[0]}.index.json")
    if path in whole:
        return [path]
    # os.path takes a name that no file can have, too.
    missing = next((file for file in files if not os.path.isfile(file)), None)
    if missing is not None:
        raise ValueError(f"{folder} lacks {clip(missing.name)}, which its index names: fetch it")
    return files


def _indexed(index: Path) -> list[Path]:
    told = json_of(index, MOST, "an index")
    files = told.get("weight_map") if isinstance(told, dict) else None
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{index} has no weight_map, which tells the file of each tensor: fetch it again")
    for name in files.values():
        if type(name) is not str or Path(name).name != name or not name.endswith((".safetensors", ".bin")):
            raise ValueError(f"{index} names the file {short(name)}; expected one beside it with weights")
    first = next((files[key] for key in EMBEDDINGS if key in files), None)
    names = sorted(set(files.values()), key=lambda name: (name != first, name))
    return [index.parent / name for name in names]
