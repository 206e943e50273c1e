"""A checkpoint of fairseq's ``moe`` branch: which files it has, what is in them, and which rank reads what.

    files = find("/data/en_moe_lm_15b")     # any spelling of the path
    plan = survey(files)                    # every file's header, checked against the key table; no weight is read
    fill(model, plan, held)                 # one rank reads the tensors it keeps, straight into place

A checkpoint is untrusted: pickles.py reads what a file says without calling anything, and its weights are memory-mapped, so
that nothing in it runs and nothing is read that is not kept. From below to above: objects (what a pickle makes), rebuilt and
pickles (the machine, with what it does at once for a tensor), contents (what may stand in one), archive (where a file's
parts lie), stretch and weights (a file's tensors, made when they are asked for), reading (one file), keys (fairseq's names),
options (the config), shards (tensors cut over several files), files (which there are), belonging (whether files belong
together), inspection (checksums), config (the options against what the files hold), loads and copying, joining (parts of a
tensor), placement (which rank an expert goes to), filling (what is filled, and where), plan (which rank reads what),
describing (tables). safetensors is the other format of a file. What ``python -m moekit.checkpoint`` does is in verifying and
reshaping; writing makes the folders.
"""

from moekit.checkpoint.collecting import no_collector
from moekit.checkpoint.describing import describe
from moekit.checkpoint.files import Files, find
from moekit.checkpoint.inspection import NonFinite, warn_nonfinite
from moekit.checkpoint.keys import KEYS, Place, places
from moekit.checkpoint.placement import physical_of
from moekit.checkpoint.plan import Plan, fill, inspect, survey
from moekit.checkpoint.reading import Source, content, read, stamp
from moekit.checkpoint.shards import tensors
from moekit.checkpoint.weights import Weights

__all__ = [
    "KEYS",
    "Files",
    "NonFinite",
    "Place",
    "Plan",
    "Source",
    "Weights",
    "content",
    "describe",
    "fill",
    "find",
    "inspect",
    "no_collector",
    "physical_of",
    "places",
    "read",
    "stamp",
    "survey",
    "tensors",
    "warn_nonfinite",
]
