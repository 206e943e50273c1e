"""A notebook's model: an earlier run's is closed before the next one is loaded, and its codec is looked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moekit.api import Model

if TYPE_CHECKING:
    from moekit.data.codec import Codec


def close_earlier(variables: Mapping[str, Any]) -> None:
    """Close the models among a notebook's variables, so that the next one finds their memory free."""
    for value in variables.values():
        if isinstance(value, Model):
            value.close()


def codec_of(model: Model) -> Codec | None:
    """The model's codec; where its files are missing, None and a sentence that says so: tokens are then shown by id."""
    if model.reads_text:
        return model.codec
    try:
        why = model.codec.why
    except ValueError as error:
        why = error
    print(f"Tokens are shown by their ids, and no text can be written: {why}.")
    return None
