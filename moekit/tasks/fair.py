"""The zero-shot tasks of FAIR's mixture-of-experts paper (Artetxe et al. 2021, arXiv 2112.10684), for the task files.

A choice is written into the question, in place of a mask, and its score is the mean log-probability of the tokens from
the first on in which the choices differ. Where the choices are calibrated, the same without the question is subtracted:
how probable the answer is by itself (Brown et al. 2020, arXiv 2005.14165, section 2.4). The templates and settings are those
of FAIR's own evaluation of English (``examples/few_shot`` in its copy of fairseq).

A data set's item becomes

    {"text": what stands before the choice, "choices": each choice with what stands after it, "gold": the right one,
     "golds": all that are right, "calibration": each choice without the question, or []}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from moekit.arguments import MOST, Whole, shown

Doc = Mapping[str, Any]


class ChoiceTask(ConfigurableTask):
    """A task of choices that are scored by their tokens' log-probabilities; the class of the task files.

    ``metadata.score`` of a file is "mean" (of the tokens in which the choices differ) or "sum".
    """

    def __init__(self, config: Mapping[str, Any] | None = None, **more: Any):
        super().__init__(config={name: value for name, value in config.items() if name != "class"}, **more)

    def construct_requests(self, doc: Doc, ctx: str, **kwargs: Any) -> list[Instance]:
        """A request for each choice, and one for each choice without the question where there is a calibration."""
        for option in ("apply_chat_template", "chat_template"):
            kwargs.pop(option, None)
        pairs = [(ctx, self.config.target_delimiter + choice) for choice in doc["choices"]]
        pairs += [("", choice) for choice in doc["calibration"]]
        return [
            Instance(request_type="loglikelihood", doc=doc, arguments=pair, idx=index, **kwargs)
            for index, pair in enumerate(pairs)
        ]

    def scores(self, doc: Doc, results: Sequence[Any]) -> np.ndarray:
        """[C] float64, the score of each choice.

        Raises:
            ValueError: the results have no log-probability for each token, as those of other models than moekit's.
        """
        if not all(hasattr(one, "logprobs") for one in results):
            raise ValueError(
                f"{self.config.task} needs the log-probability of each token, which only the model 'moekit' gives: name it, or "
                "take the harness's own task"
            )
        count = len(doc["choices"])
        if self.config.metadata.get("score") == "sum":
            return np.array([one[0] for one in results])
        found = means(results[:count])
        return found - means(results[count:]) if doc["calibration"] else found

    def process_results(self, doc: Doc, results: Sequence[Any]) -> dict[str, float]:
        return {"acc": float(int(self.scores(doc, results).argmax()) in doc["golds"])}


def means(results: Sequence[Any]) -> np.ndarray:
    """[C] float64, the mean log-probability of each choice's tokens, without those with which all choices begin.

    A choice keeps its last token at least, even where another one begins with all of it.
    """
    shared = 0
    for together in zip(*(one.ids[:-1] for one in results), strict=False):
        if len(set(together)) > 1:
            break
        shared += 1
    return np.array([np.mean(one.logprobs[shared:], dtype=np.float64) for one in results])


def item(
    text: str, choices: Iterable[str], golds: Iterable[int], calibration: Iterable[str] = ()
) -> dict[str, Any]:
    """An item in the form that the top of this file describes."""
    golds = list(golds)
    return {
        "text": text,
        "choices": list(choices),
        "gold": golds[0] if golds else -1,
        "golds": golds,
        "calibration": list(calibration),
    }


def whole(value: Any) -> int:
    """A choice's number; a file may spell it as text."""
    return Whole(-MOST).convert(int(value) if isinstance(value, str) else value)


def each(convert: Callable[[Doc], dict[str, Any]]) -> Callable[[Iterable[Doc]], datasets.Dataset]:
    """``process_docs`` of a task file: every item of a data set in the form above."""

    def one(number: int, doc: Doc) -> dict[str, Any]:
        try:
            made = convert(doc)
            choices = made["choices"] + made["calibration"]
            if not choices or not all(isinstance(text, str) and text for text in choices):
                raise ValueError("a choice is missing, empty, or no text")
            if not all(0 <= gold < len(made["choices"]) for gold in made["golds"]):
                raise ValueError("the right choice is none of the choices")
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            said = f"there is no field {error}" if isinstance(error, KeyError) else error
            raise ValueError(
                f"item {number} is no item of {convert.__name__}: {said}; expected the fields of its data set, found "
                f"{shown(dict(doc))}"
            ) from None
        return made

    def process(docs: Iterable[Doc]) -> datasets.Dataset:
        return datasets.Dataset.from_list([one(*numbered) for numbered in enumerate(docs)])

    process.__doc__ = convert.__doc__
    return process


