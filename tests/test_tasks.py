"""Tasks through lm-evaluation-harness: scores against those of ``model.score`` and of fairseq, and templates by hand."""

import functools
import json
import math
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from test_project import ROOT

import moekit
from moekit.checkpoint import export
from moekit.likelihood import Text, plan_steps, score_texts
from moekit.nn.cache import slots_for
from moekit.nn.transformer import Transformer
from moekit.notebook import task_report
from moekit.symbols import EOS, PAD
from moekit.tasks import FILES, HarnessModel, Scored, compare, evaluate_tasks, fair, known_tasks, loading
from moekit.tasks.evaluation import changed_items
from moekit.tasks.loading import load_tasks, set_apart
from moekit.tasks.rows import dataset
from moekit.worker.decoding import SPARE
from moekit.worker.scoring import GRAPH

# Contexts of different lengths with one, two and four continuations; a space at an end, a line end, none at all.
PAIRS = [
    ("It is a truth universally acknowledged, that a single man", end)
    for end in (" in possession of a good fortune", " must", " must be in want of a wife.", " xyzzy")
] + [
    ("def main(", "):"),
    ("def main(", "argv=None):\n    return"),
    ("Die Datei wird ", "gespeichert."),
    ("The man broke his toe. What was the CAUSE of this?\n", "He dropped a hammer on his foot."),
    ("", "Once upon a time"),
    ("def main(", "):"),
]


@pytest.fixture(scope="module", params=[1, 2, 4])
def model(request):
    with moekit.load("demo", request.param, "cpu", progress=False) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def one():
    with moekit.load("demo", 1, "cpu", progress=False) as loaded:
        yield loaded


def requests(arguments, kind="loglikelihood"):
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


