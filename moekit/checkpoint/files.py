"""Which files a checkpoint has: any spelling of its path names the same ones.

The branch's trainer writes ``NAME-shared.pt`` and, for each rank, ``NAME-rank-N.pt``. With ``--ddp-backend fully_sharded``
each rank writes ``NAME-rank-N-shardN.pt`` and ``NAME-shared-shardN.pt``: the latter are copies of one another, or, with
``--use-sharded-state``, parts of the shared tensors (see shards.py), which are needed all. A folder of Hugging Face's
libraries has one file with all weights, or several and an index (see hugging/).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from moekit import paths
from moekit.arguments import shown
from moekit.checkpoint.contents import clip
from moekit.checkpoint.hugging import folder as folder_of_hugging
from moekit.checkpoint.keys import SHARED_KEY
from moekit.checkpoint.reading import read, stamp
from moekit.checkpoint.shards import tensors


class Seen(NamedTuple):
    """A file's stamp, and the top level that was read after it."""

    stamp: tuple[int, ...]
    state: dict[str, Any]

    @classmethod
    def of(cls, path: Path) -> Seen:
        return cls(stamp(path), read(path))


@dataclass(frozen=True)
class Files:
    """``shared`` holds what every rank needs, ``ranks[i]`` is ``-rank-i`` and holds experts. Either may be all.

    Attributes:
        shards: more files with parts of what every rank needs.
        seen: what :func:`find` has read, so that :func:`moekit.checkpoint.survey` need not parse it again. It is not pickled.
    """

    shared: Path
    ranks: tuple[Path, ...]
    shards: tuple[Path, ...] = ()
    seen: dict[Path, Seen] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"seen": {}}

    def read(self, path: Path) -> dict[str, Any]:
        """The top level of one of them: what was seen of it, once, if it was not written to since."""
        seen = self.seen.pop(path, None)
        return read(path) if seen is None or seen.stamp != stamp(path) else seen.state

    @property
    def common(self) -> tuple[Path, ...]:
        """What every rank reads."""
        return (self.shared, *self.shards)

    @property
    def all(self) -> tuple[Path, ...]:
        return (*self.common, *self.ranks)

    @property
    def first(self) -> Path:
        """The file whose config counts, as in fairseq: rank 0's, if there are rank files."""
        return self.ranks[0] if self.ranks else self.shared


_NUMBER = "0|[1-9][0-9]*"
NAME = re.compile(
    rf"(?P<stem>.+?)(?P<part>-shared|-rank-(?P<rank>{_NUMBER}))?(-shard(?P<shard>{_NUMBER}))?(?P<end>\.pt|\.safetensors)",
    re.DOTALL,
)
MEGATRON = re.compile(r".+-model_part-[0-9]+.*\.pt", re.DOTALL)


def find(checkpoint: str | Path) -> Files:
    """The files of the checkpoint that ``checkpoint`` names.

    Args:
        checkpoint: its folder; ``model-shared.pt``; any ``model-rank-N.pt``; ``model.pt``, which need not exist (if it
            does and holds the shared part, it stands in for ``model-shared.pt``); ``"demo"`` or ``"demo-dense"``; all of
            these with ``.safetensors`` in place of ``.pt``; a folder with a ``config.json`` of Hugging Face's libraries, or
            a file in it. Stems other than ``model`` work alike.

    Raises:
        ValueError: nothing there, several checkpoints in one folder, a gap in the ranks, or no shared part.
    """
    path = _path(checkpoint)
    hugging = folder_of_hugging.find(path)
    if hugging is not None:
        first, *rest = hugging
        return Files(first, (), tuple(rest))
    folder, named = (path, None) if path.is_dir() else (path.parent, _named(path))
    names = _names(folder, checkpoint)
    stem = named["stem"] if named else _only_stem(folder, names)
    parts = {name: match for name, match in names.items() if match["stem"] == stem}
    ends = {match["end"] for match in parts.values()}
    # Where there are both, one was made of the other.
    end = named["end"] if named and named["end"] in ends else min(ends, default=".pt")
    parts = {name: match for name, match in parts.items() if match["end"] == end}
    whole = {name: match for name, match in parts.items() if match["shard"] is None}
    sharded = {name: match for name, match in parts.items() if match["shard"] is not None}
    # Where there are both, the files that are whole were made of the shards.
    chosen = sharded if not whole or (path.name in sharded) else whole
    ranks = {int(match["rank"]): folder / name for name, match in chosen.items() if match["rank"]}
    if named and (named["rank"] or named["shard"]) and path.name not in parts:
        raise ValueError(f"there is no file {path}; {folder} holds {len(ranks)} rank files")
    _check_gaps(
        folder, ranks, lambda rank: f"{stem}-rank-{rank}{f'-shard{rank}' if chosen is sharded else ''}.pt"
    )
    in_order = tuple(ranks[rank] for rank in sorted(ranks))
    if chosen is sharded:
        return _of_shards(folder, stem, sharded, in_order)
    return _with_shared(folder, stem, path, parts, end, in_order)


