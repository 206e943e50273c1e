"""What inspect_routing.ipynb needs beside traces, metrics and pictures: labels, tables and files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moekit.notebook import report
from moekit.notebook.pictures import capacity_name
from moekit.notebook.pieces import pieces
from moekit.routing import metrics
from moekit.routing.compare import change_by_domain
from moekit.routing.domains import domains_of
from moekit.routing.trace import join

# What a notebook shows of a table of ``change_by_domain``; the files hold all of it.
CHANGES = "domain units change low high p effect perplexity_ratio ratio_low ratio_high".split()

# A capacity at which there are drops to see, for a text that is read without one.
TIGHT = {"capacity_token_fraction": 0.2}

__all__ = [
    "CHANGES",
    "TIGHT",
    "change_by_domain",
    "continued",
    "costs",
    "favourites",
    "labels_of",
    "masked_by_domain",
    "masked_name",
    "price_of_drops",
    "save",
    "stacked",
    "wide",
    "written",
]

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from moekit.api import Model
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
        ``chance``, ``lift``, ``low``, ``high`` (of the lift, over samples), ``p``, ``survives`` and ``note`` (of
        :func:`moekit.routing.metrics.permutation`; "too few": none can survive, whatever its ``p``), ``against``, and its
        ``top tokens``.
    """
    import pandas as pd

    labels = trace.labels_of(labels)
    found = metrics.domain_specialisation(trace, labels, against=against, choice=choice)
    tested = metrics.permutation(trace, labels, choice=choice)
    found = found.merge(
        tested[["layer", "domain", "expert", "p", "survives", "note"]], on=["layer", "domain", "expert"]
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
                "note": row["note"],
                "against": against,
                "top tokens": "  ".join(list(dict.fromkeys(shown))[:tokens]),
            }
        )
    order = sorted(rows, key=lambda row: row["next"] - row["share"])
    return pd.DataFrame(order)


def continued(
    model: Model, trace: Trace, labels: str | np.ndarray, samples: int = 10, read: int = 32, **options: Any
) -> Trace:
    """How the model routes text that it writes itself: it continues the beginnings of samples of each domain.

    Args:
        trace: of the text, in blocks or texts.
        labels: [T] labels, or the name of the trace's column.
        samples: the most of each domain, spread over the text; those that begin with ``read`` tokens of it alone, or, where
            there are none, with a most of it.
        read: tokens that the model reads of each, its first symbol included.
        options: of ``model.generate``, such as ``max_new_tokens``, ``temperature`` and ``seed``.

    Returns:
        The trace of the prompts and the new tokens, a sample each, with the labels of the prompts as column ``domain``. Its
        metrics count the new tokens.

    Raises:
        ValueError: all samples are shorter.
    """
    labels = trace.labels_of(labels)
    start = np.flatnonzero(np.diff(trace.sample, prepend=-1))
    length = np.diff(np.append(start, len(trace)))
    told = [(n, Counter(labels[n : n + read].tolist()).most_common(1)[0]) for n in start[length >= read]]
    if not told:
        raise ValueError(f"no sample has {read} tokens; expected some to continue, so read fewer")
    chosen: list[tuple[int, str]] = []
    for domain in sorted({domain for _, (domain, _) in told}):
        here = [(n, count) for n, (found, count) in told if found == domain]
        # A prompt of one domain alone is better.
        best = [n for n, count in here if count == read] or [n for n, _ in here]
        places = np.linspace(0, len(best) - 1, min(samples, len(best))).astype(int)
        chosen += [(best[place], domain) for place in places]
    # The first symbol of a sample is the end of what came before; generation begins with one of its own.
    prompts = [trace.token[n + 1 : n + read].tolist() for n, _ in chosen]
    made = model.generate(prompts, trace=True, **options)
    found = join(one.trace for one in made)
    return found.labelled(domain=np.array([domain for _, domain in chosen])[found.sample])


