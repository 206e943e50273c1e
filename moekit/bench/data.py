"""The speed of encoding and binarising text, compared with fairseq's tools on the same file with as many processes.

Both programs do the whole work, from the text file to the finished file, and have to write the same bytes. Imports do not
count: fairseq's time begins after its import, and the first run of moekit, which imports it in the workers, is left out.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import site
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from moekit import paths
from moekit.arguments import check_regular, reading
from moekit.bench import measure
from moekit.bench.figures import rounded
from moekit.bench.setting import number, whole
from moekit.checkpoint.contents import clip
from moekit.data import binarise, encode_files
from moekit.data.codec import FILES

# The goal for encoding, as a multiple of fairseq's speed.
GOAL = 10

ENCODE = """
import sys, time
from fairseq.examples.roberta.multiprocessing_bpe_encoder import main
started = time.perf_counter()
main()
print(time.perf_counter() - started)
"""
BINARISE = """
import sys, time
from fairseq import options
from fairseq_cli.preprocess import main
args = options.get_preprocessing_parser().parse_args()
started = time.perf_counter()
main(args)
print(time.perf_counter() - started)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text", type=Path, help="a text file; default: the sources of this Python's packages"
    )
    parser.add_argument(
        "--megabytes",
        type=number(above=0, most=1e6),
        default=40.0,
        help="of the text to use (default: %(default)s)",
    )
    parser.add_argument(
        "--bpe", type=Path, default=paths.DEMO_BPE, help=f"a folder with {', '.join(FILES)} (default: demo's)"
    )
    parser.add_argument(
        "--workers",
        type=whole(most=1024),
        default=len(os.sched_getaffinity(0)),
        help="processes on both sides",
    )
    parser.add_argument(
        "--repeats",
        type=whole(most=1000),
        default=3,
        help="runs of ours after a first one; the median counts",
    )


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time both programs on both steps.

    Returns:
        One dict per step: ``work``, ``figure`` and ``unit`` (MB of input per second), ``fairseq`` (its figure in the same
        unit), ``ratio``, ``goal`` (of the ratio; None for binarising), ``megabytes``, ``workers``.

    Raises:
        ValueError: the files of moekit and fairseq differ, a file is missing, the text has no line, or fairseq's tool fails.
    """
    encoder_json, vocab_bpe, dict_txt = needed = [args.bpe / name for name in FILES]
    # If a file is missing, fairseq restarts its workers without end.
    if missing := [str(path) for path in needed if not path.is_file()]:
        raise ValueError(f"--bpe {args.bpe}: there is no {', '.join(missing)}")
    with tempfile.TemporaryDirectory() as folder:
        text, ours, theirs = (Path(folder) / name for name in ("text", "ours", "theirs"))
        text.write_bytes(_text(args.text, int(args.megabytes * 1e6)))
        rows = []

        files = [
            "--encoder-json",
            encoder_json,
            "--vocab-bpe",
            vocab_bpe,
            "--inputs",
            text,
            "--outputs",
            theirs,
        ]
        fairseq = _fairseq(ENCODE, *files, "--keep-empty", "--workers", args.workers)
        how = {"device": torch.device("cpu"), "repeats": args.repeats, "warm_up": 1}
        seconds = measure.median(
            lambda: encode_files([text], ours, encoder_json, vocab_bpe, True, args.workers), **how
        )
        _same(ours, theirs)
        rows.append(_row("encode", text, seconds, fairseq, GOAL, args.workers))

        files = [
            "--only-source",
            "--srcdict",
            dict_txt,
            "--validpref",
            ours,
            "--destdir",
            f"{folder}/data-bin",
        ]
        fairseq = _fairseq(BINARISE, *files, "--workers", args.workers)
        seconds = measure.median(lambda: binarise(ours, f"{folder}/valid", dict_txt, args.workers), **how)
        for end in ("bin", "idx"):
            _same(Path(folder, f"valid.{end}"), Path(folder, "data-bin", f"valid.{end}"))
        rows.append(_row("binarise", ours, seconds, fairseq, None, args.workers))
    return rows


def _text(path: Path | None, size: int) -> bytes:
    """About ``size`` bytes of text, and not more, in whole lines."""
    if path is not None:
        with reading(path):
            check_regular(path, "a text file for --text")
            with open(path, "rb") as file:
                data = file.read(size)
        if b"\n" not in data:
            raise ValueError(f"--text {path} has no whole line in its first {size:,} bytes: name a text file")
    else:
        data = b""
        for source in _sources():
            data += _utf8(source.read_bytes())
            if len(data) >= size:
                break
    return _utf8(data[: data.rfind(b"\n", 0, size) + 1])


def _sources() -> Iterator[Path]:
    """The files of Python's own modules and of packages, in one order. Who has enough of them looks for no others."""
    for folder in (sysconfig.get_path("stdlib"), *site.getsitepackages()):
        for found, folders, names in os.walk(folder):
            # Those of packages are a folder of their own.
            folders[:] = sorted(set(folders) - {"site-packages"})
            yield from (Path(found, name) for name in sorted(names) if name.endswith(".py"))


def _utf8(data: bytes) -> bytes:
    return data.decode(errors="ignore").encode()


def _fairseq(code: str, *arguments: object) -> float:
    """The seconds that one of fairseq's tools takes."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3600)
    if done.returncode:
        last = clip((done.stderr.strip().splitlines() or ["it says nothing"])[-1])
        raise ValueError(f"fairseq's tool ended with {done.returncode} ({last}): is fairseq installed?")
    return float(json.loads(done.stdout.splitlines()[-1]))


def _same(ours: Path, theirs: Path) -> None:
    if not filecmp.cmp(ours, theirs, shallow=False):
        raise ValueError(f"{ours.name} and fairseq's {theirs.name} differ: expected the same bytes")


def _row(
    work: str, source: Path, seconds: float, fairseq: float, goal: float | None, workers: int
) -> dict[str, Any]:
    megabytes = source.stat().st_size / 1e6
    return {
        "work": work,
        "figure": rounded(megabytes / seconds),
        "unit": "MB/s",
        "fairseq": rounded(megabytes / fairseq),
        "ratio": round(fairseq / seconds, 1),
        "goal": goal,
        "megabytes": rounded(megabytes),
        "workers": workers,
    }
