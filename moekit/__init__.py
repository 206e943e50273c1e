"""moekit: load, run and look inside fairseq's sparse mixture-of-experts language models."""

import importlib
import os

# Threads that spin while they wait for work take the cores from whatever else runs: with a busy neighbour on two cores,
# a decoded token of a small model took 15 to 140 ms, and 1.6 ms with threads that sleep. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from moekit.processes import forkserver

if forkserver.in_notebook():
    # The process that ranks are forked from imports torch while this one does.
    forkserver.prepare_if_possible()

from moekit.api import Model, load
from moekit.nn.intervene import Force
from moekit.ranks import RankError
from moekit.routing.trace import Trace
from moekit.scoring import Evaluation

__all__ = [
    "Evaluation",
    "Force",
    "Model",
    "RankError",
    "Trace",
    "__version__",
    "compare",
    "exchange",
    "explore",
    "load",
    "metrics",
    "module",
    "plan",
]

# What is imported when it is asked for: module, and name in it; "" for the module itself.
LAZY = {
    "compare": ("moekit.routing.compare", "compare"),
    "exchange": ("moekit.routing.exchange", ""),
    "explore": ("moekit.notebook.explorer", "explore"),
    "metrics": ("moekit.routing.metrics", ""),
    "module": ("moekit.plain", "module"),
    "plan": ("moekit.planning.table", "plan"),
}


def __getattr__(name: str):
    if name == "__version__":
        from moekit.versions import own

        return own()
    if name in LAZY:
        module, attribute = LAZY[name]
        found = importlib.import_module(module)
        return getattr(found, attribute) if attribute else found
    raise AttributeError(f"module 'moekit' has no attribute {name!r}")
