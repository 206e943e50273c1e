"""The explorer as one HTML file that needs neither a kernel nor the network."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moekit import results
from moekit.arguments import Whole, check
from moekit.notebook.explorer.pack import choose_samples, pack
from moekit.routing.trace import labels

if TYPE_CHECKING:
    from moekit.data import Codec
    from moekit.routing.trace import Trace

HERE = Path(__file__).parent
NO_KERNEL = "masking needs the model: call moekit.explore(trace, model=model) in a notebook"

# The policy forbids every request, so a page that opens needs no network.
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<title>moekit: routing</title>
<style>
:root { color-scheme: light dark; }
body { margin: 0; }
@media (prefers-color-scheme: dark) { :root {
  --jp-ui-font-color0: #e8e8e8; --jp-ui-font-color2: #a0a0a0; --jp-layout-color0: #111; --jp-layout-color1: #1c1c1c;
  --jp-border-color2: #444;
} }
"""


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
    path = Path(path).expanduser()
    text = page(trace, codec, domains, max_tokens)
    with results.whole(path, make=True) as part:
        part.write_text(text, "utf-8")
    return path


def page(
    trace: Trace, codec: Codec | None = None, domains: np.ndarray | None = None, max_tokens: int = 20_000
) -> str:
    """The text of the page that :func:`save_html` writes."""
    max_tokens = check("max_tokens", max_tokens, Whole())
    domains = None if domains is None else labels(domains)
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

    # Without "<" no token's text can end the element that holds the header.
    held = json.dumps(header).replace("<", "\\u003c")
    parts = [
        PAGE,
        (HERE / "explorer.css").read_text("utf-8"),
        '</style>\n</head>\n<body>\n<div id="explorer"></div>\n',
    ]
    parts.append(f'<script type="application/json" id="header">{held}</script>\n')
    for (name, _), array in zip(header["arrays"], arrays, strict=True):
        text = base64.b64encode(array.tobytes()).decode()
        parts.append(f'<script type="application/octet-stream" id="array-{name}">{text}</script>\n')
    script = (HERE / "explorer.js").read_text("utf-8")
    parts.append(f'<script type="module">\n{script}\nopenPage();\n</script>\n</body>\n</html>\n')
    return "".join(parts)
