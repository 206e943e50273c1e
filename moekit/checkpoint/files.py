"""Which files a checkpoint has: any spelling of its path names the same ones."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from moekit import paths
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


FILE = re.compile(r"(?P<stem>.+?)(?P<part>-shared|-rank-(?P<rank>\d+))?\.pt")


def find(checkpoint: str | Path) -> Files:
    """The files of the checkpoint that ``checkpoint`` names.

    Args:
        checkpoint: its folder; ``model-shared.pt``; any ``model-rank-N.pt``; ``model.pt``, which need not exist (if it
            does and holds the shared part, it stands in for ``model-shared.pt``); ``"demo"``. Stems other than
            ``model`` work alike.

    Raises:
        ValueError: nothing there, several checkpoints in one folder, a gap in the ranks, or no shared part.
    """
    if str(checkpoint) == "demo":
        checkpoint = paths.DEMO_MODEL
    path = Path(checkpoint).expanduser()
    folder = path if path.is_dir() else path.parent
    if not folder.is_dir():
        raise ValueError(
            f"there is no folder {folder}; checkpoint={str(checkpoint)!r} must name a folder or a .pt file"
        )

    found = {p.name: match for p in sorted(folder.glob("*.pt")) if (match := FILE.fullmatch(p.name))}
    if path == folder:
        stems = sorted(
            {m["stem"] for m in found.values() if m["part"]} or {m["stem"] for m in found.values()}
        )
        if not stems:
            raise ValueError(
                f"{folder} holds no checkpoint: expected model-shared.pt and model-rank-0.pt, ..."
            )
        if len(stems) > 1 and "model" not in stems:
            raise ValueError(
                f"{folder} holds several checkpoints ({', '.join(stems)}): name one, as in {stems[0]}.pt"
            )
        stem = "model" if "model" in stems else stems[0]
    else:
        match = FILE.fullmatch(path.name)
        if match is None:
            what = "is not a .pt file or a folder" if path.exists() else "does not exist"
            raise ValueError(f'{path} {what}: name a checkpoint\'s folder, one of its .pt files, or "demo"')
        stem = match["stem"]

    ranks = {int(m["rank"]): folder / name for name, m in found.items() if m["stem"] == stem and m["rank"]}
    if path.suffix and path != folder and not path.exists() and FILE.fullmatch(path.name)["rank"]:
        raise ValueError(f"there is no file {path}; {folder} holds {len(ranks)} rank files")
    missing = sorted(set(range(max(ranks, default=-1) + 1)) - set(ranks))
    if missing:
        names = ", ".join(f"{stem}-rank-{r}.pt" for r in missing[:5])
        raise ValueError(
            f"{folder} holds {len(ranks)} rank files up to {stem}-rank-{max(ranks)}.pt but lacks {names}"
        )

    candidates = [folder / f"{stem}-shared.pt", folder / f"{stem}.pt"]
    if path == candidates[1]:
        candidates.reverse()
    for candidate in candidates:
        if candidate.is_file() and SHARED_KEY in tensors(read(candidate), candidate):
            return Files(candidate, tuple(ranks[r] for r in sorted(ranks)))
    there = ", ".join(name for name, m in found.items() if m["stem"] == stem) or "no such file"
    raise ValueError(
        f"{folder} has no shared part of '{stem}' ({there}): expected {stem}-shared.pt, or {stem}.pt, with {SHARED_KEY}"
    )