def packaged(file: str, **_: Any) -> dict[str, datasets.Dataset]:
    """``custom_dataset`` of a task file: the items in ``file`` of this package."""
    lines = (Path(__file__).parent / "files" / file).read_text("utf-8").splitlines()
    return {"validation": datasets.Dataset.from_list([json.loads(line) for line in lines])}


@each
def written(doc: Doc) -> dict[str, Any]:
    """``text``, ``choices`` and ``gold`` as they stand."""
    return item(doc["text"], doc["choices"], [doc["gold"]])


@each
def hellaswag(doc: Doc) -> dict[str, Any]:
    """``activity_label: ctx_a Ctx_b`` and each of ``endings``."""
    second = doc["ctx_b"].strip()
    words = (
        f"{doc['activity_label'].strip()}: {doc['ctx_a'].strip()} {second[:1].upper()}{second[1:]}".split()
    )
    return item(" ".join(words) + " ", doc["endings"], [whole(doc["label"])])


@each
def piqa(doc: Doc) -> dict[str, Any]:
    """``goal`` and each solution."""
    return item(doc["goal"].strip() + " ", [doc["sol1"], doc["sol2"]], [whole(doc["label"])])


@each
def record(doc: Doc) -> dict[str, Any]:
    """The passage and the query with each entity in place of ``@placeholder``; every answer is right."""
    before, _, after = doc["query"].partition("@placeholder")
    entities = list(dict.fromkeys(doc["entities"]))
    choices = [entity + after.replace("@placeholder", entity) for entity in entities]
    golds = [number for number, entity in enumerate(entities) if entity in set(doc["answers"])]
    return item(f"{doc['passage'].replace('@highlight', '')} {before}", choices, golds)


@each
def winogrande(doc: Doc) -> dict[str, Any]:
    """The sentence with each option in place of ``_``."""
    before, _, after = doc["sentence"].partition("_")
    return item(before, [doc["option1"] + after, doc["option2"] + after], [whole(doc["answer"]) - 1])


@each
def storycloze(doc: Doc) -> dict[str, Any]:
    """Four sentences and each ending; the fields are named as in the authors' files, or as in the hub's data set."""
    if "InputSentence1" in doc:
        sentences = [doc[f"InputSentence{n}"] for n in range(1, 5)]
        endings, answer = [doc[f"RandomFifthSentenceQuiz{n}"] for n in (1, 2)], doc["AnswerRightEnding"]
    else:
        sentences = [doc[f"input_sentence_{n}"] for n in range(1, 5)]
        endings, answer = [doc[f"sentence_quiz{n}"] for n in (1, 2)], doc["answer_right_ending"]
    return item(" ".join(sentences) + " ", endings, [whole(answer) - 1])


@each
def openbookqa(doc: Doc) -> dict[str, Any]:
    """As :func:`arc`."""
    return question(doc["question_stem"], doc)


@each
def arc(doc: Doc) -> dict[str, Any]:
    """A question is answered by "It is ...", and a sentence that breaks off goes on; calibrated by "It is ..." alone."""
    return question(doc["question"], doc)


def question(stem: str, doc: Doc) -> dict[str, Any]:
    """The item of :func:`arc` with the question ``stem``."""
    stem = stem.strip()
    answers = [text.lower() for text in doc["choices"]["text"]]
    answers = [answer if answer.endswith(".") else answer + "." for answer in answers]
    alone = [f"It is {answer}" for answer in answers]
    gold = list(doc["choices"]["label"]).index(doc["answerKey"].strip())
    return item(stem + " ", alone if stem.endswith("?") else answers, [gold], alone)


# The question to a premise, as the page of the released models asks it.
ASKED = {"cause": "What was the CAUSE of this?", "effect": "What happened as a RESULT?"}


@each
def copa(doc: Doc) -> dict[str, Any]:
    """The premise, its question, and each alternative on a line of its own."""
    text = f"{doc['premise'].strip()} {ASKED[doc['question']]}\n"
    return item(text, [doc["choice1"], doc["choice2"]], [whole(doc["label"])])
