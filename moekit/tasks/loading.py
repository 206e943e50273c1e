"""Tasks by their names or files, with their data sets."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.task
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from moekit import arguments
from moekit.arguments import check, shown
from moekit.headlines import folded, headline
from moekit.tasks.rows import Rows, dataset

# The task files of the package.
FILES = Path(__file__).parent / "files"


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
    with quiet():
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
            called = _read(path, resolve_func=False).get("task", name)
            if not isinstance(called, str):
                raise ValueError(f"the task file {path} has task: {shown(called)}; expected a name")
            wanted[called] = path
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
        raise ValueError(f"the task file {path} cannot be read ({folded(error, 200)})") from None


def _load(manager: TaskManager, name: str, spec: Any) -> dict[str, Task]:
    try:
        return manager.load([spec])["tasks"]
    except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"the data set of {name} cannot be had ({headline(error, 200)}); give it as a file with "
            f"data={{{name!r}: 'FILE.jsonl'}} (in the notebook: task_data)"
        ) from None
    except Exception as error:
        # A task's templates and functions, too, may raise anything.
        raise ValueError(
            f"the task {name} cannot be made ({headline(error, 200)}): check the fields of the task file, and those of its items"
        ) from error


def _given(name: str, rows: Rows | Mapping[str, Rows], config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a task's config that makes ``rows`` its data set."""
    splits = [config[key] for key in config if key.endswith("_split") and config[key]]
    if odd := [split for split in splits if not isinstance(split, str)]:
        raise ValueError(f"the task {name} has the split {shown(odd[0])}; expected a name")
    if isinstance(rows, Mapping):
        if missing := [split for split in splits[:1] if split not in rows]:
            raise ValueError(
                f"data of {name} has the splits {', '.join(map(str, rows))}, without {missing[0]}; expected the splits that the "
                "task names"
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


def set_apart(task: Task) -> None:
    """Keep each item out of its own examples, and check that there are as many as are drawn; else a ValueError."""
    shots = task.config.num_fewshot
    if not shots:
        return
    examples = Counter(map(_content, task.fewshot_docs()))
    # Each copy of an item may be drawn, and is then replaced.
    copies = max((examples[content] for content in map(_content, task.eval_docs)), default=0)
    if copies:
        # The harness looks for the item itself only where this says that both are of one split.
        task.fewshot_cfg.split = task.config.test_split
    needed = shots + max(copies, task.fewshot_cfg.split == task.config.test_split)
    if needed > (there := examples.total()):
        raise ValueError(
            f"num_fewshot={shots}: {task.config.task} has {there} examples, and {needed} are needed; ask for fewer, or give "
            "more with data={'TASK': {'SPLIT': 'FILE.jsonl'}}"
        )


def _content(doc: Any) -> str:
    return repr(sorted(doc.items()) if isinstance(doc, Mapping) else doc)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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
