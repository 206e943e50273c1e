"""Traces in other tools' layouts: the files are what those tools write, and what is read back is what was written."""

import json
import os
import zipfile

import numpy as np
import pytest
import torch
from processes import ran
from synthetic_traces import synthetic

from moekit.routing import exchange
from moekit.routing.exchange import objects, readers
from moekit.symbols import PAD


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
    assert np.array_equal(back.sample, trace.sample) and np.array_equal(back.position, trace.position)
    if layout in ("sglang", "olmoe"):
        assert np.array_equal(back.token, trace.token)
        assert np.array_equal(back.target, trace.target)
    if layout == "olmoe":
        assert np.array_equal(back.predicted, trace.predicted)


@pytest.mark.parametrize(
    ("layout", "other"), [("vllm", "sample_00000001.npy"), ("megatron", "router_trace_rank1.jsonl")]
)
def test_a_folder_of_another_trace_is_left_as_it_is(trace, layout, other, tmp_path):
    path = tmp_path / "trace"
    first = trace.select(samples=0)
    exchange.write(trace, path, layout)
    if not (path / other).exists():
        exchange.write(first, path, layout)
        (path / other).write_text("")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(ValueError, match=f"trace holds {other} of another trace, .*: name another folder"):
        exchange.write(first, path, layout)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    # What is not read with the trace may stay.
    (path / other).rename(path / "notes.txt")
    for file in path.glob("sample_00000002.npy"):
        file.unlink()
    exchange.write(first, path, layout)
    back = exchange.read(path, layout, num_experts=300)
    assert np.array_equal(back.experts, first.experts)


def test_files_are_as_the_others_write_them(trace, tmp_path):
    exchange.write(trace, tmp_path / "v", "vllm")
    files = sorted((tmp_path / "v").iterdir())
    arrays = [np.load(file) for file in files]
    assert [array.shape for array in arrays] == [(128, 6, 2), (128, 6, 2), (44, 6, 2)]
    assert arrays[0].dtype == np.int16 and arrays[0].max() > 127  # int8 would have overflowed
    assert not arrays[0][:, [0, 2, 4]].any() and np.array_equal(
        arrays[1][:, [1, 3, 5]], trace.experts[128:256]
    )
    exchange.write(trace, tmp_path / "v.npz", "vllm")
    back = exchange.read(tmp_path / "v.npz", "vllm", num_experts=300)
    assert np.array_equal(back.experts, trace.experts) and back.layers == (1, 3, 5)
    with pytest.raises(ValueError, match="the trace has 3 samples, and a .npy file holds one request"):
        exchange.write(trace, tmp_path / "v.npy", "vllm")

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


# ---------------------------------------------------------------------- files built as the tools build them


def vllm_array(layers, moe, choices):
    """As vLLM's capturer does: zeros for every hidden layer, filled where a layer routes."""
    array = np.zeros((len(choices), layers, 2), dtype=np.uint8)
    array[:, moe] = choices
    return array


def test_vllm_has_a_slice_for_every_hidden_layer(tmp_path):
    choices = np.array([[[5, 0], [1, 2]], [[0, 3], [7, 0]], [[2, 1], [0, 4]]])
    np.save(tmp_path / "x.npy", vllm_array(5, [1, 3], choices))
    back = exchange.read(tmp_path / "x.npy", "vllm")
    assert back.layers == (1, 3) and np.array_equal(back.experts, choices) and back.num_experts == 8
    # Names for all of its slices, or for those with experts.
    assert exchange.read(tmp_path / "x.npy", "vllm", layers=[10, 11, 12, 13, 14]).layers == (11, 13)
    assert exchange.read(tmp_path / "x.npy", "vllm", layers=[6, 8]).layers == (6, 8)
    with pytest.raises(ValueError, match="the file has 5 layers, 2 of them with experts"):
        exchange.read(tmp_path / "x.npy", "vllm", layers=[1, 2, 3])
    np.save(tmp_path / "x.npy", np.zeros((3, 5, 2), np.uint8))
    with pytest.raises(ValueError, match="nothing was recorded"):
        exchange.read(tmp_path / "x.npy", "vllm")


