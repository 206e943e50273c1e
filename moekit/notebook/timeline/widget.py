"""The timeline in a notebook: an anywidget whose kernel side hands out the profile once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import anywidget

from moekit.notebook import pictures
from moekit.notebook.timeline.pack import HERE, pack, page, save_html

if TYPE_CHECKING:
    from moekit.profiling import Profile


class Timeline(anywidget.AnyWidget):
    """A timeline of all ranks that zooms."""

    _esm = HERE / "timeline.js"
    _css = HERE / "timeline.css"

    def __init__(self, profile: Profile):
        # These are no traits, because a saved notebook keeps its traits and would hold the whole profile.
        self.profile, self.packed = profile, pack(profile)
        super().__init__()
        self.on_msg(self._answer)

    def save_html(self, path: str | Path) -> Path:
        """Write this timeline as a stand-alone page; see :func:`moekit.notebook.timeline.save_html`."""
        return save_html(self.profile, path)

    def embedded(self):
        """The page of :meth:`save_html` within the notebook, folded: converted to HTML, the notebook holds the timeline."""
        height = 220 + 52 * self.packed[0]["ranks"]
        return pictures.embedded(page(self.profile), "The timeline as a page (click to open)", height)

    def _answer(self, _: object, content: dict, buffers: list) -> None:
        """The one message of timeline.js."""
        header, arrays = self.packed
        self.send({"header": header}, arrays)
