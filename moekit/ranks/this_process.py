"""One rank: this very process."""

import contextlib
import os
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from moekit.headlines import headline
from moekit.ranks.base import Rank, RankError, Ranks, Stream, busy, forked, gone, noting, own
from moekit.ranks.system import usable_cores


class ThisProcess(Ranks):
    """A single rank without a process: no pickling, no process group.

    An error leaves it usable, since no other rank waits for this one. ``timeout`` has no effect: interrupt it.
    """

    def __init__(self, devices: list[torch.device]):
        super().__init__(devices)
        self._owner = os.getpid()
        self._rank: Rank | None = Rank(0, 1, devices[0])
        self._lock, self._caller = threading.Lock(), None
        # The interpreter's exit closes the pool before it takes modules apart. An abandoned stream has nothing to end then.
        self._end = weakref.finalize(self, int)
        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))

    def call(self, fn, *args, timeout=None, on_report=None, **kwargs):
        if os.getpid() != self._owner:
            # A fork does not have the threads of the process that made the pool.
            raise forked(self._owner)
        if self._rank is None or not self._end.alive:
            raise gone("closed")
        me = object()
        try:
            with self._lock:
                if self._caller is not None:
                    # This call would change under the other one what both use: experts that are fetched, caches, graphs.
                    raise busy()
                self._caller = me
            return self._call(fn, args, kwargs, on_report)
        finally:
            if self._caller is me:
                self._caller = None

    def _call(
        self,
        fn: Callable[..., Any],
        args: tuple,
        kwargs: dict[str, Any],
        on_report: Callable[[int, Any], None] | None,
    ) -> list[Any]:
        # As with ranks in processes of their own, an error of the driver's ends a stream, and does not go through the function.
        streams = any(isinstance(arg, Stream) for arg in args)
        failed: list[Exception] = []

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
            with here, _torchs_defaults():
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


# The notebook's own default type, once for each call that runs, and the lock of that list.
_noted: list[torch.dtype] = []
_sharing = threading.Lock()


@contextlib.contextmanager
def _torchs_defaults() -> Iterator[None]:
    """What a new process has, where a notebook may have chosen otherwise: the device and type of tensors for which none is named,
    no autocast, and no mode for inference, in which no checkpoint can be loaded."""
    device = torch.get_default_device()
    # Torch has one default type for all threads: the first call that runs notes the notebook's, and the last one restores it.
    with _sharing:
        _noted.append(_noted[0] if _noted else torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
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
            dtype = _noted.pop()
            if not _noted:
                torch.set_default_dtype(dtype)
