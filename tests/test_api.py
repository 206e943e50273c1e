"""What a model's verbs take, decide once, and refuse before the ranks are asked."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from branch_cases import BASE

import moekit
from moekit.api import Model
from moekit.checkpoint import export
from moekit.data.codec import Codec, Ids
from moekit.fairseq_data import Data
from moekit.generation.request import KINDS, rules
from moekit.nn.config import ModelConfig
from moekit.nn.intervene import Force
from moekit.nn.transformer import Transformer
from moekit.paths import DEMO_BPE, DEMO_DATA
from moekit.symbols import BOS, EOS, PAD

QUIET = {"progress": False}


def write(folder: Path, **options) -> Path:
    """A checkpoint with random weights."""
    model = Transformer(ModelConfig(**(vars(BASE) | options)))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    export.save(model, folder, files=2)
    return folder


@pytest.fixture(scope="module")
def tiny(reference):
    with moekit.load(reference / "checkpoint", device="cpu", **QUIET) as model:
        yield model


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """The demo's codec, no dict.txt beside the checkpoint, and 500 rows of the matrices that no type has."""
    folder = write(tmp_path_factory.mktemp("wide"), vocab_rows=len(Codec.load("demo")) + 500)
    with moekit.load(folder, device="cpu", bpe="demo", **QUIET) as model:
        yield model


@pytest.fixture
def asleep(tiny, monkeypatch):
    """The tiny model, whose ranks must not be asked."""
    monkeypatch.setattr(tiny.ranks, "call", None)
    return tiny


def with_bos(reference: Path, folder: Path) -> Path:
    for path in (reference / "checkpoint").iterdir():
        state = torch.load(path, weights_only=True)
        state["cfg"]["task"]["add_bos_token"] = True
        torch.save(state, folder / path.name)
    return folder


# ---------------------------------------------------------------------------------------------- decided once


def test_scoring_and_generating_know_one_vocabulary(wide):
    """The rows that no type has take no part in the softmax, of text or of its ids."""
    (made,) = wide.generate("The", max_new_tokens=5, **QUIET)
    prompt = wide.codec.encode("The")
    for texts in ([prompt + made.ids], prompt + made.ids):
        np.testing.assert_allclose(wide.score(texts)["logprob"][len(prompt) :], made.logprobs, atol=1e-5)
    trace = wide.trace([prompt + made.ids], **QUIET)
    np.testing.assert_allclose(trace.logprob[len(prompt) : -1], made.logprobs, atol=1e-5)
    assert wide.vocab == len(wide.codec) < wide.config.vocab_rows
    for call in (wide.score, wide.generate, wide.trace):
        with pytest.raises(ValueError, match=rf"the id {wide.vocab}; expected 0 to {wide.vocab - 1}"):
            call([[5, wide.vocab]])


