"""A fused decode step that is wrong on a GPU is noticed before it is used."""

import os
import warnings
from types import SimpleNamespace

import pytest
import torch

INTERPRET = "TRITON_INTERPRET"
if not torch.cuda.is_available():
    os.environ[INTERPRET] = "1"  # read when a kernel is defined: by the imports that follow

pytest.importorskip("triton")
from branch_cases import CASES, build

from moekit import checkpoint
from moekit.nn.cache import Cache
from moekit.nn.dispatch import Local
from moekit.nn.kernels import batch_step, grid_barrier, operations, short_step, trust
from moekit.nn.kernels.grid_barrier import GAVE_UP
from moekit.nn.passes import Pass
from moekit.nn.transformer import Transformer

os.environ.pop(INTERPRET, None)  # other tests know nothing of it


class Model:
    """Something that a dictionary can have as a weak key."""


@pytest.fixture
def pretended(monkeypatch):
    monkeypatch.setattr(trust, "compares", lambda model: True)
    monkeypatch.setattr(trust, "_trusted", type(trust._trusted)())


def test_what_a_failed_comparison_left_behind_is_forgotten_once(pretended):
    model, logits, forgotten = Model(), torch.randn(2, 50), []

    def asked(rows, off):
        return trust.trusted(
            model, "a", rows, lambda: logits + off, lambda: logits, lambda: forgotten.append(rows)
        )

    assert asked(2, 0.0) and not forgotten
    with pytest.warns(UserWarning, match="a decode step of 3 sequences in a is off by"):
        assert not asked(3, logits.flip(1))
    assert not asked(3, 0.0) and asked(2, 0.0) and forgotten == [3]


def test_a_barrier_that_gave_up_is_an_error_of_its_model_and_once():
    one, other = (Transformer(CASES["before_dropping"].config) for _ in range(2))
    cpu = torch.device("cpu")
    count = grid_barrier.counter(one, cpu)
    assert grid_barrier.counter(one, cpu) is count and grid_barrier.counter(other, cpu) is not count
    count.fill_(GAVE_UP + 17)
    operations.check(other)
    with pytest.raises(RuntimeError, match="did not all run at the same time"):
        operations.check(one)
    operations.check(one)
    count.fill_(GAVE_UP)
    grid_barrier.forget(one)
    operations.check(one)
    assert grid_barrier.counter(one, cpu) is count, "graphs use it"


def test_a_step_is_compared_once_a_size(pretended):
    model, asked = Model(), []
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) + 100

    def step(name, off):
        def go():
            asked.append(name)
            return logits + off

        return go

    for rows in (3, 3, 4):
        # The mean of a row is none of its difference, and a little noise is none.
        found = trust.trusted(model, "a", rows, step("fast", 5 + 0.1 * logits.roll(1) / 100), step("slow", 0))
        assert found
    assert asked == ["slow", "fast"] * 2


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda logits: logits.roll(1, dims=-1), r"is off by 1\.\d"),
        (lambda logits: logits * torch.nan, "is off by inf"),
        (lambda logits: torch.zeros_like(logits), "is off by 1 "),
        (lambda logits: 1 / 0, r"fails on this GPU \(ZeroDivisionError: division by zero\)"),
    ],
)
def test_a_wrong_step_is_said_once_and_not_used(pretended, wrong, said):
    model, logits = Model(), torch.randn(3, 500, generator=torch.Generator().manual_seed(0)) + 100
    with pytest.warns(
        UserWarning, match=f"a decode step of 3 sequences in one launch {said}.*ordinary kernels"
    ):
        assert not trust.trusted(model, "one launch", 3, lambda: wrong(logits), lambda: logits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not trust.trusted(model, "one launch", 3, lambda: wrong(logits), lambda: logits)


def test_one_wrong_sequence_among_many_is_seen(pretended):
    logits = torch.randn(64, 500, generator=torch.Generator().manual_seed(0))
    other = logits.clone()
    other[5] = logits[6]
    with pytest.warns(UserWarning, match=r"64 sequences in kernels for many is off by 1\.\d"):
        assert not trust.trusted(Model(), "kernels for many", 64, lambda: other, lambda: logits)


def test_logits_that_are_all_alike_or_nan_are_no_reason(pretended):
    for logits in (torch.ones(2, 4), torch.full((2, 4), torch.nan)):
        assert trust.trusted(
            Model(), "one launch", 2, lambda logits=logits: logits, lambda logits=logits: logits
        )
    with pytest.warns(UserWarning, match="off by inf"):
        assert not trust.trusted(
            Model(), "one launch", 1, lambda: torch.arange(4.0)[None], lambda: torch.ones(1, 4)
        )


def test_a_rank_without_sequences_has_nothing_to_compare(pretended):
    """Each rank has the whole of a dense model, and a rank may have no sequence."""
    model = SimpleNamespace(dispatch=Local())
    asked = Pass(groups=0, rows_expected=1)
    assert operations.read_on(model, torch.zeros(0, dtype=torch.long), asked, 50) is None


def test_what_is_compared():
    """Only where one process decides, and where a comparison changes no count."""
    gpu, cpu = (
        SimpleNamespace(weight=SimpleNamespace(is_cuda=True)),
        SimpleNamespace(weight=SimpleNamespace(is_cuda=False)),
    )
    model = SimpleNamespace(embed=gpu, dispatch=Local(), slots=None)
    assert trust.compares(model)
    for other in ({"embed": cpu}, {"dispatch": object()}, {"slots": object()}):
        assert not trust.compares(SimpleNamespace(**vars(model) | other))


def test_a_lack_of_memory_is_no_wrong_step(pretended):
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory")

    model, logits = Model(), torch.ones(1, 4)
    with pytest.raises(torch.OutOfMemoryError):
        trust.trusted(model, "one launch", 1, full, lambda: logits)
    assert not trust._trusted[model]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter pretends")
def test_a_model_reads_on_with_the_ordinary_kernels_where_fused_ones_are_wrong(
    tmp_path, monkeypatch, pretended
):
    """The cache is that of the ordinary step, whatever the wrong one has written."""
    monkeypatch.setenv(INTERPRET, "1")
    build("alternate_ffn", tmp_path)
    plan = checkpoint.survey(checkpoint.find(tmp_path))
    from moekit.nn import transformer

    model = transformer.empty(plan.config, torch.device("cpu"), torch.float32)
    checkpoint.fill(model, plan, range(plan.config.experts), lambda *_: None, 1)
    model.use("triton")

    def read(count):
        cache = Cache(model.config, count, 16, torch.device("cpu"), torch.float32)
        ids = torch.arange(5, 5 + 3 * count).view(count, 3)
        with torch.inference_mode():
            model(ids[:, :2], Pass(cache=cache))
            cache.advance(torch.full((count,), 2))
            return operations.read_on(
                model, ids[:, 2], Pass(groups=count, cache=cache), 150
            ), cache.kv.clone()

    # A model of this size takes the kernels for few, and for many where these fit.
    assert short_step.fits(model, 2)
    right, cached = read(2)
    assert any(trust._trusted[model].values())
    trust._trusted.clear()
    for module in (short_step, batch_step):

        def broken(*arguments, whole=module.read_on, **options):
            return whole(*arguments, **options).flip(-1)

        monkeypatch.setattr(module, "read_on", broken)
    with pytest.warns(UserWarning, match="ordinary kernels are used"):
        found, kept = read(2)
    torch.testing.assert_close(found, right, rtol=0, atol=1e-5)
    torch.testing.assert_close(kept, cached, rtol=0, atol=1e-5)
    assert not any(trust._trusted[model].values())
