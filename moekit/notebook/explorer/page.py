"""The explorer as one HTML file that needs neither a kernel nor the network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moekit.arguments import Whole
from moekit.checked import checked
from moekit.notebook import standalone
from moekit.notebook.explorer.pack import choose_samples, pack
from moekit.notebook.pieces import CODEC
from moekit.routing.trace import TRACE, Trace

if TYPE_CHECKING:
    from moekit.data import Codec

HERE = Path(__file__).parent
NO_KERNEL = "masking needs the model: call moekit.explore(trace, model=model) in a notebook"


def save_html(
    trace: Trace,
    path: str | Path,
    codec: Codec | None = None,
    domains: np.ndarray | None = None,
    max_tokens: int = 20_000,
) -> Path:
    """Write the explorer of a trace as one page of at most about 170 bytes a token at 6 layers; see :func:`explore`.

    Args:
        path: the file to write.
        max_tokens: a longer trace is cut to whole samples with about this many tokens, spread evenly over the domains;
            the page says so, and its figures are of what it holds.

    Returns:
        ``path``.

    Raises:
        ValueError: an argument makes no sense.
        moekit.results.NotWritten: (a ValueError) the folder cannot be written to, or its disk is full.
    """
    return standalone.save(path, page(trace, codec, domains, max_tokens))


@checked(trace=TRACE, codec=CODEC, max_tokens=Whole())
def page(
    trace: Trace, codec: Codec | None = None, domains: np.ndarray | None = None, max_tokens: int = 20_000
) -> str:
    """The text of the page that :func:`save_html` writes."""
    domains = None if domains is None else trace.labels_of(domains)
    chosen = choose_samples(trace.sample, domains, max_tokens)
    here = np.isin(trace.sample, chosen)
    cut = None
    if not here.all():
        cut = (
            f"This page holds {here.sum():,} of the trace's {len(trace):,} tokens: {len(chosen):,} of "
            f"{len(np.unique(trace.sample)):,} samples, spread over the domains. All figures are of these."
        )
        trace = trace.select(mask=here)
        domains = None if domains is None else domains[here]
    header, arrays = pack(trace, codec, domains, mask=NO_KERNEL, cut=cut)
    return standalone.page("moekit: routing", HERE / "explorer.js", header, arrays)