def test_texts_begin_as_fairseqs_hub_has_them_begin(reference, tmp_path):
    """``<s>`` where the model was trained with ``add_bos_token``: scores are those of fairseq's own interface."""
    from fairseq.models.transformer_lm import TransformerLanguageModel

    folder, data = with_bos(reference, tmp_path), str((reference / "data-bin").resolve())
    lm = TransformerLanguageModel.from_pretrained(
        str(folder),
        data_name_or_path=data,
        user_dir=str(Path(moekit.__file__).parent / "plugin"),
        moe_eval_capacity_token_fraction=None,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fairseq's of pinned memory
        (best, *_), *_ = lm.generate([torch.tensor([5, 6, 7])], score_reference=True)
    with moekit.load(folder, device="cpu", **QUIET) as model:
        assert model.config.add_bos and model.first == BOS
        scored, trace = model.score([5, 6, 7])["logprob"], model.trace([5, 6, 7], **QUIET)
        (made,) = model.generate([5, 6, 7], max_new_tokens=4, **QUIET)
        again = model.score([5, 6, 7, *made.ids])["logprob"][3:]
    np.testing.assert_allclose(scored, best["positional_scores"], atol=1e-4)
    np.testing.assert_allclose(trace.logprob[:3], best["positional_scores"], atol=1e-4)
    assert trace.token.tolist() == [BOS, 5, 6, 7]
    np.testing.assert_allclose(again, made.logprobs, atol=1e-4)


def test_without_add_bos_texts_begin_with_the_end_of_a_sentence(tiny):
    assert tiny.first == EOS and tiny.trace([5, 6], **QUIET).token.tolist() == [EOS, 5, 6]


def test_an_interventions_capacity_is_merged_once_for_every_verb(tiny, reference):
    texts, how = [[5] * 30, [6] * 20], {"batch_size": 2}
    wanted = tiny.score(texts, capacity_token_fraction=0.05, **how)
    free = tiny.score(texts, **how)
    with tiny.route(capacity_token_fraction=0.05):
        pd.testing.assert_frame_equal(tiny.score(texts, **how), wanted)
        trace = tiny.trace(texts, **how, **QUIET)
        made = tiny.generate(texts, max_new_tokens=2, trace=True, **QUIET)
    assert trace.meta["capacity_token_fraction"] == made[0].trace.meta["capacity_token_fraction"] == 0.05
    assert not trace.kept.all() and not made[0].trace.kept.all()
    with tiny.route(capacity_token_fraction=None):
        pd.testing.assert_frame_equal(tiny.score(texts, capacity_token_fraction=0.05, **how), free)
    assert not wanted.equals(free)


def test_the_trainings_capacity_has_a_name(tiny, reference):
    how = {"tokens_per_sample": 64, "batch_size": 2, **QUIET}
    named = tiny.evaluate(reference / "data-bin", capacity_token_fraction="training", **how)
    number = tiny.evaluate(reference / "data-bin", capacity_token_fraction=-1, **how)
    assert named.tokens.equals(number.tokens)
    assert not named.tokens.equals(tiny.evaluate(reference / "data-bin", **how).tokens)


def test_without_a_codec_tokens_are_shown_by_their_ids(tiny):
    assert isinstance(tiny.codec, Ids) and not tiny.reads_text
    assert tiny.codec.pieces([5, 6]) == [" 5", " 6"] and tiny.codec.decode([5, 6]) == " 5 6"
    assert tiny.score([5, 6])["piece"].tolist() == [" 5", " 6"]
    assert tiny.generate([5, 6], 2, **QUIET)[0].text is None
    for call in (tiny.score, tiny.generate, tiny.trace):
        with pytest.raises(ValueError, match=r"text needs encoder\.json, vocab\.bpe, dict\.txt, expected in"):
            call(["text"])


def test_a_codec_that_was_asked_for_has_to_be_there(reference, tmp_path, monkeypatch):
    monkeypatch.setattr(moekit.ranks, "start", None)
    with pytest.raises(ValueError, match="expected in /nowhere:"):
        moekit.load(reference / "checkpoint", device="cpu", bpe="/nowhere", **QUIET)
    with pytest.raises(ValueError, match="has 8192 types, the model knows 200"):
        moekit.load(reference / "checkpoint", device="cpu", bpe="demo", **QUIET)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match=f"expected in {tmp_path}/bpe:"):
        moekit.load(reference / "checkpoint", device="cpu", bpe="~/bpe", **QUIET)
    with pytest.raises(ValueError, match=rf"there is no dictionary {tmp_path}/x"):
        moekit.load(reference / "checkpoint", device="cpu", dictionary="~/x", **QUIET)


def test_a_codec_of_another_dictionary_is_refused(tmp_path):
    folder = write(tmp_path / "model", vocab_rows=8192)
    shutil.copytree(DEMO_BPE, tmp_path / "bpe", copy_function=shutil.copyfile)
    lines = (DEMO_BPE / "dict.txt").read_text().splitlines()
    (folder / "dict.txt").write_text("\n".join([lines[1], lines[0], *lines[2:]]) + "\n")
    with pytest.raises(ValueError) as found:
        moekit.load(folder, device="cpu", bpe=tmp_path / "bpe", **QUIET)
    assert f"{tmp_path}/bpe/dict.txt and {folder}/dict.txt differ first in line 1" in str(found.value)


