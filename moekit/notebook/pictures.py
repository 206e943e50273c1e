"""Pictures and tables as they go into a page or a paper: with a description, and as LaTeX."""

from __future__ import annotations

import base64
import html
import io
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moekit import progress, results
from moekit.arguments import Text, Whole
from moekit.checked import Instance, checked

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from matplotlib.figure import Figure

    from moekit.routing.trace import Trace

DPI = 160
TABLE = Instance(pd.DataFrame, "a table")


class Picture:
    """A figure in a notebook with alternative text, which converted pages keep.

    Args:
        figure: what to show.
        alt: what it shows, for those who do not see it; None: its titles and axes.
    """

    def __init__(self, figure: Figure, alt: str | None = None):
        self.figure, self.alt = figure, alt or described(figure)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        # nbconvert's page drops the alternative text of a plain image, and keeps that of an element.
        made = io.BytesIO()
        self.figure.savefig(made, dpi=DPI, format="png", bbox_inches="tight")
        width = int.from_bytes(made.getvalue()[16:20], "big") // 2
        data, alt = base64.b64encode(made.getvalue()).decode(), html.escape(self.alt)
        element = (
            f'<img src="data:image/png;base64,{data}" alt="{alt}" style="width:{width}px;max-width:100%">'
        )
        return {"text/html": element, "text/plain": self.alt}


def described(figure: Figure) -> str:
    """A figure's titles and axes in one sentence each."""
    axes = [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]
    said = [figure.get_suptitle()]
    said += [title for ax in axes if (title := ax.get_title(loc="left") or ax.get_title())]
    labels = [(ax.get_xlabel(), ax.get_ylabel()) for ax in axes]
    said += [f"across: {x}" for x in dict.fromkeys(x for x, _ in labels if x)]
    said += [f"up: {y}" for y in dict.fromkeys(y for _, y in labels if y)]
    return "; ".join(" ".join(part.split()) for part in said if part)


def clear_progress() -> None:
    """Remove what progress bars of finished calls left, once the cell has something else to show; warnings stay."""
    progress.clear()


def embedded(page: str, title: str, height: int = 900):
    """A whole HTML page within a notebook's output, folded, so that the converted notebook holds it, too."""
    from IPython.display import HTML

    return HTML(
        f"<details><summary>{html.escape(title)}</summary>"
        f'<iframe title="{html.escape(title)}" sandbox="allow-scripts allow-downloads" loading="lazy" '
        f'style="width:100%;height:{height}px;border:1px solid #ccc" srcdoc="{html.escape(page)}"></iframe></details>'
    )


def save(
    output_dir: str | Path,
    figures: Mapping[str, Figure | None],
    tables: Mapping[str, tuple[pd.DataFrame, str]],
) -> list[str]:
    """Write ``{name}.pdf`` and ``.png`` of each figure, ``{name}.csv`` and ``.tex`` of each table; they appear together.

    Args:
        figures: name -> a figure; None stands for one that was not made.
        tables: name -> the table and its caption.

    Returns:
        The files' names.

    Raises:
        moekit.results.NotWritten: the folder cannot be written to, or its disk is full; earlier files are as they were.
    """
    figures = {name: figure for name, figure in figures.items() if figure is not None}
    with results.together(output_dir) as folder:
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.png", dpi=DPI, bbox_inches="tight")
            figure.savefig(folder / f"{name}.pdf", bbox_inches="tight", metadata={"CreationDate": None})
        for name, (table, caption) in tables.items():
            table.to_csv(folder / f"{name}.csv", index=False)
            (folder / f"{name}.tex").write_text(latex(table, caption, name), "utf-8")
    names = [f"{name}.{end}" for name in figures for end in ("pdf", "png")]
    return sorted([*names, *(f"{name}.{end}" for name in tables for end in ("csv", "tex"))])


def capacity_name(fraction: float | None) -> str:
    """``capacity_token_fraction``, as a trace's meta has it, in a word; that of another fraction is another one."""
    if fraction is None:
        return "none"
    return "training" if fraction <= 0 else np.format_float_positional(fraction, trim="-")


def settings(traces: Mapping[str, Trace]) -> pd.DataFrame:
    """What made each figure: one row per entry, from what its trace's meta tells.

    Args:
        traces: what is shown -> the trace that it is made of.

    Returns:
        ``shows``, ``tokens``, ``samples``, ``capacity``, ``mask``, ``batch_size``, ``tokens_per_sample``, ``dtype``, ``seed``.
    """
    rows = []
    for name, trace in traces.items():
        meta = trace.meta
        changed = (meta.get("intervention") or {}).get("mask", [])
        rows.append(
            {
                "shows": name,
                "tokens": len(trace),
                "samples": len(np.unique(trace.sample)),
                "capacity": capacity_name(meta.get("capacity_token_fraction")),
                "mask": ", ".join(f"{layer}:{expert}" for layer, expert in changed) or "none",
                "batch_size": meta.get("batch_size", "–"),
                "tokens_per_sample": meta.get("tokens_per_sample") or "each text",
                "dtype": ", experts in ".join(filter(None, (meta.get("dtype"), meta.get("experts")))),
                "seed": meta.get("seed"),
            }
        )
    return pd.DataFrame(rows)


@checked(table=TABLE, caption=Text(), label=Text(), digits=Whole(0))
def latex(table: pd.DataFrame, caption: str, label: str, digits: int = 3) -> str:
    """A table for a paper, in LaTeX with the package booktabs.

    Numbers have ``digits`` places behind the point; p values below what these show are given as "<".
    """

    def cell(name: str, value: Any) -> str:
        if isinstance(value, bool | np.bool_):
            return "yes" if value else "no"
        if isinstance(value, float | np.floating):
            least = 10.0**-digits
            if np.isnan(value):
                return "--"
            if np.isinf(value):
                return r"$\infty$" if value > 0 else r"$-\infty$"
            return f"$<{least:.{digits}f}$" if name == "p" and value < least else f"${value:.{digits}f}$"
        # A comma alone is punctuation there, with a space behind it.
        whole = isinstance(value, int | np.integer)
        return f"${value:,}$".replace(",", "{,}") if whole else _escaped(str(value))

    names = [_escaped(str(name).replace("_", " ")) for name in table.columns]
    kinds = "".join("l" if table[name].dtype.kind in "OUbT" else "r" for name in table.columns)
    rows = [
        " & ".join(cell(name, value) for name, value in zip(table.columns, row, strict=True)) + r" \\"
        for row in table.itertuples(index=False, name=None)
    ]
    head = [r"\begin{table}", r"\centering", rf"\caption{{{_escaped(caption)}}}", rf"\label{{tab:{label}}}"]
    body = [rf"\begin{{tabular}}{{{kinds}}}", r"\toprule", " & ".join(names) + r" \\", r"\midrule", *rows]
    return "\n".join([*head, *body, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


SPECIAL = {sign: "\\" + sign for sign in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    # TeX's first fonts have other signs in these places.
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "×": r"$\times$",
    "−": "--",
}


def _escaped(text: str) -> str:
    return "".join(SPECIAL.get(sign, sign) for sign in text)
