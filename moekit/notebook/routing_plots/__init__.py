"""Pictures of a routing trace that stay readable at 512 experts: sorted or clustered, beside uniform random routing.

Each function takes a :class:`moekit.routing.trace.Trace` and returns a matplotlib figure (or HTML); none touches pyplot's
state.

Shape letters: T tokens, L traced layers, K choices, E experts, D domains.
"""

from moekit.notebook.routing_plots.by_domain import domain_heatmap
from moekit.notebook.routing_plots.dropping import drops_by_position
from moekit.notebook.routing_plots.effects import changes, information, written
from moekit.notebook.routing_plots.loads import choices, load_heatmap
from moekit.notebook.routing_plots.routes import paths
from moekit.notebook.routing_plots.text import text_figure, text_html
from moekit.notebook.routing_plots.together import coactivation

__all__ = [
    "changes",
    "choices",
    "coactivation",
    "domain_heatmap",
    "drops_by_position",
    "information",
    "load_heatmap",
    "paths",
    "text_figure",
    "text_html",
    "written",
]
