"""A :class:`~moekit.ranks.base.Stream` on its way: the driver sends items while a call runs, and the rank iterates over them."""

from __future__ import annotations

import io
import pickle
import queue
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cloudpickle

from moekit.processes import channel
from moekit.ranks.base import Each, Stream, own

# The most items that a rank has and has not begun.
AHEAD = 2


class Coming:
    """Stands in a job for the stream that follows it."""


class Own:
    """Stands in a job for the rank's own part of an argument, which follows what all ranks get."""


def in_a_job(arg: Any) -> Any:
    """What stands for the argument ``arg`` in a job."""
    return Coming() if isinstance(arg, Stream) else Own() if isinstance(arg, Each) else arg


def pickled(values: Sequence[Any], rank: int) -> bytes:
    """The list of what ``rank`` gets of each of ``values``."""
    plain = all(isinstance(value, Each) and value.plain for value in values)
    return (pickle if plain else cloudpickle).dumps([own(value, rank) for value in values], protocol=5)


def arguments(
    job: bytearray, stream: Iterator[Any]
) -> tuple[Callable[..., Any], list[Any], dict[str, Any], bool]:
    """The function and the arguments of a job, and whether ``stream``, its items, is one of them."""
    pickles = io.BytesIO(job)
    fn, args, kwargs = cloudpickle.load(pickles)
    mine = iter(cloudpickle.load(pickles) if any(isinstance(arg, Own) for arg in args) else ())
    whole = [
        next(mine) if isinstance(arg, Own) else stream if isinstance(arg, Coming) else arg for arg in args
    ]
    return fn, whole, kwargs, any(isinstance(arg, Coming) for arg in args)


class Feed:
    """The driver's side: what is sent to the ranks while they run a call."""

    def __init__(self, stream: Stream, pipes: Sequence[socket.socket]):
        self._items, self._pipes = iter(stream.items), pipes
        self._ahead = [0] * len(pipes)
        self._ended = False

    def more(self) -> dict[int, channel.Outgoing]:
        """The next item, or the end, for each rank; nothing while a rank has enough, and after the end."""
        if self._ended or max(self._ahead) >= AHEAD:
            return {}
        # An item travels as a list of one, and the end as an empty list.
        item = next(((item,) for item in self._items), ())
        # All ranks get an item or none does: it is made and pickled for all of them first.
        unsent = {rank: channel.Outgoing(pipe, pickled(item, rank)) for rank, pipe in enumerate(self._pipes)}
        self._ended = not item
        self._ahead = [count + 1 for count in self._ahead]
        return unsent

    def end(self) -> None:
        """The ranks get no more items than they were sent."""
        self._items = iter(())

    def taken(self, rank: int) -> None:
        """``rank`` has begun its next item."""
        self._ahead[rank] -= 1


def following(jobs: queue.SimpleQueue[bytearray], say: Callable[[str, Any], None]) -> Iterator[Any]:
    """The rank's side: the items that come after a job, until the end."""
    while item := cloudpickle.loads(jobs.get()):
        say("taken", None)
        yield item[0]
