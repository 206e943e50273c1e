"""moekit: load, run and look inside fairseq's sparse mixture-of-experts language models."""

import os

# Threads that spin while they wait for work take the cores from whatever else runs: with a busy neighbour on two cores,
# a decoded token of a small model took 15 to 140 ms, and 1.6 ms with threads that sleep. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from moekit.api import Model, load
from moekit.nn.intervene import Force
from moekit.ranks import RankError
from moekit.routing.trace import Trace
from moekit.scoring import Evaluation

__all__ = ["Evaluation", "Force", "Model", "RankError", "Trace", "explore", "load"]


def __getattr__(name: str):
    if name == "explore":  # needs Jupyter's widgets, so it is imported when it is asked for
        from moekit.notebook.explorer import explore

        return explore
    raise AttributeError(f"module 'moekit' has no attribute {name!r}")
