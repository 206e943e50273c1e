"""Experts in one byte a weight: the numbers by hand, the load, equality over ranks, and what they cost the demo."""

import math

import numpy as np
import pytest
import torch
from branch_cases import build
from test_copying import Lazy, staged
from test_preflight import given

import moekit
from moekit import checkpoint
from moekit.checkpoint import export
from moekit.checkpoint.copying import Piece
from moekit.nn import transformer
from moekit.nn.experts import Assignment, Experts, QuantisedExperts
from moekit.nn.quantise import KINDS, LARGEST, dequantise, name_of, quantise
from moekit.notebook import preflight, report
from moekit.notebook.parameters import ParameterError

CPU = torch.device("cpu")
QUIET = {"progress": False}
EVERY = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def quantised(matrix: torch.Tensor, kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    numbers, scale = torch.empty_like(matrix, dtype=kind), torch.empty(len(matrix))
    quantise(matrix, numbers, scale)
    return numbers, scale


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.view(torch.uint8).equal(other.view(torch.uint8))


# ------------------------------------------------------------------------------------------------- the numbers


def test_a_matrix_by_hand():
    matrix = torch.tensor([[127.0, -63.4, 0.6, 0.4], [-0.5, 0.25, 0.0, 0.1], [0.0, 0.0, 0.0, 0.0]])
    numbers, scale = quantised(matrix, torch.int8)
    assert numbers.tolist() == [[127, -63, 1, 0], [-127, 64, 0, 25], [0, 0, 0, 0]]
    np.testing.assert_allclose(scale[:2], [1.0, 0.5 / 127], rtol=1e-6)
    numbers, scale = quantised(matrix, torch.float8_e4m3fn)
    np.testing.assert_allclose(scale[:2], [127 / 448, 0.5 / 448], rtol=1e-6)
    # Between 224 and 256, and between 448 and 416, neighbours are 16 and 32 apart.
    assert numbers.float()[:2, :3].tolist() == [[448, -224, 2.0], [-448, 224, 0]]
    assert not numbers.float()[2].any()


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_no_number_is_far_from_its_weight(kind, dtype):
    matrix = torch.randn(40, 300, generator=torch.Generator().manual_seed(1)).to(dtype)
    numbers, scale = quantised(matrix, kind)
    error = (dequantise(numbers, scale, torch.float32) - matrix.float()).abs()
    # Half a step: of 1 for int8; of an eighth of the number's power of two for float8, down to its smallest step.
    step = torch.ones_like(error)
    if kind == torch.float8_e4m3fn:
        step = torch.exp2(numbers.float().abs().clamp(min=2.0**-6).log2().floor()) / 8
    assert (error <= 0.501 * step * scale[:, None]).all()
    assert numbers.float().abs().amax(dim=1).eq(LARGEST[kind]).all(), (
        "the largest weight has the largest number"
    )


@EVERY
def test_a_row_that_is_not_finite_stays_so_and_others_are_untouched(kind):
    matrix = torch.tensor([[1.0, 2.0], [math.nan, 2.0], [1.0, math.inf], [3.0, -1.0]])
    numbers, scale = quantised(matrix, kind)
    assert scale[[0, 3]].isfinite().all() and not scale[[1, 2]].isfinite().any()
    found = dequantise(numbers, scale, torch.float32)
    np.testing.assert_allclose(found[[0, 3]], matrix[[0, 3]], rtol=0.05)
    assert not found[[1, 2]].isfinite().any()


@EVERY
def test_experts_compute_with_numbers_times_scales(kind):
    torch.manual_seed(0)
    plain = Experts(3, 24, 40, "gelu").requires_grad_(False)
    for parameter in plain.parameters():
        parameter.normal_()
    found = QuantisedExperts.of(plain, kind)
    assert {t.dtype for t in (found.w1, found.w2)} == {kind} and found.b1.equal(plain.b1)
    assert [tuple(scale.shape) for scale in found.scales] == [(3, 40), (3, 24)]
    for number in range(3):
        for name, scale in zip(("w1", "w2"), found.scales, strict=True):
            own = getattr(found, name)[number].float() * scale[number][:, None]
            getattr(plain, name)[number] = own
    x, order = torch.randn(8, 24), torch.tensor([3, 1, 0, 7, 2, 5, 4, 6])
    some = Assignment(order, torch.tensor([3, 0, 4]))
    assert found(x, some).equal(plain(x, some))
    x.requires_grad_()
    found(x, some).sum().backward()
    assert x.grad[order[:7]].any(dim=1).all() and found.w1.grad is None


# ---------------------------------------------------------------------------------------------------- the load


@EVERY
@pytest.mark.parametrize("size", [1024, 4096, 1 << 16])
def test_rows_are_quantised_whole_whatever_the_buffers(kind, size):
    """Matrices among other tensors, some larger than a buffer; a row has up to 600 bytes."""
    pieces, wanted = [], []
    for number, shape in enumerate([(7, 300), (5,), (40, 24), (1, 300), (64, 100), (3, 7)]):
        source = torch.randn(shape, generator=torch.Generator().manual_seed(number)).half()
        if len(shape) == 1:
            pieces.append(Piece("b", source, torch.empty(shape)))
            wanted.append((source.float(),))
        else:
            target, scale = torch.zeros(shape, dtype=kind), torch.zeros(shape[0])
            pieces.append(Piece("w", source, target, scale=scale))
            wanted.append(quantised(source, kind))
    staged(pieces, [Lazy(size, []), Lazy(size, [])])
    for piece, (target, *scale) in zip(pieces, wanted, strict=True):
        assert same_bytes(piece.target, target) and (not scale or piece.scale.equal(scale[0]))


def test_a_row_larger_than_a_buffer_is_an_error():
    piece = Piece("file: key", torch.zeros(2, 600), torch.zeros(2, 600).char(), scale=torch.zeros(2))
    with pytest.raises(RuntimeError, match="file: key cannot be quantised: a row of it has more than 1,024"):
        staged([piece], [Lazy(1024, [])])


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_load_quantises_what_the_files_have_and_changes_no_other_type(reference, kind, dtype):
    plan = checkpoint.survey(checkpoint.find(reference / "checkpoint"))
    plain = transformer.empty(plan.config, CPU, plan.dtype)
    model = transformer.empty(plan.config, CPU, dtype, kind=kind)
    for each in (plain, model):
        checkpoint.fill(each, plan, range(plan.config.experts), threads=2)
    for layer in plan.config.moe_layers:
        wanted = QuantisedExperts.of(plain.layers[layer].moe.experts, kind)
        found = model.layers[layer].moe.experts
        for name in ("w1", "w2"):
            assert same_bytes(getattr(found, name), getattr(wanted, name))
        assert all(map(torch.equal, found.scales, wanted.scales))
        assert found.b1.equal(wanted.b1.to(dtype)) and found.b2.equal(wanted.b2.to(dtype))
    others = {t.dtype for name, t in model.named_parameters() if not name.endswith((".w1", ".w2"))}
    assert others == {dtype}
    size = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert transformer.weight_bytes(plan.config, None, dtype, kind) == size


def test_bad_requests_are_refused_before_anything_is_loaded(reference, tmp_path):
    folder = reference / "checkpoint"
    with pytest.raises(ValueError, match="experts='int4': expected one of int8, fp8 or None"):
        moekit.load(folder, experts="int4")
    with pytest.raises(ValueError, match="backend='grouped_mm' has no product with int8 experts"):
        moekit.load(folder, device="cpu", backend="grouped_mm", experts="int8")
    build("alternate_ffn", tmp_path)
    said = f"experts='fp8': the model in {tmp_path} is dense"
    with pytest.raises(ValueError, match=said):
        moekit.load(tmp_path, device="cpu", experts="fp8")
    with pytest.raises(ParameterError, match=said):
        preflight.load_shards(given(checkpoint=str(tmp_path), experts="fp8"))


def test_quantised_experts_are_not_written(reference, tmp_path):
    plan = checkpoint.survey(checkpoint.find(reference / "checkpoint"))
    model = transformer.empty(plan.config, CPU, kind=torch.int8)
    with pytest.raises(ValueError, match="has quantised experts: write the one that they were made of"):
        export.save(model, tmp_path, 1)


# ---------------------------------------------------------------------------------------------------- the verbs


@pytest.fixture(scope="module", params=[1, 2, 4])
def model(request, reference):
    with moekit.load(
        reference / "checkpoint", request.param, "cpu", experts="int8", backend="loop", **QUIET
    ) as found:
        yield found


@pytest.fixture(scope="module")
def oracle(reference):
    """One rank whose experts have the type of the other weights, and the values of the quantised ones."""

    def round_(rank):
        for layer in rank.state["model"].layers:
            if layer.moe is not None:
                experts = layer.moe.experts
                rounded = QuantisedExperts.of(experts, torch.int8)
                for number in range(experts.held):
                    for name, weights in rounded.expert(number)._asdict().items():
                        getattr(experts, name).data[number] = weights

    with moekit.load(reference / "checkpoint", 1, "cpu", backend="loop", **QUIET) as found:
        found.ranks.call(round_)
        yield found


def test_every_verb_computes_what_the_rounded_weights_do(model, oracle, reference):
    data = {"tokens_per_sample": 32, "max_batches": 6, "capacity_token_fraction": 0.3, **QUIET}
    found, wanted = (each.evaluate(reference / "data-bin", **data) for each in (model, oracle))
    np.testing.assert_allclose(found.tokens["logprob"], wanted.tokens["logprob"], atol=2e-5)
    prompts = [[5, 6, 7], [8, 9]]
    found, wanted = (each.generate(prompts, max_new_tokens=6, **QUIET) for each in (model, oracle))
    assert [one.ids for one in found] == [one.ids for one in wanted]
    found, wanted = (each.trace(prompts, **QUIET) for each in (model, oracle))
    assert np.array_equal(found.experts, wanted.experts)
    assert found.meta["experts"] == "int8" and wanted.meta["experts"] is None
    scores = []
    for each in (model, oracle):
        with each.route(mask={1: [0, 1]}, drop_second=True):
            scores.append(each.score(prompts)["logprob"])
    np.testing.assert_allclose(*scores, atol=2e-5)


def test_the_type_of_the_experts_is_shown(model, reference):
    assert "experts in int8, float32 on" in repr(model)
    assert set(report.parts(model)["experts' type"]) == {"int8"}
    assert "float32, experts in int8" in report.model(model).loc["ranks"].item()
    where = reference / "checkpoint", model.world_size, "cpu", "auto"
    shares = report.shares(*where, experts="int8")
    assert set(shares["experts' type"]) == {"int8"} and set(report.shares(*where)["experts' type"]) == {
        "float32"
    }
    for part, told in zip(model.parts, shares["GiB"], strict=True):
        assert told == round(part["bytes"] / 2**30, 3)
    files = report.files(reference / "checkpoint")["experts_dtype"]
    assert files["model-shared.pt"] == "" and set(files.drop("model-shared.pt")) == {"float16"}


# ------------------------------------------------------------------------------------------------- what it costs


@pytest.mark.parametrize("kind", KINDS)
def test_experts_that_are_not_finite_are_named(kind):
    """Their numbers of one byte cannot be asked for it, and their scales can."""
    with moekit.load("demo", 1, "cpu", experts=kind, **QUIET) as model:
        model.ranks.call(damage, model.config.moe_layers[1])
        with pytest.warns(
            RuntimeWarning, match="the weights of the experts of layer 3 are not finite already"
        ):
            model.score([range(4, 40)])


def damage(rank, layer):
    rank.state["model"].layers[layer].moe.experts.w1_scale.fill_(math.nan)


def test_what_one_byte_costs_the_demo():
    """All of the demo's text: the perplexity within 0.02 %, the errors of a layer, and the model as before."""
    with moekit.load("demo", 1, "cpu", experts="int8", **QUIET) as model:
        before = model.score("A model is as it was before.")
        found = report.quantisation(model, max_tokens=None)
        assert model.score("A model is as it was before.").equals(before)
    told = found.compared.paired
    assert told.tokens > 40_000 and told.units > 100
    assert abs(math.expm1(-told.value)) < 2e-4
    assert told.low < 0 < told.high
    assert found.layers.index.tolist() == [1, 3, 5]
    assert found.layers["error"].between(0.005, 0.012).all()
    assert (found.layers["same experts"] > 0.99).all() and (found.layers["same first choice"] > 0.998).all()
    assert found.layers.loc[1, "same experts"] == 1, "no quantised layer is before the first"
    assert found.change.loc["tokens"].item() == f"{told.tokens:,}"


def test_the_cost_does_not_depend_on_the_ranks_and_floats_of_one_byte_cost_more(reference):
    found = {}
    for ranks, experts in ((1, "int8"), (2, "int8"), (1, "fp8")):
        with moekit.load(reference / "checkpoint", ranks, "cpu", experts=experts, **QUIET) as model:
            how = {"tokens_per_sample": 32, "capacity_token_fraction": 0.3}
            found[ranks, experts] = report.quantisation(model, reference / "data-bin", max_tokens=600, **how)
    one, two, floats = found.values()
    np.testing.assert_allclose(one.layers, two.layers, atol=1e-6)
    assert one.change.iloc[0].equals(two.change.iloc[0])
    assert (floats.layers["error"] > 2 * one.layers["error"]).all()


def test_the_experts_of_the_files_are_those_of_a_plain_model(reference):
    """What the quantised model is compared with computes what a model without quantisation does."""
    how = {"tokens_per_sample": 32, "max_tokens": 300, **QUIET}
    with (
        moekit.load(reference / "checkpoint", 2, "cpu", experts="int8", backend="loop", **QUIET) as model,
        moekit.load(reference / "checkpoint", 2, "cpu", backend="loop", **QUIET) as plain,
    ):
        after = model.trace(reference / "data-bin", **how)
        found = report.quantisation(model, reference / "data-bin", **how).compared.tokens
        before = plain.trace(reference / "data-bin", **how)
    np.testing.assert_allclose(found["logprob_before"], before.logprob, atol=1e-6)
    np.testing.assert_allclose(found["logprob_after"], after.logprob, atol=1e-6)


def test_experts_that_are_placed_otherwise_are_the_same(reference):
    """Quantised, read from the files for the comparison, and placed on two ranks in another order."""
    found = {}
    count = moekit.checkpoint.survey(moekit.checkpoint.find(reference / "checkpoint")).config.experts
    for placement in (None, {1: [rank for _ in range(count // 2) for rank in (1, 0)]}):
        with moekit.load(
            reference / "checkpoint", 2, "cpu", experts="int8", placement=placement, **QUIET
        ) as model:
            how = {"tokens_per_sample": 32}
            told = report.quantisation(model, reference / "data-bin", max_tokens=300, **how)
            found[placement is None] = told.layers, told.compared.tokens
    for one, other in zip(*found.values(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_comparison_that_cannot_be_made_costs_nothing(reference, tmp_path):
    import shutil

    folder = shutil.copytree(reference / "checkpoint", tmp_path / "checkpoint")
    with moekit.load(folder, 1, "cpu", **QUIET) as model:
        with pytest.raises(
            ValueError, match="experts are as the files have them: load it with experts='int8'"
        ):
            report.quantisation(model)
    with moekit.load(folder, 2, "cpu", experts="int8", **QUIET) as model:
        before = model.score([[5, 6, 7]])
        with pytest.raises(ValueError, match=r"has no bogus\.bin"):
            report.quantisation(model, reference / "data-bin", subset="bogus")
        (folder / "model-rank-1.pt").rename(tmp_path / "aside.pt")
        with pytest.raises(
            ValueError, match=r"model-rank-1.pt is not the file that the model was loaded from"
        ):
            report.quantisation(model, [[5, 6, 7]])
        assert model.score([[5, 6, 7]]).equals(before)


def test_names_of_types():
    assert [name_of(kind) for kind in (*KINDS.values(), None)] == ["int8", "fp8", None]
