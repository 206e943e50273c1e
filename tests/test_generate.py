"""Generation: against scoring, against itself on other ranks and in other company, and by hand."""

import copy
import dataclasses
import functools
import gc
import itertools
import json
import math
import pickle
import re
import subprocess
import sys
import threading
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

import moekit
from moekit.checkpoint import export
from moekit.data.codec import Codec
from moekit.generation import request, run, session
from moekit.generation.text import Text
from moekit.generation.written import Written
from moekit.nn.cache import Cache
from moekit.nn.config import ModelConfig
from moekit.nn.intervene import Force
from moekit.nn.noise import splitmix64, uniform
from moekit.nn.passes import Pass
from moekit.nn.record import Options
from moekit.nn.transformer import Transformer
from moekit.paths import DEMO_BPE as DEMO
from moekit.ranks import streams
from moekit.symbols import EOS, PAD
from moekit.worker import decoding, greedy
from moekit.worker.prompts import dealt, most_tokens
from moekit.worker.sampling import Settings, choose

IDS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16], [], [17, EOS, 18]]
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def recorded(reference):
    with moekit.load(reference / "checkpoint", device="cpu", **QUIET) as model:
        yield model


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    """A random model with the demo's dictionary."""
    codec = Codec.load("demo")
    config = ModelConfig(
        layers=2, dim=32, ffn_dim=32, heads=2, vocab_rows=len(codec), input_dim=32, output_dim=32, max_positions=64,
        share_output=True, moe_freq=2, experts=4, gate_fp32=True, second_expert="all", pre_norm=True,
    )  # fmt: skip
    model = Transformer(config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("model")
    export.save(model, folder, files=2)
    with moekit.load(folder, device="cpu", bpe=DEMO, **QUIET) as model:
        yield model


# ---------------------------------------------------------------------------------------------- against scoring


@pytest.mark.parametrize("changes", [{}, {"drop_second": True}])
def test_greedy_takes_what_scoring_finds_most_probable(recorded, changes):
    with recorded.route(**changes):
        found = recorded.generate(IDS, max_new_tokens=10, **QUIET)
        trace = recorded.trace(
            [ids + g.ids for ids, g in zip(IDS, found, strict=True)], predicted=True, **QUIET
        )
    for number, (ids, generation) in enumerate(zip(IDS, found, strict=True)):
        sample = trace.select(samples=number)
        new = slice(len(ids), len(ids) + 10)
        assert sample.predicted[new].tolist() == generation.ids
        np.testing.assert_allclose(sample.logprob[new], generation.logprobs, atol=1e-4)
        assert generation.score == pytest.approx(sample.logprob[new].sum(), abs=1e-3)


def test_drawn_tokens_have_the_log_probabilities_of_scoring(recorded):
    how = {"temperature": 1.3, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.2, "alternatives": 3}
    found = recorded.generate(IDS, max_new_tokens=8, num_return_sequences=2, **how, **QUIET)
    assert [g.prompt for g in found] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    texts = [IDS[g.prompt] + g.ids for g in found]
    trace = recorded.trace(texts, predicted=True, **QUIET)
    for number, generation in enumerate(found):
        sample = trace.select(samples=number)
        new = slice(len(texts[number]) - 8, len(texts[number]))
        np.testing.assert_allclose(sample.logprob[new], generation.logprobs, atol=1e-4)
        assert [best[0][0] for best in generation.alternatives] == sample.predicted[new].tolist()
        assert all(
            len(best) == 3 and best[0][1] >= best[1][1] >= best[2][1] for best in generation.alternatives
        )


def test_a_prompt_is_routed_by_itself_where_there_is_a_capacity(recorded):
    """The first new token follows from the prompt alone, as scoring it with batch size 1 has it."""
    prompts = [ids for ids in IDS if ids]
    found = recorded.generate(prompts, max_new_tokens=1, capacity_token_fraction=0.05, **QUIET)
    trace = recorded.trace(prompts, capacity_token_fraction=0.05, predicted=True, **QUIET)
    assert not trace.kept.all()
    last = [trace.select(samples=n).predicted[-1] for n in range(len(prompts))]
    assert [g.ids[0] for g in found] == last
    free = recorded.generate(prompts, max_new_tokens=1, **QUIET)
    assert any(abs(a.score - b.score) > 1e-4 for a, b in zip(found, free, strict=True))


def test_every_moe_layer_records(recorded):
    seen = []
    recorded.generate(
        IDS,
        max_new_tokens=3,
        record=lambda layer, routing: seen.append((layer, routing.experts.shape)),
        **QUIET,
    )
    longest = 1 + max(map(len, IDS))
    assert seen == [(n, (5, t, 2)) for t in (longest, 1, 1) for n in (1, 3)]


def test_a_trace_and_a_function_that_records_see_the_same(recorded):
    seen = []
    found = recorded.generate(
        IDS[:1],
        max_new_tokens=3,
        record=lambda layer, routing: seen.append((layer, routing.experts.flatten(0, 1).clone())),
        trace=Options(layers=[3]),
        **QUIET,
    )
    assert [layer for layer, _ in seen] == [1, 3] * 3
    told = torch.cat([experts for layer, experts in seen if layer == 3])
    np.testing.assert_array_equal(told, found[0].trace.experts[:, 0])


class Mute(Exception):
    """An error whose text cannot be made."""

    def __str__(self):
        raise RuntimeError


def raises(error, *_):
    raise error


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_a_function_raises_in_a_layer_costs_no_rank(reference, world_size):
    def fails(layer, routing):
        layer // (routing.experts.shape[1] - 1)

    with moekit.load(reference / "checkpoint", world_size, "cpu", **QUIET) as model:
        wanted = model.generate(IDS, max_new_tokens=3, **QUIET)
        said = r"record raised ZeroDivisionError: .* in line \d+ of fails, on rank 0; .* the same model"
        for how in ({}, {"temperature": 1.0}, {"beam_size": 2}):
            with pytest.raises(ValueError, match=said):
                model.generate(IDS, max_new_tokens=3, record=fails, **how, **QUIET)
        with pytest.raises(
            ValueError, match=r"record raised TypeError: .*takes 1 positional argument but 2 were given, on"
        ):
            model.generate(IDS, max_new_tokens=3, record=lambda layer: None, **QUIET)
        for error, said in ((SystemExit("bye"), "SystemExit: bye"), (Mute(), "Mute")):
            with pytest.raises(ValueError, match=f"record raised {said} in line"):
                model.generate(IDS, max_new_tokens=3, record=functools.partial(raises, error), **QUIET)
        with pytest.raises(ValueError, match=said):
            model.generate(
                IDS, max_new_tokens=3, record=functools.partial(raises, Mute()), trace=True, **QUIET
            )
        with pytest.raises(ValueError, match="record raised"):
            list(model.stream(IDS, 3, record=fails))
        same(model.generate(IDS, max_new_tokens=3, **QUIET), wanted)


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_interrupt_of_a_function_is_one_and_costs_no_rank(reference, world_size):
    """In the driver's own process it is the key, which Python raises as it is; from other ranks it is told."""

    def stops(layer, routing):
        if routing.experts.shape[1] == 1:
            raise KeyboardInterrupt("enough")

    said = (
        "^enough$" if world_size == 1 else r"record raised KeyboardInterrupt: enough in line \d+ of stops, on"
    )
    with moekit.load(reference / "checkpoint", world_size, "cpu", **QUIET) as model:
        wanted = model.generate(IDS, max_new_tokens=3, **QUIET)
        for how in ({}, {"beam_size": 2}):
            with pytest.raises(KeyboardInterrupt, match=said):
                model.generate(IDS, max_new_tokens=3, record=stops, **how, **QUIET)
        with pytest.raises(KeyboardInterrupt, match=said):
            list(model.stream(IDS, 3, record=stops))
        same(model.generate(IDS, max_new_tokens=3, **QUIET), wanted)


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_a_function_raises_ends_the_generation(reference, world_size, monkeypatch):
    """The ranks make the bursts that they were told of, two ahead, and a stream its step."""
    monkeypatch.setitem(run.UNHEARD, "cpu", 1)
    bursts, add = [], Written.add
    monkeypatch.setattr(Written, "add", lambda self, burst: bursts.append(burst) or add(self, burst))

    def fails(layer, routing):
        raise KeyError("mine")

    with moekit.load(reference / "checkpoint", world_size, "cpu", **QUIET) as model:
        with pytest.raises(ValueError, match="record raised KeyError: 'mine'"):
            model.generate(IDS, max_new_tokens=40, record=fails, **QUIET)
        assert len(bursts) <= 3 * world_size
        bursts.clear()
        with pytest.raises(ValueError, match="record raised KeyError: 'mine'"):
            list(model.stream(IDS, 40, record=fails))
        assert not bursts


def test_a_function_that_cannot_be_sent_is_told(reference, tmp_path, monkeypatch):
    (tmp_path / "of_the_driver.py").write_text("def listens(layer, routing):\n    pass\n")
    lock, seen = threading.Lock(), []

    def holds(layer, routing):
        with lock:
            seen.append(layer)

    with moekit.load(reference / "checkpoint", 2, "cpu", **QUIET) as model:
        wanted = model.generate(IDS, max_new_tokens=3, **QUIET)
        said = r"record=<function .*holds at .*> cannot be sent .* \(TypeError: cannot pickle '_thread.lock' object\); expected"
        with pytest.raises(ValueError, match=said):
            model.generate(IDS, max_new_tokens=3, record=holds, **QUIET)
        with pytest.raises(ValueError, match=said):
            next(model.stream(IDS, 3, record=holds))
        with pytest.raises(ValueError, match="record=.* cannot be sent .* loaded model"):
            model.generate(IDS, max_new_tokens=3, record=lambda layer, routing: model.config, **QUIET)
        # The ranks know the folders of the time of the load.
        monkeypatch.syspath_prepend(tmp_path)
        from of_the_driver import listens

        said = r"^record cannot be made on rank 0 \(ModuleNotFoundError: No module named 'of_the_driver'\); .* in sys.path$"
        for how in ({}, {"trace": True}):
            with pytest.raises(ValueError, match=said):
                model.generate(IDS, max_new_tokens=3, record=listens, **how, **QUIET)
        with pytest.raises(ValueError, match=said):
            list(model.stream(IDS, 3, record=listens))
        same(model.generate(IDS, max_new_tokens=3, **QUIET), wanted)
    with moekit.load(reference / "checkpoint", 1, "cpu", **QUIET) as model:
        same(model.generate(IDS, max_new_tokens=3, record=holds, **QUIET), wanted)
    assert seen


# ------------------------------------------------------------------------------------- in whatever company


def same(ours, theirs) -> None:
    assert [(g.prompt, g.ids, g.text, g.finish_reason) for g in ours] == [
        (g.prompt, g.ids, g.text, g.finish_reason) for g in theirs
    ]
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
        assert a.score == pytest.approx(b.score, abs=1e-3)


WAYS = [
    {"temperature": 0.0},
    {"temperature": 1.0, "num_return_sequences": 3, "seed": 7, "top_p": 0.95, "repetition_penalty": 1.1},
    {"temperature": 1.0, "capacity_token_fraction": 0.05},
    {"beam_size": 3, "num_return_sequences": 2},
]


def test_the_world_size_changes_nothing(reference, recorded):
    """More ranks than sequences among them, so that some only serve."""
    with moekit.load(reference / "checkpoint", world_size=3, device="cpu", **QUIET) as model:
        for how in WAYS:
            for prompts in (IDS, IDS[:1]):
                same(
                    model.generate(prompts, max_new_tokens=6, **how, **QUIET),
                    recorded.generate(prompts, max_new_tokens=6, **how, **QUIET),
                )
        ours, theirs = (
            [(t.sequence, t.id) for t in m.stream(IDS, 4, temperature=1.0)] for m in (model, recorded)
        )
        assert ours == theirs


@pytest.mark.parametrize("how", WAYS)
def test_neighbours_change_nothing(recorded, how, monkeypatch):
    together = recorded.generate(IDS, max_new_tokens=6, **how, **QUIET)
    with monkeypatch.context() as changed:
        changed.setitem(request.SEQUENCE_TOKENS, "cpu", 1)  # one sequence at a time
        same(recorded.generate(IDS, max_new_tokens=6, **how, **QUIET), together)
    monkeypatch.setattr(request, "LOGITS", 450)  # of 200 types: two sequences, or one of more beams
    same(recorded.generate(IDS, max_new_tokens=6, **how, **QUIET), together)


def test_a_step_makes_no_more_logits_than_it_may(recorded, monkeypatch):
    def waves(limit: int, **how) -> list[int]:
        monkeypatch.setattr(request, "LOGITS", limit * recorded.config.vocab_rows)
        begun = []
        with monkeypatch.context() as changed:
            begin = session.decode._begin
            changed.setattr(
                session.decode,
                "_begin",
                lambda rank, key, prompts, *more: (
                    begun.append(len(prompts)) or begin(rank, key, prompts, *more)
                ),
            )
            recorded.generate(IDS, max_new_tokens=3, **how, **QUIET)
        return begun

    assert waves(2) == [2, 2, 1]
    assert waves(4, beam_size=2) == [2, 2, 1]
    assert waves(1, beam_size=2) == [1] * 5
    assert waves(1000) == [5]


def test_a_search_in_which_an_expert_gives_nan_has_all_results_and_a_warning(reference, tmp_path, recorded):
    """A prompt that such an expert reads finds no numbers, and the others find what they find without it."""
    module = moekit.module(reference / "checkpoint")
    last = module.config.moe_layers[-1]
    with torch.no_grad():
        module.layers[last].moe.experts.w2[3] = float("nan")
    export.save(module, tmp_path, files=2)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(4, 200, 3).tolist() for _ in range(12)]
    ways = [{"beam_size": 3, "num_return_sequences": 2}, {"beam_size": 2, "num_return_sequences": 2}]
    results = []
    for world_size in (1, 2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = moekit.load(tmp_path, world_size, "cpu", **QUIET)
        with model:
            for how in ways:
                with pytest.warns(RuntimeWarning, match=r"not finite in \d+ of 12 searches \(\d+, "):
                    found = model.generate(prompts, max_new_tokens=3, **how, **QUIET)
                assert [one.prompt for one in found] == [n for n in range(12) for _ in range(2)]
                results.append(found)
            with pytest.warns(RuntimeWarning, match="not finite in .* of 12 sequences") as said:
                tokens = list(model.stream(prompts, max_new_tokens=3))
            assert {Path(w.filename).name for w in said} == {"test_generate.py"}
            # Each sequence is told once.
            bad = {token.sequence for token in tokens if np.isnan(token.logprob)}
            assert sum(int(re.search(r"in (\d+) of", str(w.message))[1]) for w in said) == len(bad)
    for one, two in zip(results[:2], results[2:], strict=True):
        assert [(a.ids, a.finish_reason) for a in one] == [(a.ids, a.finish_reason) for a in two]
    for how, found in zip(ways, results, strict=False):
        plain = recorded.generate(prompts, max_new_tokens=3, **how, **QUIET)
        whole = [
            n for n in range(0, 24, 2) if all(np.isfinite(one.logprobs).all() for one in found[n : n + 2])
        ]
        assert 0 < len(whole) < 12
        assert any(found[n : n + 2] == plain[n : n + 2] for n in whole)


def test_neighbours_change_nothing_where_the_second_expert_is_drawn(reference, monkeypatch):
    with moekit.load(
        reference / "checkpoint", device="cpu", config={"second_expert": "sampling"}, **QUIET
    ) as model:
        together = model.generate(IDS, max_new_tokens=6, **QUIET)
        other = model.generate(IDS, max_new_tokens=6, seed=2, **QUIET)
        assert any(abs(a.score - b.score) > 1e-4 for a, b in zip(together, other, strict=True))
        monkeypatch.setitem(request.SEQUENCE_TOKENS, "cpu", 1)
        same(model.generate(IDS, max_new_tokens=6, **QUIET), together)


# --------------------------------------------------------------------------------------------- text and streams


def test_line_ends_are_read_as_training_read_them_and_written_as_line_ends(text_model):
    codec = text_model.codec
    as_text = text_model.generate("Two\nlines\n", max_new_tokens=5, **QUIET)
    as_ids = text_model.generate(
        [*codec.encode("Two"), EOS, *codec.encode("lines"), EOS], max_new_tokens=5, **QUIET
    )
    same(as_text, as_ids)
    pieces = Text(codec, ())
    assert "".join(pieces.add(i) for i in [*codec.encode("a"), EOS, *codec.encode("b")]) == "a\nb"


def test_an_empty_prompt_starts_a_line(text_model):
    same(
        text_model.generate("", max_new_tokens=5, **QUIET),
        text_model.generate([[]], max_new_tokens=5, **QUIET),
    )


def test_the_stream_is_the_generation(text_model):
    how = {"max_new_tokens": 12, "temperature": 1.0, "num_return_sequences": 2, "alternatives": 2}
    found = text_model.generate(["The", "A longer one"], **how, **QUIET)
    tokens = list(text_model.stream(["The", "A longer one"], **how))
    assert [t.sequence for t in tokens] == [0, 1, 2, 3] * 12
    for number, generation in enumerate(found):
        mine = [t for t in tokens if t.sequence == number]
        assert [t.id for t in mine] == generation.ids
        assert "".join(t.text for t in mine) == generation.text
        assert [t.finish_reason for t in mine] == [None] * 11 + ["length"]
        assert [t.alternatives for t in mine] == generation.alternatives


@pytest.mark.parametrize("length", [1, 4])
def test_it_ends_where_a_stop_text_is_complete(text_model, length):
    how = {"max_new_tokens": 30, "temperature": 1.0, "num_return_sequences": 3}
    free = text_model.generate("The", **how, **QUIET)
    stop = free[0].text[20 : 20 + length]  # may begin and end within tokens
    for generation, unstopped in zip(
        text_model.generate("The", stop=[stop, "nowhere in it"], **how, **QUIET), free, strict=True
    ):
        assert generation.ids == unstopped.ids[: len(generation.ids)]
        before, found, _ = unstopped.text.partition(stop)
        if found:
            assert (generation.text, generation.finish_reason) == (before, "stop")
            assert stop not in text_model.codec.decode(generation.ids[:-1])
        else:
            assert (generation.text, generation.finish_reason) == (unstopped.text, "length")
    assert stop in free[0].text


def test_characters_come_whole():
    codec = Codec.load("demo")
    ids = codec.encode("日本 — жизнь €5\n🙂!")
    assert len(ids) > len("日本 — жизнь €5\n🙂!")  # so some characters have several tokens
    text = Text(codec, ["🙂"])
    pieces = [text.add(i) for i in ids]
    assert "".join(pieces) == "日本 — жизнь €5\n🙂!" and "" in pieces
    assert not any("\ufffd" in piece for piece in pieces)
    half = Text(codec, ())
    cut = codec.encode("日")[:-1]
    assert "".join(half.add(i) for i in cut) + half.rest() == "\ufffd"


def test_an_abandoned_stream_leaves_nothing_behind(text_model):
    def kept(rank):
        return sorted(map(str, rank.state))

    before = text_model.ranks.call(kept)
    tokens = text_model.stream("The", max_new_tokens=50)
    other = text_model.stream("Other", max_new_tokens=3)
    first = [next(tokens) for _ in range(3)]
    assert len(list(other)) == 3  # two may be under way
    assert text_model.ranks.call(kept) != before
    tokens.close()
    assert text_model.ranks.call(kept) == before
    assert [t.id for t in first] == text_model.generate("The", max_new_tokens=3, **QUIET)[0].ids


def test_a_closed_stream_ends_what_it_reads_from(text_model, monkeypatch):
    def kept(rank):
        return sorted(map(str, rank.state))

    # Python 3.12.3 keeps what a closed generator loops over.
    own, held = run._bursts, []
    monkeypatch.setattr(run, "_bursts", lambda *given, **how: held.append(own(*given, **how)) or held[-1])
    before = text_model.ranks.call(kept)
    tokens = text_model.stream("The", max_new_tokens=50)
    next(tokens)
    tokens.close()
    assert held and text_model.ranks.call(kept) == before


def test_a_stream_closed_while_the_ranks_are_busy_is_ended_by_the_next_generation(reference):
    def kept(rank):
        return sorted(map(str, rank.state))

    def busy(rank):
        rank.report("running")

    with moekit.load(reference / "checkpoint", world_size=2, device="cpu", **QUIET) as model:
        before = model.ranks.call(kept)
        tokens = model.stream([[5, 6]], max_new_tokens=20)
        next(tokens)
        model.ranks.call(busy, on_report=lambda rank, message: tokens.close())
        assert model.ranks.call(kept) != before
        model.generate([[5, 6]], max_new_tokens=2, **QUIET)
        assert model.ranks.call(kept) == before and not model.abandoned


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_stream_that_is_not_read_to_its_end_says_nothing_when_the_interpreter_ends(reference, world_size):
    script = f"""
import moekit
model = moekit.load({str(reference / "checkpoint")!r}, {world_size}, "cpu", progress=False)
tokens = model.stream([[5, 6]], max_new_tokens=20)
next(tokens)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert (ended.returncode, ended.stderr) == (0, "")


# ------------------------------------------------------------------------------------------------------- choosing


def drawn(logits, count=20_000, **settings):
    """How often each token comes, over ``count`` sequences."""
    logits = torch.tensor([logits]).expand(count, -1)
    keys = [(1, number, 0) for number in range(count)]
    tokens = choose(logits.float(), Settings(vocab=logits.shape[1], **settings), keys)
    return torch.bincount(tokens, minlength=logits.shape[1]) / count


@pytest.mark.parametrize("temperature", [1e-200, 1e-249, 1e-269, 1e-307, 5e-324])
@pytest.mark.parametrize("largest", [3.0, 65_504.0, 3e38])
@pytest.mark.parametrize("how", [{}, {"top_k": 3}, {"top_p": 0.5}, {"repetition_penalty": 1.5}])
def test_the_lowest_temperatures_take_the_best_token(temperature, largest, how):
    logits = torch.tensor([[2.0, 2.5, -1.0, 2.9, 2.0], [-2.0, -2.5, -1.0, -1.5, -3.0]])
    logits = logits / logits.abs().max() * largest
    seen = torch.zeros(logits.shape, dtype=torch.bool) if "repetition_penalty" in how else None
    settings = Settings(vocab=5, temperature=temperature, **how)
    found = [choose(logits, settings, [(1, n, step) for n in (0, 1)], seen).tolist() for step in range(20)]
    assert found == [[3, 2]] * 20


def test_draws_follow_the_softmax():
    logits = [0.5, 9.0, -1.0, 1.5, 0.0]  # the second is padding, which never comes
    for temperature in (0.5, 1.0, 2.0):
        wanted = torch.tensor([0.5, -math.inf, -1.0, 1.5, 0.0]).div(temperature).softmax(0)
        torch.testing.assert_close(drawn(logits, temperature=temperature), wanted, atol=0.01, rtol=0)


def test_top_k_and_top_p_by_hand():
    logits = torch.tensor([0.4, 0.0, 0.1, 0.3, 0.2]).log().tolist()
    assert drawn(logits, temperature=1.0, top_k=1).tolist() == [1, 0, 0, 0, 0]
    two = torch.tensor([4 / 7, 0, 0, 3 / 7, 0])
    torch.testing.assert_close(drawn(logits, temperature=1.0, top_k=2), two, atol=0.01, rtol=0)
    torch.testing.assert_close(drawn(logits, temperature=1.0, top_p=0.6), two, atol=0.01, rtol=0)
    assert drawn(logits, temperature=1.0, top_p=0.39).tolist() == [1, 0, 0, 0, 0]
    # of the two best the first alone has 4/7
    assert drawn(logits, temperature=1.0, top_k=2, top_p=0.57).tolist() == [1, 0, 0, 0, 0]


def test_the_repetition_penalty_by_hand():
    logits = torch.tensor([[2.0, 0.0, 1.5, -1.0]])
    seen = torch.tensor([[True, False, False, False]])
    settings = Settings(vocab=4, repetition_penalty=2.0)
    assert choose(logits, settings, [(1, 0, 0)], seen).tolist() == [2]  # 2 / 2 < 1.5
    assert choose(logits, settings, [(1, 0, 0)]).tolist() == [0]
    negative, both = torch.tensor([[-1.0, 0.0, -1.5, -4.0]]), torch.tensor([[True, False, False, False]])
    assert choose(negative, settings, [(1, 0, 0)], both).tolist() == [2]  # -1 * 2 < -1.5


def test_padding_is_never_chosen():
    logits = torch.zeros(1, 10)
    logits[0, PAD] = 50
    assert choose(logits, Settings(vocab=10), [(1, 0, 0)]).tolist() == [0]


def test_the_generator_is_splitmix64():
    """The first numbers of seed 1234567, as published with the reference implementation's ports."""
    found = splitmix64([1234567], 5, torch.device("cpu"))[0].numpy().view(np.uint64)
    assert found.tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    numbers = uniform([(1, 2, 3), (1, 2, 4)], 10_000, torch.device("cpu"))
    assert 0 < numbers.min() and numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.01 and not torch.equal(numbers[0], numbers[1])


# ------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"prompts": [[5] * 50], "max_new_tokens": 15}, "51 of the model's 64 positions"),
        ({"prompts": [[5] * 70]}, " 0 new tokens fit"),
        ({"prompts": []}, "no prompts"),
        ({"prompts": [[5, 200]]}, "id 200"),
        ({"prompts": [[5, PAD]]}, "id 1"),
        ({"prompts": "text"}, "encoder.json"),
        ({"stop": "a"}, "encoder.json"),
        ({"stop": [""]}, "stop"),
        ({"stop": None}, "None"),
        ({"prompts": None}, "NoneType"),
        ({"prompts": b"bytes"}, "bytes"),
        ({"prompts": [[5], b"bytes"]}, "prompt 1 is b'bytes'"),
        ({"prompts": [[5.5, 6]]}, "whole numbers"),
        ({"prompts": [[[5]]]}, "whole numbers"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1}, "temperature=-1"),
        ({"temperature": True}, "temperature=True"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 1.5, "temperature": 1}, "top_p=1.5"),
        ({"num_return_sequences": 2}, "num_return_sequences=2"),
        ({"beam_size": 2, "num_return_sequences": 3}, "beam_size=2"),
        ({"beam_size": 2, "temperature": 1.0}, "temperature"),
        ({"beam_size": 2, "max_new_tokens": 1}, "max_new_tokens=1"),
        ({"beam_size": 150}, r"beam_size=150: expected at most \d\d, as the dictionary has \d+ types"),
        (
            {"temperature": 1, "num_return_sequences": 2**40},
            r"num_return_sequences=\d+: expected at most 1048576",
        ),
        ({"alternatives": 10**18}, r"alternatives=10{18}: expected at most \d+, as the dictionary has"),
        ({"seed": -1}, "seed=-1"),
        ({"capacity_token_fraction": "all"}, "capacity_token_fraction"),
    ],
)
def test_mistakes_are_told_before_anything_runs(recorded, arguments, said, monkeypatch):
    monkeypatch.setattr(recorded.ranks, "call", None)
    with pytest.raises(ValueError, match=said):
        recorded.generate(**({"prompts": [[5]], "max_new_tokens": 4} | arguments))


