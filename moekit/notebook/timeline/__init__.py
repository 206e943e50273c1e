"""A zooming timeline of a profile, in a notebook and as one stand-alone page.

    view = timeline.Timeline(profile)
    view                              # in the last line of a cell: shows it
    view.save_html("timeline.html")   # works without a kernel and without the network

The drawing is in timeline.js, which both homes share; pack.py hands it the profile as typed arrays.
"""

from moekit.notebook.timeline.pack import page, save_html
from moekit.notebook.timeline.widget import Timeline

__all__ = ["Timeline", "page", "save_html"]
