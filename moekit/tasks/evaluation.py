"""Tasks on a loaded model: a table of results, a row for each item, and what changed between two runs."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.task
import numpy as np
import pandas as pd
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from moekit import arguments
from moekit.api import Model
from moekit.arguments import Texts, Whole, check, shown
from moekit.nn.quantise import dtype_name
from moekit.routing.statistics import holm, paired
from moekit.tasks.fair import ChoiceTask
from moekit.tasks.harness import HarnessModel
from moekit.tasks.rows import Rows, dataset

# The task files of the package.
FILES = Path(__file__).parent / "files"
# The harness's own default for the draw of few-shot examples.
SHOTS_SEED = 1234
MARGIN = "margin"


@dataclass(frozen=True)
class TaskResults:
    """The result of :func:`evaluate_tasks`.

    Attributes:
        tasks: one row per task and metric: ``task``, ``metric``, ``value``, ``stderr`` (the harness's; NaN where it knows
            none), ``items``, ``shots``.
        items: one row per item, task and metric: ``task``, ``item`` (its number in the data set), ``metric``, ``value``,
            ``text`` (what the model read before the answer), ``answer`` (the choice taken, or what was generated),
            ``target`` (the right choice, or what was expected), ``scores`` (of the choices, as a list; None without any).
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


def evaluate_tasks(
    model: Model,
    tasks: str | Sequence[str],
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
        num_fewshot: examples in front of each item; None: as the task says, which is none for moekit's own.
        capacity_token_fraction, seed: as for :meth:`moekit.api.Model.score`, where each text is a routing group.
        shots_seed: of the draw of examples; FAIR reports the mean over 25 draws.
        blank_lines: see :class:`moekit.tasks.harness.HarnessModel`.
        include: a folder of further task files.
        progress: show bars.

    Raises:
        ValueError: an argument makes no sense, there is no such task, or a data set cannot be had.
        moekit.ranks.RankError: a rank failed.
    """
    names = check("tasks", tasks, Texts())
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
    with _quiet():
        for task in loaded.values():
            if shots is not None:
                task.set_config("num_fewshot", shots)
            elif task.config.num_fewshot is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(shots_seed)
            _enough(task)
        began = time.perf_counter()
        found = lm_eval.evaluate(harness, {"tasks": loaded}, limit=limit)
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
        "versions": model.versions | {"lm-eval": lm_eval.__version__},
    }
    items = _item_table(found, loaded)
    return TaskResults(_task_table(found, loaded, items), items, harness.tokens, seconds, meta)


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


def known_tasks() -> list[str]:
    """The names of moekit's own tasks."""
    return sorted(path.stem for path in FILES.glob("*.yaml"))


def load_tasks(
    names: Sequence[str], data: Mapping[str, Rows | Mapping[str, Rows]], include: str | Path | None = None
) -> dict[str, Task]:
    """The harness's tasks by name, with their data sets.

    Raises:
        ValueError: there is no such task, or a data set cannot be had.
    """
    with _quiet():
        return _loaded(names, data, include)


def _loaded(
    names: Sequence[str], data: Mapping[str, Rows | Mapping[str, Rows]], include: str | Path | None
) -> dict[str, Task]:
    folders = [FILES]
    if include is not None:
        folders.append(check("include", include, arguments.Path()))
        if not folders[-1].is_dir():
            raise ValueError(
                f"there is no folder {folders[-1]}; expected include to name one with task files"
            )
    # The harness's own files are thousands: they are looked through only where they are asked for.
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not all(name in manager.task_index or name.endswith(".yaml") for name in names):
        manager = TaskManager(include_path=folders)
    wanted: dict[str, Path] = {}
    others = []
    for name in names:
        if name.endswith(".yaml"):
            path = check("tasks", name, arguments.Path())
            if not path.is_file():
                raise ValueError(f"there is no task file {path}; expected the path of one, or a task's name")
            wanted[_read(path, resolve_func=False).get("task", name)] = path
        elif name not in manager.task_index:
            raise ValueError(
                f"tasks={shown(name)}: there is no such task; moekit's own are {', '.join(known_tasks())}, and "
                "lm_eval ls tasks lists the harness's"
            )
        else:
            entry = manager.task_index[name]
            for one in sorted(entry.tags) if entry.yaml_path is None else [name]:
                path = manager.task_index[one].yaml_path
                if one in data or path.is_relative_to(FILES):
                    wanted[one] = path
                else:
                    others.append(one)
    for name in data:
        if name not in wanted:
            raise ValueError(
                f"data is given for {shown(name)}, which is none of the tasks {', '.join([*wanted, *others])}"
            )
    loaded = {}
    for name, path in wanted.items():
        config = _read(path)
        if name in data:
            config |= _given(name, data[name], config)
        elif not config.get("dataset_path") and not config.get("custom_dataset"):
            raise ValueError(
                f"{path} names no dataset_path; write one into it, or give the data set with data={{{name!r}: 'FILE.jsonl'}}"
            )
        loaded |= _load(manager, name, config)
    for name in others:
        loaded |= _load(manager, name, name)
    return loaded


def _read(path: Path, **how: Any) -> dict[str, Any]:
    """The content of a task file; a ValueError where it cannot be read."""
    try:
        return load_yaml(path, **how)
    except Exception as error:
        # A task file names Python code, which may raise anything.
        said = " ".join(str(error).split())
        raise ValueError(f"the task file {path} cannot be read ({said[:200]})") from None


def _load(manager: TaskManager, name: str, spec: Any) -> dict[str, Task]:
    try:
        return manager.load([spec])["tasks"]
    except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"the data set of {name} cannot be had ({type(error).__name__}: {first[:200]}); give it as a file with "
            f"data={{{name!r}: 'FILE.jsonl'}} (in the notebook: task_data)"
        ) from None


