"""The demo's byte-level BPE in GPT-2's file format, fairseq's dictionary over it, and data in its ids.

A line of text is stripped, encoded to BPE ids and ends with </s>; empty lines are left out. This is what
fairseq's `examples/roberta/multiprocessing_bpe_encoder.py` followed by `fairseq-preprocess --only-source`
does.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moekit.symbols import EOS

# The number of types: 256 bytes, the merges and <|endoftext|>. With fairseq's 4 special symbols and padding it is 8192.
TYPES = 8185
# The number of special symbols, <s>, <pad>, </s> and <unk>, which fairseq puts before the lines of dict.txt.
SPECIALS = 4
END_OF_TEXT = "<|endoftext|>"
PREPROCESS_SECONDS = 600

# BPE ids (the values of encoder.json), without </s>.
EncodedLines = list[list[int]]


def bytes_to_unicode() -> dict[int, str]:
    """GPT-2's printable character for each byte, in the order of its ids 0 to 255.

    A printable Latin-1 byte has the same character; the other 68 bytes have the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _with_pre_tokenizer(model: models.BPE) -> Tokenizer:
    bpe = Tokenizer(model)
    # With this option, the tokenizer cuts text by GPT-2's pattern.
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.decoder = decoders.ByteLevel()
    return bpe


def train_bpe(lines: list[str], folder: Path, num_types: int = TYPES) -> Tokenizer:
    """Learn merges on `lines`, write `encoder.json` and `vocab.bpe` to `folder`, and load them from there."""
    alphabet = list(bytes_to_unicode().values())
    trainer = trainers.BpeTrainer(vocab_size=num_types - 1, initial_alphabet=alphabet, show_progress=True)
    bpe = _with_pre_tokenizer(models.BPE())
    bpe.train_from_iterator(lines, trainer, length=len(lines))
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    types = dict.fromkeys([*alphabet, *(first + second for first, second in merges), END_OF_TEXT])
    if len(types) != num_types:
        raise ValueError(f"the text gave {len(types)} types, expected {num_types}: train on more text")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "encoder.json").write_text(json.dumps({kind: i for i, kind in enumerate(types)}))
    merged = "".join(f"{first} {second}\n" for first, second in merges)
    (folder / "vocab.bpe").write_text("#version: 0.2\n" + merged, encoding="utf-8")
    return load_bpe(folder)


