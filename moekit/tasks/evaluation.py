"""Tasks on a loaded model: a table of results, a row for each item, and what changed between two runs."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pandas as pd
from lm_eval.api.task import Task

from moekit.api import Model
from moekit.arguments import Texts, Whole, check, shown
from moekit.checked import Instance, checked
from moekit.headlines import headline
from moekit.nn.quantise import dtype_name
from moekit.ranks import RankError
from moekit.routing.statistics import holm, paired
from moekit.tasks.fair import ChoiceTask
from moekit.tasks.harness import HarnessModel
from moekit.tasks.loading import known_tasks, load_tasks, quiet, set_apart
from moekit.tasks.rows import Rows

# The harness's own default for the draw of few-shot examples.
SHOTS_SEED = 1234
MARGIN = "margin"
# What the harness divides a choice's log-probability by, in the metrics in which it does so.
LENGTHS = {"acc_norm": len, "acc_bytes": lambda choice: len(choice.encode())}


@dataclass(frozen=True)
class TaskResults:
    """The result of :func:`evaluate_tasks`.

    Attributes:
        tasks: one row per task and metric: ``task``, ``metric``, ``value``, ``stderr`` (the harness's; NaN where it knows
            none), ``items``, ``shots``.
        items: one row per item, task and metric: ``task``, ``item`` (its number in the data set), ``metric``, ``value``,
            ``text`` (what the model read before the answer), ``answer`` (the choice that this metric takes, or what was
            generated), ``target`` (the right choice, or several with " | " between them, or what was expected), ``scores``
            (of the choices, as a list; None without any).
            Choices have one metric more than the harness knows: "margin", the right choice's score minus the best other's
            (nats, of a token where the score is a mean). A change shows in it before an answer changes.
        tokens: the tokens of all texts, where a shared beginning counts with each text.
        seconds: the time of the harness's run, without the loading of data sets.
        meta: ``capacity_token_fraction``, ``intervention``, ``limit``, ``world_size``, ``device``, ``dtype``, ``experts``
            (their type: "int8", "fp8" or None), ``checkpoint``, ``versions``.
    """

    tasks: pd.DataFrame
    items: pd.DataFrame
    tokens: int
    seconds: float
    meta: dict[str, Any]


RESULTS = Instance(TaskResults, "what evaluate_tasks gives")


def evaluate_tasks(
    model: Model,
    tasks: str | Path | Iterable[str | Path],
    *,
    data: Mapping[str, Rows | Mapping[str, Rows]] | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    capacity_token_fraction: float | str | None = None,
    seed: int = 1,
    shots_seed: int = SHOTS_SEED,
    blank_lines: bool = False,
    include: str | Path | None = None,
    progress: bool = True,
) -> TaskResults:
    """Evaluate ``model`` on tasks: moekit's own (:func:`known_tasks`), the harness's, or a task file.

    Args:
        tasks: names, tags or paths of ``.yaml`` files. "fair_zero_shot" is FAIR's six.
        data: for a task, its data set in place of the hub's: a ``.json``, ``.jsonl``, ``.csv`` or ``.tsv`` file, rows, or one
            of these for each split; the fields are those of the hub's. Without it a data set is fetched by its name, which
            needs a network the first time.
        limit: the first items of each task; None: all.
        num_fewshot: examples in front of each item, none of which has all fields of the item; None: as the task says, which is none for
            moekit's own.
        capacity_token_fraction, seed: as for :meth:`moekit.api.Model.score`, where each text is a routing group.
        shots_seed: of the draw of examples; FAIR reports the mean over 25 draws.
        blank_lines: see :class:`moekit.tasks.harness.HarnessModel`.
        include: a folder of further task files.
        progress: show bars.

    Raises:
        ValueError: an argument makes no sense, there is no such task, or a data set cannot be had.
        moekit.ranks.RankError: a rank failed.
    """
    names = check("tasks", tasks, Texts(paths=True))
    if not names:
        raise ValueError(f"tasks={shown(tasks)}: expected at least one, such as {', '.join(known_tasks())}")
    limit = check("limit", limit, Whole(optional=True))
    shots = check("num_fewshot", num_fewshot, Whole(0, optional=True))
    shots_seed = check("shots_seed", shots_seed, Whole(0))
    options = {"capacity_token_fraction": capacity_token_fraction, "seed": seed, "blank_lines": blank_lines}
    if not isinstance(model, Model):
        raise ValueError(f"model={shown(model)}: expected the model that moekit.load returns")
    data = {} if data is None else data
    if not isinstance(data, Mapping):
        raise ValueError(f"data={shown(data)}: expected a data set for each task, {{'TASK': 'FILE.jsonl'}}")
    harness = HarnessModel(model, **options, progress=progress)
    loaded = load_tasks(names, data, include)
    with quiet():
        for task in loaded.values():
            if shots is not None:
                task.set_config("num_fewshot", shots)
            elif task.config.num_fewshot is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(shots_seed)
            set_apart(task)
        began = time.perf_counter()
        found = _evaluated(harness, loaded, limit)
        seconds = time.perf_counter() - began
    change = model.intervention
    meta = {
        "capacity_token_fraction": model.capacity(capacity_token_fraction),
        "intervention": None if change is None else change.describe(),
        "limit": limit,
        "world_size": model.world_size,
        "device": model.device,
        "dtype": dtype_name(model.dtype),
        "experts": model.experts,
        "checkpoint": str(model.files.shared.parent),
        # As in a trace: the fields that the load changed.
        **({"config": dict(model.changes)} if model.changes else {}),
        "versions": model.versions,
    }
    items = _item_table(found, loaded)
    return TaskResults(_task_table(found, loaded, items), items, harness.tokens, seconds, meta)


@checked(before=RESULTS, after=RESULTS)
def compare(before: TaskResults, after: TaskResults) -> pd.DataFrame:
    """What changed between two runs over the same items: a mask, a capacity, another checkpoint.

    Returns:
        One row per task and metric: ``task``, ``metric``, ``items`` (of both runs), ``before``, ``after``, ``change`` (the
        mean of after - before), ``low``, ``high`` (its 95 % interval over items; NaN for fewer than 8, or where all
        changes are equal), ``p`` (sign flips over items, with Holm's correction over the rows), ``changed`` (the share of
        items whose answer is another one). See :class:`moekit.routing.statistics.Paired`.

    Raises:
        ValueError: the runs share no item.
    """
    both = changed_items(before, after)
    rows = []
    for (task, metric), some in both.groupby(["task", "metric"], sort=False):
        change = (some["value_after"] - some["value_before"]).to_numpy(float)
        told = paired(change, np.arange(len(some)))
        rows.append(
            {
                "task": task,
                "metric": metric,
                "items": len(some),
                "before": some["value_before"].mean(),
                "after": some["value_after"].mean(),
                "change": told.value,
                "low": told.low,
                "high": told.high,
                "p": told.p,
                "changed": some["changed"].mean(),
            }
        )
    table = pd.DataFrame(rows)
    table["p"] = holm(table["p"])
    return table


@checked(before=RESULTS, after=RESULTS)
def changed_items(before: TaskResults, after: TaskResults) -> pd.DataFrame:
    """The items of both runs side by side: ``task``, ``item``, ``metric``, ``text``, ``target``, and ``value``, ``answer`` and
    ``scores`` with ``_before`` and ``_after``; ``changed``: whether the answer is another one.

    Raises:
        ValueError: the runs share no item.
    """
    keys = ["task", "item", "metric"]
    columns = [*keys, "value", "answer", "scores"]
    both = before.items.merge(after.items[columns], on=keys, suffixes=("_before", "_after"))
    if both.empty:
        raise ValueError("the two runs share no item; expected results of the same tasks and data")
    both["changed"] = both["answer_before"] != both["answer_after"]
    return both


def _evaluated(harness: HarnessModel, tasks: dict[str, Task], limit: int | None) -> dict[str, Any]:
    """The harness's results."""
    try:
        return lm_eval.evaluate(harness, {"tasks": tasks}, limit=limit)
    except (ValueError, RankError):
        raise
    except Exception as error:
        # A task's templates, functions and filters may raise anything.
        raise ValueError(
            f"the tasks {', '.join(tasks)} cannot be evaluated ({headline(error, 200)}): check the fields of the task file, and those "
            "of its items"
        ) from error


