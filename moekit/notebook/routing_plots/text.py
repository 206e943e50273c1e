"""A sample's text, coloured by where the router sent each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from moekit.arguments import Choice, Whole
from moekit.checked import checked
from moekit.notebook import coloured_text
from moekit.notebook.coloured_text import Span
from moekit.notebook.pieces import CODEC, visible_pieces
from moekit.notebook.style import commonest
from moekit.routing.trace import TRACE, Trace, need_layers, need_tokens

if TYPE_CHECKING:
    from IPython.display import HTML

    from moekit.data import Codec

# The darkest colour of a probability, as a part of its scale: black text stands on it.
DARKEST = 0.65
HOW = {
    "trace": TRACE,
    "codec": CODEC,
    "sample": Whole(0),
    "layer": Whole(0),
    "by": Choice(("expert", "confidence")),
}


@checked(**HOW)
def text_html(
    trace: Trace,
    codec: Codec | None = None,
    sample: int | None = None,
    layer: int | None = None,
    by: str = "expert",
) -> HTML:
    """A sample's text, each token coloured by its first choice; inline styles only, so that nbconvert keeps it.

    Args:
        sample: its number in the trace; None: the first.
        layer: a traced model layer; None: the first.
        by: "expert": the 8 most frequent experts have colours; "confidence": the first choice's gate probability.

    Raises:
        ValueError: no such sample or layer, or another ``by``.
    """
    from IPython.display import HTML

    shown = _passage(trace, codec, sample, layer, by)
    return HTML(
        f'<div style="font-family:system-ui,sans-serif;font-size:14px;line-height:1.8;max-width:60em">'
        f'<div style="font-size:12px"><b>{shown.title}</b> &nbsp; {coloured_text.chips(shown.keys)}{shown.note}</div>'
        f"{coloured_text.html(shown.spans)}</div>"
    )


@checked(**HOW, max_tokens=Whole())
def text_figure(
    trace: Trace,
    codec: Codec | None = None,
    sample: int | None = None,
    layer: int | None = None,
    by: str = "expert",
    max_tokens: int = 300,
) -> Figure:
    """:func:`text_html` as a figure, of the sample's first ``max_tokens`` tokens."""
    shown = _passage(trace, codec, sample, layer, by)
    return coloured_text.figure(shown.spans[:max_tokens], shown.title, shown.keys, shown.note)


@dataclass(frozen=True)
class _Passage:
    title: str
    keys: list[tuple[str, str]]
    note: str
    spans: list[Span]


def _passage(trace: Trace, codec: Codec | None, sample: int | None, layer: int | None, by: str) -> _Passage:
    need_tokens(trace, "text")
    need_layers(trace, "text")
    sample = int(trace.sample[0]) if sample is None else sample
    part = trace.select(samples=sample)
    if not len(part):
        raise ValueError(f"the trace has no sample {sample}; its samples are {_range(trace)}")
    layer_index = 0 if layer is None else trace.at(layer)
    first = part.experts[:, layer_index, 0].tolist()
    if by == "expert":
        colours = commonest(part.experts[:, layer_index, 0])
        fills = [colours.get(expert, "") for expert in first]
        keys = [(f"E{expert}", colour) for expert, colour in colours.items()]
        note = "other experts: no colour"
    else:
        fills = [_shade(probability) for probability in part.probs[:, layer_index, 0]]
        keys = [(f"{probability:g}", _shade(probability)) for probability in (0, 0.25, 0.5, 0.75, 1)]
        note = f"gate probability of the first choice; uniform {1 / trace.num_experts:.3g}"
    words = visible_pieces(codec, part.token)
    tips = [_tip(part, layer_index, row) for row in range(len(part))]
    title = f"sample {part.sample[0]}, layer {part.layers[layer_index]}"
    return _Passage(title, keys, note, [Span(*each) for each in zip(words, fills, tips, strict=True)])


def _tip(part: Trace, layer_index: int, row: int) -> str:
    choices = zip(
        part.experts[row, layer_index], part.probs[row, layer_index], part.kept[row, layer_index], strict=True
    )
    return ", ".join(f"E{e} {p:.2f}" + ("" if kept else " not dispatched") for e, p, kept in choices)


def _shade(probability: float) -> str:
    return to_hex(colormaps["YlGnBu"](DARKEST * probability))


def _range(trace: Trace) -> str:
    return f"{trace.sample.min()} to {trace.sample.max()}"
