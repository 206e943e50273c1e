"""A checkpoint of fairseq's ``moe`` branch: which files it has, what lies in them, who reads what.

    files = find("/data/en_moe_lm_15b")     # any spelling of the path
    plan = survey(files)                    # every file's header, checked against the key table; no weight is read
    fill(model, plan, held)                 # one rank reads the tensors it keeps, straight into place

A checkpoint is untrusted: files are opened with torch's restricted unpickler and memory-mapped, so that nothing in
them runs and nothing is read that is not kept.
"""

from moekit.checkpoint.files import Files, find
from moekit.checkpoint.keys import KEYS, Place, places
from moekit.checkpoint.plan import Plan, describe, fill, survey
from moekit.checkpoint.reading import Source, read, stamp, tensors

__all__ = [
    "KEYS",
    "Files",
    "Place",
    "Plan",
    "Source",
    "describe",
    "fill",
    "find",
    "places",
    "read",
    "stamp",
    "survey",
    "tensors",
]