def test_the_last_position_can_be_used(recorded):
    assert len(recorded.generate([[5] * 50], max_new_tokens=14, **QUIET)[0].ids) == 14
    assert recorded.config.max_positions == 64


def test_settings_may_be_numpys(recorded):
    ours = recorded.generate(
        [[5]], np.int64(3), temperature=np.float32(1), seed=np.int64(2), top_p=np.float64(0.5), **QUIET
    )
    same(ours, recorded.generate([[5]], 3, temperature=1, seed=2, top_p=0.5, **QUIET))


def test_prompts_may_be_arrays(recorded):
    ours = recorded.generate(np.array([[5, 6], [7, 8]]), max_new_tokens=3, **QUIET)
    same(ours, recorded.generate([torch.tensor([5, 6]), [7, 8]], max_new_tokens=3, **QUIET))
    one = recorded.generate(torch.tensor([5, 6]), max_new_tokens=3, **QUIET)
    assert len(one) == 1 and json.dumps(one[0].ids)  # plain ints


class Step:
    """What a GPU captures, as a stand-in that is valid for one set of rows and writes to the cache when it is made."""

    made = []

    def __init__(self, model, cache, vocab, rows_expected, end=None):
        self.model, self.cache, self.vocab, self.kv = model, cache, vocab, cache.kv
        self.lengths, self.end, self.failing = cache.lengths, end, -1
        tokens = torch.zeros(len(cache.lengths), dtype=torch.long)
        self.inputs = [tokens] if end is None else [tokens, cache.lengths.clone()]
        self.made.append(self)
        for _ in range(2):
            self(*self.inputs)

    def __call__(self, *given):
        assert self.kv is self.cache.kv and self.lengths is self.cache.lengths, "it is out of date"
        self.failing -= 1
        if self.failing == 0:
            raise RuntimeError("a step fails")
        for own, other in zip(self.inputs, given, strict=True):
            own.copy_(other)
        cache = self.cache if self.end is None else self.cache.counting(self.inputs[1])
        step = Pass(groups=len(self.inputs[0]), cache=cache)
        logits = self.model.logits(self.model(self.inputs[0][:, None], step)[:, 0], self.vocab)
        if self.end is not None:
            self.end(*self.inputs, logits)
        return logits


