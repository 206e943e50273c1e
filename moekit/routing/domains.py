"""The domain of each token, by the line of the text that it is read from."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moekit.arguments import Path as PathKind
from moekit.arguments import Text, check, check_bytes, reading, shown
from moekit.checked import checked
from moekit.data.documents import LONGEST_NAME
from moekit.fairseq_data import data_folder, lines
from moekit.routing.trace import TRACE, Trace
from moekit.symbols import BOS

# The bytes that a file of domains may have, however few lines the text has.
MOST = 1 << 26


@checked(trace=TRACE, subset=Text())
def domains_of(
    trace: Trace, data: str | Path = "demo", subset: str | None = None, domains: str | Path | None = None
) -> np.ndarray:
    """The domain of each token's line in the text that was binarised.

    Args:
        trace: of binarised data cut into blocks (``sample_break_mode`` "none", no context window).
        data: the folder with ``{subset}.bin`` and ``.idx``, or "demo".
        subset: None: the one that the trace's meta names.
        domains: a side file with a domain a line of the text. None: ``{subset}.domains.txt`` in ``data`` or in the
            folder above.

    Returns:
        [T] array of strings. A token belongs to the line that it is read from; a ``</s>`` to the line that it ends,
        and the one in front of the data to the first line; a ``<s>`` to the line of the token behind it.

    Raises:
        ValueError: a file is missing, or lines, tokens and trace do not fit each other.
    """
    subset = subset or trace.meta.get("subset")
    if subset is None:
        raise ValueError(
            "the trace's meta names no subset, so it is not of binarised data; give the subset whose lines it holds"
        )
    labels, sizes, ids = lines_of(data, subset, domains)

    block = trace.meta.get("tokens_per_sample")
    if block is None or trace.meta.get("sample_break_mode") != "none" or trace.meta.get("context_window"):
        raise ValueError(
            f"the trace has sample_break_mode={shown(trace.meta.get('sample_break_mode'))} and "
            f"context_window={shown(trace.meta.get('context_window'))}; domains are known for data in blocks, 'none' and 0: "
            "trace the data so"
        )
    # A sample may have a <s> in front, which has the place of the token behind it. The meta of older traces does not tell.
    begun = trace.meta.get("add_bos", bool((trace.token[trace.position == 0] == BOS).any()))
    # The token's place in the text: a block begins with the last token of the block before it.
    place = trace.sample.astype(np.int64) * block + np.maximum(trace.position - begun, 0) - 1
    fits = place < len(ids)
    fits[fits] &= (ids[place[fits]] == trace.token[fits]) | (place[fits] < 0) | (trace.token[fits] == BOS)
    if not fits.all():
        raise ValueError(
            f"{int((~fits).sum())} of {len(trace)} tokens differ from {data_folder(data)}/{subset}; expected the data that was "
            "traced"
        )
    line = np.repeat(np.arange(len(sizes)), sizes)
    return labels[line[np.maximum(place, 0)]]


def lines_of(
    data: str | Path, subset: str, domains: str | Path | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The domains of the lines of a binarised text, the lines' lengths in tokens, and all its ids; see :func:`domains_of`.

    Raises:
        ValueError: a file is missing or damaged, or there are not as many domains as lines.
    """
    folder = data_folder(data)
    sides = [folder / f"{subset}.domains.txt", folder.parent / f"{subset}.domains.txt"]
    if domains is not None:
        sides = [check("domains", domains, PathKind())]
    with reading(sides[0]):
        side = next((s for s in sides if s.is_file()), None)
        if side is None:
            raise ValueError(
                f"there is no file {sides[0]} with a domain for each line of the text; write one there, or name another"
            )
        sizes, ids = lines(folder / subset)
        # A character has four bytes at most, and a line's end two.
        check_bytes(side, "a domain for each line", max(MOST, len(sizes) * (4 * LONGEST_NAME + 2)))
        try:
            named = side.read_text("utf-8-sig").split("\n")[:-1]
        except UnicodeDecodeError as error:
            raise ValueError(f"{side} is not UTF-8: {error.reason} at byte {error.start}") from None
    if len(named) != len(sizes):
        raise ValueError(
            f"{side} has {len(named)} lines, the text {len(sizes)}: expected a domain for each line"
        )
    longest = max(range(len(named)), key=lambda line: len(named[line]))
    # NumPy gives every label the room of the longest.
    if len(named[longest]) > LONGEST_NAME:
        raise ValueError(
            f"{side}, line {longest + 1}: a domain of {len(named[longest]):,} characters; expected at most {LONGEST_NAME}"
        )
    return np.array(named), sizes, ids