def by_hand(model, context, continuation, **options) -> list[float]:
    """The log-probabilities of the continuation's tokens in the whole text, which is scored by itself."""
    whole, before = model.codec.encode(context + continuation), model.codec.encode(context.rstrip(" "))
    first = next((n for n, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
    return model.score([whole], **options)["logprob"].to_numpy()[first:].tolist()


@pytest.mark.parametrize("fraction", [None, 0.1, "training"])
def test_loglikelihood_is_that_of_score(model, fraction):
    harness = HarnessModel(model, capacity_token_fraction=fraction, progress=False)
    found = harness.loglikelihood(requests(PAIRS))
    for (context, continuation), scored in zip(PAIRS, found, strict=True):
        expected = by_hand(model, context, continuation, capacity_token_fraction=fraction)
        assert scored.logprobs == pytest.approx(expected, abs=1e-4)
        assert scored[0] == pytest.approx(math.fsum(expected), abs=1e-4)
        assert len(scored.ids) == len(expected)
    assert found[4] == found[9], "the same request has the same result"


def test_a_dense_model(one, tmp_path):
    """Without experts a capacity changes nothing, and questions share their beginning with one, too."""
    plain = Transformer(replace(one.config, moe_freq=0, layers=2))
    torch.manual_seed(0)
    for weight in plain.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    export.save(plain, tmp_path, files=1)
    with moekit.load(tmp_path, 2, "cpu", bpe="demo", progress=False) as dense:
        free, tight = (
            HarnessModel(dense, capacity_token_fraction=fraction, progress=False).loglikelihood(
                requests(PAIRS)
            )
            for fraction in (None, 0.1)
        )
        assert free == tight
        for pair, scored in zip(PAIRS, free, strict=True):
            assert scored.logprobs == pytest.approx(by_hand(dense, *pair), abs=1e-4)
        table = dense.evaluate(
            domains="demo", capacity_token_fraction=[None, 0.5], max_batches=2, progress=False
        )
        assert (table["dropped"] == 0).all() and table["capacity"].isna().all()
        assert table["domain"].is_unique, "there is no capacity, and so no second row"


def test_experts_of_one_byte_that_are_fetched():
    how = {"device": "cpu", "experts": "int8", "progress": False}
    loaded = HarnessModel(checkpoint="demo", world_size=1, resident=2, **how).model
    assert loaded.experts == "int8" and loaded.parts[0]["resident"] == 2
    with loaded, moekit.load("demo", 1, **how) as all_there:
        fetched, there = (
            evaluate_tasks(model, "copa_release", progress=False) for model in (loaded, all_there)
        )
    pd.testing.assert_frame_equal(fetched.items, there.items)
    assert fetched.meta["experts"] == "int8"
    assert "config" not in fetched.meta
    changes = {"second_expert": "random"}
    with moekit.load("demo", 1, config=changes, **how) as changed:
        assert evaluate_tasks(changed, "copa_release", limit=1, progress=False).meta["config"] == changes


def test_graphs_of_other_calls_give_their_memory_back(one):
    one.ranks.call(lambda rank: rank.state.update({GRAPH: object(), SPARE: object()}))
    HarnessModel(one, progress=False).loglikelihood(requests(PAIRS[:1]))
    assert one.ranks.call(lambda rank: {GRAPH, SPARE} & set(rank.state)) == [set()]


def test_greedy_is_what_generation_writes(one):
    pairs = [("It is a truth universally", continuation) for continuation in (" acknowledged", " a", " the")]
    prompt = one.codec.encode(pairs[0][0])
    written = one.generate([prompt], max_new_tokens=6, progress=False)[0]
    pairs.append((pairs[0][0], one.codec.decode(written.ids[:3])))
    found = HarnessModel(one, progress=False).loglikelihood(requests(pairs))
    for scored in found:
        assert scored[1] == (written.ids[: len(scored.ids)] == scored.ids)
    assert found[-1][1] and not all(scored[1] for scored in found)


def test_changes_of_the_routing_hold(model):
    harness = HarnessModel(model, progress=False)
    plain = harness.loglikelihood(requests(PAIRS))
    with model.route(mask={1: [0, 3], 5: [8]}, drop_second=True):
        found = harness.loglikelihood(requests(PAIRS))
        for pair, scored in zip(PAIRS, found, strict=True):
            assert scored.logprobs == pytest.approx(by_hand(model, *pair), abs=1e-4)
    assert abs(found[0][0] - plain[0][0]) > 0.01
    with model.route(force=moekit.Force((3, 4), sample=1, positions=range(2, 8))):
        found = harness.loglikelihood(requests(PAIRS))
        texts = [model.codec.encode(context + end) for context, end in PAIRS[:2]]
        table = model.score(texts)
    forced = table[table["sample"] == 1]["logprob"].to_numpy()[-len(found[1].ids) :]
    assert found[1].logprobs == pytest.approx(forced, abs=1e-4)
    assert found[2].logprobs == pytest.approx(plain[2].logprobs, abs=1e-4), "only the text that is named"
    own = HarnessModel(model, mask={"5": [*range(14)]}, progress=False)
    try:
        assert own.loglikelihood(requests(PAIRS[:1]))[0][0] != pytest.approx(plain[0][0], abs=1e-4)
        assert model.intervention.mask == {5: tuple(range(14))}
    finally:
        own.changed.__exit__(None, None, None)


@pytest.mark.parametrize("fraction", [None, 0.5])
def test_a_text_without_ids_to_score(model, fraction):
    """Such as one of the symbol that begins it alone: it has no scores, and changes none of the others'."""
    how = {"fraction": fraction, "seed": 1, "progress": False}
    ids = (EOS, *model.codec.encode("Alice was beginning to get very tired"))
    empty = [Text((EOS,), 1), Text(ids, len(ids)), Text(ids[:3], 3)]
    for some in ([empty[0]], empty, []):
        found = score_texts(model, some, **how)
        assert [(score.logprobs.shape, score.best.shape) for score in found] == [((0,), (0,))] * len(some)
        assert all(score.logprobs.dtype == np.float32 and score.best.dtype == bool for score in found)
    [alone] = score_texts(model, [Text(ids, 1)], **how)
    first, found, *_ = score_texts(model, [empty[0], Text(ids, 1), *empty[1:]], **how)
    assert not len(first.logprobs)
    np.testing.assert_array_equal(found.logprobs, alone.logprobs)


@pytest.mark.parametrize("world_size", [1, 2])
def test_learned_positions_and_beginnings_of_several_lengths(one, tmp_path, world_size):
    """The padding behind a long beginning and a short rest lies beyond the last position."""
    config = replace(one.config, layers=2, vocab_rows=200, max_positions=128, learned_positions=True)
    plain = Transformer(config)
    torch.manual_seed(0)
    for weight in plain.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    export.save(plain, tmp_path, files=2)
    texts = []
    for shared in [100] * 2 + [12] * 10:
        beginning = torch.randint(4, 200, (shared,)).tolist()
        rests = torch.randint(4, 200, (2, 120 - shared)).tolist()
        texts += [Text((EOS, *beginning, *rest), 1 + shared) for rest in rests]
    cached = slots_for(120) * len(texts)
    how = {"fraction": None, "seed": 1, "progress": False}
    with moekit.load(tmp_path, world_size, "cpu", progress=False) as model:
        steps = list(plan_steps(texts, world_size, 2048, cached, alone=False))
        assert any(
            part.lengths.max() + part.tokens.shape[1] > config.max_positions
            for step in steps
            for part in step
        )
        model.cached_tokens = cached
        together = score_texts(model, texts, **how)
        alone = [score_texts(model, [text], **how)[0] for text in texts]
    for found, expected in zip(together, alone, strict=True):
        np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5, rtol=0)


def test_line_ends(one):
    harness = HarnessModel(one, progress=False)
    kept = HarnessModel(one, blank_lines=True, progress=False)
    [once], [twice] = (h.loglikelihood(requests([("One.\n\nTwo.\n", "\nThree.")])) for h in (harness, kept))
    ids = one.codec.encode("One.\nTwo.")
    assert once.ids == one.codec.encode("Three.") and EOS not in once.ids
    assert once.logprobs == pytest.approx(by_hand(one, "One.\nTwo.\n", "Three."), abs=1e-4)
    assert twice.ids == [EOS, *once.ids] and len(ids) == len(one.codec.encode("One.\n\nTwo.")) - 1


def test_a_long_context_loses_its_beginning(one):
    harness = HarnessModel(one, progress=False)
    context, end = "word " * 400 + "the", " end of it"
    [scored] = harness.loglikelihood(requests([(context, end)]))
    # The last id is not read, so with the symbol that begins a text as many fit as there are positions.
    ids = one.codec.encode(context + end)[-one.config.max_positions :]
    text = Text((EOS, *ids), 1 + len(ids) - len(scored.ids))
    [expected] = score_texts(one, [text], fraction=None, seed=1, progress=False)
    assert scored.logprobs.tolist() == expected.logprobs.tolist()
    with pytest.raises(ValueError, match=r"the continuation ' word word.*expected 1 to 255"):
        harness.loglikelihood(requests([("a", " word" * 400)]))
    with pytest.raises(ValueError, match="the continuation '' has 0 tokens"):
        harness.loglikelihood(requests([("a", "")]))


def test_rolling_reads_everything_once(model):
    harness = HarnessModel(model, progress=False)
    short, long = "It was a very fine morning.\n\nShe sat down.", "He went on and on about it. " * 80
    found = harness.loglikelihood_rolling(requests([(short,), (long,), ("",)], "loglikelihood_rolling"))
    assert found[0] == pytest.approx(model.score([short])["logprob"].sum(), abs=1e-3)
    ids, most = [EOS, *model.codec.encode(long)], model.config.max_positions
    assert len(ids) > 2 * most
    total = 0.0
    for start in range(0, len(ids) - 1, most):
        # The last part has as much context as fits.
        end = min(start + most, len(ids) - 1)
        first = end - most
        table = score_texts(
            model,
            [Text(tuple(ids[first : end + 1]), start - first + 1)],
            fraction=None,
            seed=1,
            progress=False,
        )
        total += float(table[0].logprobs.sum())
    assert found[1] == pytest.approx(total, abs=1e-3)
    first = model.score([ids[1:most]])["logprob"].sum()
    assert first > found[1] and found[2] == 0


def test_generate_until(model):
    harness = HarnessModel(model, progress=False)
    contexts = ["It is a truth universally acknowledged, that a", "def __init__(self", "Die Datei"]
    settings = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    found = harness.generate_until(requests([(context, settings) for context in contexts], "generate_until"))
    expected = model.generate(contexts, max_new_tokens=12, stop=["\n"], progress=False)
    assert found == [one.text for one in expected]
    [drawn] = harness.generate_until(
        requests([(contexts[0], {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 0.9})])
    )
    assert drawn == model.generate(contexts[:1], max_new_tokens=8, temperature=0.9, progress=False)[0].text
    [long] = harness.generate_until(requests([("word " * 400, {"until": ["\n"]})]))
    assert isinstance(long, str)


def plans(texts, world_size, slots, *, shares=True, alone=False):
    return list(plan_steps(texts, world_size, slots, slots if shares else 0, alone=alone))


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("how", [{}, {"shares": False}, {"alone": True, "shares": False}])
def test_the_plan_has_every_text_once(world_size, how):
    rng = np.random.default_rng(0)
    texts = []
    for _ in range(30):
        context = (EOS, *rng.integers(4, 90, rng.integers(0, 40)).tolist())
        for _ in range(rng.integers(1, 5)):
            end = rng.integers(4, 90, rng.integers(1, 12)).tolist()
            texts.append(Text((*context, *end), len(context)))
    seen, shared = [], 0
    for step in plans(texts, world_size, 300, **how):
        assert len(step) == world_size and step[0] is not None
        parts = [part for part in step if part is not None]
        assert len({part.beginnings is None for part in parts}) == 1
        for part in parts:
            for row, number in enumerate(part.samples.tolist()):
                text = texts[number]
                read = part.tokens[row][part.tokens[row] != PAD].tolist()
                if part.beginnings is not None:
                    parent = part.parents[row]
                    beginning = part.beginnings[parent][: part.lengths[parent]].tolist()
                    shared += len(beginning)
                    read = beginning + read
                assert read == list(text.ids if how.get("alone") else text.ids[:-1])
                wanted = part.targets[row][part.targets[row] != PAD].tolist()
                assert wanted == list(text.ids[text.start :])
                seen.append(number)
            assert not how.get("alone") or (part.tokens != PAD).all()
    assert sorted(seen) == list(range(len(texts)))
    assert (shared > 0) == how.get("shares", True)


def test_a_shared_beginning_is_read_once():
    context = tuple(range(4, 54))
    texts = [Text((*context, 60 + n, 70), len(context)) for n in range(4)]
    [[part]] = plans(texts, 1, 8192)
    assert part.beginnings.shape == (1, 49) and part.tokens.shape == (4, 2)
    [[part]] = plans(texts[:1], 1, 8192)
    assert part.beginnings is None


@pytest.fixture(scope="module")
def hub():
    """The released fairseq's hub interface, with the plug-in."""
    from fairseq.models.transformer_lm import TransformerLanguageModel

    folder = ROOT / "moekit" / "demo"
    return TransformerLanguageModel.from_pretrained(
        str(folder / "model"),
        data_name_or_path="../gpt2_bpe",
        user_dir=str(ROOT / "moekit" / "plugin"),
        bpe="gpt2",
        gpt2_encoder_json=str(folder / "gpt2_bpe" / "encoder.json"),
        gpt2_vocab_bpe=str(folder / "gpt2_bpe" / "vocab.bpe"),
        moe_eval_capacity_token_fraction=None,
    )


def test_scores_are_those_of_fairseqs_scorer(one, hub):
    found = HarnessModel(one, progress=False).loglikelihood(requests(PAIRS))
    for (context, continuation), scored in zip(PAIRS, found, strict=True):
        told = hub.score(context + continuation, replace_newline_with_eos=True)
        count = len(scored.ids)
        assert told["tokens"].tolist()[-count:] == scored.ids
        assert scored.logprobs == pytest.approx(told["positional_scores"][-count:].numpy(), abs=1e-4)


def test_copa_of_the_release_by_task_file_and_by_hub(model, hub):
    """The three questions as the page of the released models asks them: a task file, and what it prints line by line."""
    found = evaluate_tasks(model, "copa_release", progress=False)
    items = found.items.query("metric == 'acc'")
    rows = [json.loads(line) for line in (FILES / "copa_release.jsonl").read_text().splitlines()]
    asked = {"cause": "What was the CAUSE of this?", "effect": "What happened as a RESULT?"}
    for row, item in zip(rows, items.itertuples(), strict=True):
        prompt = f"{row['premise']} {asked[row['question']]}"
        ends = [row["choice1"], row["choice2"]]
        sums = [
            hub.score(f"{prompt}\n{end}", replace_newline_with_eos=True)["positional_scores"].sum()
            for end in ends
        ]
        assert item.answer == ends[0 if sums[0] > sums[1] else 1]
        assert item.scores[0] - item.scores[1] == pytest.approx(float(sums[0] - sums[1]), abs=1e-3)
        assert item.value == float(item.answer == ends[row["label"]]) and item.text == f"{prompt}\n"


# ------------------------------------------------------------------------------------------------- FAIR's templates

CHOICES = {"text": ["Light", "A stone."], "label": ["A", "B"]}
TEMPLATES = {
    "hellaswag": (
        {
            "activity_label": "Cooking ",
            "ctx_a": "A man  stirs.",
            "ctx_b": "he",
            "endings": ["eats.", "flies."],
            "label": "1",
        },
        ("Cooking: A man stirs. He ", ["eats.", "flies."], [1], []),
    ),
    "piqa": (
        {"goal": " Open a jar", "sol1": "Turn the lid.", "sol2": "Sing.", "label": 0},
        ("Open a jar ", ["Turn the lid.", "Sing."], [0], []),
    ),
    "record": (
        {
            "passage": "Ann met Bob.\n@highlight\nBob left",
            "query": "After that @placeholder was alone.",
            "entities": ["Ann", "Bob", "Ann"],
            "answers": ["Ann"],
        },
        ("Ann met Bob.\n\nBob left After that ", ["Ann was alone.", "Bob was alone."], [0], []),
    ),
    "winogrande": (
        {
            "sentence": "The cup fits the box as _ is small.",
            "option1": "the cup",
            "option2": "the box",
            "answer": "1",
        },
        ("The cup fits the box as ", ["the cup is small.", "the box is small."], [0], []),
    ),
    "storycloze": (
        {f"InputSentence{n}": f"S{n}." for n in range(1, 5)}
        | {"RandomFifthSentenceQuiz1": "Yes.", "RandomFifthSentenceQuiz2": "No.", "AnswerRightEnding": "2"},
        ("S1. S2. S3. S4. ", ["Yes.", "No."], [1], []),
    ),
    "openbookqa": (
        {"question_stem": "A plant needs", "choices": CHOICES, "answerKey": "A"},
        ("A plant needs ", ["light.", "a stone."], [0], ["It is light.", "It is a stone."]),
    ),
    "arc": (
        {"question": "What helps a plant?", "choices": CHOICES, "answerKey": "B"},
        ("What helps a plant? ", ["It is light.", "It is a stone."], [1], ["It is light.", "It is a stone."]),
    ),
    "copa": (
        {
            "premise": "It rained. ",
            "question": "effect",
            "choice1": "I got wet.",
            "choice2": "I sang.",
            "label": 0,
        },
        ("It rained. What happened as a RESULT?\n", ["I got wet.", "I sang."], [0], []),
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_by_hand(name):
    doc, (text, choices, golds, calibration) = TEMPLATES[name]
    [made] = getattr(fair, name)([doc])
    assert made == {
        "text": text,
        "choices": choices,
        "gold": golds[0],
        "golds": golds,
        "calibration": calibration,
    }


def test_both_forms_of_storycloze():
    doc = {f"input_sentence_{n}": f"S{n}." for n in range(1, 5)}
    doc |= {"sentence_quiz1": "Yes.", "sentence_quiz2": "No.", "answer_right_ending": 2}
    assert fair.storycloze([doc])[0] == fair.storycloze([TEMPLATES["storycloze"][0]])[0]


def scored(ids, logprobs):
    made = Scored((sum(logprobs), False))
    made.ids, made.logprobs = ids, np.array(logprobs, np.float32)
    return made


def test_means_leave_out_what_all_choices_share():
    three = [
        scored([7, 8, 1], [-9, -1, -2]),
        scored([7, 8, 2, 3], [-9, -1, -3, -5]),
        scored([7, 8, 4], [-9, -1, 0]),
    ]
    assert fair.means(three).tolist() == [-2, -4, 0]
    begins = [scored([7], [-1]), scored([7, 8], [-1, -3])]
    assert fair.means(begins).tolist() == [-1, -2], "a choice keeps its last token"


def test_a_calibrated_task_by_hand(model):
    """Mean log-probabilities of the tokens that differ, minus those without the question."""
    rows = [TEMPLATES["openbookqa"][0], TEMPLATES["openbookqa"][0] | {"question_stem": "What does it need?"}]
    found = evaluate_tasks(model, ["fair_openbookqa"], data={"fair_openbookqa": rows}, progress=False)
    scores = found.items.query("metric == 'acc'")["scores"]
    for row, told in zip(rows, scores, strict=True):
        stem = row["question_stem"]
        ends = ["light.", "a stone."]
        asked = [f" It is {end}" if stem.endswith("?") else f" {end}" for end in ends]
        differ = [len(model.codec.encode(f" {end}")) for end in ends]
        expected = [
            np.mean(by_hand(model, stem, end)[-count:])
            - np.mean(by_hand(model, "", f"It is {alone}")[-count:])
            for end, alone, count in zip(asked, ends, differ, strict=True)
        ]
        assert told == pytest.approx(expected, abs=1e-4)


def test_fewshot_examples_are_lines(one):
    found = evaluate_tasks(one, "copa_release", num_fewshot=2, limit=1, progress=False)
    text = found.items["text"][0]
    assert text.count("\n") == 5 and text.endswith("What was the CAUSE of this?\n")
    assert "The liquid in the bottle poured out.\n" in text and found.tasks["shots"].tolist() == [2, 2]
    drawn = {
        evaluate_tasks(one, "demo_endings", num_fewshot=2, limit=1, shots_seed=seed, progress=False).items[
            "text"
        ][0]
        for seed in range(3)
    }
    assert len(drawn) > 1


# ------------------------------------------------------------------------------------------------ results and errors


@pytest.fixture(scope="module")
def runs(one):
    before = evaluate_tasks(one, ["demo_endings", "copa_release"], progress=False)
    with one.route(mask={1: range(8), 3: range(8), 5: range(8)}):
        after = evaluate_tasks(one, ["demo_endings", "copa_release"], progress=False)
    return before, after


def test_results_do_not_depend_on_the_ranks(model, runs):
    found = evaluate_tasks(model, ["demo_endings", "copa_release"], progress=False)
    before = runs[0]
    pd.testing.assert_frame_equal(found.tasks, before.tasks, atol=1e-4)
    told, expected = (np.concatenate(run.items["scores"].to_numpy()) for run in (found, before))
    assert told == pytest.approx(expected, abs=1e-4)
    assert found.items["answer"].tolist() == before.items["answer"].tolist()
    assert found.tokens == before.tokens and found.meta["world_size"] == model.world_size


def test_the_demo_knows_its_kinds_of_text(runs):
    table = runs[0].tasks.set_index(["task", "metric"])
    value, stderr, items, _ = table.loc["demo_endings", "acc"]
    assert value > 0.85 and items == 38
    assert stderr == pytest.approx(math.sqrt(value * (1 - value) / (items - 1)))
    items = runs[0].items.query("task == 'demo_endings'")
    right = items.query("metric == 'margin'")["value"].to_numpy() > 0
    assert right.tolist() == (items.query("metric == 'acc'")["value"] == 1).tolist()


def test_what_a_mask_changes(runs):
    before, after = runs
    assert after.meta["intervention"]["mask"] and before.meta["intervention"] is None
    table = compare(before, after).set_index(["task", "metric"])
    row = table.loc["demo_endings", "margin"]
    means = [run.items.query("task == 'demo_endings' and metric == 'margin'")["value"].mean() for run in runs]
    assert (row["before"], row["after"]) == pytest.approx(means)
    assert (
        row["change"] == pytest.approx(means[1] - means[0]) and row["low"] < row["change"] < row["high"] < 0
    )
    assert row["p"] < 0.01
    items = changed_items(before, after).query("task == 'demo_endings' and metric == 'acc'")
    assert (
        row["changed"]
        == items["changed"].mean()
        == (items["answer_before"] != items["answer_after"]).mean()
        > 0
    )
    same = compare(before, before)
    assert (same["change"] == 0).all() and (same["changed"] == 0).all() and same["low"].isna().all()
    small = replace(before, items=before.items[before.items["task"] == "none"])
    with pytest.raises(ValueError, match="the two runs share no item"):
        compare(before, small)
    for both in ((before, None), (before.items, after)):
        for verb in (compare, changed_items):
            with pytest.raises(ValueError, match=r"^(before|after)=.*: expected what evaluate_tasks gives"):
                verb(*both)


def test_the_harness_finds_the_model():
    assert get_model("moekit") is HarnessModel


def test_a_loaded_model_is_of_no_other_checkpoint(one):
    with pytest.raises(ValueError, match="^a model and a checkpoint, too: expected a loaded model"):
        HarnessModel(one, checkpoint="demo")
    with pytest.raises(
        ValueError, match="^world_size, dtype: a loaded model has its own; expected none of these"
    ):
        HarnessModel(one, world_size=2, dtype="float16", device="auto")


@pytest.mark.slow
def test_the_command_line(tmp_path):
    """``lm_eval`` itself finds the model where a task is one of the files."""
    options = ["--model", "moekit", "--model_args", "checkpoint=demo,world_size=2", "--device", "cpu"]
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "lm_eval",
            *options,
            "--tasks",
            str(FILES / "copa_release.yaml"),
            "--output_path",
            "out",
        ],
        **{"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 200},
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "copa_release" in ran.stdout
    [path] = Path(tmp_path, "out").rglob("results*.json")
    assert json.loads(path.read_text())["results"]["copa_release"]["acc,none"] == 0.0


@pytest.mark.parametrize(
    ("given", "added"),
    [
        (["--model", "moekit", "--tasks", "fair_piqa"], ["--include_path", str(FILES)]),
        (["run", "--tasks", "x", "--include_path", "own"], []),
        (["ls", "tasks"], []),
    ],
)
def test_moekits_command_knows_its_tasks(monkeypatch, given, added):
    from moekit.tasks import __main__ as command

    seen = []
    monkeypatch.setattr(sys, "argv", ["x", *given])
    monkeypatch.setattr(command, "cli_evaluate", lambda: seen.extend(sys.argv[1:]))
    command.main()
    assert seen == given + added


@pytest.mark.parametrize(
    ("model_args", "said"),
    [
        (["checkpoint=/nowhere"], "/nowhere does not exist: name a checkpoint's folder"),
        (
            ['{"checkpoint": "demo", "mask": {"5": [88]}}'],
            "mask: layer 5 has no expert 88: they are 0 to 15",
        ),
        (
            ["world_size=1"],
            "no model and no checkpoint: expected a loaded model, or what to load",
        ),
        ([], "no model and no checkpoint: expected a loaded model, or what to load"),
        (["pretrained=demo"], "pretrained: moekit's model has no such argument; expected those of"),
    ],
)
def test_a_wrong_argument_of_the_command_is_one_sentence(monkeypatch, capsys, model_args, said):
    from moekit.tasks import __main__ as command

    # The harness takes seconds to look through its own tasks.
    own = functools.partial(TaskManager, include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", own)
    given = ["--model_args", *model_args] if model_args else []
    monkeypatch.setattr(sys, "argv", ["x", "--model", "moekit", *given, "--tasks", "demo_endings"])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert f"python -m moekit.tasks: error: {said}" in capsys.readouterr().err.splitlines()[-1]


def test_every_file_is_a_task():
    assert set(known_tasks()) >= {f"fair_{name}" for name in ("hellaswag", "piqa", "record", "winogrande")}
    rows = {
        f"fair_{'arc_challenge' if name == 'arc' else name}": [doc] for name, (doc, _) in TEMPLATES.items()
    }
    loaded = load_tasks(["fair_zero_shot", "fair_arc_challenge", "fair_copa"], rows)
    assert set(loaded) == set(rows)
    assert all(
        task.config.metadata["score"] == ("sum" if "copa" in name else "mean")
        for name, task in loaded.items()
    )


def test_data_is_given_as_files(tmp_path, one):
    doc = TEMPLATES["piqa"][0]
    files = {
        "rows.jsonl": json.dumps(doc) + "\n\n" + json.dumps(doc) + "\n",
        "rows.json": json.dumps([doc, doc]),
        "rows.csv": 'goal,sol1,sol2,label\nOpen a jar,"Turn the lid.",Sing.,0\nOpen a jar,"Turn the lid.",Sing.,0\n',
    }
    found = []
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        run = evaluate_tasks(one, "fair_piqa", data={"fair_piqa": tmp_path / name}, progress=False)
        found.append(run.items[["item", "metric", "value", "answer"]])
    assert len(found[0]) == 4
    for other in found[1:]:
        pd.testing.assert_frame_equal(other, found[0], atol=1e-5)
    split = {"validation": tmp_path / "rows.jsonl", "train": [doc | {"goal": "Close a jar"}]}
    run = evaluate_tasks(one, "fair_piqa", data={"fair_piqa": split}, num_fewshot=1, progress=False)
    assert run.items["text"][0] == "Close a jar Turn the lid.\nOpen a jar "


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"tasks": []}, r"tasks=\[\]: expected at least one"),
        ({"tasks": "fair_nothing"}, "there is no such task; moekit's own are .*fair_copa"),
        ({"tasks": "/nowhere/x.yaml"}, "there is no task file /nowhere/x.yaml"),
        ({"tasks": Path("/nowhere/x.yaml")}, "there is no task file /nowhere/x.yaml"),
        ({"tasks": ["copa_release", Path("/nowhere/x.yaml")]}, "there is no task file /nowhere/x.yaml"),
        ({"tasks": Path("/").glob("nothing")}, "tasks=.*: expected at least one"),
        ({"tasks": (Path(folder, "x.yaml") for folder in ("/nowhere",))}, "no task file /nowhere/x.yaml"),
        ({"tasks": [Path("x"), 1]}, "expected a list of texts or paths"),
        (
            {"tasks": "copa_release", "data": {"fair_piqa": []}},
            "data is given for 'fair_piqa', which is none",
        ),
        ({"tasks": "fair_piqa", "data": {"fair_piqa": "/nowhere.jsonl"}}, "there is no file /nowhere.jsonl"),
        ({"tasks": "fair_piqa", "data": {"fair_piqa": __file__}}, "test_tasks.py cannot be read"),
        (
            {"tasks": "fair_piqa", "data": {"fair_piqa": {"train": [{}]}}},
            "has the splits train, without validation",
        ),
        *[
            (
                {"tasks": "fair_piqa", "data": {"fair_piqa": [TEMPLATES["piqa"][0] | wrong]}},
                f"item 0 .*{said}",
            )
            for wrong, said in (
                ({"label": 2}, "the right choice is none of the choices"),
                # As in a data set that keeps its answers to itself.
                ({"label": -1}, "the right choice is none of the choices"),
                ({"label": "x"}, "'x'"),
                ({"label": 0.5}, "piqa"),
                ({"sol1": ""}, "a choice is missing, empty, or no text"),
                ({"sol2": 3}, "a choice is missing, empty, or no text"),
                ({"goal": None}, "NoneType"),
            )
        ],
        ({"tasks": "fair_piqa", "data": {"fair_piqa": [{"goal": "x"}]}}, "item 0 .*there is no field 'sol1'"),
        ({"tasks": "fair_piqa", "data": {"fair_piqa": [{}]}}, "holds no items"),
        ({"tasks": "fair_piqa", "data": {"fair_piqa": 3}}, "holds no items"),
        ({"tasks": "fair_piqa", "data": 0}, "data=0: expected a data set for each task"),
        (
            {"tasks": "copa_release", "num_fewshot": 10**6},
            "num_fewshot=1000000: copa_release has .* examples",
        ),
        ({"tasks": "copa_release", "include": "/nowhere"}, "there is no folder /nowhere"),
        ({"tasks": "copa_release", "limit": 0}, "limit=0: expected a whole number"),
        ({"tasks": "copa_release", "capacity_token_fraction": 0}, "capacity_token_fraction=0: expected"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(one, asked, said, monkeypatch):
    # The harness's thousands of files take seconds.
    monkeypatch.setattr(
        loading, "TaskManager", lambda include_path, **_: TaskManager(None, include_path, False)
    )
    with pytest.raises(ValueError, match=said) as caught:
        evaluate_tasks(one, **asked, progress=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{{: x", "cannot be read .while parsing"),
        ("- a", "cannot be read .Expected YAML dict"),
        ("task: x\ninclude: none.yaml", "cannot be read .*none.yaml"),
        ("task: x\nprocess_docs: !function no_such.thing", "cannot be read .*no_such"),
        ("task: x", "x.yaml names no dataset_path"),
    ],
)
def test_a_task_file_that_makes_no_sense_is_named(tmp_path, text, said):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"x.yaml .*{said}" if "names" not in said else said):
        load_tasks([str(tmp_path / "x.yaml")], {})


TASK = {
    "task": "tiny",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}],
}
ROWS = [{"question": "The cat", "choices": ["sat", "ran"], "answer": number} for number in (0, 1)]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"doc_to_text": "{{nothing.at_all}}"}, "cannot be made .UndefinedError: 'nothing' is undefined"),
        ({"doc_to_choice": "{{"}, "cannot be made .TemplateSyntaxError"),
        ({"metric_list": 5}, "cannot be made .TypeError"),
        ({"process_docs": "x"}, "cannot be made .TypeError"),
        ({"repeats": "x"}, "cannot be evaluated .TypeError"),
        ({"test_split": ["x"]}, "the task tiny has the split .'x'.; expected a name"),
        ({"task": 5}, "has task: 5; expected a name"),
    ],
)
def test_fields_of_a_task_file_that_make_no_sense_are_one_sentence(one, tmp_path, fields, said):
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(TASK | fields))
    with pytest.raises(ValueError, match=said) as caught:
        evaluate_tasks(one, str(tmp_path / "x.yaml"), data={"tiny": ROWS}, progress=False)
    assert "\n" not in str(caught.value)


