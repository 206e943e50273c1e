"""The notebooks' parameters, checked in their first cell: a bad one ends the run there, with one sentence.

    p = parameters.check(globals(), parameters.RUN_INFERENCE)

papermill passes ``-p flag true`` as the string "true", ``-p name 007`` as the number 7, ``-p world_size 1e3`` as a float and
``-p prompts '["a", "b"]'`` as a string, and only warns of a parameter that the notebook does not have. A kernel's namespace
also holds variables of the user's own, such as those of an IPython startup file: these are no parameters.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from moekit import arguments
from moekit.arguments import (
    Capacity,
    Choice,
    Kind,
    Number,
    Path,
    Text,
    Texts,
    Whole,
    Wholes,
)
from moekit.data.settings import KINDS as PREPARING
from moekit.generation.request import KINDS
from moekit.nn.quantise import KINDS as QUANTISED
from moekit.notebook import errors
from moekit.profiling.run import STEPS
from moekit.profiling.work import MODES
from moekit.ranks import WHERE
from moekit.routing.metrics.resampling import least_draws
from moekit.units import Memory


class ParameterError(ValueError):
    """A parameter of a notebook that makes no sense. Jupyter shows its one sentence instead of a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"ParameterError: {self}"]


@dataclass(frozen=True)
class Location:
    """What can be opened, as text: a path, a glob, or a name such as "demo", which what opens it knows.

    Beside a :class:`moekit.arguments.Path`, it may be a number that papermill made of a name.
    """

    optional: bool = False
    expected = Path.expected

    def convert(self, value: Any) -> str:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return str(Path().convert(str(value) if number else value))


@dataclass(frozen=True)
class Numbers:
    """A list of numbers; one number counts as a list of one."""

    optional: bool = False
    expected = "a list of numbers"

    def convert(self, value: Any) -> list[float]:
        return [Number().convert(n) for n in (value if isinstance(value, list | tuple) else [value])]


@dataclass(frozen=True)
class Pairs:
    """Experts by layer: ``{layer: experts}``, with one expert or several; or a list of ``[layer, expert]``."""

    optional: bool = False
    expected = "experts by layer, such as {5: 8} or [[5, 8]]"

    def convert(self, value: Any) -> dict[int, list[int]]:
        pairs = value.items() if isinstance(value, dict) else value
        found: dict[int, list[int]] = {}
        for layer, experts in pairs:
            # papermill's YAML and JSON may spell a key as text.
            layer = int(layer) if isinstance(layer, str) and layer.isdigit() else layer
            found.setdefault(Whole(0).convert(layer), []).extend(Wholes().convert(experts))
        return found


@dataclass(frozen=True)
class Locations:
    """A path for each name; where ``one`` says so, one path alone stands for itself."""

    optional: bool = False
    one: bool = False

    @property
    def expected(self) -> str:
        named = "a path for each name, such as {'news': '/data/news'}"
        return f"the path of a folder, or {named}" if self.one else named

    def convert(self, value: Any) -> str | dict[str, str]:
        if isinstance(value, Mapping) and value:
            return {Text().convert(name): Location().convert(path) for name, path in value.items()}
        if not self.one:
            raise ValueError
        return Location().convert(value)


Table = Mapping[str, Kind | Memory | Location | Numbers | Pairs | Locations]

MODEL: Table = {
    "checkpoint": Location(),
    "bpe": Location(optional=True),
    "world_size": Whole(optional=True),
    "device": Choice(("auto", "cuda", "cpu")),
    "dtype": Choice(("auto", "float32", "float16", "bfloat16")),
    "output_dir": Location(),
}
EXPERTS: Table = {"experts": Choice(tuple(QUANTISED), optional=True)}
RANKS: Table = {"ranks": Choice(WHERE)}
FETCHED: Table = {"resident": Whole(optional=True), "gpu_memory": Memory(optional=True)}
DATA: Table = {
    "data": Location(),
    "subset": Text(),
    "tokens_per_sample": Whole(optional=True),
    "batch_size": Whole(),
    "capacity_token_fraction": Capacity(),
}
READING: Table = DATA | {
    "sample_break_mode": Choice(("none", "complete", "complete_doc", "eos")),
    "context_window": Whole(0),
}
GENERATION: Table = {"prompts": Texts()} | {
    name: KINDS[name]
    for name in (
        "max_new_tokens",
        "temperature",
        "top_k",
        "top_p",
        "beam_size",
        "repetition_penalty",
        "num_return_sequences",
        "seed",
    )
}

README: Table = {"prompt": Text()}
PREPARE_DATA: Table = {"source": Location(), "data_dir": Location(), **PREPARING}
LOAD_SHARDS: Table = {**MODEL, **EXPERTS, **RANKS, **FETCHED}
RUN_INFERENCE: Table = {
    **MODEL,
    **EXPERTS,
    **RANKS,
    **FETCHED,
    **READING,
    "max_batches": Whole(optional=True),
    **GENERATION,
}
INSPECT_ROUTING: Table = {
    **MODEL,
    **EXPERTS,
    **RANKS,
    **FETCHED,
    **DATA,
    "texts": Texts(optional=True),
    "domains": Texts(optional=True),
    "layers": Wholes(optional=True),
    "max_tokens": Whole(optional=True),
    "compare_with": Location(optional=True),
}
STUDY_ROUTING: Table = {
    **MODEL,
    **EXPERTS,
    **RANKS,
    **FETCHED,
    "data": Location(),
    "subset": Text(),
    "domains": Location(optional=True),
    "tokens_per_sample": Whole(optional=True),
    "batch_size": Whole(),
    "capacity_token_fractions": Numbers(),
    "mask": Pairs(optional=True),
    "continuations": Whole(),
    "prompt_tokens": Whole(2),
    "max_new_tokens": KINDS["max_new_tokens"],
    "temperature": KINDS["temperature"],
    "resamples": Whole(least_draws()),
    "seed": Whole(0),
}
EVALUATE_TASKS: Table = {
    **MODEL,
    **EXPERTS,
    **RANKS,
    **FETCHED,
    "baseline": Location(optional=True),
    "tasks": Texts(paths=True),
    "task_data": Locations(optional=True),
    "limit": Whole(optional=True),
    "num_fewshot": Whole(0, optional=True),
    "domains": Locations(optional=True, one=True),
    "subset": Text(),
    "tokens_per_sample": Whole(optional=True),
    "max_batches": Whole(optional=True),
    "capacity_token_fractions": Numbers(),
    "mask": Pairs(optional=True),
}

