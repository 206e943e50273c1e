"""``python -m moekit.checkpoint``: look at a checkpoint, check it, and make others of it.

Exit codes: 0; 1 if ``verify`` finds numbers that are not finite; 2 for an error, which is one sentence, and for damage.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moekit.checkpoint import describe, find, reshaping, survey
from moekit.checkpoint.verifying import verify


def main(arguments: Sequence[str] | None = None) -> int:
    asked = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
            return asked.run(asked)
    except ValueError as error:
        print(f"{asked.verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{asked.verb}: interrupted; the same command goes on where it was", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m moekit.checkpoint",
        description="Look at a checkpoint, check it, and make others of it.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True)

    def verb(name: str, run, about: str, target: bool = False) -> argparse.ArgumentParser:
        one = verbs.add_parser(name, help=about, description=about)
        one.add_argument(
            "source", metavar="SOURCE" if target else "FOLDER", help="a folder, one of its files, or demo"
        )
        if target:
            one.add_argument("target", metavar="TARGET", help="the folder to make")
            one.add_argument("--force", action="store_true", help="replace TARGET")
        one.add_argument("--quiet", action="store_true", help="no progress")
        one.set_defaults(run=run)
        return one

    verb("inspect", _inspect, "The files: experts, types, sizes.").add_argument("--json", action="store_true")
    verb("verify", _verify, "Read everything: checksums, NaN, infinities.").add_argument(
        "--json", action="store_true"
    )
    verb("strip", _strip, "The same files without the optimizer's state.", True)
    one = verb("reshard", _reshard, "The experts in another number of files.", True)
    one.add_argument("--files", type=int, required=True, help="how many")
    one = verb("keep", _keep, "A smaller model: some experts, and their rows of the gates.", True)
    one.add_argument(
        "--experts", required=True, help="LAYER:EXPERT,... or LAYER:FIRST-LAST,...; * is every layer; from 0"
    )
    one = verb("convert", _convert, "Another format.", True)
    one.add_argument("--to", choices=sorted(reshaping.FORMATS), required=True)
    one.add_argument(
        "--bpe",
        help="with --to hf: the folder with encoder.json, vocab.bpe and dict.txt, of which the tokenizer is made, or demo; "
        "by default the source, or gpt2_bpe in it or beside it",
    )
    return parser


def _table(rows: list[dict[str, Any]]) -> str:
    shown = [[_cell(value) for value in row.values()] for row in rows]
    columns = list(zip(list(rows[0]), *shown, strict=True))
    widths = [max(map(len, column)) for column in columns]
    lines = [list(rows[0]), *shown]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return str(len(value))
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _inspect(asked: argparse.Namespace) -> int:
    rows = describe(asked.source)
    print(json.dumps(rows, indent=1) if asked.json else _table(rows))
    return 0


def _verify(asked: argparse.Namespace) -> int:
    rows = verify(asked.source, show=not asked.quiet)
    print(json.dumps(rows, indent=1) if asked.json else _table(rows))
    damaged = [(row["file"], key) for row in rows for key in row["damaged"]]
    for file, key in damaged:
        print(
            f"verify: {file}: {key} does not have the checksum that the file tells: fetch it again",
            file=sys.stderr,
        )
    return 2 if damaged else int(any(row["nonfinite"] for row in rows))


def _options(asked: argparse.Namespace) -> dict[str, bool]:
    return {"force": asked.force, "show": not asked.quiet}


def _strip(asked: argparse.Namespace) -> int:
    reshaping.strip(asked.source, asked.target, **_options(asked))
    return 0


def _reshard(asked: argparse.Namespace) -> int:
    reshaping.reshard(asked.source, asked.target, asked.files, **_options(asked))
    return 0


def _keep(asked: argparse.Namespace) -> int:
    layers = survey(find(asked.source)).config.moe_layers
    experts = reshaping.experts_of(asked.experts, layers)
    reshaping.keep(asked.source, asked.target, experts, **_options(asked))
    return 0


def _convert(asked: argparse.Namespace) -> int:
    if asked.bpe is not None and asked.to != "hf":
        raise ValueError(f"--bpe {asked.bpe}: a tokenizer is a part of --to hf alone")
    told = _tokenizer(asked) if asked.to == "hf" else {}
    reshaping.convert(asked.source, asked.target, asked.to, **told, **_options(asked))
    if asked.to != "hf":
        _say_what_lacks(Path(asked.target).expanduser())
    return 0


def _say_what_lacks(folder: Path) -> None:
    """Say what a folder of weights needs before it can read text."""
    from moekit.data.codec import FILES, has_codec, places

    if not any(map(has_codec, places(folder))):
        lacking = [name for name in FILES if not (folder / name).is_file()]
        print(
            f"convert: {folder} reads and writes ids alone: for text put {', '.join(lacking)} there",
            file=sys.stderr,
        )


def _tokenizer(asked: argparse.Namespace) -> dict[str, Any]:
    """The tokenizer's files, those that it is made of, and the dictionary's types."""
    from moekit.data import tokenizer
    from moekit.data.codec import FILES, Codec, has_codec, places
    from moekit.data.dictionary import Dictionary, text_of

    files = find(asked.source)
    folder = files.shared.parent
    bpe = next(filter(has_codec, places(folder)), None) if asked.bpe is None else asked.bpe
    if bpe is None:
        print("convert: no tokenizer is made, as no --bpe names the folder of the BPE", file=sys.stderr)
        there = (folder / "dict.txt").is_file()
        return {"dictionary": len(Dictionary(folder / "dict.txt")) if there else None}
    codec = Codec.load(bpe)
    config = survey(files, len(codec)).config
    texts = tokenizer.files(codec, "<s>" if config.add_bos else "</s>", config.max_positions)
    paths = (codec.encoder_json, codec.vocab_bpe, codec.dictionary.path)
    texts |= {name: text_of(path, f"a {name}") for name, path in zip(FILES, paths, strict=True)}
    return {"texts": texts, "dictionary": len(codec)}


if __name__ == "__main__":
    sys.exit(main())