@pytest.fixture
def replayed(text_model, monkeypatch):
    """The steps that are captured."""
    monkeypatch.setattr(Step, "made", [])
    monkeypatch.setattr(session.decode.graphs, "of_step", Step)
    monkeypatch.setattr(
        session.decode.graphs,
        "fits",
        lambda model, asked, *rows: bool(rows) and asked.record is None and asked.edit is None,
    )

    def forget():
        text_model.ranks.call(lambda rank: rank.state.pop(session.decode.SPARE, None))

    forget()
    yield Step.made
    forget()


def alike(wanted, found):
    for one, other in zip(wanted, found, strict=True):
        assert (one.ids, one.text) == (other.ids, other.text)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


@pytest.mark.parametrize("how", [{"temperature": 1.0, "seed": 3, "stop": ["th", "."]}, {}])
def test_a_step_that_is_replayed_changes_nothing(text_model, how, request, monkeypatch):
    """Sequences that end with a stop text, whose rows go; greedy steps choose by themselves what they read next."""
    how = {"max_new_tokens": 23, "progress": False} | how
    prompts = ["The", "A cat", "", "In the beginning", "Once"]
    if "stop" not in how:
        first, second, *_ = (one.text for one in text_model.generate(prompts, **how))
        how["stop"] = [first[-20:-10], second[-15:-10]]
    wanted = text_model.generate(prompts, **how)
    monkeypatch.setattr(run, "BURST", {"cpu": 3})
    made = request.getfixturevalue("replayed")
    alike(wanted, text_model.generate(prompts, **how))
    assert len(made) > 1, "rows that end call for another graph"