def test_what_nothing_draws_has_no_effect(tiny):
    wanted = tiny.generate([5, 6], 5, **QUIET)[0]
    assert tiny.generate([5, 6], 5, top_k=3, top_p=0.5, **QUIET)[0].ids == wanted.ids
    searched = tiny.generate([5, 6], 5, beam_size=2, **QUIET)[0]
    assert tiny.generate([5, 6], 5, beam_size=2, top_k=3, **QUIET)[0].ids == searched.ids


def test_the_rules_of_generation_need_no_model():
    import inspect

    defaults = {n: p.default for n, p in inspect.signature(Model.generate).parameters.items() if n in KINDS}
    assert defaults.keys() == KINDS.keys()
    streams = {n: p.default for n, p in inspect.signature(Model.stream).parameters.items() if n in KINDS}
    assert streams.items() <= defaults.items() and KINDS.keys() - streams.keys() == {"beam_size"}
    assert rules(defaults | {"top_k": 5})["top_k"] is None
    assert rules(defaults | {"top_k": 5, "temperature": 1})["top_k"] == 5
    with pytest.raises(ValueError, match="num_return_sequences=3: expected at most beam_size=2"):
        rules(defaults | {"beam_size": 2, "num_return_sequences": 3})


# ------------------------------------------------------------------------------------------ arguments of all kinds


def test_texts_and_ids_come_from_any_iterable_once(wide):
    wanted = wide.score(["abc", "def"])
    assert sorted(set(wanted["sample"])) == [0, 1]
    lines = {"a": "abc", "b": "def"}
    for texts in (
        (t for t in ["abc", "def"]),
        iter(["abc", "def"]),
        np.array(["abc", "def"]),
        lines.values(),
    ):
        pd.testing.assert_frame_equal(wide.score(texts), wanted)
    ids = [wide.codec.encode(text) for text in ("abc", "def")]
    for made in ((iter(part) for part in ids), map(tuple, ids), [torch.tensor(part) for part in ids]):
        pd.testing.assert_frame_equal(wide.score(made), wanted)
    for made in (ids[0], iter(ids[0]), np.array(ids[0])):
        one = wide.score(made)
        pd.testing.assert_frame_equal(one, wanted[wanted["sample"] == 0])
    found = wide.generate((t for t in ["abc", "def"]), 2, stop=(s for s in ["x" * 9]), **QUIET)
    assert [g.prompt for g in found] == [0, 1]
    assert wide.trace((t for t in ["abc", "def"]), **QUIET).meta["texts"] == 2
    assert len({t.sequence for t in wide.stream((t for t in ["abc", "def"]), 2)}) == 2


