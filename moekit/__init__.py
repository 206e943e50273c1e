"""moekit: load, run and look inside fairseq's sparse mixture-of-experts language models."""

from moekit.handle import Evaluation, Model, load
from moekit.ranks import RankError

__all__ = ["Evaluation", "Model", "RankError", "load"]