SHOTS = 2
# The field of a template that tells one item from another.
NUMBERED = {
    "hellaswag": "activity_label",
    "piqa": "goal",
    "record": "passage",
    "winogrande": "sentence",
    "storycloze": "InputSentence1",
    "openbookqa": "question_stem",
    "arc": "question",
    "copa": "premise",
}


def numbered(doc, field, letter="n"):
    return [doc | {field: f"<{letter}{number}> {doc[field]}"} for number in range(8)]


def answered(prompts, solved) -> int:
    """How many prompts have what their own item would be with its answer."""
    return sum(own in prompt for own, prompt in zip(solved, prompts, strict=True))


def prompts_of(name, data, apart=set_apart):
    [task] = load_tasks([name], data).values()
    task.set_config("num_fewshot", SHOTS)
    task.set_fewshot_seed(1234)
    apart(task)
    return [task.fewshot_context(doc, SHOTS) for doc in task.eval_docs]


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_item_of_a_given_data_set_has_its_answer_in_its_examples(name):
    task = f"fair_{'arc_challenge' if name == 'arc' else name}"
    evaluated, shots = ("test", "validation") if name == "storycloze" else ("validation", "train")
    doc, field = TEMPLATES[name][0], NUMBERED[name]
    rows = numbered(doc, field)
    solved = [made["text"] + made["choices"][made["gold"]] for made in getattr(fair, name)(rows)]
    for given in (rows, {evaluated: rows, shots: rows}, {evaluated: rows, shots: rows[4:] + rows[4:]}):
        prompts = prompts_of(task, {task: given})
        assert answered(prompts, solved) == 0
        assert all(prompt.count("<n") == 1 + SHOTS for prompt in prompts)
    # Of splits without a common item, the harness's own draw stands.
    given = {evaluated: rows, shots: numbered(doc, field, "m")}
    plain = prompts_of(task, {task: given}, apart=lambda _: None)
    assert prompts_of(task, {task: given}) == plain


