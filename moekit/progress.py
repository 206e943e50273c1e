"""The one kind of progress bar: a rate and what is left, in a terminal, in JupyterLab and in a notebook that ran headless.

tqdm's own notebook bar is a widget, of which a headless run keeps nothing, and its text bar leaves a line for every
step. Under a kernel, this one redraws a single plain output, so that what stays is its last state.
"""

from __future__ import annotations

import io
import sys
from collections import deque
from typing import Any, ClassVar

from tqdm import tqdm

from moekit.arguments import Flag, check


def under_kernel() -> bool:
    """Whether this runs in a notebook's kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and "IPKernelApp" in shell.config


class KernelBar(tqdm):
    """A tqdm bar in one display that is redrawn."""

    # the outputs of the latest bars, for ``clear``
    outputs: ClassVar[deque] = deque(maxlen=64)

    def __init__(self, *args: Any, **options: Any):
        self.shown = None
        super().__init__(*args, **options, file=io.StringIO(), ncols=100, ascii=False)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        from IPython.display import display

        text = {"text/plain": msg or str(self)}
        if self.shown is None:
            self.shown = display(text, raw=True, display_id=True)
            self.outputs.append(self.shown)
        else:
            self.shown.update(text, raw=True)


def clear() -> None:
    """Empty the outputs of the bars that a notebook has shown so far; warnings and all else beside them stay."""
    while KernelBar.outputs:
        KernelBar.outputs.popleft().update({"text/html": "", "text/plain": ""}, raw=True)


def bar(label: str, total: int, unit: str, *, done: int = 0, show: bool = True, delay: float = 0.0) -> tqdm:
    """A bar over ``total`` of ``unit`` ("B", " tokens"), ``done`` of them already.

    Args:
        show: False makes it silent.
        delay: seconds before it appears; what takes less shows none.

    Raises:
        ValueError: ``show``, which is the argument ``progress`` of most calls, is no flag.
    """
    show = check("progress", show, Flag())
    kind = KernelBar if under_kernel() else tqdm
    options = {"initial": done, "unit": unit, "unit_scale": True, "mininterval": 0.3, "delay": delay}
    # A service, say, may have no standard error.
    nowhere = kind is tqdm and sys.stderr is None
    return kind(desc=label, total=total, disable=nowhere or not show, **options)
