"""The text files to prepare, and the subset of each file."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from moekit import paths
from moekit.data.documents import DOCUMENTS

TEXT_SUFFIXES = (".txt", ".text", ".raw", ".md", *DOCUMENTS)
SUBSET = re.compile(r"(?<![a-z])(?:(train|training)|(valid|validation|dev)|(test))(?![a-z])")
# A file in a folder of prepared data that records the source of the data.
MARK = "moekit-source.json"
# Folders of data_dir that hold downloads.
FETCHED = ("downloads", "gpt2_bpe", "checkpoints")
SUBSETS = ("train", "valid", "test")
# The file SUBSET.domains.txt beside a text names the domain of each line of the text.
DOMAINS = ".domains.txt"

# Files by subset.
Texts = dict[str, list[Path]]


def demo() -> Texts:
    return {"valid": [paths.DEMO_TEXT / "valid.txt"], "test": [paths.DEMO_TEXT / "test.txt"]}


def wikitext(folder: Path) -> Texts:
    """The files in the archive of WikiText-103."""
    return _all_there({subset: [folder / f"wiki.{subset}.raw"] for subset in SUBSETS})


def own(source: str, data_dir: Path) -> Texts:
    """Own text: a file, a folder (its text files, at any depth) or a glob, sorted by path.

    A file whose name has the word train, valid (validation, dev) or test in it belongs to that subset. Any other file
    belongs to valid, the subset that models are evaluated on.

    Args:
        data_dir: the folder of prepared data. Files that were made there, or in another such folder, are left out.

    Raises:
        ValueError: no text is found.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.name.endswith(TEXT_SUFFIXES))
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
    """The name of the folder for data from own text: the name of the file, or of the folder that a glob begins with."""
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
