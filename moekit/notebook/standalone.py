"""A view as one HTML file that needs neither a kernel nor the network: its style, its script and its data stand in it."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moekit import results

# The policy forbids every request, so a page that opens needs no network.
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ margin: 0; }}
@media (prefers-color-scheme: dark) {{ :root {{
  --jp-ui-font-color0: #e8e8e8; --jp-ui-font-color2: #a0a0a0; --jp-layout-color0: #111; --jp-layout-color1: #1c1c1c;
  --jp-border-color2: #444;
}} }}
"""


def listed(arrays: Mapping[str, np.ndarray]) -> tuple[list[tuple[str, str]], list[np.ndarray]]:
    """Arrays as a script takes them: the (name, dtype) of each, and their numbers, one-dimensional and little-endian."""
    names = [(name, str(array.dtype)) for name, array in arrays.items()]
    flat = [np.ascontiguousarray(array, array.dtype.newbyteorder("<")).ravel() for array in arrays.values()]
    return names, flat


def page(title: str, script: Path, header: dict[str, Any], arrays: Sequence[np.ndarray]) -> str:
    """The text of a page.

    Args:
        script: a module whose ``openPage`` shows the view in the element ``explorer``; its style is the ``.css`` beside it.
        header: with ``arrays``, the (name, dtype) of each array.
        arrays: as :func:`listed` gives them.
    """
    # Without "<" no text in the header can end the element that holds it.
    held = json.dumps(header).replace("<", "\\u003c")
    parts = [
        PAGE.format(title=title),
        script.with_suffix(".css").read_text("utf-8"),
        '</style>\n</head>\n<body>\n<div id="explorer"></div>\n',
        f'<script type="application/json" id="header">{held}</script>\n',
    ]
    for (name, _), array in zip(header["arrays"], arrays, strict=True):
        text = base64.b64encode(array.tobytes()).decode()
        parts.append(f'<script type="application/octet-stream" id="array-{name}">{text}</script>\n')
    text = script.read_text("utf-8")
    parts.append(f'<script type="module">\n{text}\nopenPage();\n</script>\n</body>\n</html>\n')
    return "".join(parts)


def save(path: str | Path, text: str) -> Path:
    """Write a page; its folder is made. Returns ``path``, with the home folder in place of ``~``.

    Raises:
        moekit.results.NotWritten: (a ValueError) the folder cannot be written to, or its disk is full.
    """
    path = Path(path).expanduser()
    with results.whole(path, make=True) as part:
        part.write_text(text, "utf-8")
    return path