@pytest.mark.parametrize("name", ["demo_endings", "copa_release"])
def test_no_item_of_the_package_has_its_answer_in_its_examples(name):
    """Nor where the command ``lm_eval`` reads the task file."""
    solved = [doc["text"] + doc["choices"][doc["gold"]] for doc in load_tasks([name], {})[name].eval_docs]
    for apart in (set_apart, lambda _: None):
        assert answered(prompts_of(name, {}, apart), solved) == 0


@pytest.mark.parametrize(
    "splits",
    [
        {"test_split": "test"},
        {"test_split": "test", "fewshot_split": "test"},
        {"test_split": None, "validation_split": "test"},
        {"test_split": None, "validation_split": "test", "fewshot_split": "test"},
        {"test_split": None, "validation_split": "test", "training_split": "train"},
        {"training_split": "train", "fewshot_split": "train"},
    ],
)
def test_no_item_of_a_task_file_has_its_answer_in_its_examples(tmp_path, splits):
    rows = numbered(ROWS[0], "question")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = dict.fromkeys(("test", "train"), str(tmp_path / "rows.jsonl"))
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(TASK | splits | {"dataset_kwargs": {"data_files": files}}))
    solved = [f"{row['question']} {row['choices'][row['answer']]}" for row in rows]
    for data in ({}, {"tiny": rows}, {"tiny": dict.fromkeys(files, rows)}):
        assert answered(prompts_of(str(path), data), solved) == 0


