"""What the metrics share: the choices that count, labels and types of tokens, and tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from moekit.arguments import Choice, Wholes, check
from moekit.routing.trace import Trace
from moekit.symbols import PAD

if TYPE_CHECKING:
    import pandas as pd


def set_sizes(sizes: Iterable[int] | None, experts: int) -> list[int]:
    """Numbers of experts to measure, ascending; None: about E/32, E/16, ... E/2.

    Raises:
        ValueError: there is none, or one is below 1 or above E.
    """
    if sizes is None:
        return sorted({max(1, experts // part) for part in (32, 16, 8, 4, 2)})
    sizes = sorted(set(check("sizes", sizes, Wholes())))
    if not sizes or sizes[0] < 1 or sizes[-1] > experts:
        raise ValueError(f"sizes={sizes}: expected numbers from 1 to {experts}")
    return sizes


def chosen_experts(trace: Trace, layer_index: int, choice: int | None, dispatched: bool) -> np.ndarray:
    """[T, K] experts that the tokens chose, or [T, 1] of one ``choice``.

    Args:
        layer_index: the layer's place on the trace's axis L.
        choice: which of the K choices, 0 the first; None: all.
        dispatched: a choice that was not dispatched has the number E, which is no expert's.
    """
    chosen = trace.experts[:, layer_index]
    if dispatched:
        chosen = np.where(trace.kept[:, layer_index], chosen, np.int16(trace.num_experts))
    return chosen if choice is None else chosen[:, choice : choice + 1]


def made(trace: Trace, choice: int | None) -> int:
    """How many choices of a token count: K, or 1 if one ``choice`` is looked at."""
    return trace.top_k if choice is None else 1


def block_counts(block: np.ndarray, chosen: np.ndarray, experts: int, blocks: int) -> np.ndarray:
    """[blocks, experts] float64: how often the tokens of each block chose each expert.

    Args:
        block: [T], each token's block.
        chosen: [T, K] experts; the number ``experts`` is none, and does not count.
    """
    cell = block[:, None] * (experts + 1) + chosen
    return np.bincount(cell.ravel(), minlength=blocks * (experts + 1)).reshape(blocks, -1)[:, :experts] * 1.0


def telling(cells: np.ndarray) -> int:
    """How many units have a choice that counts, of :func:`block_counts` [U, E]; the others tell nothing of the layer."""
    return int(cells.any(axis=1).sum())


def labels_of(trace: Trace, groups: str | Iterable[str] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different labels, sorted, and each token's number among them [T]."""
    return np.unique(trace.labels_of(groups), return_inverse=True)


def tokens_by(trace: Trace, by: str) -> tuple[np.ndarray, np.ndarray]:
    """The types of the tokens that have one, and their rows."""
    check("by", by, Choice(("input", "target", "predicted")))
    token = {"input": "token"}.get(by, by)
    token = getattr(trace, token).astype(np.int64)
    rows = np.flatnonzero(token != PAD) if by == "target" else np.flatnonzero(token >= 0)
    if by == "predicted" and not len(rows):
        raise ValueError("the trace holds no predicted tokens: record it with predicted=True")
    return token[rows], rows


def layers_of(trace: Trace) -> np.ndarray:
    """[L] int64, the traced layers' numbers in the model."""
    return np.array(trace.layers)


def broadcast_table(
    columns: dict[str, np.ndarray],
    share: dict[str, np.ndarray],
    chance: float | np.ndarray | None = None,
    **more,
) -> pd.DataFrame:
    """A table with one row for each cell of arrays that broadcast against each other."""
    import pandas as pd

    columns = columns | share | ({} if chance is None else {"chance": chance}) | more
    arrays = np.broadcast_arrays(*columns.values())
    return pd.DataFrame({name: a.ravel() for name, a in zip(columns, arrays, strict=True)})


def table_of_rows(rows: list[tuple], columns: str) -> pd.DataFrame:
    """A table of ``rows``; ``columns`` holds the names with blanks between them."""
    import pandas as pd

    return pd.DataFrame(rows, columns=columns.split())
