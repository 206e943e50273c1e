"""A function of the user's that ranks call while they compute."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import cloudpickle

from moekit.arguments import shown
from moekit.headlines import headline
from moekit.nn.gate import Routing
from moekit.ranks import Rank


class Raised(NamedTuple):
    """What a rank reports of a function that raised there, or cannot be made there.

    Attributes:
        said: a sentence on the error, its place and what to do.
        interrupt: whether the function raised a KeyboardInterrupt.
    """

    said: str
    interrupt: bool


class Listener:
    """Calls ``function`` with (layer, :class:`moekit.nn.gate.Routing`) in every MoE layer, until it raises.

    What it raises is reported as :class:`Raised`, and the pass goes on: other ranks wait in it, so an error there costs all ranks. In the
    driver's own process an interrupt is the user's key, and no other rank waits: it ends the pass.

    Attributes:
        rank: the one that it is on, once it is on one.
    """

    def __init__(self, function: Callable[[int, Routing], None]):
        self.rank: Rank | None = None
        self._function, self._pickled, self._ended = function, None, False

    def __call__(self, layer: int, routing: Routing) -> None:
        if self._ended or not self._made():
            return
        try:
            self._function(layer, routing)
        except BaseException as error:
            interrupt = isinstance(error, KeyboardInterrupt)
            if interrupt and self._pickled is None:
                raise
            # The first place is the call above. Where the function does not take these arguments, there is no other.
            _, *places = traceback.extract_tb(error.__traceback__)
            where = f" in line {places[0].lineno} of {places[0].name}" if places else ""
            self._end(
                f"record raised {headline(error)}{where}, on rank {self.rank.rank}; "
                + (
                    "the generation has ended, and the model can be used on"
                    if interrupt
                    else "expected a function that takes (layer, routing): mend it, and generate again with the same model"
                ),
                interrupt,
            )

    def _made(self) -> bool:
        """Whether the function is here, made of what was sent; else the error is reported."""
        if self._function is None:
            try:
                self._function = cloudpickle.loads(self._pickled)
            except BaseException as error:
                self._end(
                    f"record cannot be made on rank {self.rank.rank} ({headline(error, 200)}); expected a function of a module that "
                    "ranks find too: define it in the notebook, or load the model when the module's folder is in sys.path"
                )
        return not self._ended

    def _end(self, said: str, interrupt: bool = False) -> None:
        self._ended = True
        self.rank.report(Raised(said, interrupt))

    def __getstate__(self) -> dict[str, Any]:
        """What is sent to a rank: the function is made there when it is called, where an error costs no rank."""
        try:
            pickled = cloudpickle.dumps(self._function)
        except Exception as error:
            raise ValueError(
                f"record={shown(self._function)} cannot be sent to the ranks, which are processes of their own ({headline(error, 200)}); "
                "expected a function that uses no open file, lock or loaded model: leave these out, or load the model with "
                "world_size=1, whose rank is this process"
            ) from error
        return {**self.__dict__, "_function": None, "_pickled": pickled}
