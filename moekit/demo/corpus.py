"""Rebuild the demo's corpus, tokenizer and data: `python -m moekit.demo.corpus --out DIR`.

The script runs on Debian bookworm. It downloads packages, unpacks them into a work folder, and installs nothing. The
steps are: packages -> documents -> held-out and training documents -> text without repeats -> tokenizer ->
token arrays. All choices are seeded, so the same package versions give the same bytes.

The script needs `tokenizers`, `numpy` and `tqdm`, and fairseq for the binarised held-out data.
"""

import argparse
import json
import random
import re
import subprocess
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from moekit.demo import tokenizer
from moekit.demo.readers import Document
from moekit.demo.sources import DOMAINS, Source, packages, sources_page

SEED = 1
# Bytes of training text for each domain.
TRAIN_BYTES = 5_000_000
# Bytes of text for each domain and split.
HELD_OUT_BYTES = 20_000
# The fewest bytes of a document.
MIN_DOCUMENT = 300
# The range of bytes of a document that may be held out.
HELD_OUT_DOCUMENT = range(2_000, 12_000)
# Words per shingle. A block of lines is a repeat if most of its shingles occurred before.
SHINGLE = 8
# A block that this many documents contain is dropped everywhere.
BOILERPLATE_DOCUMENTS = 5
DOWNLOAD_SECONDS = 900


def fetch(work: Path) -> dict[str, str]:
    """Download and unpack all packages below `work`; return the version of each package."""
    debs = work / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    missing = [name for name in packages() if not list(debs.glob(f"{name}_*.deb"))]
    if missing:
        print(f"downloading {len(missing)} packages into {debs}", flush=True)
        subprocess.run(["apt-get", "download", *missing], cwd=debs, check=True, timeout=DOWNLOAD_SECONDS)
    versions = {}
    for name in tqdm(packages(), desc="unpack", unit="package"):
        (deb,) = debs.glob(f"{name}_*.deb")
        versions[name] = deb.name.split("_")[1].replace("%3a", ":")
        folder = work / "unpacked" / name
        if not folder.exists():
            partial = folder.with_name(name + ".partial")
            partial.mkdir(parents=True, exist_ok=True)
            subprocess.run(["dpkg", "-x", deb, partial], check=True, timeout=DOWNLOAD_SECONDS)
            partial.rename(folder)
    return versions


def read(source: Source, work: Path) -> Iterator[Document]:
    root = work / "unpacked" / source.package
    paths = [p for p in sorted(root.glob(source.files)) if p.is_file() and not re.search(source.skip, str(p))]
    if not paths:
        raise ValueError(
            f"no files match {source.files!r} in package {source.package!r}, expected at least one: "
            "has the package's layout changed since Debian bookworm?"
        )
    for path in tqdm(paths, desc=source.package, unit="file", leave=False):
        for document in source.read(path):
            blocks = [[tidy(line) for line in block] for block in document.blocks]
            blocks = [[line for line in block if line] for block in blocks]
            name = f"{source.package}/{path.relative_to(root)}{document.name}"
            yield Document(name, [block for block in blocks if block])


def tidy(line: str) -> str:
    """One line of text with composed characters and single spaces, without control characters or spaces at its ends."""
    line = unicodedata.normalize("NFC", line).replace("\u00ad", "").replace("\ufeff", "")
    line = "".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Zs") else c for c in line)
    return " ".join(line.split())


def size(document: Document) -> int:
    """The bytes of a document in UTF-8, including line ends."""
    return sum(len(line.encode()) + 1 for block in document.blocks for line in block)


def split(documents: list[Document], rng: random.Random) -> dict[str, list[Document]]:
    """Shuffle, take whole documents for valid and test (the last cut to the budget); the rest is train."""
    documents = documents[:]
    rng.shuffle(documents)
    splits: dict[str, list[Document]] = {}
    for name in ("valid", "test"):
        chosen, room = [], HELD_OUT_BYTES
        while room > HELD_OUT_DOCUMENT.start // 2:
            at = next(i for i, document in enumerate(documents) if size(document) in HELD_OUT_DOCUMENT)
            document = cut(documents.pop(at), room)
            chosen.append(document)
            room -= size(document)
        splits[name] = chosen
    splits["train"] = documents
    return splits


def cut(document: Document, room: int) -> Document:
    """The first blocks of a document that fit into `room` bytes."""
    blocks = []
    for block in document.blocks:
        room -= sum(len(line.encode()) + 1 for line in block)
        if room < 0:
            break
        blocks.append(block)
    return Document(document.name, blocks)