@pytest.mark.parametrize("room, longest", [(128, 16), (3, 16), (3, 7), (3, 3), (128, 1)])
def test_greedy_steps_come_to_the_host_in_any_parts(text_model, room, longest, request, monkeypatch):
    """More steps than have room on the device, and reports in between."""
    how, prompts = {"max_new_tokens": 29, "progress": False}, ["The", "A cat", "", "In the beginning"]
    wanted = text_model.generate(prompts, **how)
    monkeypatch.setattr(greedy, "ROOM", room)
    monkeypatch.setattr(run, "UNHEARD", {"cpu": longest})
    made = request.getfixturevalue("replayed")
    for _ in range(2):
        alike(wanted, text_model.generate(prompts, **how))
    assert len(made) == 1, "a generation like the one before takes over its graph"


def test_a_graph_that_is_made_for_the_last_slot_stays_in_the_cache(text_model, request):
    """Steps that warm up go on from one another, and there is one slot."""
    prompts, how = [[5] * 58, [6] * 58], {"max_new_tokens": 6, "progress": False}
    wanted = text_model.generate(prompts, **how)
    made = request.getfixturevalue("replayed")
    alike(wanted, text_model.generate(prompts, **how))
    [step] = made
    assert step.cache.slots == 64 and step.inputs[1].tolist() == [63, 63]


