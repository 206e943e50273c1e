"""A pool that was made apart from the model that uses it."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import torch

from moekit.ranks.base import Gone, Rank, Ranks, gone

_tenants: weakref.WeakKeyDictionary[Ranks, weakref.ref[LentRanks]] = weakref.WeakKeyDictionary()


class LentRanks(Ranks):
    """The ranks of ``pool`` for one model at a time: closing it empties the ranks and leaves them running.

    Raises:
        ValueError: ``pool`` is no pool of ranks, or is closed, or holds a model that is not closed.
    """

    def __init__(self, pool: Ranks):
        if not isinstance(pool, Ranks) or isinstance(pool, LentRanks):
            raise ValueError(
                f"ranks is of type {type(pool).__name__}: expected a pool that moekit.ranks.start made"
            )
        tenant = _tenants.get(pool, lambda: None)()
        if tenant is not None and not tenant.closed:
            raise ValueError(
                "these ranks hold a model: close that one first, or start other ranks for this one"
            )
        super().__init__(pool.devices, pool.nodes)
        self._pool, self.closed = pool, False
        try:
            # A model that was never closed has left this.
            pool.call(forget)
        except Gone as error:
            raise ValueError(
                f"ranks is a pool whose ranks are gone ({error.why}): start others with moekit.ranks.start, or leave "
                "ranks out"
            ) from None
        _tenants[pool] = weakref.ref(self)

    def call(self, fn: Any, *args: Any, **options: Any) -> list[Any]:
        if self.closed:
            raise gone("closed")
        return self._pool.call(fn, *args, **options)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            with contextlib.suppress(RuntimeError):
                # The ranks are gone, or still run another call.
                self._pool.call(forget)


def forget(rank: Rank) -> None:
    """Drop all that the rank holds."""
    rank.state.clear()
    if rank.device.type == "cuda":
        torch.cuda.empty_cache()
