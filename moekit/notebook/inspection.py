"""What inspect_routing.ipynb needs beside traces, metrics and pictures: labels, tables and files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moekit import results
from moekit.notebook import report
from moekit.notebook.pieces import pieces
from moekit.routing import metrics
from moekit.routing.compare import change_by_domain
from moekit.routing.domains import domains_of

__all__ = ["change_by_domain", "favourites", "labels_of", "masked_by_domain", "save", "wide"]

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from moekit.data.codec import Codec
    from moekit.notebook.explorer import Explorer
    from moekit.routing.trace import Trace


def labels_of(trace: Trace, data: str, domains: Sequence[str] | None, of_texts: bool) -> np.ndarray | None:
    """[T] labels that group the tokens; None without labels.

    Args:
        data: the folder with the text's data, or "demo".
        domains: for texts a label for each, None numbers them; for data the side file with a label a line, None looks
            for it beside the data and does without if there is none. (A notebook's parameter ``domains``.)
        of_texts: whether the trace is of texts.

    Raises:
        ValueError: ``domains`` does not fit the trace.
    """
    if of_texts:
        texts = int(trace.sample.max()) + 1
        domains = [f"text {n}" for n in range(texts)] if domains is None else domains
        # There are more labels where max_tokens ended the trace before the last text.
        if len(domains) < texts:
            raise ValueError(f"domains has {len(domains)} labels for {texts} texts; expected one for each")
        return np.array(domains)[trace.sample]
    if domains is None:
        try:
            return domains_of(trace, data)
        except ValueError as error:
            print(f"No domains: {error}.")
            return None
    if len(domains) != 1:
        raise ValueError(
            f"domains={list(domains)}: expected the one file with a domain for each line of the text"
        )
    return domains_of(trace, data, domains=domains[0])


def favourites(
    trace: Trace,
    labels: np.ndarray,
    codec: Codec | None,
    tokens: int = 6,
    *,
    against: str = "load",
    choice: int | None = None,
) -> pd.DataFrame:
    """For each domain the expert that it prefers most, over all layers, strongest preference first.

    The preference for an expert is the share of the domain's tokens that choose it minus the largest share among the other
    domains (:func:`moekit.routing.metrics.domain_specialisation`).

    Args:
        against: what ``chance`` and ``lift`` refer to: "load", the expert's share of all tokens, or "uniform".
        choice: only this choice (0: first).

    Returns:
        One row per domain: ``domain``, ``layer``, ``expert``, ``share``, ``next`` (the largest share of another domain),
        ``chance``, ``lift``, ``low``, ``high`` (of the lift, over samples), ``p`` and ``survives`` (of
        :func:`moekit.routing.metrics.permutation`), ``against``, and its ``top tokens``.
    """
    import pandas as pd

    labels = trace.labels_of(labels)
    found = metrics.domain_specialisation(trace, labels, against=against, choice=choice)
    tested = metrics.permutation(trace, labels, choice=choice)
    found = found.merge(
        tested[["layer", "domain", "expert", "p", "survives"]], on=["layer", "domain", "expert"]
    )
    table = found.pivot(index=["layer", "expert"], columns="domain", values="value")
    whole = found.set_index(["domain", "layer", "expert"])
    rows = []
    for domain in table.columns:
        others = table.drop(columns=domain).max(axis=1) if table.shape[1] > 1 else 0 * table[domain]
        layer, expert = (table[domain] - others).idxmax()
        top = metrics.top_tokens(trace.select(mask=labels == domain), layer, expert, n=2 * tokens)["token"]
        shown = (piece.strip() or "␣" for piece in pieces(codec, top))
        row = whole.loc[(domain, layer, expert)]
        rows.append(
            {
                "domain": domain,
                "layer": layer,
                "expert": expert,
                "share": row["value"],
                "next": others.loc[(layer, expert)],
                "chance": row["chance"],
                "lift": row["lift"],
                "low": row["lift_low"],
                "high": row["lift_high"],
                "p": row["p"],
                "survives": bool(row["survives"]),
                "against": against,
                "top tokens": "  ".join(list(dict.fromkeys(shown))[:tokens]),
            }
        )
    order = sorted(rows, key=lambda row: row["next"] - row["share"])
    return pd.DataFrame(order)


def masked_by_domain(pairs: Mapping[Trace, Trace], labels: np.ndarray | None) -> pd.DataFrame:
    """:func:`moekit.routing.compare.change_by_domain` of several pairs of traces, with the capacity that each is under.

    Args:
        pairs: trace -> the same text's trace without an expert.
    """
    import pandas as pd

    tables = []
    for before, after in pairs.items():
        fraction = before.meta["capacity_token_fraction"]
        table = change_by_domain(before, after, labels)
        table.insert(0, "capacity", "none" if fraction is None else f"{fraction:g}")
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def wide(table: pd.DataFrame) -> pd.DataFrame:
    """A metric's table with one row per (layer, statistic) as one with one column per statistic, and a last row of chance."""
    import pandas as pd

    values = table.pivot(index="layer", columns="statistic", values="value")
    chance = table.groupby("statistic")["chance"].first().rename("random routing")
    return pd.concat([values, chance.to_frame().T]).rename_axis(index="layer", columns=None)


def save(
    output_dir: str | Path,
    trace: Trace,
    figures: Mapping[str, Figure | None],
    tables: Mapping[str, pd.DataFrame | None],
    explorer: Explorer,
) -> Path:
    """Write ``trace.parquet``, ``explorer.html``, ``{name}.png`` of each figure and ``{name}.csv`` of each table.

    They appear together, at the end. None stands for a figure or a table that was not made.

    Returns:
        The folder, absolute.

    Raises:
        moekit.results.NotWritten: the folder cannot be written to, or its disk is full; earlier files are as they were.
    """
    with results.together(output_dir) as folder:
        report.draw(folder, figures)
        trace.save(folder / "trace.parquet")
        for name, table in tables.items():
            if table is not None:
                table.to_csv(folder / f"{name}.csv", index=False)
        explorer.save_html(folder / "explorer.html")
    return report.absolute(output_dir)