def test_copies_of_an_item_are_no_examples_of_it(one):
    doc = TEMPLATES["piqa"][0]
    rows = [doc, doc, *numbered(doc, "goal")[:4]]
    for shots, good in ((4, True), (5, False)):
        asked = {"data": {"fair_piqa": rows}, "num_fewshot": shots, "progress": False}
        if good:
            text = evaluate_tasks(one, "fair_piqa", **asked).items["text"][0]
            assert text.count("<n") == 4 and text.endswith(" Turn the lid.\nOpen a jar ")
        else:
            with pytest.raises(ValueError, match="num_fewshot=5: fair_piqa has 6 examples, and 7 are needed"):
                evaluate_tasks(one, "fair_piqa", **asked)


@pytest.mark.parametrize("answer", [-1, 7, "other"])
def test_an_item_without_a_right_choice_is_said_to_count_as_wrong(one, tmp_path, answer):
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(TASK | {"doc_to_target": "answer"}))
    rows = [*map(dict, ROWS), {"question": "A dog", "choices": ["sat", "ran"], "answer": 0}]
    asked = {"data": {"tiny": rows}, "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        evaluate_tasks(one, str(tmp_path / "x.yaml"), **asked)
    kind = type(answer)
    for row in rows[:2]:
        row["answer"] = row["choices"][row["answer"]] if kind is str else row["answer"]
    rows[2]["answer"] = answer
    with pytest.warns(UserWarning, match="tiny: the right choice of . of 3 items is none of their choices"):
        evaluate_tasks(one, str(tmp_path / "x.yaml"), **asked)


METRICS = ["acc", "acc_norm", "acc_bytes", "acc_mutual_info"]
LONG = ["was", "sat", "ran away from the big dog", "\u2014" * 8]


def items_of(one, tmp_path, fields, rows):
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(TASK | fields))
    found = evaluate_tasks(one, str(tmp_path / "x.yaml"), data={"tiny": rows}, progress=False)
    return found.items


