"""moekit: load, run and look inside fairseq's sparse mixture-of-experts language models."""

from moekit.handle import Evaluation, Model, load
from moekit.intervene import Force
from moekit.ranks import RankError
from moekit.trace import Trace

__all__ = ["Evaluation", "Force", "Model", "RankError", "Trace", "explore", "load"]


def __getattr__(name: str):
    if name == "explore":  # needs Jupyter's widgets, so it is imported when it is asked for
        from moekit.explorer import explore

        return explore
    raise AttributeError(f"module 'moekit' has no attribute {name!r}")