def test_a_graph_of_greedy_steps_is_for_these_alone(text_model, request):
    """What draws does not take over a graph that chooses, nor the other way round; a trace has none."""
    prompts, how = ["The", "A cat"], {"max_new_tokens": 20, "progress": False}
    settings = [
        {},
        {"temperature": 1.0},
        {},
        {"alternatives": 2},
        {"trace": True},
        {},
        {"repetition_penalty": 1.5},
    ]
    wanted = [text_model.generate(prompts, **how, **own) for own in settings]
    made = request.getfixturevalue("replayed")
    for own, one in zip(settings, wanted, strict=True):
        alike(one, text_model.generate(prompts, **how, **own))
    assert [step.end is not None for step in made] == [True, False, True, False, True, False]


def test_a_forced_routing_finds_the_prompts_in_a_cache_that_is_taken_over(text_model, request):
    prompts, how = ["The", "A cat"], {"max_new_tokens": 20, "progress": False}
    plain = text_model.generate(prompts, **how)

    def forced():
        with text_model.route(force=[Force([1, 2], sample=0, positions=range(3))]):
            return text_model.generate(prompts, **how)

    wanted = forced()
    assert [one.ids for one in wanted] != [one.ids for one in plain]
    request.getfixturevalue("replayed")
    alike(plain, text_model.generate(prompts, **how))
    alike(wanted, forced())
    alike(plain, text_model.generate(prompts, **how))


