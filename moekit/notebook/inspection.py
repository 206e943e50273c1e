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
from moekit.routing.compare import compare
from moekit.routing.domains import domains_of

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
            for it beside the data and does without if there is none.
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


def favourites(trace: Trace, labels: np.ndarray, codec: Codec | None, tokens: int = 6) -> pd.DataFrame:
    """The experts that each domain prefers most, over all layers, strongest first.

    Preference is :func:`moekit.routing.metrics.domain_specialisation` of this domain over that of the domain next in line.

    Returns:
        One row per domain: ``domain``, ``layer``, ``expert``, ``share`` (of the domain's tokens that choose it), ``next``
        (the largest share of another domain), ``chance``, and its ``top tokens``.
    """
    import pandas as pd

    found = metrics.domain_specialisation(trace, labels)
    table = found.pivot(index=["layer", "expert"], columns="domain", values="value")
    rows = []
    for domain in table.columns:
        others = table.drop(columns=domain).max(axis=1) if table.shape[1] > 1 else 0 * table[domain]
        layer, expert = (table[domain] - others).idxmax()
        at = (layer, expert)
        top = metrics.top_tokens(trace.select(mask=labels == domain), layer, expert, n=2 * tokens)["token"]
        shown = (piece.strip() or "␣" for piece in pieces(codec, top))
        rows.append(
            {
                "domain": domain,
                "layer": layer,
                "expert": expert,
                "share": table.loc[at, domain],
                "next": others if np.isscalar(others) else others.loc[at],
                "chance": found["chance"].iloc[0],
                "top tokens": "  ".join(list(dict.fromkeys(shown))[:tokens]),
            }
        )
    order = sorted(rows, key=lambda row: row["next"] - row["share"])
    return pd.DataFrame(order)


def wide(table: pd.DataFrame) -> pd.DataFrame:
    """A metric's table with one row per (layer, statistic) as one with one column per statistic, and a last row of chance."""
    import pandas as pd

    values = table.pivot(index="layer", columns="statistic", values="value")
    chance = table.groupby("statistic")["chance"].first().rename("random routing")
    return pd.concat([values, chance.to_frame().T]).rename_axis(index="layer", columns=None)


def change_by_domain(before: Trace, after: Trace, labels: np.ndarray | None) -> pd.DataFrame:
    """What an intervention did to the log-probability, one row per domain.

    Args:
        labels: [T] of ``before``; None: everything is one domain.

    Returns:
        ``domain``, ``tokens``, ``change`` (mean of after - before, nats a token), ``error`` (its standard error over
        samples), ``worst`` (the first percentile of the change), ``rerouted`` (share of tokens whose experts changed
        anywhere).
    """
    import pandas as pd

    found = compare(before, after).tokens
    if len(found) != len(before):
        raise ValueError(
            f"the traces share {len(found)} of {len(before)} tokens: they are not of the same text"
        )
    found["domain"] = "all" if labels is None else labels
    rows = []
    for domain, part in found.dropna(subset="delta").groupby("domain"):
        of_sample = part.groupby("sample")["delta"].agg(["mean", "size"])
        weight = of_sample["size"] / of_sample["size"].sum()
        mean = float(part["delta"].mean())
        spread = float(np.sqrt((weight**2 * (of_sample["mean"] - mean) ** 2).sum()))
        rows.append(
            {
                "domain": domain,
                "tokens": len(part),
                "change": mean,
                "error": spread if len(of_sample) > 1 else np.nan,
                "worst": float(part["delta"].quantile(0.01)),
                "rerouted": float((part["layers_changed"] > 0).mean()),
            }
        )
    return pd.DataFrame(rows).sort_values("change", ignore_index=True)


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
