"""Which part of the model a kernel belongs to: by the range that it was launched in, by its name, and by its order.

A range says most of it. The experts' two products look alike and come in turns, or are one kernel, and what follows them in a
dispatch is the combine. A CUDA graph has no ranges: the same work ran once outside of it, and its kernels come in the same order.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from moekit.nn.parts import FETCH, WHOLE
from moekit.profiling.events import Kernel
from moekit.worker.steps import CALL

# Both products of the experts, where they are one kernel.
EXPERTS = "experts"
# The parts, in the order of a pass; then what is no work.
PARTS = (
    "embedding",
    "norm",
    "attention",
    "dense",
    "gate",
    "plan",
    "dispatch",
    FETCH,
    EXPERTS,
    "experts up",
    "experts down",
    "combine",
    "output",
    WHOLE,
    "log-probabilities",
    "sampling",
    "other",
    "waiting",
    "idle",
    "host",
)
NO_WORK = ("waiting", "idle", "host")
# The parts of kernels of moekit's own that do several parts' work within one range.
BY_NAME = {
    "_publish": "dispatch",
    "_merge": "dispatch",
    "_pull": "dispatch",
    "_hand_out": "dispatch",
    "_send": "dispatch",
    "_tiles": "plan",
    "_by_expert": "plan",
    "_streamed_ffn": EXPERTS,
    "_experts_up": "experts up",
    "_experts_down": "experts down",
    "_up": "experts up",
    "_down": "experts down",
    "_collect": "combine",
}
# Kernels in which a rank waits for the others.
EXCHANGES = ("exchange", "nccl", "_meet", "_hand_out", "_collect")
GROUPED = ("_grouped_linear", "_specialised_linear")
PRODUCT = re.compile(
    rf"{'|'.join(GROUPED)}|gemm|gemv|cutlass|nvjet|aten::(linear|addmm|mm|bmm|_?grouped_mm)$"
)
OUTSIDE = -1
CALLED = (CALL,)


class Name(NamedTuple):
    """Where a kernel belongs: ``step`` of its call, ``layer`` (:data:`OUTSIDE` for none) and ``part``."""

    step: int
    layer: int
    part: str


def is_exchange(kernel: str) -> bool:
    return kernel.startswith(EXCHANGES)


def placed(ranges: Sequence[str], step: int = 0) -> Name:
    """What the ranges around a launch say; the part is "" where none does, and the step is ``step``."""
    layer, part = OUTSIDE, ""
    for name in ranges:
        kind, _, number = name.partition(" ")
        if kind == "step" and number.isdigit():
            step = int(number)
        elif kind == "layer" and number.isdigit():
            layer, part = int(number), ""
        elif name in PARTS:
            part = name
        elif kind == FETCH and number.isdigit():
            part = FETCH
    return Name(step, layer, part)


def named(kernels: Sequence[Kernel]) -> list[Name]:
    """Name kernels of ranges, in the order in which they ran."""
    found: list[Name] = []
    before: tuple[int, int] | None = None
    step, products, begun = 0, 0, False
    for kernel in kernels:
        # What comes after a step, such as the copy of its results, belongs to it.
        step, layer, part = name = placed(kernel.ranges, step if kernel.ranges[:1] == CALLED else 0)
        if part == FETCH:
            # It may be of another layer than the kernels that it runs beside.
            found.append(name)
            continue
        if (step, layer) != before:
            before, products, begun = (step, layer), 0, False
        own = next((of for begin, of in BY_NAME.items() if kernel.name.startswith(begin)), None)
        if part not in (EXPERTS, "dispatch"):
            part = part or own or "other"
        elif own is not None:
            begun = begun or own.startswith("experts")
            part = own
        elif part == EXPERTS or kernel.name.startswith(GROUPED):
            begun = True
            products += bool(PRODUCT.search(kernel.name))
            part = "experts down" if products and products % 2 == 0 else "experts up"
        elif begun:
            part = "combine"
        found.append(Name(step, layer, part))
    return found


def named_of_graphs(kernels: Sequence[Kernel], template: Sequence[Kernel]) -> list[Name]:
    """Name all kernels of a rank: those of a CUDA graph by the same kernels, in the same order, of ``template``."""
    found = named(kernels)
    # No graph fetches experts: the host does, between the parts of a step.
    template = [kernel for kernel in template if not kernel.fetches]
    names = named(template)
    launches: dict[int, list[int]] = defaultdict(list)
    for place, kernel in enumerate(kernels):
        if kernel.graph:
            launches[kernel.launched].append(place)
    of_template = [kernel.name for kernel in template]
    # The launches of one graph are alike. A step in parts is several graphs, and those of alike layers are alike, too: each
    # stands behind the one before it.
    known: dict[tuple[tuple[str, ...], int], tuple[list[tuple[int, str]], int]] = {}
    behind = 0
    for places in launches.values():
        order = tuple(kernels[place].name for place in places)
        if (order, behind) not in known:
            known[order, behind] = _next(order, of_template, names, behind)
        own, behind = known[order, behind]
        for place, (layer, part) in zip(places, own, strict=True):
            found[place] = Name(found[place].step, layer, part)
    return found


def _next(
    of_graph: tuple[str, ...], of_template: list[str], names: list[Name], behind: int
) -> tuple[list[tuple[int, str]], int]:
    """The layers and the parts of a graph's kernels where just these run in the template, and the place behind them.

    Args:
        behind: where to look first; then the template is looked through from its start.
    """
    size = len(of_graph)
    last = len(of_template) - size
    for at in (*range(behind, last + 1), *range(min(behind, last + 1))):
        if tuple(of_template[at : at + size]) == of_graph:
            return [(name.layer, name.part) for name in names[at : at + size]], at + size
    return _matched(of_graph, of_template, names), behind


def _matched(of_graph: Sequence[str], of_template: list[str], names: list[Name]) -> list[tuple[int, str]]:
    """The layer and the part of each kernel of a graph. What the template lacks goes where its name mostly goes there."""
    mostly: dict[str, Counter[str]] = defaultdict(Counter)
    for kernel, name in zip(of_template, names, strict=True):
        mostly[kernel][name.part] += 1

    def alone(kernel: str) -> tuple[int, str]:
        return OUTSIDE, mostly[kernel].most_common(1)[0][0] if mostly[kernel] else "other"

    found = [alone(kernel) for kernel in of_graph]
    matcher = difflib.SequenceMatcher(None, of_graph, of_template, autojunk=False)
    for ours, theirs, size in matcher.get_matching_blocks():
        for i in range(size):
            found[ours + i] = names[theirs + i].layer, names[theirs + i].part
    return found