def test_each_metric_has_the_answer_that_it_values(one, tmp_path):
    """By the harness's own values: they are 1 for the right answer and for no other one."""
    rows = [
        {"question": question, "choices": LONG, "answer": number}
        for question in ("The cat", "It is a truth universally", "def main(")
        for number in range(len(LONG))
    ]
    items = items_of(one, tmp_path, {"metric_list": [{"metric": name} for name in METRICS]}, rows)
    by_metric = {name: items.query("metric == @name") for name in METRICS}
    for some in by_metric.values():
        assert some["target"].tolist() == [LONG[row["answer"]] for row in rows]
        assert some["value"].tolist() == (some["answer"] == some["target"]).astype(float).tolist()
    answers = {name: tuple(some["answer"]) for name, some in by_metric.items()}
    assert len(set(answers.values())) == len(METRICS), "the items tell the metrics apart"
    assert items.query("metric == 'margin'")["answer"].tolist() == list(answers["acc"])


def test_an_answer_that_changes_in_one_metric_alone_is_listed(runs):
    """Items are listed whose answer by any metric is another one."""
    before = replace(runs[0], items=runs[0].items.query("task == 'copa_release'").reset_index(drop=True))
    longer = before.items.query("metric == 'acc'").assign(metric="acc_norm")
    before = replace(before, items=pd.concat([before.items, longer], ignore_index=True))
    after = replace(before, items=before.items.copy())
    after.items.loc[after.items.index[-1], "answer"] = "another"
    table, listed = task_report.changes(before, after)
    assert dict(zip(table["metric"], table["changed"], strict=True)) == {
        "acc": 0,
        "margin": 0,
        "acc_norm": pytest.approx(1 / 3),
    }
    assert listed["answer_after"].tolist() == ["another"]


