"""Pictures of prepared data, and a passage's way through the codec. matplotlib is imported where used."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moekit.data.binarise import Binarised
from moekit.data.codec import Codec
from moekit.notebook.style import done
from moekit.symbols import UNK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from moekit.data.preparing import Prepared

# ids
COUNTED_AT_ONCE = 1 << 22


def picture(prepared: Prepared, top: int = 20) -> Figure:
    """Three views of prepared data: how long documents are, which types are frequent, which types occur at all."""
    import matplotlib.pyplot as plt

    subsets = {name: prepared.binarised(name) for name in prepared.summaries}
    counts = {name: type_counts(data, len(prepared.codec)) for name, data in subsets.items()}
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    plot_lengths(left, {name: document_lengths(data.sizes) for name, data in subsets.items()})
    plot_frequent(middle, sum(counts.values()), prepared.codec, top)
    unknown = {name: summary.unknown_types for name, summary in prepared.summaries.items()}
    plot_types(right, counts, unknown)
    return done(figure)


def document_lengths(sizes: np.ndarray) -> np.ndarray:
    """Tokens a document. As fairseq's ``complete_doc`` has it, an empty line (one token, its ``</s>``) ends a document.

    In text without empty lines, each line is a document.
    """
    sizes = np.asarray(sizes, np.int64)
    empty = np.flatnonzero(sizes == 1)
    if not len(empty):
        return sizes
    total = np.concatenate(([0], np.cumsum(sizes)))
    starts, ends = np.concatenate(([0], empty + 1)), np.concatenate((empty, [len(sizes)]))
    lengths = total[ends] - total[starts]
    return lengths[lengths > 0]


def type_counts(data: Binarised, types: int) -> np.ndarray:
    """[types] how often each type of the dictionary occurs."""
    counts = np.zeros(types, np.int64)
    for start in range(0, len(data.ids), COUNTED_AT_ONCE):
        counts += np.bincount(data.ids[start : start + COUNTED_AT_ONCE], minlength=types)
    return counts


def plot_lengths(axes: Axes, lengths: dict[str, np.ndarray]) -> None:
    # Blank lines alone are no document.
    longest = max(int(of_subset.max(initial=1)) for of_subset in lengths.values())
    bins = np.unique(np.geomspace(1, longest + 1, 40).astype(int))
    for name, of_subset in lengths.items():
        label = f"{name}: {len(of_subset):,}"
        if len(of_subset):
            label += f", median {int(np.median(of_subset)):,}"
        axes.hist(of_subset, bins, histtype="step", linewidth=1.5, label=label)
    axes.set(xscale="log", xlabel="tokens a document", ylabel="documents", title="Document lengths")
    axes.margins(y=0.2)
    axes.legend(frameon=False)


def plot_frequent(axes: Axes, counts: np.ndarray, codec: Codec, top: int) -> None:
    order = np.argsort(counts)[::-1][:top]
    order = order[counts[order] > 0]
    axes.barh(range(len(order)), 100 * counts[order] / counts.sum())
    axes.set_yticks(range(len(order)), [_label(piece) for piece in codec.pieces(order)], family="monospace")
    axes.invert_yaxis()
    axes.set(xlabel="% of all tokens", title="Most frequent types (␣ is a space)")


def plot_types(axes: Axes, counts: dict[str, np.ndarray], unknown_types: dict[str, int]) -> None:
    """Of the types that occur in the text, those that the dictionary has and those that are unknown."""
    names = list(counts)
    known = np.array([int(((of := counts[name]) > 0).sum() - (of[UNK] > 0)) for name in names])
    unknown = np.array([unknown_types[name] for name in names])
    axes.bar(names, known, label="known")
    bars = axes.bar(names, unknown, bottom=known, color="tab:red", label="unknown")
    share = 100 * unknown / np.maximum(known + unknown, 1)
    axes.bar_label(bars, [f"{percent:.3g} % unknown" for percent in share], padding=3)
    types = len(next(iter(counts.values())))
    axes.axhline(types, color="grey", linestyle=":")
    axes.text(0.01, types, f"the dictionary has {types:,}", va="bottom", transform=axes.get_yaxis_transform())
    axes.set(ylabel="types", title="Types in the text")
    axes.margins(y=0.25)
    axes.legend(frameon=False, ncols=2)


def round_trip(codec: Codec, text: str, width: int = 110) -> str:
    """A passage's way through the codec, to be printed: the text, its pieces above their ids, and the text again.

    Raises:
        ValueError: the ids do not give the text back, because the dictionary lacks a piece of it.
    """
    ids = codec.encode(text)
    pieces, again = codec.pieces(ids), codec.decode(ids)
    if again != text:
        raise ValueError(
            f"the text does not come back: {ids.count(UNK)} of its pieces are not in the dictionary"
        )
    rows = [["", ""]]
    for piece, number in zip(pieces, map(str, ids), strict=True):
        piece = piece.replace(" ", "␣")
        columns = max(len(piece), len(number)) + 2
        if len(rows[-1][0]) + columns > width:
            rows.append(["", ""])
        rows[-1] = [rows[-1][0] + piece.ljust(columns), rows[-1][1] + number.ljust(columns)]
    return "\n\n".join([text, *("\n".join(map(str.rstrip, row)) for row in rows), again])


def _label(piece: str) -> str:
    """A piece for an axis: blanks visible, and nothing that the font lacks or takes for mathematics."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    has = get_font(findfont(FontProperties(family="monospace"))).get_char_index
    shown = piece.replace(" ", "␣")
    shown = "".join(c if has(ord(c)) and c.isprintable() else ascii(c)[1:-1] for c in shown)
    return shown.replace("$", r"\$")
