"""How much of a token's expert is told by the token, its neighbours, its place and its domain."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from moekit.arguments import Flag, Texts, shown
from moekit.checked import checked
from moekit.routing.metrics.registry import measured
from moekit.routing.metrics.tables import labels_of, table_of_rows
from moekit.routing.statistics import SEED, entropy_bits
from moekit.routing.trace import TRACE, Trace

if TYPE_CHECKING:
    import pandas as pd

# shuffled copies whose mean is what a plug-in estimate gives where nothing is told
SHUFFLES = 20
# Rarer types tell their own expert and nothing else; shuffles cannot tell that apart.
COMMON = 20


@measured
def information(
    trace: Trace,
    groups: Sequence[str] | np.ndarray | None = None,
    *,
    choice: int = 0,
    min_count: int = COMMON,
    shuffles: int = SHUFFLES,
    classes: Mapping[str, Sequence | np.ndarray] | None = None,
) -> pd.DataFrame:
    """What tells a token's expert: mutual information with its token, its place, the token before it and its domain.

    I(x; expert) = H(x) + H(expert) - H(x, expert) in bits, from counts (plug-in), over the tokens whose x comes at least
    ``min_count`` times. Plug-in values are too large, the more so the more kinds of x there are. ``chance`` is the mean of
    the same with the experts shuffled over the tokens, ``corrected`` = value - chance, and ``share`` = corrected / H(expert).

    Args:
        groups: [T] labels; None: no domain.
        choice: which of the K choices, 0 the first.
        classes: more columns [T] by name, such as :func:`classes_of` makes.

    Returns:
        One row per (layer, ``of``), ``of`` one of token, position, previous, domain and the names of ``classes``: ``layer``,
        ``of``, ``tokens``, ``value``, ``chance``, ``corrected``, ``entropy`` (of the expert, bits), ``share``.
    """
    inside = (np.diff(trace.sample, prepend=-1) == 0) & (np.diff(trace.position, prepend=-2) == 1)
    columns = {
        "token": np.where(trace.token >= 0, trace.token, -1),
        "position": trace.position,
        "previous": np.where(inside, np.roll(trace.token, 1), -1),
    }
    if classes is not None and not isinstance(classes, Mapping):
        raise ValueError(
            f"classes={shown(classes)}: expected labels by name, such as {{'kind': classes_of(...)}}"
        )
    given = dict(classes or {}) | ({} if groups is None else {"domain": groups})
    columns |= {name: labels_of(trace, labels)[1] for name, labels in given.items()}
    rng = np.random.default_rng(SEED)
    rows = []
    for name, column in columns.items():
        kind = np.unique(column, return_inverse=True)[1]
        common = (np.bincount(kind)[kind] >= min_count) & (column >= 0)
        kind = np.unique(kind[common], return_inverse=True)[1]
        for layer_index, layer in enumerate(trace.layers):
            expert = trace.experts[common, layer_index, choice].astype(np.int64)
            entropy = _entropy(expert)
            own = _entropy(kind) + entropy
            value = own - _entropy(kind * trace.num_experts + expert)
            again = [
                own - _entropy(kind * trace.num_experts + rng.permutation(expert)) for _ in range(shuffles)
            ]
            chance = float(np.mean(again)) if shuffles else np.nan
            share = (value - chance) / entropy if entropy > 0 else np.nan
            rows.append((layer, name, len(kind), value, chance, value - chance, entropy, share))
    frame = table_of_rows(rows, "layer of tokens value chance corrected entropy share")
    return frame.sort_values("layer", kind="stable", ignore_index=True)


def _entropy(cell: np.ndarray) -> float:
    """Entropy of what ``cell`` [n] counts, in bits; 0 for no cell."""
    count = np.bincount(cell)
    return float(entropy_bits(count[count > 0] / max(1, len(cell))))


@checked(trace=TRACE, pieces=Texts(), words=Flag())
def classes_of(
    trace: Trace, pieces: Sequence[str], of: Callable[[str], str], *, words: bool = False
) -> np.ndarray:
    """[T] a class for each token, by the user's own function of its text.

    Args:
        pieces: [T] the tokens as text: ``codec.pieces(trace.token)``.
        of: piece (or word) -> class, such as ``lambda piece: "number" if piece.strip().isdigit() else "other"``. It is asked
            once for each different text.
        words: put the pieces of a word together first: a word begins where a piece begins with white space or follows one
            that ends with it, and at a sample's first token.

    Raises:
        ValueError: ``pieces`` has another length.
    """
    if not callable(of):
        raise ValueError(f"of={shown(of)}: expected a function that tells a piece's class")
    if len(pieces) != len(trace):
        raise ValueError(f"pieces has {len(pieces)} texts for {len(trace)} tokens; expected one for each")
    if words:
        before = ["", *pieces[:-1]]
        first = np.diff(trace.sample, prepend=-1) != 0
        begins = [
            bool(new) or not one or one[:1].isspace() or (last and last[-1:].isspace()) or last == "</s>"
            for one, last, new in zip(pieces, before, first, strict=True)
        ]
        word = np.cumsum(begins) - 1
        whole: list[list[str]] = [[] for _ in range(int(word[-1]) + 1)] if len(word) else []
        for number, piece in zip(word, pieces, strict=True):
            whole[number].append(piece)
        joined = ["".join(parts) for parts in whole]
        pieces = [joined[number] for number in word]
    known = {piece: str(of(piece)) for piece in dict.fromkeys(pieces)}
    return np.array([known[piece] for piece in pieces])