def test_a_call_that_fails_among_greedy_steps_leaves_nothing_behind(text_model, request):
    prompts, how = ["The", "A cat"], {"max_new_tokens": 20, "progress": False}
    wanted = text_model.generate(prompts, **how)
    made = request.getfixturevalue("replayed")
    alike(wanted, text_model.generate(prompts, **how))
    [step] = made
    step.failing = 7
    with pytest.raises(moekit.ranks.RankError, match="a step fails"):
        text_model.generate(prompts, **how)
    alike(wanted, text_model.generate(prompts, **how))
    assert len(made) == 1


def test_a_step_goes_on_from_the_tokens_that_the_graph_has(text_model, request):
    """The first one of a call reads those of the driver, which may be others."""

    def calls(rank):
        prompts = dealt([range(2)], [[[EOS, 5, 6], [EOS, 7]]])[0]
        settings = Settings(len(text_model.codec))
        for _ in range(2):
            read = decode.begin(rank, -7, prompts, settings, 40).tokens[:, -1].tolist()
            for instead in (None, None, [9, 10], None):
                made = decode.run(rank, -7, [[0, 1]], [instead or read], 9)
                read = made.tokens[:, -1].tolist()
                yield made.tokens.tolist(), made.logprobs
            decode.end(rank, -7)

    decode, copies = session.decode, []
    [wanted] = text_model.ranks.call(lambda rank: list(calls(rank)))
    made = request.getfixturevalue("replayed")
    call = Step.__call__
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(
            Step,
            "__call__",
            lambda self, *given: copies.append(given[0] is not self.inputs[0]) or call(self, *given),
        )
        [found] = text_model.ranks.call(lambda rank: list(calls(rank)))
    for (tokens, logprobs), (others, close) in zip(wanted, found, strict=True):
        assert tokens == others
        np.testing.assert_allclose(logprobs, close, atol=1e-5)
    # Two steps warm up.
    assert len(made) == 1 and len(copies) == 2 + 2 * 4 * 9
    assert np.flatnonzero(copies[2:]).tolist() == list(range(0, 72, 9))


def test_a_graph_is_freed_as_soon_as_nobody_needs_it(replayed, text_model):
    """The garbage collector may come in the middle of another capture, and to free a graph would spoil that."""

    def made(rank):
        model = rank.state["model"]
        return greedy.Greedy(model, Cache(model.config, 2, 64, torch.device("cpu"), torch.float32), 50, 2)

    gc.disable()
    try:
        [one] = text_model.ranks.call(made)
        replayed.clear()
        known = weakref.ref(one), weakref.ref(one.graph)
        del one
        assert [ref() for ref in known] == [None, None]
    finally:
        gc.enable()


