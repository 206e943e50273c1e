"""A view as one HTML file that needs neither a kernel nor the network: its style, its script and its data stand in it."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

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


def standalone(
    title: str, style: str, script: str, header: dict[str, Any], arrays: Sequence[np.ndarray]
) -> str:
    """The text of a page.

    Args:
        script: a module whose ``openPage`` shows the view in the element ``explorer``.
        header: with ``arrays``, the (name, dtype) of each array.
        arrays: one-dimensional and little-endian.
    """
    # Without "<" no text in the header can end the element that holds it.
    held = json.dumps(header).replace("<", "\\u003c")
    parts = [
        PAGE.format(title=title),
        style,
        '</style>\n</head>\n<body>\n<div id="explorer"></div>\n',
        f'<script type="application/json" id="header">{held}</script>\n',
    ]
    for (name, _), array in zip(header["arrays"], arrays, strict=True):
        text = base64.b64encode(array.tobytes()).decode()
        parts.append(f'<script type="application/octet-stream" id="array-{name}">{text}</script>\n')
    parts.append(f'<script type="module">\n{script}\nopenPage();\n</script>\n</body>\n</html>\n')
    return "".join(parts)