def written(read: Trace, new: Trace, favourites: pd.DataFrame) -> pd.DataFrame:
    """Whether text that the model writes uses the experts that the domain's text uses.

    Args:
        read: the trace of the text, with a column ``domain``.
        new: that of :func:`continued`.
        favourites: pairs to look at: ``domain``, ``layer``, ``expert``, as :func:`favourites` gives; first choices count.

    Returns:
        One row per pair: ``domain``, ``layer``, ``expert``, ``read``, ``read_low``, ``read_high`` (share of the domain's
        tokens in the text, 95 % over samples), ``written``, ``written_low``, ``written_high`` (of the new tokens), ``load``
        (of all new tokens), ``units`` (continuations).
    """
    keys = ["domain", "layer", "expert"]
    found = favourites[keys]
    for name, trace in (("read", read), ("written", new)):
        table = metrics.domain_specialisation(trace, "domain", choice=0)
        names = {"value": name, "low": f"{name}_low", "high": f"{name}_high"}
        more = ["chance", "units"] if name == "written" else []
        found = found.merge(table[[*keys, *names, *more]].rename(columns=names), on=keys)
    return found.rename(columns={"chance": "load"})


def costs(free: Trace, tight: Mapping[float, Trace], labels: str | np.ndarray) -> dict[str, pd.DataFrame]:
    """:func:`moekit.routing.compare.change_by_domain` from ``free`` to each trace with a capacity, by the capacity's name."""
    return {
        f"capacity {capacity_name(fraction)}": change_by_domain(free, one, labels)
        for fraction, one in tight.items()
    }


def stacked(tables: Mapping[str, pd.DataFrame], name: str) -> pd.DataFrame:
    """Tables of one kind below one another; the column ``name`` tells which is which."""
    import pandas as pd

    return pd.concat([table.assign(**{name: key}) for key, table in tables.items()], ignore_index=True)


def masked_name(mask: Mapping[int, Sequence[int]]) -> str:
    """Experts by layer in words: {5: [8, 2]} is "5:8, 5:2", as the explorer and the settings name them."""
    return ", ".join(f"{layer}:{expert}" for layer, experts in mask.items() for expert in experts)


def masked_by_domain(pairs: Mapping[Trace, Trace], labels: np.ndarray | None) -> pd.DataFrame:
    """:func:`moekit.routing.compare.change_by_domain` of several pairs of traces, with the capacity that each is under.

    Args:
        pairs: trace -> the same text's trace without an expert.
    """
    import pandas as pd

    tables = []
    for before, after in pairs.items():
        table = change_by_domain(before, after, labels)
        table.insert(0, "capacity", capacity_name(before.meta["capacity_token_fraction"]))
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def wide(table: pd.DataFrame) -> pd.DataFrame:
    """A metric's table with one row per (layer, statistic) as one with one column per statistic, and a last row of chance."""
    import pandas as pd

    values = table.pivot(index="layer", columns="statistic", values="value")
    chance = table.groupby("statistic")["chance"].first().rename("random routing")
    return pd.concat([values, chance.to_frame().T]).rename_axis(index="layer", columns=None)


def price_of_drops(free: Trace, tight: Trace) -> str:
    """What the capacity of ``tight`` drops in each layer, and what it costs beside ``free`` without one, in a sentence."""
    shares = ", ".join(f"{row.value:.1%} in layer {row.layer}" for row in metrics.drops(tight).itertuples())
    bits = [-float(np.nanmean(one.logprob, dtype=np.float64)) / math.log(2) for one in (free, tight)]
    return (
        f"With a capacity of {capacity_name(tight.meta['capacity_token_fraction'])}, {shares} of the choices are "
        f"{metrics.drops_name(tight)}. "
        f"The text takes {bits[1]:.3f} bits a token with it, {bits[0]:.3f} without a limit."
    )


def save(
    output_dir: str | Path,
    trace: Trace,
    figures: Mapping[str, Figure | None],
    tables: Mapping[str, pd.DataFrame | None],
    explorer: Explorer,
) -> Path:
    """Write ``trace.parquet``, ``explorer.html``, and the figures and tables, as :func:`moekit.notebook.report.write` does."""

    def more(folder: Path) -> None:
        trace.save(folder / "trace.parquet")
        explorer.save_html(folder / "explorer.html")

    return report.write(output_dir, figures, tables, more)