def test_prompts_of_one_shape_are_read_with_one_graph(text_model, monkeypatch):
    """A stand-in for what a GPU captures: it is valid for one shape and one cache, and writes to the cache when it is made."""
    how = {"max_new_tokens": 30, "progress": False}
    prompts, others = ["The cat", "A dog ran", "It"], ["The cats", "A dog", "In"]
    wanted, wanted_others = text_model.generate(prompts, **how), text_model.generate(others, **how)
    made, replayed = [], []

    class Captured:
        def __init__(self, work, *inputs):
            self.work, self.shapes = work, [given.shape for given in inputs]
            made.append(self.shapes)
            # Other numbers than those that are replayed.
            work(*map(torch.ones_like, inputs))

        def __call__(self, *inputs):
            assert [given.shape for given in inputs] == self.shapes
            replayed.append(self)
            return self.work(*inputs)

    graphs = session.decode.graphs
    monkeypatch.setattr(graphs, "of_step", Step)
    monkeypatch.setattr(graphs, "Graph", Captured)
    monkeypatch.setattr(graphs, "fits", lambda *args: True)
    text_model.ranks.call(lambda rank: rank.state.pop(session.decode.SPARE, None))
    for turn in range(1, graphs.AFTER + 4):
        same(text_model.generate(prompts, **how), wanted)
        assert (len(made), len(replayed)) == ((0, 0) if turn <= graphs.AFTER else (1, turn - graphs.AFTER))
    # Another shape, and a trace, do without it.
    same(text_model.generate(others, **how), wanted_others)
    traced = text_model.generate(prompts, trace=True, **how)
    assert [one.ids for one in traced] == [one.ids for one in wanted]
    assert len(made) == 1 and len(replayed) == 3


def test_what_is_traced_ends_with_its_sequence(text_model, monkeypatch):
    """As on a GPU, where finished sequences keep their rows: they do not while somebody records."""
    how = {"max_new_tokens": 12, "stop": ["e", "a"], "trace": True, "progress": False, "temperature": 1.0}
    wanted = text_model.generate(["The", "Once upon", "In"], **how)
    assert len({len(one.ids) for one in wanted}) > 1
    monkeypatch.setattr(session, "MOVES", {"cpu": False})
    for one, other in zip(wanted, text_model.generate(["The", "Once upon", "In"], **how), strict=True):
        assert one.ids == other.ids and np.array_equal(one.trace.token, other.trace.token)
        assert np.array_equal(one.trace.experts, other.trace.experts)


def test_bursts_and_dead_rows_change_nothing(text_model, monkeypatch):
    """As on a GPU: several tokens a call, and rows that are over stay until half of them are."""
    how = {"max_new_tokens": 23, "temperature": 1.0, "seed": 3, "stop": ["th", "."], "progress": False}
    how |= {"repetition_penalty": 1.2, "alternatives": 2}
    prompts = ["The", "A cat", "", "In the beginning", "Once"]
    model = text_model
    wanted = model.generate(prompts, **how)
    assert len({len(one.ids) for one in wanted}) > 2, "nothing is tested where all end alike"
    calls = []
    call = model.ranks.call
    monkeypatch.setattr(
        model.ranks, "call", lambda fn, *args, **how: calls.append((fn, args)) or call(fn, *args, **how)
    )
    monkeypatch.setattr(run, "BURST", {"cpu": 5})
    monkeypatch.setattr(session, "MOVES", {"cpu": False})
    for one, other in zip(wanted, model.generate(prompts, **how), strict=True):
        assert (one.ids, one.text, one.finish_reason) == (other.ids, other.text, other.finish_reason)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
        assert [[i for i, _ in row] for row in one.alternatives] == [
            [i for i, _ in row] for row in other.alternatives
        ]
    runs = [args for fn, args in calls if fn is session.decode.run]
    assert 1 < len(runs) <= 5 and {args[3] for args in runs} <= {5, 2}
    assert any(PAD in numbers for args in runs for numbers in args[2]), "no row was kept beyond its end"


# ------------------------------------------------------------------------------------------------ the driver's half


def test_a_generation_to_which_nobody_listens_is_one_call(text_model, monkeypatch):
    """Also where its tokens come in several bursts."""
    calls, shown = [], []
    call = text_model.ranks.call
    monkeypatch.setattr(
        text_model.ranks, "call", lambda fn, *args, **how: calls.append(fn.__name__) or call(fn, *args, **how)
    )
    wanted = text_model.generate(["The", ""], max_new_tokens=20, temperature=1.0, **QUIET)
    monkeypatch.setattr(run, "UNHEARD", {"cpu": 7})
    real = run.Burst.of
    monkeypatch.setattr(
        run.Burst,
        "of",
        lambda numbers, found, texts: shown.append(found.tokens.shape) or real(numbers, found, texts),
    )
    same(text_model.generate(["The", ""], max_new_tokens=20, temperature=1.0, **QUIET), wanted)
    assert calls == ["generate"] * 2 and shown == [(2, 7), (2, 7), (2, 6)]
    assert not [key for key in text_model.ranks.call(lambda rank: list(rank.state)) if isinstance(key, int)]


