"""What the notebooks tell of GPUs, on a machine whose GPUs are made up."""

import math
from types import SimpleNamespace

import pytest
import torch

from moekit import ranks
from moekit.notebook import report
from moekit.planning.runs import room
from moekit.ranks.machine import free_memory, gpus

SAID = """GPU-aaaa-1, 1024, 81559
GPU-bbbb-2, 70000, 81559
GPU-cccc-3, [N/A], [N/A]
"""


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """Three GPUs, seen by torch in another order than by the driver."""
    seen = [SimpleNamespace(name="H200", uuid=uuid) for uuid in ("bbbb-2", "aaaa-1", "cccc-3")]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(seen))
    monkeypatch.setattr(torch.cuda, "get_device_properties", seen.__getitem__)
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{SAID}END\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return program


def test_memory_belongs_to_torchs_gpus(made_up):
    first, second, third = gpus()
    assert (first.free, second.free) == (70_000 * 2**20, 1024 * 2**20) and first.total == 81_559 * 2**20
    assert math.isnan(third.free) and third.name == "H200"


@pytest.mark.parametrize("script", ["exit 9", "echo nonsense", None])
def test_a_machine_that_does_not_tell(script, made_up):
    made_up.unlink() if script is None else made_up.write_text(f"#!/bin/sh\n{script}\n")
    assert [math.isnan(gpu.free) for gpu in gpus()] == [True] * 3


def test_what_torch_keeps_is_free_and_lent_gpus_count_as_empty(made_up, monkeypatch):
    """Free memory is decided in one place, for a plan, a profile, a bench and a table."""
    devices = [torch.device("cuda", index) for index in (1, 0)]
    assert free_memory(devices) == [1024 * 2**20, 70_000 * 2**20]
    assert free_memory(devices, lent=True) == [81_559 * 2**20] * 2
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: (index + 2) * 2**20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda index: 2**20)
    assert free_memory(devices) == [1026 * 2**20, 70_001 * 2**20]
    assert math.isnan(free_memory([torch.device("cuda", 2)])[0])
    # A plan may ask for more ranks, so it knows of all GPUs.
    assert room(devices[:1]).devices[:2] == (70_001 * 2**20, 1026 * 2**20)


def test_ranks_on_a_cpu_share_its_memory(monkeypatch):
    monkeypatch.setattr("moekit.ranks.machine.host_memory", lambda what: {"MemAvailable": 12}[what])
    assert free_memory([torch.device("cpu")] * 4) == [3.0] * 4


def test_tables(made_up, reference, monkeypatch):
    assert report.machine()[""]["cuda:1"] == "H200, 1.0 of 79.6 GiB free"
    monkeypatch.setattr(ranks, "choose_devices", lambda *_: [torch.device("cuda", i) for i in range(2)])
    assert report.shares(reference / "checkpoint", 2, "auto", "auto")["GiB free"].tolist() == [68.4, 1.0]
