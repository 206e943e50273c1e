"""The setting of a bench: a shape with random weights, on ranks of this machine."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moekit import checkpoint, ranks
from moekit.api import Model
from moekit.arguments import Kind, Number, Whole, check, shown
from moekit.bench import measure, shapes
from moekit.bench.figures import Figure, goal, too_large
from moekit.bench.measure import Ceilings
from moekit.nn.config import ModelConfig
from moekit.nn.memory import Sizes
from moekit.nn.operations import BACKENDS, DTYPES, choose_backend
from moekit.nn.quantise import KINDS
from moekit.nn.resident import Residence
from moekit.planning.fitting import cached_tokens, fitting
from moekit.planning.runs import Run, room
from moekit.profiling.work import Size, work_of
from moekit.ranks.machine import free_memory
from moekit.worker.steps import Work


@dataclass(frozen=True)
class Setting:
    """The setting of a bench; ``dtype``, ``backend`` and ``experts`` are names; ``device`` is "cpu" or "cuda"."""

    shape: str
    device: str
    dtype: str
    backend: str
    world_size: int
    repeats: int
    # The type of the experts' matrices; None: ``dtype``.
    experts: str | None = None
    # Experts a layer on the device of their rank, and how skewed the gates are; see shapes.py.
    resident: int | None = None
    zipf: float = 0.0
    prefetch: bool = True

    @property
    def config(self) -> ModelConfig:
        return shapes.SHAPES[self.shape]

    @property
    def kind(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def itemsize(self) -> int:
        return self.kind.itemsize

    @property
    def experts_kind(self) -> torch.dtype | None:
        return None if self.experts is None else KINDS[self.experts]

    @property
    def sizes(self) -> Sizes:
        return self.run().sizes

    def rank_bytes(self) -> float:
        """The bytes of the weights of a rank, with equal numbers of experts on all ranks."""
        sizes = self.sizes
        return sizes.shared + sizes.layers * self.config.experts / self.world_size * sizes.expert

    @classmethod
    def of(cls, args: argparse.Namespace) -> Setting:
        """The setting from the arguments of :func:`add_arguments`.

        Raises:
            ValueError: this machine does not support the setting.
        """
        device = ranks.choose_devices(args.world_size, args.device)[0]
        on_gpu, cores = device.type == "cuda", ranks.usable_cores()
        if not on_gpu and args.world_size > cores:
            raise ValueError(
                f"--world-size {args.world_size}: ranks on the CPU need a core each to be measured, and this machine has "
                f"{cores}: give {cores} at most"
            )
        dtype = args.dtype or ("float16" if on_gpu else "float32")
        kind = None if args.experts is None else KINDS[args.experts]
        setting = cls(
            args.shape or ("15b" if on_gpu else "tiny"),
            device.type,
            dtype,
            choose_backend(args.backend, device, DTYPES[dtype], kind),
            args.world_size,
            args.repeats or (10 if on_gpu else 3),
            args.experts,
            zipf=getattr(args, "zipf", 0.0),
            prefetch=not getattr(args, "no_prefetch", False),
        )
        if kind is not None and not setting.config.moe_layers:
            raise ValueError(
                f"--experts {args.experts}: the shape {setting.shape} has no experts; leave --experts out"
            )
        if setting.zipf and not setting.config.moe_layers:
            raise ValueError(
                f"--zipf {setting.zipf:g}: the shape {setting.shape} has no gates to skew; leave --zipf out"
            )
        resident, gpu_memory = (getattr(args, name, None) for name in ("resident", "gpu_memory"))
        if resident is None and gpu_memory is None:
            if not setting.prefetch:
                raise ValueError(
                    "--no-prefetch says how experts are fetched, and all stay on the device: give --resident or --gpu-memory, too"
                )
            return setting
        run = setting.run()
        run, _ = fitting(run, room(run.devices), resident, gpu_memory)
        return replace(setting, resident=run.resident)

    @property
    def devices(self) -> list[torch.device]:
        """The device of each rank."""
        on_gpu = self.device == "cuda"
        return [
            torch.device("cuda", rank) if on_gpu else torch.device("cpu") for rank in range(self.world_size)
        ]

    def run(self) -> Run:
        """The run as :mod:`moekit.planning` sees it."""
        one_byte = self.experts is not None
        found = Run.of(self.config, self.devices, self.kind, self.backend, None, one_byte=one_byte)
        return replace(found, resident=self.resident)

    def too_large(self) -> str:
        """The reason why the weights do not fit into the free memory; "" if they fit."""
        run = self.run()
        parts = run.parts(0)
        return too_large(parts["weights"] + parts["slots"], "weights", min(free_memory(run.devices)))

    @contextlib.contextmanager
    def model(self) -> Iterator[tuple[Model, Ceilings]]:
        """The handle of a model with random weights, as ``moekit.load`` returns it, and the ceilings of its devices."""
        with ranks.start(self.world_size, self.device) as pool:
            ceilings = measure.slowest(pool.call(measure.ceilings, self.kind))
            staying = None if self.resident is None else Residence(self.resident, prefetch=self.prefetch)
            how = {"kind": self.experts_kind, "residence": staying, "zipf": self.zipf}
            pool.call(shapes.build, self.config, self.kind, self.backend, **how)
            plan = checkpoint.Plan(self.config, self.kind, ())
            files = checkpoint.Files(Path("random weights"), ())
            model = Model(plan, files, pool, self.kind, experts=self.experts)
            model.cached_tokens = cached_tokens(self.run(), room(pool.devices, lent=True))
            yield model, ceilings
        measure.give_back(self.device)

    def goal(self, what: str, ceilings: Ceilings) -> float | None:
        what = what if self.experts is None else f"{what} {self.experts}"
        return goal(self.shape, self.world_size, what, ceilings.device, self.dtype)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shape(parser)
    add_kind(parser)
    parser.add_argument(
        "--backend", choices=("auto", *BACKENDS), default="auto", help="auto: the fastest one for the device"
    )
    parser.add_argument("--world-size", type=int, default=1, help="ranks; each has a GPU or a core (1)")


def add_shape(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--shape",
        choices=shapes.SHAPES,
        help="default: 15b on a GPU, tiny without; 15b-64e has 64 experts, dense-* none",
    )


def add_kind(parser: argparse.ArgumentParser) -> None:
    """Where and in which types a bench computes, and how often."""
    parser.add_argument(
        "--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: a GPU if there is one"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: float16 on a GPU, float32 without")
    parser.add_argument(
        "--experts", choices=KINDS, help="the experts' matrices in one byte; default: in dtype"
    )
    parser.add_argument(
        "--repeats", type=whole(most=10_000), help="the median counts; default: 10 on a GPU, 3 without"
    )


def add_fetching(parser: argparse.ArgumentParser) -> None:
    """The arguments of the benches whose experts may be fetched."""
    parser.add_argument("--resident", type=whole(), help="experts a layer on the device; default: all")
    parser.add_argument("--gpu-memory", help="of a rank, such as 12GiB; --resident follows from it")
    parser.add_argument(
        "--zipf", type=number(0, most=10), default=0.0, help="exponent of skewed gates; default: even ones"
    )
    parser.add_argument("--no-prefetch", action="store_true", help="fetch no expert before it is needed")


def whole(least: int = 1, most: int = 10**6) -> Callable[[str], int]:
    """The type of an argument that is a whole number within these bounds."""
    return _typed(int, Whole(least, most=most))


def number(
    least: float = -math.inf, above: float = -math.inf, most: float = math.inf
) -> Callable[[str], float]:
    """The type of an argument that is a finite number within these bounds."""
    return _typed(float, Number(least, above, most))


def wholes(most: int) -> Callable[[str], list[int]]:
    """The type of an argument that lists whole numbers of at least 1, such as 1,4,32."""
    one = whole(most=most)
    return lambda text: [one(part) for part in text.split(",")]


def _typed(kind: type, expected: Kind) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            found = kind(text)
        except (ValueError, OverflowError):
            found = text
        try:
            return check("found", found, expected)
        except ValueError as error:
            said = str(error).partition(": ")[2]
            raise argparse.ArgumentTypeError(f"{shown(text)}: {said}") from None

    return convert


def random_ids(model: Model, size: Size) -> np.ndarray:
    """The tokens that all blocks or prompts of ``size`` are cut out of."""
    return np.random.default_rng(1).integers(4, model.vocab, size.tokens(model.world_size))


def random_work(model: Model, size: Size, fraction: float | None = None) -> Work:
    """What a profile of as much does on :func:`random_ids`."""
    return work_of(model, size, random_ids(model, size), model.capacity(fraction), model.vocab, seed=1)


def ceiling_figures(ceilings: Ceilings, dtype: str) -> list[Figure]:
    return [
        Figure("copy on the device, read + written", ceilings.copy / 1e9, "GB/s"),
        Figure(f"matmul, {dtype}", ceilings.matmul / 1e12, "TFLOP/s"),
        Figure("from pinned host memory", ceilings.fetch / 1e9, "GB/s"),
    ]
