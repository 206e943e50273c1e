"""A run that saves its results again and again, for tests that kill it: ``python saving.py FOLDER TRIALS SEED``.

Each trial forks a process that saves a newer version of every file over the last one, and kills it: after a random time, or
around the moves at the end, by itself or together with the process that moves, as when a machine loses its power. Prints a
JSON object: how many processes were killed while they saved, how many of these while the files moved, the files that were
not whole afterwards, and the pairs of files that were saved together and are of two runs.
"""

import contextlib
import fcntl
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image
from synthetic_traces import synthetic

from moekit import moving, results
from moekit.handle import Handle
from moekit.notebook import inspection, report
from moekit.notebook.explorer import page
from moekit.routing.trace import Trace
from moekit.scoring import Evaluation

FILES = {"results.json", "tokens.parquet", "picture.png", "trace.parquet", "table.csv", "explorer.html"}


class Loaded(Handle):
    """What is saved of a model."""

    load_seconds, world_size, dtype, experts, device = 1.0, 1, torch.float32, None, "cpu"

    def __init__(self):
        self.parts = []


def save(folder: Path, version: int) -> None:
    """All files that notebooks write, each with ``version`` in it."""
    figure = Figure(figsize=(2, 1))
    figure.text(0.5, 0.5, str(version))
    tokens = pd.DataFrame({"version": np.full(5000, version), "noise": np.random.default_rng(0).random(5000)})
    evaluation = Evaluation(1.0, 2.0, 5000, 1.0, 5000.0, tokens)
    report.save(folder, Loaded(), evaluation, {"version": version}, {"picture": figure})
    trace, _ = synthetic(tokens=300)
    trace.meta["version"] = version
    explorer = SimpleNamespace(save_html=lambda path: page.save_html(trace, path))
    table = pd.DataFrame({"version": np.full(500, version)})
    inspection.save(folder, trace, {"picture": figure}, {"table": table}, explorer)


def broken(folder: Path) -> list[str]:
    """The files that cannot be read whole, and the pairs that were saved together and are of two runs."""
    readers = {
        "results.json": lambda path: json.loads(path.read_text())["parameters"]["version"],
        "tokens.parquet": lambda path: _version(pd.read_parquet(path), 5000),
        "picture.png": lambda path: Image.open(path).load(),
        "trace.parquet": lambda path: Trace.load(path).meta["version"],
        "table.csv": lambda path: _version(pd.read_csv(path), 500),
        "explorer.html": lambda path: 1 / path.read_text().rstrip().endswith("</html>"),
    }
    found, versions = [], {}
    for name, read in readers.items():
        try:
            versions[name] = read(folder / name)
        except Exception as error:
            found.append(f"{name}: {type(error).__name__}")
    for one, other in (("results.json", "tokens.parquet"), ("trace.parquet", "table.csv")):
        if versions.get(one) != versions.get(other):
            found.append(f"mixed: {one} and {other}")
    return found


def _version(table: pd.DataFrame, rows: int) -> int:
    (version,) = set(table["version"])
    assert len(table) == rows
    return version


def marked(folder: Path, child: int) -> Path | None:
    """The temporary folder of a save whose files are all there, as soon as there is one; None if the child ends before."""
    while True:
        for mark in folder.glob(f"{results.PREFIX}*/{moving.WHOLE}"):
            return mark.parent
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return None


def mover_of(child: int) -> list[int]:
    """The process that moves the files of ``child``, if it runs."""
    with contextlib.suppress(OSError):
        return [int(pid) for pid in Path(f"/proc/{child}/task/{child}/children").read_text().split()]
    return []


def wait_for_mover(folder: Path) -> None:
    """Until no process moves files: it holds the lock of their temporary folder."""
    for lock in folder.glob(f"{results.PREFIX}*/{results.LOCK}"):
        with contextlib.suppress(OSError), open(lock) as file:
            fcntl.flock(file, fcntl.LOCK_EX)


def main(folder: Path, trials: int, seed: int) -> dict:
    draw = random.Random(seed)
    child = os.fork()
    if child == 0:
        save(folder, 0)
        start = time.perf_counter()
        save(folder, 0)
        (folder / "seconds").write_text(str(time.perf_counter() - start))
        os._exit(0)
    os.waitpid(child, 0)
    seconds = float((folder / "seconds").read_text())
    killed, moved, bad = 0, 0, []
    for version in range(1, trials + 1):
        how = ("random", "at the moves", "with the mover")[version % 3]
        child = os.fork()
        if child == 0:
            try:
                save(folder, version)
            finally:
                os._exit(0)
        if how == "random":
            time.sleep(draw.uniform(0, 1.1 * seconds))
            pids = [child]
        else:
            marked(folder, child)
            time.sleep(draw.uniform(0, 0.04))
            pids = [child, *(mover_of(child) if how == "with the mover" else [])]
        for pid in reversed(pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        ended = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        killed += ended
        moved += ended and how != "random"
        wait_for_mover(folder)
        if len(pids) > 1:
            # Nobody was left to move the rest.
            results.settle(folder)
        # Read in a process of its own, since pyarrow's threads must not run where forks are made.
        child = os.fork()
        if child == 0:
            (folder / "bad").write_text(json.dumps(broken(folder)))
            os._exit(0)
        os.waitpid(child, 0)
        bad += json.loads((folder / "bad").read_text())
    child = os.fork()
    if child == 0:
        save(folder, trials + 1)
        os._exit(0)
    os.waitpid(child, 0)
    left = sorted(path.name for path in folder.iterdir() if path.name not in {*FILES, "seconds", "bad"})
    mixed = [pair for pair in bad if pair.startswith("mixed")]
    return {
        "killed": killed,
        "moved": moved,
        "broken": [one for one in bad if one not in mixed],
        "mixed": mixed,
        "left": left,
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
