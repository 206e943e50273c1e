"""The layer beside other people's: their public calls, on stand-in packages that compute in plain torch what these do."""

import importlib
import json
import re
import sys
import textwrap
import types

import pytest
import torch

from moekit.bench import __main__ as bench
from moekit.bench import measure, moe_layer, peers, shapes
from moekit.bench.measure import Ceilings
from moekit.bench.setting import Setting
from moekit.nn.passes import Pass
from moekit.ranks import Rank, machine

CPU = torch.device("cpu")
TINY = shapes.SHAPES["tiny"]

# By package: its files. Each is what the package's page says that its call computes, without any care for speed.
VLLM = {
    "vllm/model_executor/layers/fused_moe/__init__.py": """
        import torch, torch.nn.functional as F
        from vllm.model_executor.layers.fused_moe.activation import MoEActivation

        def fused_experts(hidden_states, w1, w2, topk_weights, topk_ids, inplace=False, activation="silu", quant_config=None):
            assert topk_weights.dtype == torch.float32 and topk_ids.dtype == torch.int32
            assert activation is MoEActivation.GELU_NO_MUL
            b1, b2 = quant_config
            out = torch.zeros_like(hidden_states)
            for n, row in enumerate(hidden_states):
                for weight, e in zip(topk_weights[n], topk_ids[n].tolist()):
                    out[n] += weight * (w2[e] @ F.gelu(w1[e] @ row + b1[e]) + b2[e])
            return out
        """,
    "vllm/model_executor/layers/fused_moe/config.py": """
        def biased_moe_quant_config(w1_bias, w2_bias):
            return w1_bias, w2_bias
        """,
    "vllm/model_executor/layers/fused_moe/activation.py": """
        from enum import Enum

        class MoEActivation(Enum):
            GELU_NO_MUL = "gelu_no_mul"
        """,
}
SCATTERMOE = {
    "scattermoe/mlp.py": """
        import torch
        from torch import nn

        class ParallelExperts(nn.Module):
            def __init__(self, num_experts, input_size, output_size, bias):
                super().__init__()
                self.weight = nn.Parameter(torch.empty(num_experts, output_size, input_size))
                self.bias = nn.Parameter(torch.empty(num_experts, output_size)) if bias else None

        class MLP(nn.Module):
            def __init__(self, input_size, hidden_size, num_experts, top_k, bias=False, activation=None):
                super().__init__()
                self.experts = ParallelExperts(num_experts, input_size, hidden_size, bias)
                self.output_experts = ParallelExperts(num_experts, hidden_size, input_size, bias)
                self.activation, self.top_k = activation, top_k

            def forward(self, x, expert_p, expert_idxs):
                assert expert_p.dtype == x.dtype and expert_idxs.shape[1] == self.top_k
                out = torch.zeros_like(x)
                for k in range(self.top_k):
                    e = expert_idxs[:, k]
                    h = torch.einsum("nd,nfd->nf", x, self.experts.weight[e]) + self.experts.bias[e]
                    y = torch.einsum("nf,ndf->nd", self.activation(h), self.output_experts.weight[e])
                    out += expert_p[:, k, None] * (y + self.output_experts.bias[e])
                return out
        """,
}
MEGABLOCKS = {
    "megablocks/layers/arguments.py": """
        import dataclasses

        @dataclasses.dataclass
        class Arguments:
            hidden_size: int
            ffn_hidden_size: int
            bias: bool
            return_bias: bool
            activation_fn: object
            moe_num_experts: int
            moe_top_k: int
            mlp_impl: str
            fp16: bool
            bf16: bool
            device: object
            init_method: object
            output_layer_init_method: object
        """,
    "megablocks/layers/dmoe.py": """
        import torch
        from types import SimpleNamespace

        class ParallelDroplessMLP(torch.nn.Module):
            def __init__(self, args):
                super().__init__()
                self.args, self.mlp = args, SimpleNamespace(w1=None, w2=None)

            def forward_once(self, x, expert_weights, top_experts):
                a = self.args
                w1, w2 = (w.view(a.moe_num_experts, a.ffn_hidden_size, a.hidden_size) for w in (self.mlp.w1, self.mlp.w2))
                out = torch.zeros_like(x)
                for k in range(a.moe_top_k):
                    e = top_experts[:, k]
                    h = a.activation_fn(torch.einsum("nd,nfd->nf", x, w1[e]))
                    out += expert_weights[:, k, None] * torch.einsum("nf,nfd->nd", h, w2[e])
                return out, None
        """,
}
SPECIALIZE = {
    "triton_kernels/specialize.py": """
        import dataclasses

        @dataclasses.dataclass(frozen=True)
        class FnSpecs:
            name: str
            fn: object
            fn_arg_names: tuple
        """,
}
TRITON_KERNELS = SPECIALIZE | {
    "triton_kernels/routing.py": """
        import dataclasses

        def compute_expt_data(hist, n_expts_tot, n_gates):
            assert int(hist.sum()) == n_gates and len(hist) == n_expts_tot
            return "made"

        @dataclasses.dataclass
        class RoutingData:
            gate_scal: object
            expt_hist: object
            n_expts_tot: int
            n_expts_act: int
            expt_data: object = None

        @dataclasses.dataclass
        class GatherIndx:
            src_indx: object
            dst_indx: object

        @dataclasses.dataclass
        class ScatterIndx:
            src_indx: object
            dst_indx: object
        """,
    "triton_kernels/matmul_ogs.py": """
        import dataclasses, torch, torch.nn.functional as F
        from triton_kernels.specialize import FnSpecs

        @dataclasses.dataclass(frozen=True)
        class FusedActivation:
            specs: FnSpecs
            fn_args: tuple
            reduction_n: int

        def matmul_ogs(x, w, bias, routing_data, gather_indx=None, scatter_indx=None, gammas=None, fused_activation=None):
            assert routing_data.expt_data == "made" and bias.dtype == torch.float32
            expert = torch.repeat_interleave(torch.arange(routing_data.n_expts_tot), routing_data.expt_hist.long())
            act = routing_data.n_expts_act
            if gather_indx is not None:
                src = gather_indx.src_indx.long()
                assert gather_indx.dst_indx.long()[src].equal(torch.arange(len(src)))
                x = x[src // act]
            y = torch.einsum("pk,pkn->pn", x, w[expert]) + bias[expert].to(x.dtype)
            if fused_activation is not None:
                assert fused_activation.specs.name == "gelu" and fused_activation.reduction_n == 1
                y = F.gelu(y)
            if gammas is not None:
                y = y * gammas[:, None]
            if scatter_indx is None:
                return y
            # Row p of the sorted choices goes to place dst[p]; the places of a token are summed.
            return torch.zeros_like(y).index_copy(0, scatter_indx.dst_indx.long(), y).view(-1, act, y.shape[1]).sum(dim=1)
        """,
}
NEWER_TRITON_KERNELS = SPECIALIZE | {
    "triton_kernels/tensor_details/ragged_tensor.py": """
        def make_ragged_tensor_metadata(slice_sizes, n_total_rows):
            assert int(slice_sizes.sum()) == n_total_rows and str(slice_sizes.dtype) == "torch.int32"
            return slice_sizes
        """,
    "triton_kernels/matmul.py": """
        import dataclasses, torch, torch.nn.functional as F
        from triton_kernels.specialize import FnSpecs

        @dataclasses.dataclass(frozen=True)
        class FusedActivation:
            specs: FnSpecs
            fn_args: tuple

        def matmul(a, b, bias, a_ragged_metadata=None, gather_indx=None, scatter_indx=None, gammas=None, fused_activation=None):
            assert bias.dtype == torch.float32
            expert = torch.repeat_interleave(torch.arange(len(a_ragged_metadata)), a_ragged_metadata.long())
            if gather_indx is not None:
                a = a[gather_indx.long()]
            y = torch.einsum("pk,pkn->pn", a, b[expert]) + bias[expert].to(a.dtype)
            if fused_activation is not None:
                assert fused_activation.specs.name == "gelu"
                y = F.gelu(y)
            if gammas is not None:
                y = y * gammas[:, None]
            # Row p of the sorted choices goes to place scatter_indx[p].
            return y if scatter_indx is None else torch.zeros_like(y).index_copy(0, scatter_indx.long(), y)
        """,
}
STAND_INS = {
    "vllm": VLLM,
    "scattermoe": SCATTERMOE,
    "megablocks": MEGABLOCKS,
    "triton_kernels": TRITON_KERNELS,
}
RELEASES = STAND_INS | {"triton_kernels, newer": NEWER_TRITON_KERNELS}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put stand-in packages where they are imported from."""
    monkeypatch.syspath_prepend(tmp_path)
    # A Triton function, which test_kernels.py calls.
    monkeypatch.setitem(sys.modules, "moekit.bench.gelu", types.SimpleNamespace(gelu=None))

    def put(files: dict[str, str]) -> None:
        for name, text in files.items():
            path = tmp_path / name
            for folder in [path.parent, *path.parent.parents]:
                if folder == tmp_path:
                    break
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "__init__.py").touch()
            path.write_text(textwrap.dedent(text))
        importlib.invalidate_caches()

    yield put
    for name in [name for name in sys.modules if name.split(".")[0] in STAND_INS]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def moe():
    rank = Rank(0, 1, CPU)
    shapes.build(rank, TINY, torch.float32, "loop")
    found = rank.state["model"].layers[1].moe
    # Biases that are seen in the result.
    with torch.inference_mode():
        for name in ("b1", "b2"):
            found.experts.tensors[name].normal_(generator=torch.Generator().manual_seed(1))
    return found


@pytest.fixture(autouse=True)
def ceilings(monkeypatch):
    monkeypatch.setattr(measure, "ceilings", lambda rank, dtype: Ceilings(1e9, 1e9, 1e9, "none"))


def rows_of(tmp_path, *arguments: str) -> dict[str, dict]:
    path = tmp_path / "figures.json"
    how = ["--shape", "tiny", "--device", "cpu", "--repeats", "1", "--tokens", "16"]
    bench.main(["moe-layer", *how, *arguments, "--json", str(path)])
    rows = json.loads(path.read_text())["benches"]["moe-layer"][3:]
    return {row["work"].removeprefix("layer, 16 tokens: "): row for row in rows}


@pytest.mark.parametrize("name", RELEASES)
@pytest.mark.parametrize("fraction", [None, 0.05], ids=["all", "dropped"])
@torch.inference_mode()
def test_their_call_computes_the_layer(install, moe, name, fraction):
    install(RELEASES[name])
    ((_, peer),) = peers.PEERS[name.split(",")[0]].items()
    x, asked = torch.randn(2, 40, TINY.dim), Pass(fraction, 2)
    own = moe.experts
    try:
        moe.experts = own if peer.biases else peers.without_biases(own)
        expected = moe_layer.plain(moe, x, asked)
        moe_layer.same(name, moe_layer.theirs(peer, moe, 160)(x, asked), expected)
    finally:
        moe.experts = own
    if not peer.biases:
        # The biases would be seen.
        with pytest.raises(ValueError, match="computes something else"):
            moe_layer.same(name, expected, moe_layer.plain(moe, x, asked))


def test_all_of_them_are_timed(install, tmp_path):
    for files in STAND_INS.values():
        install(files)
    found = rows_of(tmp_path, "--against", ",".join(STAND_INS))
    assert list(found) == [
        "moekit's (loop)",
        "vLLM",
        "ScatterMoE",
        "MegaBlocks, without biases",
        "triton_kernels",
    ]
    assert all(row["figure"] > 0 and row["limit"] > 0 and "error" in row["note"] for row in found.values())


def test_a_layer_is_timed_in_a_graph_where_it_can_be_captured(install, tmp_path, monkeypatch):
    install(SCATTERMOE)

    class Graph:
        """A stand-in for a CUDA graph of the first layer, which is moekit's; the other one cannot be captured."""

        made = 0

        def __init__(self, work, *inputs):
            Graph.made += 1
            if Graph.made > 1:
                raise RuntimeError("operation not permitted when stream is capturing\nand more")
            self.work, self.inputs, self.graph, self.replayed = work, inputs, self, 0

        def __call__(self, *inputs):
            return self.work(*inputs)

        def replay(self):
            return "replayed"

    def seconds(work, device, **how):
        return [0.002 if work() == "replayed" else 0.001]

    monkeypatch.setattr(measure, "seconds", seconds)
    monkeypatch.setattr(moe_layer.graphs, "Graph", Graph)
    monkeypatch.setattr(moe_layer, "has_graph", lambda x: True)
    found = rows_of(tmp_path, "--against", "scattermoe")
    assert found["moekit's (loop)"]["figure"] == 2 and found["ScatterMoE"]["figure"] == 1
    assert re.search(r"; error \S+; 1 ms with its launches$", found["moekit's (loop)"]["note"])
    said = "1 ms with its launches, since it cannot be captured: RuntimeError: operation not permitted when stream is capturing"
    assert found["ScatterMoE"]["note"].endswith(said)


