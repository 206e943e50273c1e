"""The explorer in a notebook: an anywidget whose kernel side hands out the trace once and masks experts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import anywidget
import numpy as np
import traitlets

from moekit.explorer import page
from moekit.explorer.pack import pack

if TYPE_CHECKING:
    from moekit.data import Codec
    from moekit.handle import Model
    from moekit.trace import Trace

HERE = Path(__file__).parent
NO_MODEL = "masking needs the model: explore(trace, model=model)"


class Explorer(anywidget.AnyWidget):
    """Linked views of a trace; made by :func:`explore`.

    Attributes:
        token: the row of the selected token; set it to select another.
        expert: [place on the axis L, expert] of the selected expert; set it to select another.
    """

    _esm = HERE / "explorer.js"
    _css = HERE / "explorer.css"
    token = traitlets.Int(-1).tag(sync=True)
    expert = traitlets.List(traitlets.Int(), [-1, -1]).tag(sync=True)

    def __init__(self, trace: Trace, model: Model | None, codec: Codec | None, domains: np.ndarray | None):
        # Not traits: a saved notebook keeps the traits, and the trace belongs into its own file.
        self.trace, self.model, self.codec, self.domains = trace, model, codec, domains
        self.packed = pack(trace, codec, domains, mask=NO_MODEL if model is None else None, cut=None)
        super().__init__()
        self.on_msg(self._answer)

    def save_html(self, path: str | Path, max_tokens: int = 20_000) -> Path:
        """Write this explorer as a stand-alone page; see :func:`moekit.explorer.save_html`."""
        return page.save_html(self.trace, path, self.codec, self.domains, max_tokens)

    def _answer(self, _: object, content: dict, buffers: list) -> None:
        """One message of explorer.js's ``ask``, answered under its id."""
        try:
            if content["ask"] == "trace":
                header, arrays = self.packed
                self.send({"id": content["id"], "header": header}, arrays)
            elif content["ask"] == "mask":
                rows = slice(content["from"], content["to"])
                delta, said = self.mask(rows, content["layer"], content["expert"])
                self.send({"id": content["id"], "said": said}, [delta])
        except Exception as error:  # shown in the view: nobody sees what a comm's handler raises
            self.send({"id": content["id"], "error": f"{type(error).__name__}: {error}"})

    def mask(self, rows: slice, layer: int, expert: int) -> tuple[np.ndarray, str]:
        raise NotImplementedError


def explore(
    trace: Trace,
    model: Model | None = None,
    codec: Codec | None = None,
    domains: np.ndarray | None = None,
) -> Explorer:
    """Linked views of where the router sent each token.

    Click a token: its layers, experts and weights. Click an expert: its top tokens and contexts, its domains, its
    partners. Search either; filter by domain and by what was dropped; mask an expert and see what its absence does.

    Args:
        model: the model that made the trace, to mask experts; None: the button says why it is off.
        codec: whose ``pieces(ids)`` shows tokens as text; None: their ids.
        domains: [T] labels of the tokens (:func:`moekit.trace.domains_of`); None: no domains.
    """
    return Explorer(trace, model, codec, domains)
