"""Which text files there are to prepare, and which subset each belongs to."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from moekit import paths

TEXT_SUFFIXES = (".txt", ".text", ".raw", ".md")
SUBSET = re.compile(r"(?<![a-z])(?:(train|training)|(valid|validation|dev)|(test))(?![a-z])")
# A file in a folder of prepared data that tells what the data was made of.
MARK = "moekit-source.json"
# Folders of data_dir that hold downloads.
FETCHED = ("downloads", "gpt2_bpe", "checkpoints")
SUBSETS = ("train", "valid", "test")
# SUBSET.domains.txt beside a text names the domain of each of its lines.
DOMAINS = ".domains.txt"

# Files by subset.
Texts = dict[str, list[Path]]


def demo() -> Texts:
    return {"valid": [paths.DEMO_TEXT / "valid.txt"], "test": [paths.DEMO_TEXT / "test.txt"]}


def wikitext(folder: Path) -> Texts:
    """The files that WikiText-103's archive holds."""
    return _all_there({subset: [folder / f"wiki.{subset}.raw"] for subset in SUBSETS})


def own(source: str, data_dir: Path) -> Texts:
    """Own text: a file, a folder (its text files, at any depth) or a glob, sorted by path.

    A file whose name has the word train, valid (validation, dev) or test in it belongs to that subset, any other to
    valid, the subset that models are evaluated on.

    Args:
        data_dir: where prepared data goes. What was made there, or in any other such folder, is no text.

    Raises:
        ValueError: there is no such text.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES)
        wanted = f"files ending in {', '.join(TEXT_SUFFIXES)} (a glob names others)"
    else:
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True)) or [path]
        wanted = "a file, a folder or a glob that fits some file"
    found = [p.resolve() for p in found if p.is_file() and not p.name.endswith(DOMAINS)]
    fetched = [data_dir / name for name in FETCHED]
    found = [p for p in found if not any(q in fetched or (q / MARK).exists() for q in p.parents)]
    if not found:
        raise ValueError(
            f"source={source!r}: no text there; expected 'demo', 'wikitext-103' or own text, that is {wanted}"
        )
    texts: Texts = {}
    for file in found:
        match = SUBSET.search(file.name.lower())
        texts.setdefault(SUBSETS[match.lastindex - 1] if match else "valid", []).append(file)
    return {subset: texts[subset] for subset in SUBSETS if subset in texts}


def name_of(source: str) -> str:
    """The folder's name for what is made of own text: after the file, or the folder that a glob looks into."""
    path = Path(source).expanduser()
    while glob.has_magic(path.name):
        path = path.parent
    return "own-" + (re.sub(r"[^\w.-]+", "-", path.resolve().stem) or "text")


def _all_there(texts: Texts) -> Texts:
    for file in (file for files in texts.values() for file in files):
        if not file.is_file():
            raise ValueError(
                f"{file} is missing; remove the folder {file.parent} and run again to have it unpacked anew"
            )
    return texts