def test_what_is_absent_is_a_line_each(tmp_path, monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    found = rows_of(tmp_path)
    assert found["moekit's (loop)"]["figure"] > 0 and found["grouped_mm"]["figure"] > 0
    absent = {name: row["note"] for name, row in found.items() if row["figure"] is None}
    assert absent == {
        "transformers' grouped_mm": "transformers is not installed",
        "transformers' batched_mm": "transformers is not installed",
        "triton_kernels": "triton_kernels is not installed",
        "vLLM": "vllm is not installed",
        "ScatterMoE": "scattermoe is not installed",
        "MegaBlocks, without biases": "megablocks is not installed",
    }


BROKEN = {
    "raises": (
        {"scattermoe/mlp.py": "def MLP(**options):\n    raise RuntimeError('no GPU' + 'x' * 1000 + '\\nno')"},
        r"scattermoe failed: RuntimeError: no GPUx{100,160}\.\.\.",
    ),
    "has no such module": ({"scattermoe/other.py": ""}, r"scattermoe cannot be imported: No module named .*"),
    "has no such name": ({"scattermoe/mlp.py": ""}, r"scattermoe cannot be imported: cannot import name .*"),
    "ends on import": (
        {"scattermoe/mlp.py": "raise OSError('libcudart.so.12')"},
        r"scattermoe failed: OSError: libcudart\.so\.12",
    ),
    "is wrong": (
        {"scattermoe/mlp.py": SCATTERMOE["scattermoe/mlp.py"].replace("return out", "return out * 1.01")},
        r"scattermoe failed: ValueError: scattermoe computes something else than the loop: \d+ of 16 tokens .*",
    ),
    "gives NaN": (
        {
            "scattermoe/mlp.py": SCATTERMOE["scattermoe/mlp.py"].replace(
                "return out", "return out * float('nan')"
            )
        },
        r"scattermoe failed: ValueError: scattermoe computes something else .*",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_peer_that_fails_is_one_line_and_the_next_one_is_timed(install, tmp_path, how):
    files, said = BROKEN[how]
    install(files)
    install(VLLM)
    found = rows_of(tmp_path, "--against", "scattermoe,vllm,grouped_mm")
    assert found["ScatterMoE"]["figure"] is None and found["ScatterMoE"]["limit"] is None
    assert re.fullmatch(said, found["ScatterMoE"]["note"])
    assert found["vLLM"]["figure"] > 0 and found["grouped_mm"]["figure"] > 0


def test_a_peer_without_biases_leaves_them_to_the_next_one(install, tmp_path):
    install(MEGABLOCKS)
    install(VLLM)
    found = rows_of(tmp_path, "--against", "megablocks,vllm,grouped_mm")
    assert all(row["figure"] > 0 for row in found.values())


def test_weights_of_one_byte_are_the_loops_alone(install, tmp_path):
    install(VLLM)
    found = rows_of(tmp_path, "--experts", "int8", "--against", "loop,grouped_mm,vllm")
    assert found["moekit's (loop)"]["figure"] > 0
    notes = [found[name]["note"] for name in ("grouped_mm", "vLLM")]
    assert notes == [
        f"{name} has no product with these weights of one byte" for name in ("grouped_mm", "vllm")
    ]


@torch.inference_mode()
def test_another_activation_is_said(install, moe, monkeypatch):
    install(VLLM)
    monkeypatch.setattr(moe.experts, "activation", "relu")
    with pytest.raises(peers.Missing, match="vllm is called with gelu only, and this activation is relu"):
        peers.PEERS["vllm"]["vLLM"].call(moe.experts, 4)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@torch.inference_mode()
def test_transformers_computes_the_same(moe, implementation):
    pytest.importorskip("transformers")
    x, asked = torch.randn(2, 64, TINY.dim), Pass(0.05, 2)
    peer = peers.PEERS["transformers"][f"transformers' {implementation}"]
    expected = moe_layer.plain(moe, x, asked)
    moe_layer.same(implementation, moe_layer.theirs(peer, moe, 256)(x, asked), expected)


def test_too_many_copies_of_weights_are_not_made(moe, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(machine, "host_memory", lambda what: 1 << 20)
    with pytest.raises(peers.Missing, match="would copy 0 GiB of weights, one matrix for each choice"):
        peers.PEERS["transformers"]["transformers' batched_mm"].call(moe.experts, 100)


def test_a_wrong_result_of_our_own_ends_the_bench(monkeypatch):
    monkeypatch.setattr(
        moe_layer, "ways", lambda *_: {"wrong": lambda moe: lambda x, step: torch.zeros_like(x)}
    )
    arguments = bench.parsers()[0].parse_args(["moe-layer", "--shape", "tiny", "--device", "cpu"])
    with pytest.raises(ValueError, match="wrong computes something else"):
        moe_layer.run(Setting.of(arguments), arguments)
