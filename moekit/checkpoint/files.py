"""Which files a checkpoint has: any spelling of its path names the same ones."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from moekit import paths
from moekit.checkpoint.contents import clip, short
from moekit.checkpoint.keys import SHARED_KEY
from moekit.checkpoint.reading import read, tensors


@dataclass(frozen=True)
class Files:
    """``shared`` holds what every rank needs, ``ranks[i]`` is ``-rank-i`` and holds experts. Either may be all."""

    shared: Path
    ranks: tuple[Path, ...]

    @property
    def all(self) -> tuple[Path, ...]:
        return (self.shared, *self.ranks)

    @property
    def first(self) -> Path:
        """The file whose config counts, as in fairseq: rank 0's, if there are rank files."""
        return self.ranks[0] if self.ranks else self.shared


NAME = re.compile(r"(?P<stem>.+?)(?P<part>-shared|-rank-(?P<rank>0|[1-9][0-9]*))?\.pt", re.DOTALL)


def find(checkpoint: str | Path) -> Files:
    """The files of the checkpoint that ``checkpoint`` names.

    Args:
        checkpoint: its folder; ``model-shared.pt``; any ``model-rank-N.pt``; ``model.pt``, which need not exist (if it
            does and holds the shared part, it stands in for ``model-shared.pt``); ``"demo"``. Stems other than
            ``model`` work alike.

    Raises:
        ValueError: nothing there, several checkpoints in one folder, a gap in the ranks, or no shared part.
    """
    path = _path(checkpoint)
    folder, named = (path, None) if path.is_dir() else (path.parent, _named(path))
    names = _names(folder, checkpoint)
    stem = named["stem"] if named else _only_stem(folder, names)
    parts = {name: match for name, match in names.items() if match["stem"] == stem}
    ranks = {int(match["rank"]): folder / name for name, match in parts.items() if match["rank"]}
    if named and named["rank"] and path.name not in parts:
        raise ValueError(f"there is no file {path}; {folder} holds {len(ranks)} rank files")
    _check_gaps(folder, stem, ranks)
    return Files(_shared(folder, stem, path, parts), tuple(ranks[rank] for rank in sorted(ranks)))


def _path(checkpoint: str | Path) -> Path:
    if isinstance(checkpoint, str) and "://" in checkpoint:
        raise ValueError(
            f"checkpoint={short(checkpoint)} is an address: name a checkpoint's folder or one of its .pt files on this machine"
        )
    try:
        path = paths.DEMO_MODEL if str(checkpoint) == "demo" else Path(checkpoint).expanduser()
        # A name that is too long, say, is noticed by the system alone.
        path.exists()
    except PermissionError:
        raise ValueError(
            f"{path} cannot be read (Permission denied): check the permissions of its folder"
        ) from None
    except (OSError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"checkpoint={short(checkpoint)} cannot be opened ({getattr(error, 'strerror', None) or error}): name a "
            'checkpoint\'s folder, one of its .pt files, or "demo"'
        ) from error
    return path


def _named(path: Path) -> re.Match:
    """The parts of a file's name."""
    match = NAME.fullmatch(path.name)
    if match is None:
        what = "is not a .pt file or a folder" if path.exists() else "does not exist"
        raise ValueError(
            f'{clip(str(path))} {what}: name a checkpoint\'s folder, one of its .pt files, or "demo"'
        )
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
    return {name: match for name in names if (match := NAME.fullmatch(name))}


def _only_stem(folder: Path, names: dict[str, re.Match]) -> str:
    """The stem that a folder's path stands for: ``model``, or the only one."""
    stems = sorted({m["stem"] for m in names.values() if m["part"]} or {m["stem"] for m in names.values()})
    if not stems:
        raise ValueError(f"{folder} holds no checkpoint: expected model-shared.pt and model-rank-0.pt, ...")
    if "model" in stems:
        return "model"
    if len(stems) > 1:
        raise ValueError(
            f"{folder} holds several checkpoints ({', '.join(stems)}): name one, as in {stems[0]}.pt"
        )
    return stems[0]


def _check_gaps(folder: Path, stem: str, ranks: dict[int, Path]) -> None:
    last = max(ranks, default=-1)
    # At most len(ranks) + 1 numbers have to be looked at to find the first that is missing.
    missing = [rank for rank in range(min(last, len(ranks) + 5)) if rank not in ranks]
    if missing:
        lacking = ", ".join(f"{stem}-rank-{rank}.pt" for rank in missing[:5])
        raise ValueError(
            f"{folder} holds {len(ranks)} rank files up to {stem}-rank-{last}.pt but lacks {lacking}"
        )


def _shared(folder: Path, stem: str, path: Path, parts: dict[str, re.Match]) -> Path:
    """The file with the shared part; of two the one that ``path`` names."""
    candidates = [folder / f"{stem}-shared.pt", folder / f"{stem}.pt"]
    candidates.sort(key=lambda candidate: candidate != path)
    for candidate in candidates:
        if candidate.name in parts and SHARED_KEY in tensors(read(candidate), candidate):
            return candidate
    there = ", ".join(parts) or "no such file"
    raise ValueError(
        f"{folder} has no shared part of '{stem}' ({there}): expected {stem}-shared.pt, or {stem}.pt, with {SHARED_KEY}"
    )