def test_numpys_numbers_are_numbers(tiny, reference):
    how = {
        "tokens_per_sample": 64,
        "batch_size": 2,
        "capacity_token_fraction": 0.25,
        "max_batches": 2,
        "seed": 3,
    }
    numpys = {n: np.float32(v) if isinstance(v, float) else np.int64(v) for n, v in how.items()}
    data = reference / "data-bin"
    assert tiny.evaluate(data, **numpys, **QUIET).tokens.equals(tiny.evaluate(data, **how, **QUIET).tokens)
    trace = tiny.trace(
        data, batch_size=np.int64(2), layers=np.array([3]), full=iter([3]), max_tokens=1e3, **QUIET
    )
    assert trace.layers == (3,) and list(trace.full) == [3] and isinstance(trace.meta["batch_size"], int)
    force = Force(np.int64(3), sample=np.int64(0), positions=range(2), layers=np.array([1]))
    with tiny.route(mask={np.int64(1): (e for e in [7])}, force=(f for f in [force])):
        traced = tiny.trace([5, 6, 7], **QUIET)
    assert traced.experts[:2, 0, 0].tolist() == [3, 3]
    with moekit.load(
        reference / "checkpoint", np.int64(1), "cpu", config={"max_positions": np.int64(32)}, **QUIET
    ) as model:
        assert model.config.max_positions == 32


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: m.score([5], batch_size=0), "batch_size=0: expected a whole number of at least 1"),
        (lambda m: m.score([5], batch_size=np.nan), "batch_size=nan: expected a whole number"),
        (lambda m: m.score([5], seed=-1), "seed=-1: expected a whole number of at least 0"),
        (lambda m: m.score([5, 200]), "text 0 has the id 200; expected 0 to 199, without 1"),
        (lambda m: m.score([[5], [-1]]), "text 1 has the id -1; expected 0 to 199"),
        (lambda m: m.score([5, PAD]), "text 0 has the id 1; expected 0 to 199, without 1, the padding"),
        (lambda m: m.score([2**70]), "text 0 has the id 1180591620717411303424; expected"),
        (lambda m: m.score([]), "there are no texts"),
        (lambda m: m.score([[5], []]), "text 1 has 0 tokens"),
        (lambda m: m.score([5] * 64), "text 0 has 64 tokens; expected 1 to 63"),
        (lambda m: m.score({"a": 1}), "texts={'a': 1}: found dict"),
        (lambda m: m.score(b"a"), "texts=b'a': found bytes"),
        (lambda m: m.trace([5, 200]), "text 0 has the id 200"),
        (lambda m: m.trace({5}), r"texts=\{5\}: found set"),
        (lambda m: m.trace([5], layers=[0]), "layer 0 holds no experts"),
        (lambda m: m.trace([5], layers="one"), "layers='one': expected a list of whole numbers or None"),
        (lambda m: m.trace([5], max_tokens=0), "max_tokens=0"),
        (lambda m: m.generate([5, 200]), "prompt 0 has the id 200"),
        (lambda m: m.generate([5], capacity_token_fraction="all"), "'all': expected a number"),
        (lambda m: m.evaluate("file:///x"), "data='file:///x': an address"),
        (lambda m: m.evaluate(DEMO_DATA), r"dict\.txt has 8192 types, the model knows 200|valid"),
        (lambda m: m.route(mask=[3, 7]).__enter__(), r"mask=\[3, 7\]: expected {layer: \[experts\]}"),
        (lambda m: m.route(mask={1: [1.5]}).__enter__(), r"mask=\[1.5\]: expected a list of whole"),
        (lambda m: m.route(force=3).__enter__(), "force=3: expected moekit.Force"),
        (lambda m: m.route(drop_second="maybe").__enter__(), "drop_second='maybe': expected True or False"),
        (lambda m: m.route(capacity_token_fraction=np.nan).__enter__(), "capacity_token_fraction=nan"),
    ],
)
def test_bad_arguments_are_refused_before_the_ranks_are_asked(asleep, call, said):
    with pytest.raises(ValueError, match=said):
        call(asleep)
    assert asleep.intervention is None


def test_bad_input_never_costs_a_model_of_two_ranks(reference, tmp_path):
    data = tmp_path / "data-bin"
    shutil.copytree(reference / "data-bin", data, copy_function=shutil.copyfile)
    ids = np.fromfile(data / "valid.bin", "<u2")
    ids[100] = 200
    ids.tofile(data / "valid.bin")
    with moekit.load(reference / "checkpoint", 2, "cpu", **QUIET) as model:
        wanted = model.score([5, 6, 7])
        for call in (lambda: model.evaluate(data, **QUIET), lambda: model.trace(data, **QUIET)):
            with pytest.raises(
                ValueError, match=f"{data}/valid.bin: id 200 at place 100 is outside dict.txt"
            ):
                call()
        for call in (model.score, model.generate, model.trace):
            with pytest.raises(ValueError, match="id 200"):
                call([5, 200])
        pd.testing.assert_frame_equal(model.score([5, 6, 7]), wanted)