@pytest.mark.parametrize("kind", ["numbers", "texts"])
def test_several_right_answers(one, tmp_path, kind):
    right = [[0, 2], [1], [1, 2]]
    rows = [{"question": "The cat", "choices": LONG[:3], "answer": numbers} for numbers in right]
    fields = {"doc_to_target": "answer"}
    if kind == "texts":
        # The harness values numbers alone, and leaves a list of texts to functions of the task.
        (tmp_path / "own.py").write_text("def own(doc, results):\n    return {'acc': 1.0}\n")
        for row in rows:
            row["answer"] = [row["choices"][number] for number in row["answer"]]
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(TASK | fields))
    if kind == "texts":
        path.write_text(path.read_text() + "process_results: !function own.own\n")
    items = evaluate_tasks(one, str(path), data={"tiny": rows}, progress=False).items
    for numbers, item in zip(right, items.query("metric == 'margin'").itertuples(), strict=True):
        others = [score for number, score in enumerate(item.scores) if number not in numbers]
        assert item.value == max(item.scores[number] for number in numbers) - max(others)
        assert item.target == " | ".join(LONG[number] for number in numbers)
    if kind == "numbers":
        acc = items.query("metric == 'acc'")
        expected = [float(item.answer in item.target.split(" | ")) for item in acc.itertuples()]
        assert acc["value"].tolist() == expected


