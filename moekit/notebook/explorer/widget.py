"""The explorer in a notebook: an anywidget whose kernel side hands out the trace once and masks experts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import anywidget
import numpy as np
import traitlets

from moekit.batches import Batch
from moekit.checked import checked
from moekit.handle import MODEL
from moekit.headlines import headline
from moekit.notebook import pictures
from moekit.notebook.explorer import page
from moekit.notebook.explorer.pack import pack
from moekit.notebook.pieces import CODEC
from moekit.routing.trace import TRACE, Trace
from moekit.scoring import score_batches
from moekit.symbols import PAD

if TYPE_CHECKING:
    from moekit.api import Model
    from moekit.data import Codec

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
        # These are no traits, because a saved notebook keeps its traits and would hold the whole trace.
        self.trace, self.model, self.codec, self.domains = trace, model, codec, domains
        self.packed = pack(trace, codec, domains, mask=NO_MODEL if model is None else None, cut=None)
        super().__init__()
        self.on_msg(self._answer)

    def save_html(self, path: str | Path, max_tokens: int = 20_000) -> Path:
        """Write this explorer as a stand-alone page; see :func:`moekit.notebook.explorer.save_html`."""
        return page.save_html(self.trace, path, self.codec, self.domains, max_tokens)

    def embedded(self, max_tokens: int = 20_000):
        """The page of :meth:`save_html` within the notebook, folded: converted to HTML, the notebook holds the explorer."""
        text = page.page(self.trace, self.codec, self.domains, max_tokens)
        return pictures.embedded(text, "The explorer as a page (click to open)")

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
        except Exception as error:
            # The view shows it: Jupyter drops what the handler of a message raises.
            self.send({"id": content["id"], "error": headline(error)})

    def mask(self, rows: slice, layer: int, expert: int) -> tuple[np.ndarray, str]:
        """What the log-probabilities of one sample lose or gain without an expert.

        Args:
            rows: the sample's rows of the trace.
            layer: place on the axis L.

        Returns:
            float32 [n], change of the next token's log-probability in nats, NaN where there is none; and a sentence.

        Raises:
            ValueError: there is no model, or the trace holds only a part of the sample.
        """
        if self.model is None:
            raise ValueError(NO_MODEL)
        trace, model = self.trace, self.model
        position = trace.position[rows]
        if not np.array_equal(position, np.arange(len(position))):
            raise ValueError(
                f"the trace holds only a part of sample {trace.sample[rows.start]}, which cannot be scored: trace all of it"
            )
        sample = Batch(
            index=0,
            ids=trace.sample[rows.start : rows.start + 1],
            tokens=trace.token[rows][None],
            targets=trace.target[rows][None],
            starts=np.zeros(1, dtype=np.int64),
        )
        fraction = trace.meta.get("capacity_token_fraction")
        how = {
            "fraction": fraction,
            "vocab": model.vocab,
            "seed": trace.meta.get("seed", 1),
            "progress": False,
        }
        before = score_batches(model, [sample], **how)[0][0]
        with model.route(mask={trace.layers[layer]: [expert]}):
            after = score_batches(model, [sample], **how)[0][0]
        delta = np.where(sample.targets[0] == PAD, np.nan, after - before).astype(np.float32)
        return delta, f"scored alone, with and without it; capacity: {pictures.capacity_name(fraction)}"


@checked(trace=TRACE, model=MODEL, codec=CODEC)
def explore(
    trace: Trace,
    model: Model | None = None,
    codec: Codec | None = None,
    domains: np.ndarray | None = None,
) -> Explorer:
    """Linked views of where the router sent each token.

    Click a token: its layers, experts and weights. Click an expert: its top tokens and contexts, its domains, its
    partners. Search either; filter by domain and by what was not dispatched; mask an expert and see what its absence does.

    Args:
        model: the model that made the trace, to mask experts; None: the button says why it is off.
        codec: whose ``pieces(ids)`` shows tokens as text; None: their ids.
        domains: [T] labels of the tokens (:func:`moekit.routing.domains.domains_of`), or the name of the trace's column;
            None: no domains.
    """
    return Explorer(trace, model, codec, None if domains is None else trace.labels_of(domains))