def _given(name: str, rows: Rows | Mapping[str, Rows], config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a task's config that makes ``rows`` its data set."""
    splits = [config[key] for key in config if key.endswith("_split") and config[key]]
    if isinstance(rows, Mapping):
        if missing := [split for split in splits[:1] if split not in rows]:
            raise ValueError(
                f"data of {name} has the splits {', '.join(rows)}, without {missing[0]}; expected the splits that the task names"
            )
        made = {split: dataset(name, some) for split, some in rows.items()}
    else:
        made = dict.fromkeys(splits, dataset(name, rows))
    return {
        "custom_dataset": lambda **_: made,
        "dataset_path": None,
        "dataset_name": None,
        "dataset_kwargs": {},
    }


def _enough(task: Task) -> None:
    """Check that there are as many examples as the harness draws; else a ValueError."""
    shots = task.config.num_fewshot
    if not shots:
        return
    # One more is drawn where the item itself may be among them.
    drawn = shots + (task.fewshot_cfg.split == task.config.test_split)
    if drawn > (there := len(list(task.fewshot_docs()))):
        raise ValueError(
            f"num_fewshot={shots}: {task.config.task} has {there} examples, and {drawn} are drawn; ask for fewer, or give "
            "more with data={'TASK': {'SPLIT': 'FILE.jsonl'}}"
        )


def _item_table(found: Mapping[str, Any], tasks: Mapping[str, Task]) -> pd.DataFrame:
    rows = []
    for name, task in tasks.items():
        for sample in found["samples"][name]:
            told, margin = _told(task, sample)
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
                    rows.append(row | told)
    columns = ["task", "item", "metric", "value", "text", "answer", "target", "scores"]
    order = {name: number for number, name in enumerate(tasks)}
    table = pd.DataFrame(rows, columns=columns)
    return table.sort_values(
        ["task", "metric", "item"],
        key=lambda column: column.map(order) if column.name == "task" else column,
        kind="stable",
        ignore_index=True,
    )


def _told(task: Task, sample: Mapping[str, Any]) -> tuple[dict[str, Any], float | None]:
    """An item's ``text``, ``answer``, ``target`` and ``scores``, and its margin; None where it has none."""
    results, target = sample["filtered_resps"], sample["target"]
    scores = margin = None
    answer = ""
    if task.OUTPUT_TYPE == "multiple_choice":
        doc = sample["doc"]
        choices = task.doc_to_choice(doc)
        scores = task.scores(doc, results) if isinstance(task, ChoiceTask) else [one[0] for one in results]
        scores = [float(score) for score in scores[: len(choices)]]
        answer = choices[int(np.argmax(scores))]
        golds = set(doc["golds"]) if isinstance(task, ChoiceTask) else {target}
        if 0 < len(right := [s for n, s in enumerate(scores) if n in golds]) < len(scores):
            margin = max(right) - max(s for n, s in enumerate(scores) if n not in golds)
        target = choices[target] if isinstance(target, int) and 0 <= target < len(choices) else target
    elif task.OUTPUT_TYPE == "generate_until":
        answer = results[0] if isinstance(results[0], str) else str(results[0])
    told = {"text": sample["arguments"][0][0], "answer": answer, "target": str(target), "scores": scores}
    return told, margin


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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the harness's advice and its bars over prompts."""
    logger = logging.getLogger("lm_eval")
    level, bar = logger.level, lm_eval.api.task.tqdm
    logger.setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = lambda rows, **_: rows
    try:
        yield
    finally:
        logger.setLevel(level)
        lm_eval.api.task.tqdm = bar
