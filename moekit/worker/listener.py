"""A function of the user's that ranks call while they compute."""

from __future__ import annotations

import traceback
from collections.abc import Callable

from moekit.headlines import headline
from moekit.nn.gate import Routing


class Listener:
    """Calls ``function`` with (layer, :class:`moekit.nn.gate.Routing`) in every MoE layer, until it raises.

    What it raises is kept in words, ``raised``, and the pass goes on: other ranks wait in it, so an error there costs all ranks.
    """

    def __init__(self, function: Callable[[int, Routing], None]):
        self.function, self.raised = function, ""

    def __call__(self, layer: int, routing: Routing) -> None:
        if self.raised:
            return
        try:
            self.function(layer, routing)
        except (Exception, SystemExit, GeneratorExit) as error:
            # The first place is the call above. Where the function does not take these arguments, there is no other.
            _, *places = traceback.extract_tb(error.__traceback__)
            where = f" in line {places[0].lineno} of {places[0].name}" if places else ""
            self.raised = f"{headline(error)}{where}"