def test_choices_that_are_read_before_the_answer(one, tmp_path):
    """As in Winogrande: each choice is a beginning, and all have the same end."""
    rows = [
        {"choices": ["The cat", "It is a truth universally"], "end": "acknowledged", "answer": number}
        for number in (0, 1)
    ]
    items = items_of(one, tmp_path, {"doc_to_text": "answer", "doc_to_target": "end"}, rows)
    acc, margin = (items.query("metric == @name") for name in ("acc", "margin"))
    assert acc["value"].tolist() == (acc["answer"] == acc["target"]).astype(float).tolist() == [0, 1]
    assert [value > 0 for value in margin["value"]] == [False, True]


def test_files_of_other_tools(tmp_path):
    # With a byte order mark, a separator of lines within a string, and answers that pandas takes for missing ones.
    (tmp_path / "a.jsonl").write_text('\ufeff{"goal": "one\u2028two"}\n', "utf-8")
    assert dataset("x", tmp_path / "a.jsonl")[:] == {"goal": ["one\u2028two"]}
    (tmp_path / "a.csv").write_text("goal,sol1,label\nNA,None,0\nx,,1\n")
    assert dataset("x", tmp_path / "a.csv")[:] == {"goal": ["NA", "x"], "sol1": ["None", ""], "label": [0, 1]}


def test_a_model_is_loaded():
    with pytest.raises(ValueError, match="model='demo': expected the model that moekit.load returns"):
        evaluate_tasks("demo", "copa_release")


def test_without_a_network_a_data_set_is_named(one, monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach it\non the hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(
        ValueError, match=r"the data set of fair_piqa cannot be had .*reach it\); give it as a file"
    ):
        evaluate_tasks(one, "fair_piqa", progress=False)


def test_other_models_lack_the_tokens():
    task = load_tasks(["copa_release", "demo_endings"], {})["demo_endings"]
    with pytest.raises(ValueError, match="which only the model 'moekit' gives"):
        task.process_results(task.eval_docs[0], [(-1.0, False), (-2.0, False)])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1}\n\n{"a": }', "line 3 is no JSON .Expecting value"),
        ('{"a": 1}\n{"a": 1, "a": 2}', "line 2 has the key 'a' twice in one object"),
        ("[" * 100_000, "it is no JSON"),
        ('[{"a": 1}', "it is no JSON"),
    ],
)
def test_a_damaged_file_of_items_is_named_with_its_line(tmp_path, text, said):
    path = tmp_path / "items.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"data of x: .*items\.jsonl cannot be read \({said}"):
        dataset("x", path)


@pytest.mark.parametrize("name", ["items.jsonl", "items.json", "items.csv", "items.tsv"])
def test_a_file_of_items_with_holes_is_refused_by_its_size(tmp_path, name):
    path = tmp_path / name
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(ValueError, match=f"{name} has 1,099,511,627,776 bytes; expected the items of x, of"):
        dataset("x", path)
