"""``python -m moekit.bench NAME``: a table of figures, each with the limit of the machine and the goal.

    python -m moekit.bench all --json figures.json       the 15B's shape on a GPU, a tiny one without
    python -m moekit.bench score --shape 52b --blocks 1,4,16
    python -m moekit.bench moe-layer --dtype bfloat16 --against vllm,triton_kernels
    python -m moekit.bench tune                          cuts of the kernels for the GPU at hand, in a file

The benches need no download and no file: weights and tokens are random. Every ratio refers to a ceiling that is measured
in the same run. "python -m moekit.bench NAME --help" has the arguments of each.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from moekit import results
from moekit.bench import (
    data,
    decode,
    load,
    moe_layer,
    network,
    padded,
    profile,
    questions,
    routing,
    score,
    tune,
)
from moekit.bench.setting import Setting
from moekit.bench.setting import add_arguments as add_setting
from moekit.ranks import RankError
from moekit.versions import versions

MODEL = {
    "score": score,
    "questions": questions,
    "decode": decode,
    "load": load,
    "moe-layer": moe_layer,
    "padded": padded,
    "profile": profile,
}
# It writes a file, so that "all" leaves it out.
ALONE = {"tune": tune}
OTHER = {"data": data, "routing": routing, "network": network}
# Arguments of the benches without a shape in "all" with the tiny shape, so that they are quick, too.
TINY = {
    "data": ["--megabytes", "0.2", "--repeats", "1"],
    "routing": ["--tokens", "5000"],
    "network": ["--shape", "tiny", "--ranks", "8", "--per-machine", "2"],
}

Rows = list[dict[str, Any]]


def parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    summary, _, epilog = __doc__.replace("``", "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m moekit.bench",
        description=summary,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    benches = parser.add_subparsers(dest="bench", required=True)
    found = {}
    for name, bench in (MODEL | OTHER | ALONE).items():
        about = bench.__doc__.replace("``", "")
        found[name] = benches.add_parser(
            name,
            help=about.splitlines()[0],
            description=about,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        bench.add_arguments(found[name])
    found["all"] = benches.add_parser("all", help="all of them but tune, with what they do by default")
    for name in (*MODEL, "all"):
        add_setting(found[name])
    for sub in found.values():
        sub.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser, found


def run(name: str, args: argparse.Namespace) -> Rows:
    """The rows of one bench.

    Raises:
        ValueError: this machine cannot run the requested bench, or a result is wrong.
    """
    if name in OTHER:
        return OTHER[name].run(args)
    return [figure.row() for figure in (MODEL | ALONE)[name].run(Setting.of(args), args)]


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser, benches = parsers()
    args = parser.parse_args(arguments)
    try:
        if args.json is not None:
            # The error comes before hours of measuring, and not after.
            results.check_file(args.json)
        tables = tables_of(args, arguments[1:], parser, benches)
        if args.json is not None:
            with results.whole(args.json) as part:
                part.write_text(json.dumps({**about(arguments), "benches": tables}, indent=2) + "\n")
    except (ValueError, RankError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except OSError as error:
        # Some, such as a wait that was too long, are about no file.
        said = error if error.filename is None else f"{error.filename}: {error.strerror}"
        parser.exit(2, f"{parser.prog}: {said}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")


def tables_of(
    args: argparse.Namespace, asked: list[str], parser: argparse.ArgumentParser, benches: dict
) -> dict[str, Rows]:
    """Run the benches that ``args`` name, and show their tables."""
    if args.bench != "all":
        rows = run(args.bench, args)
        show(args.bench, rows)
        return {args.bench: rows}
    tables = {}
    tiny = Setting.of(args).shape == "tiny"
    for name in (*MODEL, *OTHER):
        own = asked if name in MODEL else TINY[name] if tiny else []
        tables[name] = run(name, parser.parse_args([name, *own]))
        show(name, tables[name])
    return tables


def show(name: str, rows: Rows) -> None:
    table = pd.DataFrame(rows).dropna(axis=1, how="all").astype(object)
    table = table.where(table.notna(), "")
    table = table.map(text)
    with pd.option_context("display.max_colwidth", None):
        print(f"\n{name}\n{table.to_string(index=False)}", flush=True)


def text(cell: Any) -> Any:
    """A cell as the table shows it: pandas would give all numbers of a column the decimals that one of them needs."""
    # The number 1.0 equals True, so the type decides.
    if isinstance(cell, bool):
        return ("no", "yes")[cell]
    return f"{cell:.10g}" if isinstance(cell, float) else cell


def about(arguments: list[str]) -> dict[str, Any]:
    return {
        "command": " ".join(["python -m moekit.bench", *arguments]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "versions": versions(),
    }


if __name__ == "__main__":
    main()
