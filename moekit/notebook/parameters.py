"""The notebooks' parameters, checked in their first cell: a bad one ends the run there, with one sentence.

papermill passes ``-p flag true`` as the string "true", ``-p name 007`` as the number 7 and ``-p world_size 1e3`` as a
float, and only warns of a parameter that the notebook does not have. ``check`` sorts that out.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from moekit.arguments import Choice, Kind, Number, ParameterError, Text, Texts, Whole, _convert

MACHINE: dict[str, Kind] = {
    "checkpoint": Text(),
    "bpe": Text(optional=True),
    "world_size": Whole(optional=True),
    "device": Choice(("auto", "cuda", "cpu")),
    "dtype": Choice(("auto", "float32", "float16", "bfloat16")),
    "output_dir": Text(),
}
LOAD_SHARDS = MACHINE
RUN_INFERENCE: dict[str, Kind] = MACHINE | {
    "data": Text(),
    "subset": Text(),
    "tokens_per_sample": Whole(optional=True),
    "batch_size": Whole(),
    "capacity_token_fraction": Number(optional=True),
    "sample_break_mode": Choice(("none", "complete", "complete_doc", "eos")),
    "context_window": Whole(0),
    "max_batches": Whole(optional=True),
    "prompts": Texts(),
    "max_new_tokens": Whole(),
    "temperature": Number(least=0),
    "top_k": Whole(optional=True),
    "top_p": Number(above=0, most=1, optional=True),
    "beam_size": Whole(),
    "repetition_penalty": Number(above=0),
    "num_return_sequences": Whole(),
    "seed": Whole(0),
}

# What a kernel's globals hold before the first cell has run.
OF_IPYTHON = {"In", "Out", "exit", "quit", "open", "get_ipython"}


class Checked(SimpleNamespace):
    """Parameters that have been checked."""


def check(variables: Mapping[str, Any], kinds: Mapping[str, Kind]) -> Checked:
    """The parameters among a notebook's variables, converted, as attributes.

    Where a kernel runs the notebook again, all of the earlier run's variables are there, too: they are no misspelt
    parameters, and its models are closed, so that the next one finds their memory free.

    Args:
        variables: ``globals()`` of the notebook, in the first cell after the parameters.
        kinds: what each parameter has to be, such as :data:`RUN_INFERENCE`.

    Raises:
        ParameterError: one is missing, makes no sense, or is none of this notebook's.
    """
    given = {
        name: value
        for name, value in variables.items()
        if not name.startswith("_")
        and name not in OF_IPYTHON
        and (value is None or isinstance(value, str | int | float | bool | list | tuple | dict))
    }
    again = any(isinstance(value, Checked) for value in variables.values())
    for name in given:
        if name not in kinds and not again:
            close = difflib.get_close_matches(name, kinds, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(kinds)}"
            raise ParameterError(f"{name} is not a parameter of this notebook: {hint}")
    checked = Checked()
    for name, kind in kinds.items():
        if name not in given:
            raise ParameterError(f"{name} is missing: expected {kind.expected}")
        setattr(checked, name, _convert(name, given[name], kind))
    if again:
        _close_models(variables)
    return checked


def _close_models(variables: Mapping[str, Any]) -> None:
    from moekit.api import Model

    for value in variables.values():
        if isinstance(value, Model):
            value.close()
