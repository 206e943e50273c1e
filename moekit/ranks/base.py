"""What a pool of ranks is: two methods to implement, and what a function that runs on a rank sees."""

import contextlib
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from moekit.processes.system import usable_cores


class RankError(RuntimeError):
    """A rank raised or died: ``rank`` is its index, ``cause`` says what happened to it.

    ``node`` names its machine, "" for the driver's own. ``__cause__`` is the exception that the rank raised, if it raised
    one and that can be pickled.
    """

    def __init__(self, rank: int, cause: str, node: str = ""):
        super().__init__(rank, cause, node)
        self.rank, self.cause, self.node = rank, cause, node

    def __str__(self) -> str:
        where = f" on node {self.node}" if self.node else ""
        return f"rank {self.rank}{where} {self.cause}"


@dataclass
class Rank:
    """What a function that runs on a rank sees.

    ``state`` lives as long as the pool. With ``world_size`` > 1 the default process group of ``torch.distributed``
    is initialised (NCCL on GPUs, gloo on the CPU); a single rank has none. ``machines`` has the number of each rank's
    machine, those of one machine next to each other; None: all ranks share one. ``local_world_size`` of the ranks run on
    this rank's machine and share its cores; a launcher may have bound fewer of them to the same cores, ``sharing`` in number.
    ``node`` names the machine.
    """

    rank: int
    world_size: int
    device: torch.device
    state: dict = field(default_factory=dict)
    send_report: Callable[[Any], None] | None = field(default=None, repr=False)
    machines: tuple[int, ...] | None = None
    node: str = field(default_factory=socket.gethostname)
    sharing: int | None = None

    def __post_init__(self) -> None:
        if self.machines is None:
            self.machines = (0,) * self.world_size

    @property
    def local_world_size(self) -> int:
        return self.machines.count(self.machines[self.rank])

    @property
    def cores(self) -> int:
        """This rank's share of the cores that its process may use, at least one."""
        return max(1, usable_cores() // (self.sharing or self.local_world_size))

    def report(self, message: Any) -> None:
        """Send ``message``, anything picklable, to the driver's ``on_report``; how often is up to the caller."""
        if self.send_report is not None:
            self.send_report(message)


@dataclass(frozen=True)
class Each:
    """An argument of a call that differs from rank to rank: rank r gets ``parts[r]``.

    Parts that are ``plain``, with nothing of a notebook in them, are pickled in a fraction of the time.
    """

    parts: Sequence[Any]
    plain: bool = False


@dataclass(frozen=True)
class Stream:
    """An argument of a call that is made while the call runs: of every item, rank r gets its own part from an iterator.

    The driver makes an item when the ranks are about to need it, so that they do not wait for all items to be made.
    """

    items: Iterable[Any]


def own(value: Any, rank: int) -> Any:
    """What ``rank`` gets of the argument ``value`` of a call."""
    return value.parts[rank] if isinstance(value, Each) else value


@contextlib.contextmanager
def noting(failed: list[BaseException]) -> Iterator[None]:
    """Note an error of the driver's own code in this block, or its ``sys.exit``, so that a call goes on and raises it at its end."""
    try:
        yield
    except (Exception, SystemExit) as error:
        failed.append(error)


class Ranks(ABC):
    """A pool of ranks. A context manager; closing it twice is fine.

    Rank r has ``devices[r]`` and runs on ``nodes[r]``, the name of a machine; "" is the driver's own.
    """

    def __init__(self, devices: list[torch.device], nodes: list[str] | None = None):
        self.devices = devices
        self.world_size = len(devices)
        self.nodes = [""] * len(devices) if nodes is None else nodes

    @abstractmethod
    def call(
        self,
        fn: Callable[..., Any],
        *args: Any,
        timeout: float | None = None,
        on_report: Callable[[int, Any], None] | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Run ``fn(rank, *args, **kwargs)`` on every rank and return the results in rank order.

        Of an argument in ``args`` that is an :class:`Each`, a rank gets its own part alone. One of them may be a
        :class:`Stream`.
        ``on_report(rank_index, message)`` is called here while the ranks run. Results are pickled: move tensors
        to the CPU first, and know that arrays travel faster. Raises RankError when a rank raises, dies or gives no
        sign of life, TimeoutError when ``timeout`` seconds are over, RuntimeError when the pool is closed or busy.

        An error of the driver's own, where an item of a stream is made or in ``on_report``, is raised here as it is. It ends the
        stream, and leaves the ranks usable: they finish what they were sent first. Without a stream it ends the call at once.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop the ranks and forget what they hold."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Gone(RuntimeError):
    """The ranks run no more; ``why`` says since when."""

    def __init__(self, why: str):
        super().__init__(f"the ranks are gone ({why}): load the model again")
        self.why = why


def gone(why: str) -> Gone:
    return Gone(why)


def busy() -> RuntimeError:
    return RuntimeError("the ranks are busy with another call: wait for it to end")


def forked(owner: int) -> RuntimeError:
    return RuntimeError(
        f"the ranks belong to process {owner}, and this one is its fork: load the model here, too"
    )