def test_vllm_leaves_a_token_that_was_not_recorded_at_zero(tmp_path):
    choices = np.array([[[5, 0], [1, 2]], [[0, 0], [0, 0]], [[2, 1], [0, 4]]])
    np.save(tmp_path / "x.npy", vllm_array(4, [2, 3], choices))
    back = exchange.read(tmp_path / "x.npy", "vllm")
    assert back.position.tolist() == [0, 2] and np.array_equal(back.experts, choices[[0, 2]])


def test_vllm_with_one_choice(tmp_path):
    array = np.zeros((3, 4, 1), np.int16)
    array[:, 1, 0] = [1, 0, 2]
    np.save(tmp_path / "x.npy", array)
    assert exchange.read(tmp_path / "x.npy", "vllm").layers == (1,)
    all_moe = exchange.read(tmp_path / "x.npy", "vllm", layers=[0, 1, 2, 3])
    assert all_moe.layers == (0, 1, 2, 3) and np.array_equal(all_moe.experts, array)


def test_vllm_requests_in_one_file(tmp_path):
    requests = [vllm_array(3, [2], np.array(c)[:, None]) for c in ([[1, 2], [3, 0]], [[4, 0]], [[0, 1]] * 3)]
    np.savez(tmp_path / "x.npz", *requests)
    back = exchange.read(tmp_path / "x.npz", "vllm")
    assert back.sample.tolist() == [0, 0, 1, 2, 2, 2] and back.position.tolist() == [0, 1, 0, 0, 1, 2]
    assert back.layers == (2,) and back.experts[2, 0].tolist() == [4, 0]
    padded = np.full((3, 3, 3, 2), -1, np.int16)
    for row, request in zip(padded, requests, strict=True):
        row[: len(request)] = request
    np.save(tmp_path / "x.npy", padded)
    again = exchange.read(tmp_path / "x.npy", "vllm")
    assert np.array_equal(again.experts, back.experts) and again.layers == (2,)
    assert np.array_equal(again.sample, back.sample) and np.array_equal(again.position, back.position)
    objects = np.empty(3, dtype=object)
    objects[:] = [requests[0], np.asfortranarray(requests[1].astype(">i4")), requests[2].astype(np.int16)]
    np.save(tmp_path / "x.npy", objects, allow_pickle=True)
    of_objects = exchange.read(tmp_path / "x.npy", "vllm")
    assert np.array_equal(of_objects.experts, back.experts) and np.array_equal(of_objects.sample, back.sample)
    np.save(tmp_path / "x.npy", np.array([requests[0]] * 2, dtype=object), allow_pickle=True)
    alike = exchange.read(tmp_path / "x.npy", "vllm")
    assert alike.sample.tolist() == [0, 0, 1, 1] and alike.experts[2:, 0].tolist() == [[1, 2], [3, 0]]


class Hostile:
    def __reduce__(self):
        return exec, ("raise SystemExit('it ran')",)


@pytest.mark.parametrize("objects", [[Hostile()], [[1, 2], [3]], [np.array(["a"])], ["text"], [None, 1.5]])
def test_vllm_objects_that_are_no_requests_are_refused_unbuilt(objects, tmp_path):
    array = np.empty(len(objects), dtype=object)
    array[:] = objects
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=r"x.npy is no array of whole numbers.*np.savez of several$"):
        exchange.read(tmp_path / "x.npy", "vllm")


def sglang_record(ids, layers=2, width=8, **fields):
    """As SGLang's gatherer for mode per_token does: -1 in a buffer of 8 choices, filled where a layer routes."""
    ids = torch.tensor(ids)
    buffer = torch.full((layers, len(ids), width), -1, dtype=torch.int32)
    buffer[layers - 1, :, : ids.shape[1]] = ids
    tokens = list(range(100, 100 + len(ids)))
    record = {"forward_pass_id": 1, "rank": 0, "gatherer_key": "primary", "input_ids": tokens}
    record |= {
        "positions": list(range(len(ids))),
        "extend_seq_lens": None,
        "forward_mode": 1,
        "misc_objects": [],
    }
    return record | {"topk_ids_of_layer": buffer} | fields


def read_sglang(folder, *records, physical=None):
    content = {"records": list(records)}
    if physical is not None:
        content["last_physical_to_logical_map"] = torch.tensor(physical)
    torch.save(content, folder / "x.pt")
    return exchange.read(folder / "x.pt", "sglang")


