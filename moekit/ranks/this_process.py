"""One rank: this very process."""

from __future__ import annotations

import contextlib
import os
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from moekit.headlines import headline
from moekit.interrupts import hold_interrupts
from moekit.processes.system import usable_cores
from moekit.ranks.base import Rank, RankError, Ranks, Stream, busy, forked, gone, noting, own


class ThisProcess(Ranks):
    """A single rank without a process: no pickling, no process group.

    An error leaves it usable, since no other rank waits for this one. ``timeout`` has no effect: interrupt it.
    """

    def __init__(self, devices: list[torch.device]):
        super().__init__(devices)
        self._owner = os.getpid()
        self._rank: Rank | None = Rank(0, 1, devices[0])
        self._lock, self._busy = threading.Lock(), False
        # The interpreter's exit closes the pool before it takes modules apart. An abandoned stream has nothing to end then.
        self._end = weakref.finalize(self, int)
        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))

    def call(self, fn, *args, timeout=None, on_report=None, **kwargs):
        if os.getpid() != self._owner:
            # A fork does not have the threads of the process that made the pool.
            raise forked(self._owner)
        if self._rank is None or not self._end.alive:
            raise gone("closed")
        # An interrupt while torch's settings change would leave them changed by half.
        with hold_interrupts() as as_before:
            with self._lock:
                if self._busy:
                    # This call would change under the other one what both use: experts that are fetched, caches, graphs.
                    raise busy()
                self._busy = True
            try:
                return self._call(fn, args, kwargs, on_report, as_before)
            finally:
                self._busy = False

    def _call(
        self,
        fn: Callable[..., Any],
        args: tuple,
        kwargs: dict[str, Any],
        on_report: Callable[[int, Any], None] | None,
        as_before: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> list[Any]:
        """The result. Interrupts come while the function runs, in ``as_before``, and not before and after it."""
        # As with ranks in processes of their own, an error of the driver's ends a stream, and does not go through the function.
        streams = any(isinstance(arg, Stream) for arg in args)
        failed: list[BaseException] = []

        def report(message: Any) -> None:
            if on_report is not None and not failed:
                with noting(failed):
                    on_report(0, message)
                if failed and not streams:
                    raise failed[0]

        def items(stream: Stream) -> Iterator[Any]:
            with noting(failed):
                for item in stream.items:
                    yield own(item, 0)
                    if failed:
                        return

        self._rank.send_report = report
        args = [items(arg) if isinstance(arg, Stream) else own(arg, 0) for arg in args]
        # The caller's own current GPU may be another one by now.
        here = (
            torch.cuda.device(self._rank.device)
            if self._rank.device.type == "cuda"
            else contextlib.nullcontext()
        )
        try:
            with here, _torchs_defaults(), as_before():
                result = fn(self._rank, *args, **kwargs)
        except (Exception, SystemExit) as error:
            if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
                # A notebook keeps its last error, and the error the call's tensors: the next call would lack their memory.
                traceback.clear_frames(error.__traceback__)
            if failed:
                raise failed[0] from (None if error is failed[0] else error)
            raise RankError(0, f"raised {headline(error)}") from error
        if failed:
            raise failed[0]
        return [result]

    def close(self) -> None:
        self._rank = None


@dataclass(frozen=True)
class Precision:
    """How torch computes with float32 on all threads.

    Attributes:
        operations: the precision of the products and the convolutions of GPUs and of the CPU.
        matmul, cudnn: the same in older names, "high" or ``allow_tf32`` say; None where torch refuses to tell them, since a newer
            name says something else.
    """

    operations: tuple[str, ...]
    matmul: str | None
    cudnn: bool | None

    @classmethod
    def unusual(cls) -> Precision | None:
        """What was chosen; None if it is what a new process has."""
        operations = tuple(one.fp32_precision for one in _operations())
        # Where nothing is chosen, products are those of IEEE.
        if tuple("ieee" if one == "none" else one for one in operations) == NEW.operations:
            return None
        older: list[Any] = [None, None]
        for place, told in enumerate(
            (torch.get_float32_matmul_precision, lambda: torch.backends.cudnn.allow_tf32)
        ):
            with contextlib.suppress(RuntimeError):
                older[place] = told()
        return cls(operations, *older)

    def choose(self) -> None:
        # The older names set the newer ones, too, which may be chosen apart.
        if self.matmul is not None:
            torch.set_float32_matmul_precision(self.matmul)
        if self.cudnn is not None:
            torch.backends.cudnn.allow_tf32 = self.cudnn
        for one, precision in zip(_operations(), self.operations, strict=True):
            # It is then what all operations have, which a notebook may choose, too.
            one.fp32_precision = "none"
            if one.fp32_precision != precision:
                one.fp32_precision = precision


def _operations() -> tuple[Any, ...]:
    backends = torch.backends
    return backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv, backends.cudnn.rnn


# What a new process has. NVIDIA's containers set the variable.
NEW = (
    Precision(("tf32", "ieee", "tf32", "tf32"), "high", True)
    if os.environ.get("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE") == "1"
    else Precision(("ieee", "ieee", "tf32", "tf32"), "highest", True)
)
# What the notebook chose of what torch has once for all threads, for each call that runs, and the lock of that list.
_noted: list[tuple[torch.dtype, Precision | None]] = []
_sharing = threading.Lock()


@contextlib.contextmanager
def _torchs_defaults() -> Iterator[None]:
    """What a new process has, where a notebook may have chosen otherwise: the device and type of tensors for which none is named,
    the precision of float32, no autocast, and no mode for inference, in which no checkpoint can be loaded."""
    device = torch.get_default_device()
    # The first call that runs notes the notebook's choice, and the last one restores it.
    with _sharing:
        dtype, precision = _noted[0] if _noted else (torch.get_default_dtype(), Precision.unusual())
        _noted.append((dtype, precision))
        torch.set_default_dtype(torch.float32)
        if precision is not None:
            NEW.choose()
    try:
        with contextlib.ExitStack() as chosen:
            if device.type != "cpu":
                chosen.enter_context(torch.device("cpu"))
            for kind in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
                chosen.enter_context(torch.autocast(kind, enabled=False))
            if torch.is_inference_mode_enabled():
                chosen.enter_context(torch.inference_mode(False))
            yield
    finally:
        with _sharing:
            dtype, precision = _noted.pop()
            if not _noted:
                torch.set_default_dtype(dtype)
                if precision is not None:
                    precision.choose()