PROFILE_INFERENCE: Table = {
    **MODEL,
    **EXPERTS,
    **RANKS,
    **FETCHED,
    "data": Location(),
    "mode": Choice(MODES),
    "batch_blocks": Wholes(),
    "steps": STEPS,
    "capacity_token_fraction": Capacity(),
}

# names that mean a parameter of another name
MEANT = {"labels": "domains", "capacity_token_fraction": "capacity_token_fractions"}
# papermill's comment at the top of the cell that it injects
INJECTED = "# Parameters"
# what papermill's --inject-paths and its kin define
OF_PAPERMILL = "PAPERMILL_"
# how alike two names are, from 0 to 1, for one to count as a misspelling of the other
CLOSE = 0.75


class Checked(SimpleNamespace):
    """Parameters that have been checked."""


def check(variables: Mapping[str, Any], kinds: Table) -> Checked:
    """The parameters among a notebook's variables, converted, as attributes.

    From here on, moekit's own errors in the notebook are shown as one sentence (:mod:`moekit.notebook.errors`).

    Args:
        variables: ``globals()`` of the notebook, in the first cell after the parameters.
        kinds: what each parameter has to be, such as :data:`RUN_INFERENCE`.

    Raises:
        ParameterError: one is missing or makes no sense; or a name that papermill injected, or that is close to a
            parameter's, is none of this notebook's.
    """
    errors.show_one_line()
    for name in _strange(variables, kinds):
        close = [MEANT[name]] if MEANT.get(name) in kinds else difflib.get_close_matches(name, kinds, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(kinds)}"
        raise ParameterError(f"{name} is not a parameter of this notebook: {hint}")
    checked = Checked()
    for name, kind in kinds.items():
        if name not in variables:
            raise ParameterError(f"{name} is missing: expected {kind.expected}")
        setattr(checked, name, parameter(name, variables[name], kind))
    return checked


def parameter(name: str, value: Any, kind: Kind) -> Any:
    """A parameter as ``kind`` has it; papermill spells None as a word, and a list as a text.

    Raises:
        ParameterError: it is something else.
    """
    if kind.optional and isinstance(value, str) and value.lower() in ("none", ""):
        return None
    if isinstance(kind, Numbers | Pairs | Locations):
        value = literal(value, "[{")
    if isinstance(kind, Texts | Wholes):
        spelled, each = literal(value), str if isinstance(kind, Texts) else int
        value = spelled if isinstance(spelled, list) and all(isinstance(x, each) for x in spelled) else value
    try:
        return arguments.check(name, value, kind)
    except ValueError as error:
        raise ParameterError(str(error)) from None


def literal(value: Any, begins: str = "[") -> Any:
    """What a text that papermill passes spells, as ``-p prompts '["a", "b"]'`` does a list; any other text stays one.

    Args:
        begins: the characters of which one has to begin the text.
    """
    if isinstance(value, str) and value.strip() and value.strip()[0] in begins:
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            return ast.literal_eval(value.strip())
    return value


def _strange(variables: Mapping[str, Any], kinds: Table) -> list[str]:
    """Names that are meant as parameters and are none: all that papermill injected, and close misspellings.

    Close misspellings are looked for among what the cells so far assign, as the kernel's history ``In`` tells; without
    a history, among all variables. A notebook that runs again in its kernel has all of its own variables there: what is
    close to a parameter then is no misspelling.
    """
    cells = variables.get("In")
    again = any(isinstance(value, Checked) for value in variables.values())
    if isinstance(cells, list):
        injected = {name for cell in cells if cell.startswith(INJECTED) for name in _assigned(cell)}
        written = {name for cell in cells for name in _assigned(cell)}
    else:
        injected, written = set(), {name for name, value in variables.items() if _plain(value)}
    misspelt = set() if again else {n for n in written if difflib.get_close_matches(n, kinds, 1, CLOSE)}
    return sorted(
        name
        for name in injected | misspelt
        if name not in kinds and not name.startswith(("_", OF_PAPERMILL)) and _plain(variables.get(name))
    )


def _plain(value: Any) -> bool:
    """Whether a parameter could have this value."""
    return value is None or isinstance(value, str | int | float | bool | list | tuple | dict | os.PathLike)


def _assigned(cell: str) -> Iterator[str]:
    """The names that a cell assigns, outside of functions and classes."""
    with contextlib.suppress(SyntaxError, ValueError):
        for statement in ast.parse(cell).body:
            if isinstance(statement, ast.Assign | ast.AnnAssign):
                targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                yield from (target.id for target in targets if isinstance(target, ast.Name))