SIX = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [1, 0]]


def test_sglang_splits_a_prefill_by_its_lengths(tmp_path):
    """A prefix of the second request was cached: its positions begin at 3, as if the first went on."""
    back = read_sglang(tmp_path, sglang_record(SIX, extend_seq_lens=[3, 3]))
    assert back.sample.tolist() == [0, 0, 0, 1, 1, 1] and back.position.tolist() == [0, 1, 2, 3, 4, 5]
    assert back.target.tolist() == [101, 102, 1, 104, 105, 1]
    assert back.layers == (1,) and np.array_equal(back.experts[:, 0], SIX)
    with pytest.raises(ValueError, match="extend_seq_lens adds up to 7 of 6 tokens"):
        read_sglang(tmp_path, sglang_record(SIX, extend_seq_lens=[3, 4]))


def test_sglang_decodes_a_token_of_each_request(tmp_path):
    """Positions that go on by chance are still those of different requests."""
    prefill = sglang_record(SIX[:3], extend_seq_lens=[1, 2], positions=[4, 5, 6])
    decode = sglang_record(SIX[3:], forward_mode=2, positions=[5, 6, 7], forward_pass_id=2)
    back = read_sglang(tmp_path, prefill, decode)
    assert back.sample.tolist() == [0, 1, 1, 2, 3, 4] and back.position.tolist() == [4, 5, 6, 5, 6, 7]
    assert back.target.tolist() == [1, 102, 1, 1, 1, 1]


def test_sglang_pads_with_minus_one(tmp_path):
    """Rows behind the requests, and rows that a captured graph pads a decode pass with; an idle pass has none."""
    padded = torch.tensor(SIX[:4] + [[-1, -1]] * 2)
    idle = sglang_record([[0, 0]])
    idle = idle | {
        "input_ids": [],
        "positions": [],
        "topk_ids_of_layer": torch.zeros(2, 0, 8, dtype=torch.int32),
    }
    first = sglang_record(padded.tolist(), extend_seq_lens=[2, 2])
    second = sglang_record(padded.tolist(), forward_mode=2, positions=[9, 4, 7, 2, 0, 0])
    back = read_sglang(tmp_path, idle, first, second)
    assert back.sample.tolist() == [0, 0, 1, 1, 2, 3, 4, 5]
    assert back.position.tolist() == [0, 1, 2, 3, 9, 4, 7, 2]
    partly = sglang_record([[0, 1], [2, -1]], extend_seq_lens=[2])
    with pytest.raises(ValueError, match="a token has fewer choices than others"):
        read_sglang(tmp_path, partly)


def test_sglang_records_physical_experts(tmp_path):
    """Under load balancing experts are moved and copied; the map of the layer gives the model's."""
    physical = [[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 0]]
    back = read_sglang(tmp_path, sglang_record([[0, 5], [4, 1]], extend_seq_lens=[2]), physical=physical)
    assert back.experts[:, 0].tolist() == [[3, 0], [3, 2]] and back.num_experts == 4
    with pytest.raises(ValueError, match=r"last_physical_to_logical_map has shape \[2, 6\]"):
        read_sglang(tmp_path, sglang_record([[0, 6]], extend_seq_lens=[1]), physical=physical)


def megatron_lines(folder, *records, rank=0):
    lines = []
    for step, layer, indices in records:
        record = {"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": rank}
        lines.append(json.dumps(record | {"num_tokens": len(indices), "topk": 2, "top_indices": indices}))
    (folder / f"router_trace_rank{rank}.jsonl").write_text("\n".join(lines) + "\n")


def test_megatron_repeats_layers_for_microbatches(tmp_path):
    one, two, three = [[0, 1], [2, 3]], [[4, 5]], [[6, 7]] * 3
    megatron_lines(tmp_path, (0, 1, one), (0, 3, one), (0, 1, two), (0, 3, two), (1, 1, three), (1, 3, three))
    megatron_lines(tmp_path, (0, 1, two), (0, 3, one[:1]), rank=1)
    back = exchange.read(tmp_path, "megatron")
    assert back.sample.tolist() == [0, 0, 1, 2, 3, 3, 3] and back.layers == (1, 3)
    assert back.experts[:, 0].tolist() == [*one, *two, *two, *three]
    assert back.experts[3].tolist() == [[4, 5], [0, 1]]
    megatron_lines(tmp_path, (0, 1, one), (0, 3, one), (0, 1, two), rank=1)
    with pytest.raises(ValueError, match="layers of step 0 on rank 1 have different numbers of microbatches"):
        exchange.read(tmp_path, "megatron")


