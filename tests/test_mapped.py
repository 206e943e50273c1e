"""Files that are cut while they are read through memory: an error that names the file, and the process goes on."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import moekit
from moekit import mapped
from moekit.checkpoint import copying
from moekit.fairseq_data import Batches
from moekit.mapped import whole_files

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not mapped.SUPPORTED, reason="of 64-bit Linux")]
SIZE = 8 << 20


def mapping(path: Path) -> torch.Tensor:
    storage = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
    return torch.empty(0, dtype=torch.uint8).set_(storage)


READERS = {
    "torch": lambda t: t.clone(),
    "a sum in half precision": lambda t: t.view(torch.float16).sum(),
    "numpy": lambda t: np.copyto(np.empty(len(t), np.uint8), t.numpy()),
    "bytes": lambda t: t.numpy().tobytes(),
    "checksum": lambda t: zlib.crc32(t.numpy()),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("threads", [1, 4])
def test_a_file_that_was_cut_is_named(tmp_path, reader, threads):
    path = tmp_path / "a file\nof weights"
    path.write_bytes(b"\1" * SIZE)
    content, before = mapping(path), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with pytest.raises(
            ValueError, match=r"a file.*of weights has become shorter while it was read: fetch"
        ):
            with whole_files():
                os.truncate(path, SIZE // 3)
                READERS[reader](content)
    finally:
        torch.set_num_threads(before)
    # Zeros lie there now, for nobody to see: the block ended with an error.
    assert content[-1] == 0 and content[0] == 1


def test_50_cuts_at_random_moments(tmp_path, counted):
    rng, named = random.Random(0), 0
    for _ in range(50):
        path = tmp_path / "weights"
        path.write_bytes(b"\1" * SIZE)
        content, kind = mapping(path), rng.choice(list(READERS))
        cutter = threading.Timer(rng.uniform(0, 0.004), os.truncate, [path, rng.randrange(SIZE)])
        cutter.start()
        try:
            with whole_files():
                while cutter.is_alive():
                    READERS[kind](content)
                READERS[kind](content)
        except ValueError as error:
            assert str(path) in str(error)
            named += 1
        path.unlink()
    counted("cuts of a mapped file while it is read", "with the file named", named)
    assert named == 50


def test_the_cause_stays_and_an_interrupt_is_none():
    with pytest.raises(KeyError), whole_files():
        raise KeyError
    with pytest.raises(KeyboardInterrupt), whole_files():
        raise KeyboardInterrupt


def test_blocks_within_blocks_and_in_two_threads(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"\1" * SIZE)
    with pytest.raises(ValueError, match="x has become shorter"), whole_files():
        with pytest.raises(ValueError, match="x has become shorter"), whole_files():
            content = mapping(path)
            os.truncate(path, 0)
            content.sum()
        content.sum()
    with whole_files():
        pass
    assert mapped._blocks == 0


def test_outside_of_a_block_a_fault_is_whoevers_it_was(tmp_path):
    """faulthandler's, which a kernel of Jupyter has, too."""
    code = (
        "import faulthandler, os, sys, mmap; faulthandler.enable(); from moekit.mapped import whole_files\n"
        "file = open(sys.argv[1], 'r+b'); content = mmap.mmap(file.fileno(), 0)\n"
        "with whole_files(): content[0]\n"
        "os.truncate(sys.argv[1], 0); content[0]"
    )
    (tmp_path / "x").write_bytes(bytes(10_000))
    environment = os.environ | {"PYTHONPATH": str(Path(moekit.__file__).parents[1])}
    ended = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "x"], env=environment, capture_output=True, timeout=60
    )
    assert ended.returncode == -signal.SIGBUS and b"Fatal Python error: Bus error" in ended.stderr


# ------------------------------------------------------------------------------------------- by moekit's own doors


@pytest.fixture
def folder(reference, tmp_path):
    return shutil.copytree(reference / "checkpoint", tmp_path / "checkpoint")


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("verify", [True, False])
def test_a_shard_that_is_cut_during_the_load(folder, tmp_path, monkeypatch, world_size, verify):
    """The copies wait for the cut, on every rank."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path, done = folder / "model-rank-1.pt", tmp_path / "cut"

    def cut():
        while len(list(tmp_path.glob("ready-*"))) < world_size:
            time.sleep(0.01)
        os.truncate(path, path.stat().st_size // 4)
        done.touch()

    def late(rank):
        before = copying.copy

        def copy(pieces, *rest, **how):
            pieces = list(pieces)
            done.with_name(f"ready-{rank.rank}").touch()
            while not done.exists():
                time.sleep(0.01)
            before(pieces, *rest, **how)
            copying.copy = before

        copying.copy = copy

    threading.Thread(target=cut).start()
    with moekit.ranks.start(world_size, "cpu") as pool:
        pool.call(late)
        with pytest.raises(
            ValueError, match=r"model-rank-1\.pt has become shorter while it was read"
        ) as caught:
            moekit.load(folder, ranks=pool, verify=verify, progress=False)
    assert isinstance(caught.value.__cause__, moekit.RankError)


def test_data_that_is_cut_between_two_batches(reference, tmp_path, monkeypatch):
    data = shutil.copytree(reference / "data-bin", tmp_path / "data")
    batches = Batches.__iter__

    def cut_after_two(self):
        for number, batch in enumerate(batches(self)):
            if number == 1:
                os.truncate(data / "valid.bin", 0)
            yield batch

    monkeypatch.setattr(Batches, "__iter__", cut_after_two)
    with moekit.load(reference / "checkpoint", 1, "cpu", progress=False) as model:
        with pytest.raises(ValueError, match=r"valid\.bin has become shorter while it was read"):
            model.evaluate(data, tokens_per_sample=64, progress=False)
        monkeypatch.undo()
        assert model.evaluate(reference / "data-bin", tokens_per_sample=64, progress=False).ntokens == 976


def test_a_source_that_is_cut_while_it_is_rewritten(folder, tmp_path, monkeypatch):
    from moekit.checkpoint import reshaping, writing

    save = writing._write

    def cut_first(path, *rest):
        os.truncate(folder / path.name, (folder / path.name).stat().st_size // 4)
        save(path, *rest)

    monkeypatch.setattr(writing, "_write", cut_first)
    with warnings.catch_warnings(), pytest.raises(ValueError, match=r"\.pt has become shorter"):
        reshaping.strip(folder, tmp_path / "target", show=False)
    assert not (tmp_path / "target").exists() and not list((tmp_path / "target.part").glob("*.pt"))
