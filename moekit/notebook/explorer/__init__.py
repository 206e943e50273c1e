"""A linked explorer of a routing trace, in a notebook and as one stand-alone page.

    explorer = moekit.explore(trace, model=model, codec=codec, domains=domains_of(trace))
    explorer                                   # in the last line of a cell: shows it
    explorer.save_html("explorer.html")        # works without a kernel and without the network

The views and every look-up are in explorer.js, which both homes share; pack.py hands it the trace as typed arrays.
"""

from moekit.notebook.explorer.page import save_html
from moekit.notebook.explorer.widget import Explorer, explore

__all__ = ["Explorer", "explore", "save_html"]