def load_bpe(folder: Path) -> Tokenizer:
    """The tokenizer of a folder with `encoder.json` and `vocab.bpe`, with the ids of `encoder.json`."""
    vocabulary = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    merges = (folder / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
    return _with_pre_tokenizer(
        models.BPE(vocab=vocabulary, merges=[tuple(merge.split()) for merge in merges])
    )


def encode(bpe: Tokenizer, lines: Iterable[str]) -> EncodedLines:
    """BPE ids of each line that is not empty."""
    stripped = [line.strip() for line in lines]
    return [encoding.ids for encoding in bpe.encode_batch([line for line in stripped if line])]


def decode(bpe: Tokenizer, ids: list[int]) -> str:
    return bpe.decode(ids, skip_special_tokens=False)


def write_dictionary(counts: Counter, folder: Path) -> None:
    """Write fairseq's `dict.txt`: "ID COUNT" by falling count, for all of `encoder.json`, padded to a multiple of 8."""
    vocabulary = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    ids = sorted(vocabulary.values(), key=lambda i: (-counts[i], i))
    padding = -(SPECIALS + len(ids)) % 8
    lines = [f"{i} {counts[i]}\n" for i in ids] + [f"madeupword{i:04d} 0\n" for i in range(padding)]
    (folder / "dict.txt").write_text("".join(lines))


def dictionary_indices(folder: Path) -> np.ndarray:
    """fairseq's index of each BPE id, int64 [types]."""
    names = [line.split()[0] for line in (folder / "dict.txt").read_text().splitlines()]
    indices = {int(name): SPECIALS + row for row, name in enumerate(names) if name.isdigit()}
    return np.array([indices[i] for i in range(len(indices))])


def flat_tokens(encoded: Iterable[EncodedLines], folder: Path) -> np.ndarray:
    """fairseq indices of all lines of all documents, each line followed by </s>: uint16 [tokens]."""
    indices = dictionary_indices(folder)
    rows = [np.append(indices[ids], EOS) for document in encoded for ids in document]
    return np.concatenate(rows).astype(np.uint16)


def binarise(data: Path, folder: Path, splits: tuple[str, ...] = ("valid", "test")) -> None:
    """Encode `data/{split}.txt` and run fairseq-preprocess to write `data/data-bin`."""
    bpe = load_bpe(folder)
    shutil.rmtree(data / "data-bin", ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "fairseq_cli.preprocess", "--only-source", "--workers", "1"]
        command += ["--srcdict", str(folder / "dict.txt"), "--destdir", str(data / "data-bin")]
        for split in splits:
            lines = encode(bpe, (data / f"{split}.txt").read_text(encoding="utf-8").split("\n"))
            encoded = Path(scratch) / f"{split}.bpe"
            encoded.write_text("".join(" ".join(map(str, ids)) + "\n" for ids in lines))
            command += [f"--{split}pref", str(encoded)]
        subprocess.run(command, check=True, timeout=PREPROCESS_SECONDS, stdout=subprocess.DEVNULL)
    (data / "data-bin" / "preprocess.log").unlink(missing_ok=True)


def cross_entropy(counts: np.ndarray, train_counts: np.ndarray) -> float:
    """The bits of `counts` [types] under the add-one smoothed unigram model of `train_counts` [types]."""
    smoothed = train_counts + 1.0
    return float(-(counts * np.log2(smoothed / smoothed.sum())).sum())


def write_arrays(
    text: dict[str, list[tuple[str, list[str]]]],
    encoded: dict[str, list[tuple[str, EncodedLines]]],
    folder: Path,
    out: Path,
) -> dict:
    """Write `{split}.npy` (flat uint16 fairseq indices) for each split; returns the figures of `meta.json`.

    `text` and `encoded` hold documents in order, as (domain, lines), by split. Bytes include one line end per
    line, as tokens include one </s> per line. The figures `unigram_..._bits_per_byte`, for the held-out splits and
    each domain, are those of the add-one smoothed unigram models over tokens and over bytes, both counted
    on the training split.
    """
    types = SPECIALS + sum(1 for _ in (folder / "dict.txt").open())
    token_counts: dict[str, dict[str, np.ndarray]] = {}
    byte_counts: dict[str, dict[str, np.ndarray]] = {}
    for split, documents in encoded.items():
        np.save(out / f"{split}.npy", flat_tokens((lines for _, lines in documents), folder))
        token_counts[split], byte_counts[split] = {}, {}
        for domain in dict.fromkeys(domain for domain, _ in documents):
            tokens = flat_tokens((lines for name, lines in documents if name == domain), folder)
            raw = "".join(f"{line}\n" for name, lines in text[split] if name == domain for line in lines)
            token_counts[split][domain] = np.bincount(tokens, minlength=types)
            byte_counts[split][domain] = np.bincount(np.frombuffer(raw.encode(), np.uint8), minlength=256)

    figures: dict = {"vocabulary": types, "eos": EOS, "splits": {}}
    train_tokens, train_bytes = sum(token_counts["train"].values()), sum(byte_counts["train"].values())
    for split in encoded:
        tokens = token_counts[split] | {"total": sum(token_counts[split].values())}
        raw = byte_counts[split] | {"total": sum(byte_counts[split].values())}
        figures["splits"][split] = {
            name: {
                "bytes": int(raw[name].sum()),
                "tokens": int(tokens[name].sum()),
                "bytes_per_token": round(float(raw[name].sum() / tokens[name].sum()), 4),
            }
            for name in tokens
        }
        if split != "train":
            for name, row in figures["splits"][split].items():
                row["unigram_tokens_bits_per_byte"] = round(
                    cross_entropy(tokens[name], train_tokens) / row["bytes"], 4
                )
                row["unigram_bytes_bits_per_byte"] = round(
                    cross_entropy(raw[name], train_bytes) / row["bytes"], 4
                )
    return figures
