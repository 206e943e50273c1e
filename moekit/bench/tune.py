"""The cuts of the experts' kernels for the GPU at hand: measured, checked, and written to a file for MOEKIT_CUTS.

For each band of rows an expert the search begins with the built-in cut and goes from neighbour to neighbour, as long as one
is faster. A cut whose result differs from the plain path's does not count, and neither does one that does not compile.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from moekit import checkpoint, results
from moekit.arguments import Path as PathKind
from moekit.arguments import check, reading
from moekit.bench import measure
from moekit.bench.figures import Figure
from moekit.bench.moe_layer import layer_too_large, random_layer, same
from moekit.bench.setting import Setting, add_kind, add_shape, ceiling_figures, whole
from moekit.nn.config import DENSE, ModelConfig
from moekit.nn.experts import Assignment, Experts
from moekit.nn.ffn import loop
from moekit.nn.gate import sort_by_expert
from moekit.nn.gates import top_k_of
from moekit.nn.kernels import cuts
from moekit.nn.kernels.cuts import Blocks, Cut, why_not
from moekit.nn.kernels.gpu import is_hopper
from moekit.nn.memory import Sizes
from moekit.progress import bar as progress_bar
from moekit.ranks import Rank
from moekit.versions import versions

# The cuts of a table: the most choices, and the most choices an expert. The last one takes any number.
BANDS = ((16, None), (None, 4), (None, 8), (None, 16), (None, 64), (None, 128), (None, None))
# Choices an expert with which the last band is measured.
MANY = 256
# A cut has to be faster by this share, so that noise changes nothing.
GAIN = 0.02


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    add_shape(what)
    what.add_argument("--checkpoint", help="the shape of this checkpoint, of which no weight is read")
    add_kind(parser)
    parser.add_argument(
        "--out", type=Path, default=Path("moekit-cuts.json"), help="the file to write (default: %(default)s)"
    )
    parser.add_argument("--tries", type=whole(), default=60, help="cuts to try in each band (60)")
    parser.add_argument("--seconds", type=whole(), default=600, help="the most for all bands (600)")
    parser.set_defaults(world_size=1, backend="triton")


@torch.inference_mode()
def run(setting: Setting, args: argparse.Namespace) -> list[Figure]:
    """Search every band and write the file. The limit of a band is that of :mod:`moekit.bench.moe_layer`.

    Tables of other GPUs and types in the file stay as they are.

    Raises:
        ValueError: the file cannot be read or written, or a built-in cut gives a wrong result.
    """
    config = _config(setting, args.checkpoint)
    if not config.moe_layers:
        return [Figure("cuts", None, "ms", note=DENSE)]
    device = setting.devices[0]
    kind = cuts.kind_of(setting.kind, setting.experts_kind or setting.kind)
    gpu, shared, hopper = cuts.gpu_name(device), cuts.shared_memory(device), is_hopper(device)
    out = check("--out", args.out, PathKind()).resolve()
    tables, made = _old(out)
    if why := layer_too_large(setting, config, -(-MANY * config.experts // top_k_of(config))):
        return [Figure("cuts", None, "ms", note=why)]
    ceilings = measure.ceilings(Rank(0, 1, device), setting.kind)
    measure.give_back(device)
    generator = torch.Generator(device).manual_seed(1)
    experts = random_layer(config, setting, generator).experts

    rows, found = ceiling_figures(ceilings, setting.dtype), []
    built_in, dims = cuts.built_in(gpu, kind, shared), (config.dim, config.ffn_dim)
    ends = time.monotonic() + args.seconds
    with progress_bar(f"tuning {kind}", len(BANDS) * args.tries, " cuts") as bar:
        for number, (choices, mean) in enumerate(BANDS):
            places = choices or (mean or MANY) * config.experts
            start = cuts.cut_for(places, config.experts, built_in, dims)
            band = Band(experts, places, top_k_of(config), setting, generator)
            left = (ends - time.monotonic()) / (len(BANDS) - number)
            best = search(start, band.seconds, kind, shared, args.tries, left, bar.update, hopper)
            bar.update((number + 1) * args.tries - bar.n)
            bounds = {"choices": choices or cuts.ANY, "mean": mean or cuts.ANY}
            found.append(replace(best.cut, **bounds))
            sizes = Sizes(config, setting.kind, setting.experts is not None)
            least = ceilings.seconds(band.bytes(sizes), 4 * places * config.dim * config.ffn_dim)
            rows.append(best.figure(_named(choices, mean), least))
    if found[-1].up.specialised:
        # The last cut of a table takes any shape.
        found.append(built_in[-1])
    table = tables.setdefault(gpu, {})
    table[kind] = tuple(found)
    made.setdefault(gpu, {})[kind] = _about(args.checkpoint or setting.shape)
    with results.whole(out) as part:
        part.write_text(cuts.written(tables, made))
    use = f"{gpu}, {kind}; to use it: export MOEKIT_CUTS={out}"
    return [*rows, Figure("table", None, "", note=use)]


def _config(setting: Setting, path: str | None) -> ModelConfig:
    return setting.config if path is None else checkpoint.survey(checkpoint.find(path)).config


def _old(path: Path) -> tuple[dict, dict]:
    """The tables in the file, and how they were made; an error comes before hours of measuring, and not after."""
    results.check_file(path, make=True)
    with reading(path):
        if not path.exists():
            return {}, {}
        text = path.read_text()
    return cuts.tables(text, f"--out {path}"), cuts.made(text)


def _named(choices: int | None, mean: int | None) -> str:
    if choices is not None:
        return f"up to {choices} choices"
    return f"up to {mean} choices an expert" if mean is not None else "more choices an expert"


def _about(shape: str) -> dict[str, str | None]:
    own = versions()
    return {
        "shape": str(shape),
        "date": time.strftime("%Y-%m-%d"),
        "moekit": own["moekit"],
        "torch": own["torch"],
    }


# ----------------------------------------------------------------------------------------------------- searching


@dataclass
class Found:
    """The best cut of a band: its seconds and those of the built-in one, and what became of the cuts that were tried."""

    cut: Cut
    seconds: float
    before: float
    tried: int = 0
    wrong: int = 0
    failed: int = 0

    def figure(self, band: str, least: float) -> Figure:
        note = (
            f"built-in {self.before * 1e3:.3g} ms; up {self.cut.up}; down {self.cut.down}; {self.tried} tried"
        )
        note += f", {self.wrong} wrong" if self.wrong else ""
        note += f", {self.failed} failed" if self.failed else ""
        return Figure(band, self.seconds * 1e3, "ms", least * 1e3, lower=True, note=note)


def search(
    start: Cut,
    clock: Callable[[Cut], float],
    kind: str,
    shared: float,
    tries: int,
    seconds: float,
    told: Callable[[], object] = lambda: None,
    hopper: bool = False,
) -> Found:
    """From ``start`` to a faster neighbour, again and again.

    Args:
        clock: the seconds of a cut; it raises ValueError if the result is wrong, and anything if the cut does not run.
        shared: bytes of shared memory.
        tries, seconds: the most of both.
        told: called after each cut.
        hopper: whether specialised warps are possible.

    Raises:
        ValueError: the result of ``start`` is wrong.
    """
    ends = time.monotonic() + seconds
    first = clock(start)
    found = Found(start, first, first)
    seen, waiting = {start}, list(neighbours(start, kind, shared, hopper))
    while waiting and found.tried < tries and time.monotonic() < ends:
        cut = waiting.pop(0)
        if cut in seen:
            continue
        seen.add(cut)
        found.tried += 1
        try:
            taken = clock(cut)
        except ValueError:
            found.wrong += 1
        except Exception:
            # What the compiler or the GPU refuses: too many registers, say.
            found.failed += 1
        else:
            if taken < found.seconds * (1 - GAIN):
                found.cut, found.seconds = cut, taken
                waiting = list(neighbours(cut, kind, shared, hopper))
        told()
    if found.cut != start:
        # Side by side: the clock of a GPU changes with the time.
        found.before, found.seconds = clock(start), clock(found.cut)
        if not found.seconds < found.before * (1 - GAIN):
            found.cut, found.seconds = start, found.before
    return found


def neighbours(cut: Cut, kind: str, shared: float, hopper: bool = False) -> Iterator[Cut]:
    """The cuts one step from ``cut`` that are possible with ``shared`` bytes of shared memory."""

    def changed(blocks: Blocks, **factors: float) -> Blocks:
        return replace(blocks, **{name: int(getattr(blocks, name) * by) for name, by in factors.items()})

    near = []
    for by in (2, 0.5):
        for factors in ({"rows": by}, {"rows": by, "warps": by}):
            near.append(replace(cut, up=changed(cut.up, **factors), down=changed(cut.down, **factors)))
    for product in ("up", "down"):
        blocks = getattr(cut, product)
        for name in ("columns", "inner", "warps"):
            near += [replace(cut, **{product: changed(blocks, **{name: by})}) for by in (2, 0.5)]
        near += [replace(cut, **{product: replace(blocks, stages=blocks.stages + by)}) for by in (1, -1)]
    if hopper:
        other = {"specialised": not cut.up.specialised}
        near.append(replace(cut, up=replace(cut.up, **other), down=replace(cut.down, **other)))
    return (one for one in near if not why_not(one, kind, shared, hopper))


class Band:
    """Random choices of experts, and the plain path's result."""

    def __init__(
        self, experts: Experts, choices: int, top_k: int, setting: Setting, generator: torch.Generator
    ):
        rows = -(-choices // top_k)
        device = generator.device
        self.experts, self.repeats = experts, setting.repeats
        self.x = torch.randn(rows, experts.w1.shape[2], generator=generator, device=device).to(setting.kind)
        chosen = torch.randint(experts.held, (rows * top_k,), generator=generator, device=device)
        weights = torch.rand(rows * top_k, generator=generator, device=device).to(setting.kind)
        self.assignment = Assignment(*sort_by_expert(chosen, experts.held), top_k, weights)
        self.expected = loop(experts, self.x, self.assignment)

    def seconds(self, cut: Cut) -> float:
        """The median time of both products.

        Raises:
            ValueError: the result differs from the plain path's.
        """
        work = functools.partial(product, self.experts, self.x, self.assignment, cut)
        same("a cut", work()[None], self.expected[None])
        device = self.x.device
        taken = measure.seconds(captured(work, device), device, repeats=self.repeats, warm_up=1, least=0.005)
        return statistics.median(taken)

    def bytes(self, sizes: Sizes) -> int:
        """What has to be read and written: the experts with choices once, rows and results."""
        reached = int((self.assignment.counts > 0).sum())
        return reached * sizes.expert + (self.x.nbytes + self.expected.nbytes)


def product(experts: Experts, x: Tensor, assignment: Assignment, cut: Cut) -> Tensor:
    # Triton is imported only if this bench runs.
    from moekit.nn.kernels.grouped import grouped_ffn

    return grouped_ffn(experts, x, assignment, cut)


def captured(work: Callable[[], Tensor], device: torch.device) -> Callable[[], object]:
    """``work`` as a CUDA graph, since small cuts take less time than their launches; elsewhere ``work`` itself."""
    if device.type != "cuda":
        return work
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