def test_stop_texts_are_looked_for_while_the_ranks_go_on(text_model, monkeypatch):
    """As on a GPU: the look at a burst falls into the call that makes the next one, and what follows a stop text is left out."""
    how = {"max_new_tokens": 23, "temperature": 1.0, "seed": 3, "stop": ["th", "."], "progress": False}
    prompts = ["The", "A cat", "", "In the beginning", "Once"]
    wanted = text_model.generate(prompts, **how)
    done, call, look = [], text_model.ranks.call, Text.stops_at

    def called(fn, *args, **options):
        done.append(f"{fn.__name__} begins")
        found = call(fn, *args, **options)
        done.append(f"{fn.__name__} ends")
        return found

    monkeypatch.setattr(text_model.ranks, "call", called)
    monkeypatch.setattr(Text, "stops_at", lambda *args: done.append("look") or look(*args))
    monkeypatch.setattr(run, "BURST", {"cpu": 5})
    monkeypatch.setattr(run, "MANY", 2)
    monkeypatch.setattr(session, "MOVES", {"cpu": False})
    same(text_model.generate(prompts, **how), wanted)
    order = [one for one, _ in itertools.groupby(done)]
    assert order[:5] == ["begin begins", "begin ends", "run begins", "look", "run ends"]
    assert order[-2:] == ["end begins", "end ends"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_error_of_the_drivers_own_ends_a_generation_and_leaves_the_ranks_usable(
    reference, monkeypatch, world_size
):
    """All ranks make the same steps: those of the bursts that they were told of."""

    def count_steps(rank):
        step = decoding._step

        def counted(*args):
            rank.state["steps"] = rank.state.get("steps", 0) + 1
            return step(*args)

        decoding._step = counted

    monkeypatch.setattr(run, "UNHEARD", {"cpu": 2})
    # A rank in this process is this module's.
    monkeypatch.setattr(decoding, "_step", decoding._step)
    with moekit.load(reference / "checkpoint", world_size, device="cpu", **QUIET) as model:
        wanted = model.generate(IDS, max_new_tokens=20, **QUIET)
        model.ranks.call(count_steps)
        with monkeypatch.context() as changed:
            changed.setattr(run.Burst, "of", lambda *args: {}["nothing"])
            with pytest.raises(KeyError, match="nothing"):
                model.generate(IDS, max_new_tokens=20, **QUIET)
        steps = model.ranks.call(lambda rank: rank.state.pop("steps"))
        assert len(set(steps)) == 1 and steps[0] < 2 * (2 + streams.AHEAD + 1)
        same(model.generate(IDS, max_new_tokens=20, **QUIET), wanted)
        assert model.ranks.call(lambda rank: rank.state.pop("steps")) == [19] * world_size


def _add(text: Text, token: int) -> Text:
    text.add(token)
    return text


@pytest.mark.parametrize("stop", [["the"], ["日"], ["a", "\n"], ["nowhere"], ["e t", "\ufffd"]])
@pytest.mark.parametrize("size", [1, 3, 16])
def test_a_burst_is_read_as_its_tokens_are_one_by_one(stop, size):
    """Also where a stop text, or a character, lies in two bursts, and where bytes are no character."""
    codec = Codec.load("demo")
    whole = codec.encode("It is the 日本 — жизнь\n€5🙂! and the 日")
    half = codec.encode("日")[0]
    for ids in (whole, [*whole[:7], half, *whole[7:]], [half] * 9):
        one_by_one = Text(codec, stop)
        place = next((n for n, token in enumerate(ids) if _add(one_by_one, token).stopped), None)
        in_bursts, found = Text(codec, stop), None
        for start in range(0, len(ids), size):
            at = in_bursts.stops_at(ids[start : start + size])
            if at is not None:
                found = start + at - 1
                break
        assert found == place


def test_a_result_is_made_when_somebody_asks(text_model):
    """It has fields like any other, and takes nothing of the others with it."""
    how = {"max_new_tokens": 9, "temperature": 1.0, "num_return_sequences": 40, "alternatives": 2, **QUIET}
    found = text_model.generate(["The", "A cat"], **how)
    assert all("ids" not in vars(one) for one in found)
    late = found[7]
    names = [one.name for one in dataclasses.fields(late)]
    # A dataclass of NumPy's arrays compares these by identity first.
    whole = request.Generation(**{name: getattr(late, name) for name in names})
    assert late == whole == dataclasses.replace(whole, logprobs=whole.logprobs.copy())
    nan = dataclasses.replace(whole, logprobs=np.full(3, np.nan, np.float32), score=float("nan"))
    assert nan == copy.deepcopy(nan) != whole
    other = whole.logprobs + np.float32(1)
    assert late != dataclasses.replace(whole, logprobs=other) and late != found[8] and late != 7
    assert repr(late) == repr(whole) and set(names) <= set(dir(late))
    assert late.trace is None and late.prompt == 0 and found[40].prompt == 1
    assert late.score == float(late.logprobs.sum(dtype=np.float64))
    assert len(late.alternatives) == 9 and all(len(row) == 2 for row in late.alternatives)
    for copied in (pickle.loads(pickle.dumps(found[8])), copy.copy(found[8]), copy.deepcopy(found[8])):
        assert vars(copied).keys() == set(names)
        assert (copied.ids, copied.text, copied.finish_reason) == (
            found[8].ids,
            found[8].text,
            found[8].finish_reason,
        )
    assert len(pickle.dumps(found[9])) < 2000
    assert dataclasses.replace(found[10], text="another").ids == found[10].ids
    with pytest.raises(AttributeError, match="has no 'tokens'"):
        late.tokens  # noqa: B018
    with pytest.raises(dataclasses.FrozenInstanceError):
        late.text = "another"


def test_prompts_travel_as_one_array_a_rank():
    two, none = dealt([[4, 6], []], [[[2, 5, 6], np.array([2])], []])
    assert two.tokens.tolist() == [[2, 5, 6], [2, PAD, PAD]] and two.tokens.dtype == np.int32
    assert none.on_ranks == [[3, 1], []] and len(none) == 0
    assert two.shapes(alone=False) == [[(2, 3)], []] and two.shapes(alone=True) == [[(1, 3), (1, 1)], []]
    assert [(part.numbers, part.tokens.tolist()) for part in two.passes(alone=True)] == [
        ([4], [[2, 5, 6]]),
        ([6], [[2]]),
    ]
    assert none.passes(alone=False) == none.passes(alone=True) == []
    # Padding counts as tokens.
    assert most_tokens([[(2, 3)], [(1, 5)]]) == [6] and most_tokens([[(1, 3), (1, 1)], [(1, 4)]]) == [4, 1]


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ([[5], [6, -1]], "prompt 1 has the id -1; expected 0 to 199, without 1, the padding"),
        ([[], [5], [], [6, 200, PAD]], "prompt 3 has the id 200; expected"),
        ([[5, 10**30], [200]], "prompt 0 has the id 1000000000.*; expected"),
        ([[5], [-(10**30)]], "prompt 1 has the id -1000000000.*; expected"),
        ([[5], [6, True]], r"prompt 1 is \[6, True\]; expected"),
    ],
)
def test_a_wrong_id_is_named_with_its_prompt(recorded, prompts, said):
    with pytest.raises(ValueError, match=said):
        recorded.generate(prompts, max_new_tokens=2)
