"""A function of the user's that ranks call while they compute."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import cloudpickle

from moekit.arguments import shown
from moekit.headlines import headline
from moekit.nn.gate import Routing


class Raised(NamedTuple):
    """What a rank reports of a function that raised.

    Attributes:
        said: the error, and its place in the function.
        interrupt: whether it is a KeyboardInterrupt.
    """

    said: str
    interrupt: bool


class Listener:
    """Calls ``function`` with (layer, :class:`moekit.nn.gate.Routing`) in every MoE layer, until it raises.

    What it raises is reported as :class:`Raised`, and the pass goes on: other ranks wait in it, so an error there costs all ranks. In the
    driver's own process an interrupt is the user's key, and no other rank waits: it ends the pass.

    Attributes:
        report: the rank's :meth:`moekit.ranks.Rank.report`, once it is on a rank.
    """

    def __init__(self, function: Callable[[int, Routing], None]):
        self.report: Callable[[Raised], None] | None = None
        self._function, self._pickled, self._raised = function, None, False

    def __call__(self, layer: int, routing: Routing) -> None:
        if self._raised:
            return
        sent = self._pickled is not None
        try:
            if self._function is None:
                self._function = cloudpickle.loads(self._pickled)
            self._function(layer, routing)
        except BaseException as error:
            interrupt = isinstance(error, KeyboardInterrupt)
            if interrupt and not sent:
                raise
            self._raised = True
            # The first place is the call above. Where the function does not take these arguments, there is no other.
            _, *places = traceback.extract_tb(error.__traceback__)
            where = f" in line {places[0].lineno} of {places[0].name}" if places else ""
            self.report(Raised(f"{headline(error)}{where}", interrupt))

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
