"""JSON from files that others wrote: read within bounds.

A text of n bytes can make objects of 60 n bytes, so it is refused by its number of values before it is read.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from moekit.headlines import first_line

# Characters that are counted at a time.
PIECE = 1 << 20
# The most values of a text. The header of a file with 60,000 tensors has 500,000.
MOST_VALUES = 600_000
# Those of a text that is data itself, such as the routing of a long batch or the items of a task: half a GB of numbers.
MANY_VALUES = 50_000_000


def loads(text: bytes | str, most: int = MOST_VALUES) -> Any:
    """What ``text`` spells.

    Args:
        most: values: numbers, texts, lists, and objects, which count twice as they are larger.

    Raises:
        ValueError: it is no JSON, is nested too deeply, has an object with the same key twice or too many values; the
            message is the end of a sentence that begins with the file's name.
    """
    try:
        text = text if isinstance(text, str) else text.decode()
        # A short text has no time lost to its counting, and neither has one with few signs.
        if 2 * len(text) > most and _weighed(text.count) > most and values(text) > most:
            raise _Refused(f"has more than {most:,} values")
        return json.loads(text, object_pairs_hook=_once)
    except _Refused:
        raise
    except (ValueError, RecursionError) as error:
        # Python refuses a number of more than 4300 digits, too.
        raise ValueError(f"is no JSON ({first_line(error, 100)})") from None


def values(text: str) -> int:
    """The values that ``text`` has at most, as ``most`` of :func:`loads` counts them."""
    # Without escapes, each quote begins a string or ends one.
    plain = text.replace("\\\\", "").replace('\\"', "")
    found, within = 0, False
    for start in range(0, len(plain), PIECE):
        codes = np.frombuffer(plain[start : start + PIECE].encode(errors="surrogatepass"), np.uint8)
        inside = np.logical_xor.accumulate(codes == ord('"')) ^ within
        outside, within = codes[~inside], inside[-1]
        found += _weighed(functools.partial(_occurs, outside))
    return found


def _occurs(codes: np.ndarray, sign: str) -> int:
    return int(np.count_nonzero(codes == ord(sign)))


def _weighed(count: Callable[[str], int]) -> int:
    """The values that begin with so many signs of each kind."""
    return count("[") + count(",") + 2 * count("{")


class _Refused(ValueError):
    """JSON that is not read."""


def _once(found: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(found)
    if len(made) != len(found):
        seen: set[str] = set()
        key = next(key for key, _ in found if key in seen or seen.add(key))
        raise _Refused(f"has the key {key[:60]!r} twice in one object")
    return made