def test_data_is_one_object_or_its_arguments(tiny, reference):
    data = Data(reference / "data-bin", tokens_per_sample=50, batch_size=2)
    one, other = tiny.open_data(data), tiny.open_data(reference / "data-bin", "valid", 50, 2)
    assert [b.ids.tolist() for b in one] == [b.ids.tolist() for b in other]
    assert one.data.asked() == {
        "data": str(reference / "data-bin"),
        "subset": "valid",
        "tokens_per_sample": 50,
        "batch_size": 2,
        "sample_break_mode": "none",
        "context_window": 0,
    }


# ------------------------------------------------------------------------------------------------ NaN and infinity


def damaged(reference: Path, folder: Path, change) -> Path:
    for path in (reference / "checkpoint").iterdir():
        state = torch.load(path, weights_only=True)
        change(state["model"])
        torch.save(state, folder / path.name)
    return folder


def test_weights_that_are_not_finite_are_named_once_a_call(reference, tmp_path):
    def change(weights):
        if (name := "decoder.layers.2.fc1.bias") in weights:
            weights[name][:] = float("nan")

    folder = damaged(reference, tmp_path, change)
    for world_size in (1, 2):
        with moekit.load(folder, world_size, "cpu", **QUIET) as model:
            with pytest.warns(RuntimeWarning) as said:
                found = model.evaluate(reference / "data-bin", tokens_per_sample=64, **QUIET)
            (told,) = [str(w.message) for w in said if w.category is RuntimeWarning]
            assert told.startswith("976 of 976 log-probabilities are not finite (float32), in samples ")
            assert "the weights of the feed-forward network of layer 2 are not finite already" in told
            assert np.isnan(found.loss_base2) and np.isnan(found.perplexity)
            with pytest.warns(RuntimeWarning, match="3 of 3 .* in samples 0: "):
                model.score([5, 6, 7])
            with pytest.warns(RuntimeWarning, match=r"not finite in 2 of 2 sequences \(0, 1\): model.score"):
                model.generate([[5, 6], [7]], 2, **QUIET)


@pytest.mark.parametrize("expert", [0, 7])
def test_weights_of_an_expert_are_named_whichever_rank_holds_it(reference, tmp_path, expert):
    module = moekit.module(reference / "checkpoint")
    with torch.no_grad():
        module.layers[1].moe.experts.w1[expert] = float("nan")
    export.save(module, tmp_path, files=2)
    ids = list(range(4, 60))
    for world_size in (1, 2):
        with pytest.warns(UserWarning, match="weights in 1 tensors are not finite"):
            model = moekit.load(tmp_path, world_size, "cpu", **QUIET)
        with model, pytest.warns(RuntimeWarning) as said:
            model.score([ids])
        [told] = [str(w.message) for w in said]
        assert "the weights of the experts of layer 1 are not finite already" in told


def test_an_overflow_of_float16_is_named_with_what_to_do(reference, tmp_path):
    def change(weights):
        if (name := "decoder.layers.2.fc2.weight") in weights:
            weights[name] *= 60_000

    folder = damaged(reference, tmp_path, change)
    with moekit.load(folder, 1, "cpu", "float16", **QUIET) as model:
        with pytest.warns(RuntimeWarning) as said:
            model.score([5, 6, 7])
        (told,) = [str(w.message) for w in said if w.category is RuntimeWarning]
    assert "feed-forward network of layer 2" in told and "dtype='bfloat16' or 'float32'" in told
    with moekit.load(folder, 1, "cpu", "float32", **QUIET) as model, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isfinite(model.score([5, 6, 7])["logprob"]).all()


def test_finite_results_are_no_reason_to_warn(tiny, reference):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for mode in ("none", "eos", "complete"):
            tiny.evaluate(reference / "data-bin", tokens_per_sample=64, sample_break_mode=mode, **QUIET)


def test_texts_of_a_study_are_read_once_too(tiny):
    from moekit.invariance import batch_invariance

    found = batch_invariance(tiny, (ids for ids in ([5, 6, 7], [8, 9])), batch_sizes=iter([2]), **QUIET)
    assert {trace.meta["texts"] for trace in found.traces.values()} == {2}