def _item_table(found: Mapping[str, Any], tasks: Mapping[str, Task]) -> pd.DataFrame:
    rows = []
    for name, task in tasks.items():
        lacking = 0
        for sample in found["samples"][name]:
            told, answers, margin = _told(task, sample)
            lacking += _lacks_right(task, sample)
            rest = "" if sample["filter"] == "none" else f" ({sample['filter']})"
            values = {metric + rest: sample[metric] for metric in sample["metrics"]}
            if margin is not None and not rest:
                values[MARGIN] = margin
            for metric, value in values.items():
                if isinstance(value, tuple | list) and len(value) == 2:
                    # A log-probability and the number of bytes or words that it is of.
                    value = value[0] / max(1, value[1])
                if isinstance(value, int | float | np.number):
                    row = {"task": name, "item": sample["doc_id"], "metric": metric, "value": float(value)}
                    answer = answers.get(metric.removesuffix(rest), told["answer"])
                    rows.append(row | told | {"answer": answer})
        if lacking:
            warnings.warn(
                f"{name}: the right choice of {lacking} of {len(found['samples'][name])} items is none of their choices, so "
                "they count as wrong: check doc_to_target and the items",
                stacklevel=3,
            )
    columns = ["task", "item", "metric", "value", "text", "answer", "target", "scores"]
    order = {name: number for number, name in enumerate(tasks)}
    table = pd.DataFrame(rows, columns=columns)
    return table.sort_values(
        ["task", "metric", "item"],
        key=lambda column: column.map(order) if column.name == "task" else column,
        kind="stable",
        ignore_index=True,
    )