def _path(checkpoint: str | Path) -> Path:
    if isinstance(checkpoint, str) and "://" in checkpoint:
        raise ValueError(
            f"checkpoint={shown(checkpoint)} is an address: name a checkpoint's folder or one of its .pt files on this machine"
        )
    if isinstance(checkpoint, str) and not checkpoint.strip():
        raise ValueError(
            f'checkpoint={shown(checkpoint)} is blank: name a checkpoint\'s folder, one of its .pt files, or "demo"'
        )
    try:
        path = paths.of_demo(checkpoint, "checkpoint") or Path(checkpoint).expanduser()
        # A name that is too long, say, is noticed by the system alone.
        path.exists()
    except PermissionError:
        raise ValueError(
            f"{path} cannot be read (Permission denied): check the permissions of its folder"
        ) from None
    except (OSError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"checkpoint={shown(checkpoint)} cannot be opened ({getattr(error, 'strerror', None) or error}): name a "
            'checkpoint\'s folder, one of its .pt files, or "demo"'
        ) from error
    return path


def _named(path: Path) -> re.Match:
    """The parts of a file's name."""
    match = NAME.fullmatch(path.name)
    if match is None:
        what = "is not a .pt file or a folder" if path.exists() else "does not exist"
        text = str(path)
        # Spaces around a name are not seen without quotes.
        text = clip(text) if text == text.strip() else shown(text)
        raise ValueError(f'{text} {what}: name a checkpoint\'s folder, one of its .pt files, or "demo"')
    return match


def _names(folder: Path, checkpoint: str | Path) -> dict[str, re.Match]:
    """The names in a folder that a checkpoint's file can have, and their parts."""
    if not folder.is_dir():
        raise ValueError(
            f"there is no folder {folder}; checkpoint={str(checkpoint)!r} must name a folder or a .pt file"
        )
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be listed ({error.strerror}): check the folder's permissions"
        ) from error
    cut = next((name for name in names if MEGATRON.fullmatch(name)), None)
    if cut is not None and (Path(checkpoint).name == cut or not any(_is_whole(name) for name in names)):
        raise ValueError(
            f"{folder / cut} is one part of a model that Megatron's --model-parallel-size has cut through its layers, which "
            "moekit does not join: name a checkpoint whose layers are whole"
        )
    return {name: match for name in names if _is_whole(name) and (match := NAME.fullmatch(name))}


def _is_whole(name: str) -> bool:
    return bool(NAME.fullmatch(name)) and not MEGATRON.fullmatch(name)


def _only_stem(folder: Path, names: dict[str, re.Match]) -> str:
    """The stem that a folder's path stands for: ``model``, or the only one."""
    stems = sorted(
        {m["stem"] for m in names.values() if m["part"]}
        or {m["stem"] for m in names.values() if m["shard"]}
        or {m["stem"] for m in names.values()}
    )
    if not stems:
        raise ValueError(
            f"{folder} holds no checkpoint: expected model.pt, or model-shared.pt and model-rank-0.pt, ..."
        )
    if "model" in stems:
        return "model"
    if len(stems) > 1:
        raise ValueError(
            f"{folder} holds several checkpoints ({', '.join(stems)}): name one, as in {stems[0]}.pt"
        )
    return stems[0]


def _check_gaps(folder: Path, numbered: dict[int, Path], name: Callable[[int], str]) -> None:
    last = max(numbered, default=-1)
    # At most len(numbered) + 1 numbers have to be looked at to find the first that is missing.
    missing = [number for number in range(min(last, len(numbered) + 5)) if number not in numbered]
    if missing:
        kind = "rank files" if "-rank-" in name(0) else "shards"
        lacking = ", ".join(name(number) for number in missing[:5])
        raise ValueError(f"{folder} holds {len(numbered)} {kind} up to {name(last)} but lacks {lacking}")


def _of_shards(folder: Path, stem: str, sharded: dict[str, re.Match], ranks: tuple[Path, ...]) -> Files:
    """The files of a training with ``--ddp-backend fully_sharded``."""
    part = "-shared" if any(match["part"] for match in sharded.values()) else ""
    shared = {
        int(match["shard"]): folder / name for name, match in sharded.items() if (match["part"] or "") == part
    }
    if not shared:
        raise ValueError(f"{folder} has no shared part of '{stem}': expected {stem}-shared-shard0.pt, ...")
    first, *rest = (shared[number] for number in sorted(shared))
    seen = Seen.of(first)
    found = tensors(seen.state, first)
    if found.cut:
        _check_gaps(folder, shared, lambda number: f"{stem}{part}-shard{number}.pt")
        return Files(first, ranks, tuple(rest), {first: seen})
    if SHARED_KEY not in found:
        raise ValueError(f"{first} is no shared part: it lacks {SHARED_KEY}")
    # The others are copies, which the branch's evaluation does not read either.
    return Files(first, ranks, seen={first: seen})


def _with_shared(
    folder: Path,
    stem: str,
    path: Path,
    parts: dict[str, re.Match],
    end: str,
    ranks: tuple[Path, ...],
) -> Files:
    """The files with the one that has the shared part; of two the one that ``path`` names."""
    candidates = [folder / f"{stem}-shared{end}", folder / f"{stem}{end}"]
    candidates.sort(key=lambda candidate: candidate != path)
    for candidate in candidates:
        if candidate.name in parts:
            seen = Seen.of(candidate)
            if SHARED_KEY in tensors(seen.state, candidate):
                return Files(candidate, ranks, seen={candidate: seen})
    there = ", ".join(parts) or "no such file"
    raise ValueError(
        f"{folder} has no shared part of '{stem}' ({there}): expected {stem}-shared{end}, or {stem}{end}, with {SHARED_KEY}"
    )
