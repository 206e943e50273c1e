"""An array of objects, as np.save writes arrays of different lengths: read without running its pickle."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from moekit.checkpoint import pickles

# The most bytes of the pickle.
MOST = 1 << 29
_ARRAY = re.compile(r"numpy\.(_core|core)\.multiarray\._reconstruct")
_WHOLE = re.compile(r"[iu][1248]")


def read(path: Path) -> list[np.ndarray] | None:
    """The arrays of whole numbers in the array of objects that ``path`` holds; None where it holds anything else."""
    with open(path, "rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }
            if not header[version](file)[2].hasobject:
                return None
            pickle = file.read(MOST + 1)
            if len(pickle) > MOST:
                return None
            _, shape, _, _, parts = pickles.parse(pickle).value.state
            if all(type(part) is int for part in parts):
                # Arrays of one shape become one array, whose objects are its numbers.
                return [np.array(parts, dtype=np.int64).reshape(shape)]
            return [_numbers(part) for part in parts]
        except Exception:
            # A damaged header or pickle fails in any way; whatever it is, it is no such array.
            return None


def _numbers(node: Any) -> np.ndarray:
    """The array that a pickled call would build, by its shape, its type and its bytes."""
    _, shape, kind, fortran, content = node.state
    code, order = kind.arguments[0], kind.state[1]
    if not _ARRAY.fullmatch(node.function) or not _WHOLE.fullmatch(code) or kind.function != "numpy.dtype":
        raise ValueError
    flat = np.frombuffer(content, np.dtype(code).newbyteorder(order))
    return flat.reshape(shape, order="F" if fortran else "C")