class Repeats:
    """Finds blocks that repeat earlier blocks exactly or nearly (by shingles, in which all numbers count as equal)."""

    def __init__(self) -> None:
        self.keys: set[int] = set()
        self.shingles: set[int] = set()

    @staticmethod
    def words(block: list[str]) -> list[str]:
        return re.findall(r"\w+|[^\w\s]", re.sub(r"\d+", "0", " ".join(block).casefold()))

    @classmethod
    def key(cls, block: list[str]) -> int:
        return hash_text(" ".join(cls.words(block)))

    def seen(self, block: list[str]) -> bool:
        """Whether `block` repeats an earlier block; if not, it is added to the known blocks."""
        words = self.words(block)
        key = hash_text(" ".join(words))
        shingles = {hash_text(" ".join(words[i : i + SHINGLE])) for i in range(len(words) - SHINGLE + 1)}
        known = len(shingles & self.shingles)
        if key in self.keys or (shingles and known > 0.5 * len(shingles)):
            return True
        self.keys.add(key)
        self.shingles |= shingles
        return False


def hash_text(text: str) -> int:
    data = text.encode()
    return zlib.crc32(data) << 32 | zlib.adler32(data)


def collect(work: Path) -> dict[str, dict[str, list[Document]]]:
    """Documents by split and domain, without repeats within or across documents, domains and splits.

    Held-out documents are read first, so that text in both splits is removed from the training text.
    """
    rng = random.Random(SEED)
    domains: dict[str, dict[str, list[Document]]] = {}
    for domain, sources in tqdm(DOMAINS.items(), desc="read", unit="domain"):
        documents = [document for source in sources for document in read(source, work)]
        documents = [d for d in without_boilerplate(documents) if size(d) >= MIN_DOCUMENT]
        domains[domain] = split(documents, rng)
    repeats = Repeats()
    result: dict[str, dict[str, list[Document]]] = {}
    for part in ("valid", "test", "train"):
        result[part] = {}
        for domain, splits in domains.items():
            room, kept = TRAIN_BYTES, []
            for document in tqdm(splits[part], desc=f"{part} {domain}", unit="document", leave=False):
                fresh = Document(document.name, [b for b in document.blocks if not repeats.seen(b)])
                if part == "train" and size(fresh) < MIN_DOCUMENT:
                    continue
                if size(fresh) > room:
                    continue
                kept.append(fresh)
                room -= size(fresh)
            result[part][domain] = kept
    return result


def without_boilerplate(documents: list[Document]) -> Iterator[Document]:
    found = Counter(key for d in documents for key in {Repeats.key(block) for block in d.blocks})
    for d in documents:
        yield Document(d.name, [b for b in d.blocks if found[Repeats.key(b)] < BOILERPLATE_DOCUMENTS])


def lines_of(documents: list[Document]) -> list[str]:
    return [line for document in documents for block in document.blocks for line in block]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the trainer's token arrays")
    parser.add_argument(
        "--work", type=Path, default=Path("/tmp/moekit-corpus"), help="folder for the packages"
    )
    parser.add_argument(
        "--package",
        type=Path,
        default=Path(__file__).parent,
        help="folder for what is shipped: SOURCES.md, gpt2_bpe/, data/",
    )
    args = parser.parse_args()
    for folder in (args.out, args.package / "data"):
        folder.mkdir(parents=True, exist_ok=True)
    versions = fetch(args.work)
    corpus = collect(args.work)
    (args.package / "SOURCES.md").write_text(sources_page(versions, corpus), encoding="utf-8")

    bpe_folder = args.package / "gpt2_bpe"
    train = [(domain, lines_of([d])) for domain, documents in corpus["train"].items() for d in documents]
    random.Random(SEED).shuffle(train)
    bpe = tokenizer.train_bpe([line for _, lines in train for line in lines], bpe_folder)
    splits = {
        "train": [(domain, tokenizer.encode(bpe, lines)) for domain, lines in tqdm(train, desc="encode")]
    }
    tokenizer.write_dictionary(
        Counter(i for _, doc in splits["train"] for line in doc for i in line), bpe_folder
    )

    text = {"train": train}
    for part in ("valid", "test"):
        text[part] = [(domain, lines_of(documents)) for domain, documents in corpus[part].items()]
        splits[part] = [(domain, tokenizer.encode(bpe, lines)) for domain, lines in text[part]]
        data = args.package / "data"
        lines = [(domain, line) for domain, block in text[part] for line in block]
        (data / f"{part}.txt").write_text("".join(f"{line}\n" for _, line in lines), encoding="utf-8")
        (data / f"{part}.domains.txt").write_text(
            "".join(f"{domain}\n" for domain, _ in lines), encoding="utf-8"
        )
    tokenizer.binarise(args.package / "data", bpe_folder)

    figures = tokenizer.write_arrays(text, splits, bpe_folder, args.out)
    (args.out / "meta.json").write_text(json.dumps(figures, indent=1) + "\n")
    (args.package / "data" / "meta.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
