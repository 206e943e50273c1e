"""What it costs to have experts in one byte a weight: the same text is read with them and with those of the files."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from moekit.checked import checked
from moekit.checkpoint import stamp
from moekit.handle import MODEL
from moekit.nn.config import DENSE
from moekit.routing.compare import Comparison, compare
from moekit.worker import originals

if TYPE_CHECKING:
    from moekit.api import Model


class Quantisation(NamedTuple):
    """The experts of the files against those in one byte a weight.

    Attributes:
        layers: one row per layer with experts: ``error``, the relative error of the experts' outputs for the same inputs
            (the root of the sum of squares over that of the outputs); ``same experts``, the share of tokens with the same
            set of experts, and ``same first choice``; ``weight change``, the mean change of the combine weights (1 is all).
        change: the change of the log-probability, one fact per row.
        compared: all of it (:func:`moekit.compare`, from the experts of the files to those in one byte).
    """

    layers: pd.DataFrame
    change: pd.DataFrame
    compared: Comparison


@checked(model=MODEL)
def quantisation(
    model: Model, data_or_texts: Any = "demo", *, max_tokens: int | None = 20_000, **how: Any
) -> Quantisation:
    """Read a text twice, with the quantised experts and with those of the files, and say what differs.

    The experts of the files take no memory: they stay in the mapped files, and a plain loop fetches each of them when it
    computes. So the second reading is slow, and needs the checkpoint where it was.

    Args:
        data_or_texts, max_tokens, how: the text, as :meth:`moekit.Model.trace` takes it.

    Raises:
        ValueError: the model's experts are not quantised, a file is not the one that was loaded, or an argument makes no
            sense.
        moekit.ranks.RankError: a rank failed.
    """
    if not model.config.moe_layers:
        raise ValueError(f"{DENSE} to quantise; expected a model with experts")
    if model.experts is None:
        raise ValueError(
            "the model's experts are as the files have them: load it with experts='int8' or 'fp8' to compare the two"
        )
    for source in model.plan.sources:
        if stamp(source.path) != source.stamp:
            raise ValueError(
                f"{source.path} is not the file that the model was loaded from (it was changed, moved or removed): load the "
                "model again"
            )
    how = {"progress": False} | how
    after = model.trace(data_or_texts, max_tokens=max_tokens, **how)
    errors: dict[int, float] = {}
    with _originals(model, errors):
        before = model.trace(data_or_texts, max_tokens=max_tokens, **how)
    compared = compare(before, after)
    found = compared.layers.set_index("layer")
    layers = pd.DataFrame(
        {
            "error": pd.Series(errors),
            "same experts": 1 - found["experts_changed"],
            "same first choice": 1 - found["first_choice_changed"],
            "weight change": found["weight_change"],
        }
    )
    told = compared.paired
    facts = {
        "tokens": f"{told.tokens:,}",
        "change of the log-probability, nats a token": f"{told.value:+.6f}",
        "its 95 % interval over samples": told.between("{:+.6f}"),
        "p": f"{told.p:.2g}",
        "samples": f"{told.units:,}",
        "perplexity, change, %": f"{100 * math.expm1(-told.value):+.4f}",
        "its interval, %": told.between("{:+.4f}", lambda end: 100 * math.expm1(-end)),
    }
    return Quantisation(layers.rename_axis("layer"), pd.DataFrame({"": facts}), compared)


@contextlib.contextmanager
def _originals(model: Model, errors: dict[int, float]) -> Iterator[None]:
    """The model computes with the experts of the files; ``errors`` is filled with each layer's at the end."""
    try:
        model.ranks.call(originals.put, model.plan)
        yield
    except BaseException:
        with contextlib.suppress(Exception):
            model.ranks.call(originals.take_away)
        raise
    found = model.ranks.call(originals.take_away)
    for layer in model.config.moe_layers:
        difference, size = np.sum([part[layer] for part in found], axis=0)
        errors[layer] = math.sqrt(difference / size) if size else math.nan
