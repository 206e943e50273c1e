"""Traces in other tools' layouts: the files are what those tools write, and what is read back is what was written."""

import json

import numpy as np
import pytest
import torch
from synthetic_traces import synthetic

from moekit.routing import exchange


@pytest.fixture(scope="module")
def trace():
    return synthetic(tokens=300, layers=(1, 3, 5), experts=300, block=128)[0]


@pytest.mark.parametrize("layout", exchange.READERS)
def test_round_trip(trace, layout, tmp_path):
    path = tmp_path / "trace"
    exchange.write(trace, path, layout)
    layers = None if layout in ("sglang", "megatron") else (1, 3, 5)
    back = exchange.read(path, layout, num_experts=300, layers=layers)
    assert np.array_equal(back.experts, trace.experts) and back.layers == (1, 3, 5)
    assert back.num_experts == 300 and back.kept.all() and np.isnan(back.weights).all()
    if layout != "vllm":  # an array of one request
        assert np.array_equal(back.sample, trace.sample) and np.array_equal(back.position, trace.position)
    if layout in ("sglang", "olmoe"):
        assert np.array_equal(back.token, trace.token)
        assert np.array_equal(back.target, trace.target)
    if layout == "olmoe":
        assert np.array_equal(back.predicted, trace.predicted)


def test_files_are_as_the_others_write_them(trace, tmp_path):
    exchange.write(trace, tmp_path / "v.npy", "vllm")
    array = np.load(tmp_path / "v.npy")
    assert array.dtype == np.int16 and array.shape == (300, 3, 2)
    assert array.max() > 127  # int8 would have overflowed

    exchange.write(trace, tmp_path / "o.jsonl", "olmoe")
    first, *rest = [json.loads(line) for line in open(tmp_path / "o.jsonl")]
    assert len(rest) == 2 and np.array(first["exp_ids"]).shape == (128, 2, 3)
    assert first["exp_ids"][7][1][2] == trace.experts[7, 2, 1]

    exchange.write(trace, tmp_path / "m", "megatron")
    records = [json.loads(line) for line in open(tmp_path / "m" / "router_trace_rank0.jsonl")]
    assert [(r["step"], r["layer"]) for r in records[:4]] == [(0, 1), (0, 3), (0, 5), (1, 1)]
    assert records[1]["top_indices"][9] == trace.experts[9, 1].tolist()
    assert records[-1]["num_tokens"] == 300 - 2 * 128 and records[0]["topk"] == 2

    exchange.write(trace, tmp_path / "s.pt", "sglang")
    record = torch.load(tmp_path / "s.pt", weights_only=True)["records"][2]
    assert record["topk_ids_of_layer"].shape == (6, 44, 2)
    assert (record["topk_ids_of_layer"][[0, 2, 4]] == -1).all()
    assert record["topk_ids_of_layer"][3, 5].tolist() == trace.experts[256 + 5, 1].tolist()

    exchange.write(trace, tmp_path / "c.npy", "moe-infinity")
    counts = np.load(tmp_path / "c.npy")
    assert counts.shape == (3, 3, 300) and counts.sum() == 300 * 3 * 2
    busiest = int(np.bincount(trace.experts[128:256, 1].ravel()).argmax())
    assert counts[1, 1, busiest] == (trace.experts[128:256, 1] == busiest).sum()


def test_a_pass_of_several_sequences_and_a_wider_buffer(tmp_path):
    ids = torch.full((2, 5, 8), -1, dtype=torch.int32)
    ids[1, :, :2] = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]])
    record = {"input_ids": [11, 12, 21, 22, 23], "positions": [0, 1, 0, 1, 2], "topk_ids_of_layer": ids}
    torch.save({"records": [record]}, tmp_path / "x.pt")
    back = exchange.read(tmp_path / "x.pt", "sglang")
    assert back.sample.tolist() == [0, 0, 1, 1, 1] and back.target.tolist() == [12, 1, 22, 23, 1]
    assert back.layers == (1,) and back.experts[3, 0].tolist() == [6, 7] and back.num_experts == 10


def test_mistakes_are_told(trace, tmp_path):
    with pytest.raises(ValueError, match="layout='vLLM'"):
        exchange.write(trace, tmp_path / "x", "vLLM")
    with pytest.raises(ValueError, match="expected one of vllm"):
        exchange.read(tmp_path, "moe-infinity")
    with pytest.raises(ValueError, match="there is no"):
        exchange.read(tmp_path / "no", "vllm")
    exchange.write(trace, tmp_path / "v.npy", "vllm")
    with pytest.raises(ValueError, match="has experts 0 to"):
        exchange.read(tmp_path / "v.npy", "vllm", num_experts=8)
    with pytest.raises(ValueError, match="the file has 3"):
        exchange.read(tmp_path / "v.npy", "vllm", layers=[1])
    with pytest.raises(ValueError, match="no 'records'"):
        exchange.read(tmp_path / "v.npy", "sglang")
    (tmp_path / "o.jsonl").write_text('{"input_ids"\n')
    with pytest.raises(ValueError, match="line 1"):
        exchange.read(tmp_path / "o.jsonl", "olmoe")