def test_megatron_leaves_out_other_blocks_and_empty_steps(tmp_path):
    path = tmp_path / "router_trace_rank0.jsonl"
    base = {"step": 0, "rank": 0, "layer": 1, "topk": 2}
    records = [
        base | {"block": "decoder", "top_indices": [[0, 1]]},
        base | {"block": "mtp", "mtp_idx": 0, "top_indices": [[5, 6]]},
        base | {"step": 1, "top_indices": []},
        base | {"step": 2, "top_indices": [[2, 3], [1, 0]]},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    back = exchange.read(path, "megatron")
    assert back.sample.tolist() == [0, 1, 1] and back.experts[:, 0].tolist() == [[0, 1], [2, 3], [1, 0]]


@pytest.mark.parametrize(
    "layout, content",
    [
        ("megatron", '{"step": 0}'),
        ("megatron", '{"step": 0, "rank": 0, "layer": 1, "top_indices": 5}'),
        ("megatron", '{"step": 0, "rank": 0, "layer": 1, "top_indices": [[1, 2], [3]]}'),
        ("megatron", "[1]"),
        ("olmoe", '{"exp_ids": [[[1]]]}'),
        ("olmoe", '{"input_ids": [1], "exp_ids": [[[1], [2, 3]]]}'),
        ("olmoe", '{"input_ids": [1, 2], "exp_ids": [[[1]]]}'),
        ("olmoe", '{"input_ids": [1], "predicted_token_ids": [1, 2], "exp_ids": [[[1]]]}'),
        ("olmoe", "\x00"),
        ("vllm", ""),
        ("vllm", "text"),
        ("sglang", "text"),
    ],
)
def test_files_of_another_content_are_one_sentence(layout, content, tmp_path):
    (tmp_path / "x").write_text(content)
    with pytest.raises(ValueError, match=f"^{tmp_path / 'x'}") as caught:
        exchange.read(tmp_path / "x", layout)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", ["megatron", "olmoe"])
def test_a_line_without_an_end_is_refused_by_its_length(layout, tmp_path, monkeypatch):
    """A file may have a terabyte and take no disk."""
    monkeypatch.setattr(readers, "LONGEST_LINE", 1000)
    path = tmp_path / "trace.jsonl"
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(ValueError, match="line 1 has more than 1,000 characters; expected a JSON object"):
        exchange.read(path, layout)


def test_an_array_of_objects_is_read_to_a_limit(tmp_path, monkeypatch):
    """A file may have a terabyte and take no disk."""
    path = tmp_path / "request.npy"
    np.save(path, np.array([np.zeros((2, 1, 1), int), np.zeros((3, 1, 1), int)], dtype=object))
    assert len(exchange.read(path, "vllm", layers=(1,))) == 5
    monkeypatch.setattr(objects, "MOST", path.stat().st_size // 2)
    with pytest.raises(ValueError, match="is no array of whole numbers"):
        exchange.read(path, "vllm", layers=(1,))


@pytest.mark.parametrize("layout", exchange.READERS)
def test_a_folder_is_no_file(layout, tmp_path):
    with pytest.raises(ValueError, match=f"^{tmp_path}"):
        exchange.read(tmp_path, layout)


def test_a_file_is_written_whole_or_not_at_all(trace, tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        exchange.write(trace, tmp_path / "nowhere" / "x", "vllm")


def test_mistakes_are_told(trace, tmp_path):
    with pytest.raises(ValueError, match="layout='vLLM'"):
        exchange.write(trace, tmp_path / "x", "vLLM")
    with pytest.raises(ValueError, match="expected one of vllm"):
        exchange.read(tmp_path, "moe-infinity")
    with pytest.raises(ValueError, match="there is no"):
        exchange.read(tmp_path / "no", "vllm")
    exchange.write(trace.select(samples=0), tmp_path / "v.npy", "vllm")
    with pytest.raises(ValueError, match="has experts [0-9]+ to"):
        exchange.read(tmp_path / "v.npy", "vllm", num_experts=8)
    with pytest.raises(ValueError, match="the file has 6 layers, 3 of them with experts"):
        exchange.read(tmp_path / "v.npy", "vllm", layers=[1])
    with pytest.raises(ValueError, match="not a readable file of SGLang's recorder but an array of NumPy"):
        exchange.read(tmp_path / "v.npy", "sglang")
    for asked, said in [
        ({"path": None}, "path=None: expected the path"),
        ({"layout": ["vllm"]}, "layout=.'vllm'.: expected one of vllm"),
        ({"num_experts": "8"}, "num_experts='8': expected a whole number of at least 1"),
        ({"layers": 1.5}, "layers=1.5: expected a list of whole numbers in an order"),
        ({"layers": {1, 3}}, "layers={1, 3}: expected a list of whole numbers in an order"),
    ]:
        with pytest.raises(ValueError, match=said):
            exchange.read(**{"path": tmp_path / "v.npy", "layout": "vllm"} | asked)
    exchange.write(trace.select(samples=0), tmp_path / "v.npz", "vllm")
    with pytest.raises(ValueError, match=r"v.npz has the layers .*1, 1, 3.*; expected each once"):
        exchange.read(tmp_path / "v.npz", "vllm", layers=[1, 1, 3])
    with pytest.raises(ValueError, match="trace=5: expected a trace"):
        exchange.write(5, tmp_path / "x", "vllm")
    with pytest.raises(ValueError, match="path=5: expected the path"):
        exchange.write(trace, 5, "vllm")
    (tmp_path / "o.jsonl").write_text('{"input_ids"\n')
    with pytest.raises(ValueError, match="line 1"):
        exchange.read(tmp_path / "o.jsonl", "olmoe")


SGLANG = {
    "topk_ids_of_layer": torch.zeros(2, 3, 2, dtype=torch.int32),
    "input_ids": torch.tensor([5, 6, 7]),
    "positions": torch.tensor([0, 1, 2]),
}
ODD_RECORDS = {
    "a large expert": {"topk_ids_of_layer": torch.full((2, 3, 2), 70_000)},
    "numbers with a fraction": {"positions": torch.tensor([0.0, 1.0, 2.0])},
    "a negative position": {"positions": torch.tensor([-5, 1, 2])},
    "words": {"input_ids": ["a", "b", "c"]},
    "ragged": {"input_ids": [[1], [2, 3], [4]]},
    "a large token": {"input_ids": torch.tensor([2**40, 1, 2])},
    "lengths that overflow": {"extend_seq_lens": [2**62, 2**62]},
    "lengths that are none": {"extend_seq_lens": "x"},
    "one number, expanded": {"topk_ids_of_layer": torch.zeros(1, dtype=torch.int32).expand(100_000, 3, 2)},
}


@pytest.mark.parametrize("odd", ODD_RECORDS.values(), ids=ODD_RECORDS)
def test_odd_records_are_refused_and_nothing_wraps_around(odd, tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"records": [SGLANG]}, path)
    assert len(exchange.read(path, "sglang")) == 3
    torch.save({"records": [SGLANG | odd]}, path)
    with pytest.raises(ValueError) as said:
        exchange.read(path, "sglang")
    assert str(path) in str(said.value) and "\n" not in str(said.value)


def test_what_follows_a_gap_is_no_target(tmp_path):
    """The second token has no expert, and no row: it follows the first one, and the third does not."""
    record = {"input_ids": [10, 11, 12, 13], "exp_ids": [[[0]], [[-1]], [[1]], [[0]]]}
    (tmp_path / "o.jsonl").write_text(json.dumps(record))
    back = exchange.read(tmp_path / "o.jsonl", "olmoe")
    assert back.token.tolist() == [10, 12, 13] and back.position.tolist() == [0, 2, 3]
    assert back.target.tolist() == [PAD, 13, PAD]


# Instructions of one or two bytes, each of which makes an object of 50 and more.
BYTES = 600_000
BOMBS = {
    "lists": b"]" * BYTES,
    "tuples": b"](" + b"N\x85" * BYTES + b"e",
    "calls": b"cbuiltins\nlist\n" + b")R" * BYTES,
    "copies of a list": b"]q\x00K\x01a0](" + b"h\x00" * BYTES + b"e",
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_objects_that_cost_more_than_their_bytes_are_refused(bomb, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02" + bomb + b".")
    with pytest.raises(ValueError, match="than a file of its size needs|of more than [0-9,]+ values"):
        exchange.read(tmp_path / "x.pt", "sglang")


def test_many_small_numbers_are_read(tmp_path):
    torch.save({"records": [SGLANG | {"more": list(range(200)) * 5000}]}, tmp_path / "x.pt")
    assert len(exchange.read(tmp_path / "x.pt", "sglang")) == 3


ODD_LINES = {
    "a layer of text": ("megatron", '{"step":0,"rank":0,"layer":"x","top_indices":[[1,2]]}'),
    "a layer below 0": ("megatron", '{"step":0,"rank":0,"layer":-3,"top_indices":[[1,2]]}'),
    "a large expert": ("megatron", '{"step":0,"rank":0,"layer":0,"top_indices":[[70000,1]]}'),
    "many digits": ("megatron", '{"step":' + "9" * 5000 + "}"),
    "a large token": ("olmoe", '{"input_ids":[99999999999],"exp_ids":[[[1]]]}'),
    "a text for ids": ("olmoe", '{"input_ids":"x","exp_ids":[[[1]]]}'),
    "tokens in tokens": ("olmoe", '{"input_ids":[[1]],"exp_ids":[[[1]]]}'),
}


@pytest.mark.parametrize(("layout", "line"), ODD_LINES.values(), ids=ODD_LINES)
def test_odd_lines_are_refused(layout, line, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError) as said:
        exchange.read(path, layout)
    assert str(path) in str(said.value) and len(str(said.value)) < 500


def headed(header: str) -> bytes:
    return b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header.encode() + bytes(64)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<i4', 'fortran_order': False, 'shape': (100000000000, 3, 2)}\n",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1, 3, 2)}\n",
        "__import__('os').system('touch mark')\n",
        "(" * 5000,
    ],
    ids=["huge", "objects", "a call", "brackets"],
)
def test_odd_arrays_are_refused(header, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.npy"
    path.write_bytes(headed(header))
    with pytest.raises(ValueError, match=r"x\.npy is no array of whole numbers"):
        exchange.read(path, "vllm")
    assert not (tmp_path / "mark").exists()


def test_a_compressed_archive_and_what_is_no_file_are_refused(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", np.zeros((10_000, 10, 10), np.int32))
    with pytest.raises(ValueError, match=r"x\.npz is compressed; expected what np\.savez makes"):
        exchange.read(tmp_path / "x.npz", "vllm")
    os.mkfifo(tmp_path / "pipe")
    for layout in ("vllm", "sglang", "olmoe", "megatron"):
        with pytest.raises(ValueError, match="pipe is a device, a pipe or a socket"):
            exchange.read(tmp_path / "pipe", layout)


def test_a_pipe_in_a_folder_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.npy")
    with pytest.raises(ValueError, match=r"a\.npy is a device, a pipe or a socket"):
        exchange.read(tmp_path, "vllm")


@pytest.mark.parametrize("layout", exchange.LAYOUTS)
def test_a_trace_without_tokens_would_be_a_file_that_nobody_reads(trace, layout, tmp_path):
    with pytest.raises(
        ValueError, match=f"layout='{layout}': the trace has no tokens, expected at least one"
    ):
        exchange.write(trace.select(samples=[]), tmp_path / "trace", layout)
    assert not list(tmp_path.iterdir())


FULL = """
import pathlib, resource, sys
from synthetic_traces import synthetic
from moekit.routing import exchange

trace, _ = synthetic(tokens=2000, block=100)
resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
for layout in exchange.LAYOUTS:
    try:
        exchange.write(trace, pathlib.Path(sys.argv[1]) / layout, layout)
    except Exception as error:
        print(layout, type(error).__name__, error)
"""


def test_a_full_disk_is_one_sentence_in_every_layout(tmp_path):
    ended = ran("-c", FULL, tmp_path, seconds=120)
    said = ended.stdout.splitlines()
    assert [line.split()[0] for line in said] == list(exchange.LAYOUTS), ended.stderr
    assert all(f" NotWritten {tmp_path}: the disk is full" in line for line in said), said
    assert not list(tmp_path.iterdir())