def _lacks_right(task: Task, sample: Mapping[str, Any]) -> bool:
    """Whether none of an item's choices is said to be right; FAIR's tasks are checked when they are made."""
    if task.OUTPUT_TYPE != "multiple_choice" or isinstance(task, ChoiceTask):
        return False
    return not _right(task, sample)


def _right(task: Task, sample: Mapping[str, Any]) -> list[int]:
    """The numbers of an item's right choices."""
    doc = sample["doc"]
    if isinstance(task, ChoiceTask):
        return sorted(set(doc["golds"]))
    # Where the choices are what is read, and not what follows, the harness takes the text for the right one's number.
    told = task.doc_to_text(doc) if task.multiple_input else sample["target"]
    choices = task.doc_to_choice(doc)
    return [
        number
        for number, choice in enumerate(choices)
        if any(one in (number, choice) for one in (told if isinstance(told, list) else [told]))
    ]


def _told(task: Task, sample: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str], float | None]:
    """An item's ``text``, ``answer``, ``target`` and ``scores``, the answers of metrics that take others, and the margin.

    The margin is None for an item that has none.
    """
    results, target = sample["filtered_resps"], sample["target"]
    scores = margin = None
    answer, answers = "", {}
    if task.OUTPUT_TYPE == "multiple_choice":
        doc = sample["doc"]
        choices = list(map(str, task.doc_to_choice(doc)))
        found = np.array(
            task.scores(doc, results) if isinstance(task, ChoiceTask) else [one[0] for one in results]
        )
        # Behind the choices' own come those without the question, where a metric asks for them.
        found, alone = found[: len(choices)], found[len(choices) :]
        by_metric = {name: found / [length(one) for one in choices] for name, length in LENGTHS.items()}
        if len(alone) == len(choices):
            by_metric["acc_mutual_info"] = found - alone
        answers = {name: choices[int(np.argmax(by))] for name, by in by_metric.items()}
        answer, scores = choices[int(np.argmax(found))], found.tolist()
        right = _right(task, sample)
        if 0 < len(right) < len(choices):
            margin = float(found[right].max() - np.delete(found, right).max())
        target = " | ".join(choices[number] for number in right) or target
    elif task.OUTPUT_TYPE == "generate_until":
        answer = results[0] if isinstance(results[0], str) else str(results[0])
    told = {"text": sample["arguments"][0][0], "answer": answer, "target": str(target), "scores": scores}
    return told, answers, margin


def _task_table(found: Mapping[str, Any], tasks: Mapping[str, Task], items: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for name, task in tasks.items():
        shots = task.config.num_fewshot or 0
        values = found["results"][name]
        for key, value in values.items():
            metric, _, rest = key.partition(",")
            if not rest or metric.endswith("_stderr"):
                continue
            stderr = values.get(f"{metric}_stderr,{rest}")
            stderr = float(stderr) if isinstance(stderr, int | float | np.number) else np.nan
            told = metric if rest == "none" else f"{metric} ({rest})"
            rows.append((name, told, float(value), stderr, found["n-samples"][name]["effective"], shots))
        margins = items.query("task == @name and metric == @MARGIN")["value"]
        if len(margins):
            rows.append((name, MARGIN, margins.mean(), margins.sem(), len(margins), shots))
    return pd.DataFrame(rows, columns=["task", "metric", "value", "stderr", "items", "shots"])
