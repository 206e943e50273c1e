"""Text whose pieces stand on colours, as HTML with inline styles and as a figure.

    spans = [Span("Once", "#FFEEDD", "12 %"), Span(" more\n", "#FFAA88")]
    html(spans)
    figure(spans, title="A text", keys=[("rare", "#FFAA88")])

Styles are inline, so that nbconvert keeps them. "\n" in a piece ends the line; a mark for it is the caller's.
"""

from __future__ import annotations

import html as markup
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from moekit.notebook.style import INK, STYLE

FACE, SIZE = "DejaVu Sans Mono", 9
# a letter's width in em, of FACE
LETTER = 0.602
# inches between two lines
LINE = 0.21
POINTS_PER_INCH = 72
# below this luminance of the ground, white text reads better
DARK = 0.35
LINE_END = "¶"


@dataclass(frozen=True)
class Span:
    """A piece of text.

    Attributes:
        text: what is shown; a blank at its beginning stays without colour.
        colour: of the ground, as matplotlib and CSS both know it ("#rrggbb"), or as CSS alone ("rgba(...)"); "": none.
        tip: what the mouse shows, in HTML.
    """

    text: str
    colour: str = ""
    tip: str = ""


def visible(piece: str) -> str:
    """A token's piece for the eye: a line end as ¶ and the end of the line, a tab as ⇥."""
    ends = piece.replace("</s>", "\n")
    return ends.replace("\n", f"{LINE_END}\n").replace("\t", "⇥")


def html(spans: Iterable[Span]) -> str:
    """One ``<span>`` of inline styles around all the pieces."""
    body = "".join(_html(span) for span in spans)
    return f'<span style="white-space:pre-wrap;overflow-wrap:anywhere">{body}</span>'


def chips(keys: Sequence[tuple[str, str]]) -> str:
    """A legend as HTML: names on their colours."""
    style = f"color:{INK};border-radius:3px;padding:1px 7px;margin-right:5px"
    return "".join(
        f'<span style="background:{colour};{style}">{markup.escape(name)}</span>' for name, colour in keys
    )


def figure(
    spans: Sequence[Span],
    title: str = "",
    keys: Sequence[tuple[str, str]] = (),
    note: str = "",
    columns: int = 110,
) -> Figure:
    """The pieces in a face of fixed width.

    Args:
        title: in bold above the text.
        keys: a legend, names and their colours.
        note: a sentence behind the legend.
        columns: letters of a line.
    """
    placed, lines = _placed(spans, columns)
    with rc_context(STYLE):
        fig = Figure(figsize=(columns * SIZE * LETTER / POINTS_PER_INCH + 0.3, (lines + 2.6) * LINE))
        ax = fig.add_axes((0, 0, 1, 1))
        ax.set(xlim=(-1.5, columns + 2), ylim=(lines + 0.1, -2.5))
        ax.axis("off")
        ax.text(0, -1.9, title, weight="bold", va="center", parse_math=False)
        x = 0.0
        for name, colour in keys:
            box = FancyBboxPatch((x, -1.15), len(name), 0.6, boxstyle="round,pad=0.1", fc=colour, ec="none")
            ax.add_patch(box)
            ax.text(x + len(name) / 2, -0.83, name, ha="center", va="center", size=8, color=_ink(colour))
            x += len(name) + 1.5
        ax.text(x + 0.5, -0.83, note, va="center", size=8)
        for x, y, text, colour in placed:
            _draw(ax, x, y, text, colour)
    return fig


def _html(span: Span) -> str:
    text = span.text
    gap = " " if text[:1] == " " and text.strip() else ""
    shown = markup.escape(text[len(gap) :]).replace("\n", "<br>")
    ground = f"background:{span.colour};color:{_ink(span.colour)};" if span.colour else ""
    return f'{gap}<span title="{span.tip}" style="{ground}border-radius:3px;padding:1px 0">{shown}</span>'


def _placed(spans: Sequence[Span], columns: int) -> tuple[list[tuple[int, int, str, str]], int]:
    """Column, line, text and colour of each piece, wrapped between pieces; and how many lines there are."""
    placed, x, y = [], 0, 0
    for span in spans:
        text = span.text.removesuffix("\n")
        if x and x + len(text.removesuffix(LINE_END)) > columns:
            x, y, text = 0, y + 1, text.lstrip(" ") or text
        placed.append((x, y, text.replace("\n", " "), span.colour))
        x += len(text)
        if span.text.endswith("\n"):
            x, y = 0, y + 1
    return placed, y + 1 if x or not y else y


def _draw(ax: Axes, x: int, y: int, text: str, colour: str) -> None:
    """Letter by letter, because a letter of another font has another width and would shift the rest."""
    lead = len(text) - len(text.lstrip(" ")) if text.strip() else 0
    if colour:
        ax.add_patch(Rectangle((x + lead, y + 0.06), len(text) - lead, 0.88, fc=colour, ec="none"))
    face = {"family": FACE, "size": SIZE, "ha": "center", "parse_math": False, "color": _ink(colour)}
    for offset, letter in enumerate(text):
        if letter != " ":
            ax.text(x + offset + 0.5, y + 0.74, letter, **face)


def _ink(colour: str) -> str:
    """Black or white, whichever reads better on ``colour``."""
    if not colour.startswith("#"):
        return INK if not colour else "inherit"
    red, green, blue = to_rgb(colour)
    return "white" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < DARK else INK
