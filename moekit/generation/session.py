"""Sequences that live on the ranks while they are generated."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moekit.generation.request import Request
from moekit.generation.written import Burst
from moekit.ranks import Each, Stream
from moekit.ranks.base import noting
from moekit.symbols import PAD
from moekit.worker import decoding as decode
from moekit.worker.listener import Raised
from moekit.worker.prompts import dealt
from moekit.worker.sampling import Candidates, Chosen

if TYPE_CHECKING:
    from moekit.handle import Handle


# Whether to drop finished sequences from the batch at once; on a GPU this costs more time than it saves.
MOVES = {"cpu": True, "cuda": False}


class Session:
    """Sequences that live on the ranks while they are generated.

    Attributes:
        sequences: for each rank the numbers of its sequences, in the order of their rows on the rank.
        parts: the parts of the trace, after the end of the session.
        raised: by rank, what the user's ``record`` raised there, or why it cannot be made there.
    """

    keys = itertools.count()

    def __init__(self, model: Handle, wave: range, request: Request):
        self.model, self.request, self.slots = model, request, request.slots(wave)
        self.key = next(self.keys)
        self.sequences: list[Sequence[int]] = [
            wave[rank :: model.world_size] for rank in range(model.world_size)
        ]
        self.rows_each = 1
        self.parts: list[dict[str, np.ndarray]] = []
        self.raised: dict[int, Raised] = {}

    def begin(self) -> tuple[np.ndarray, Chosen | Candidates]:
        """Prefill the prompts. Returns the numbers of the sequences, ascending, and their rows of the ranks' proposals."""
        return self._joined(self._read(decode.begin))

    def at_once(self, longest: int, take: Callable[[Burst], None]) -> None:
        """Generate all tokens in one call, where no sequence ends before the others, and end the session.

        ``take`` gets what a rank has, while the ranks make the next ``longest`` tokens. After an error in it or in ``record``, which is
        raised here, the ranks make the bursts that they were told of, and no others.
        """

        def report(rank: int, found: Chosen) -> None:
            take(Burst.of(np.array(self.sequences[rank]), found, {}))

        new = self.request.max_new_tokens
        goals = itertools.takewhile(lambda _: not self.raised, [*range(longest, new, longest), new])
        for rank, (last, parts) in enumerate(self._read(decode.generate, new, Stream(goals), report=report)):
            if last is not None:
                report(rank, last)
            self.parts += parts

    def _read(
        self, fn: Callable[..., Any], *more: Any, report: Callable[[int, Any], None] | None = None
    ) -> list[Any]:
        """Call a function of the ranks that reads the prompts."""
        prompts = dealt(self.sequences, [[self.request.prompts[n] for n in own] for own in self.sequences])
        old = tuple(self.model.abandoned)
        settings = self.request.settings
        found = self._call(fn, Each(prompts, plain=True), settings, self.slots, *more, old, report=report)
        del self.model.abandoned[: len(old)]
        return found

    def _call(
        self, fn: Callable[..., Any], *args: Any, report: Callable[[int, Any], None] | None = None
    ) -> list[Any]:
        """Call a function of the ranks on this session; what ``record`` raises in it is raised here when all ranks are done."""

        def listen(rank: int, message: Any) -> None:
            if isinstance(message, Raised):
                self.raised[rank] = message
            else:
                report(rank, message)

        found = self.model.ranks.call(fn, self.key, *args, on_report=listen)
        if self.raised:
            first = self.raised[min(self.raised)]
            raise (KeyboardInterrupt if first.interrupt else ValueError)(first.said)
        return found

    @property
    def keeps_rows(self) -> bool:
        """Whether finished sequences may keep their rows; while somebody records, they do not."""
        settings = self.request.settings
        return not MOVES[self.model.device] and settings.trace is None and settings.record is None

    def sample(self, going: np.ndarray, read: np.ndarray, steps: int) -> Chosen:
        """Run ``steps`` decode steps of some sequences, and return their rows; the others are finished.

        Args:
            going: the numbers of these sequences, ascending.
            read: the token that each of them reads first.
        """
        found = self._call(decode.run, *self._inputs(going, read), steps)
        return self._rows(going, found)

    def sample_while(
        self, doing: Callable[[], Burst], going: np.ndarray, read: np.ndarray, steps: int
    ) -> tuple[Burst, Chosen]:
        """As :meth:`sample`, and what comes of ``doing``, which the driver does while the ranks work.

        An error in ``doing`` is raised here once the ranks have made their steps, and does not cost them.
        """
        done: list[Burst] = []
        failed: list[BaseException] = []

        def report(rank: int, message: None) -> None:
            """The steps of ``rank`` are launched."""
            if not done and not failed:
                with noting(failed):
                    done.append(doing())

        found = self._call(decode.run, *self._inputs(going, read), steps, True, report=report)
        if failed:
            raise failed[0]
        return done[0], self._rows(going, found)

    def _inputs(self, going: np.ndarray, read: np.ndarray) -> tuple[list[list[int]], list[list[int]]]:
        """For each rank the rows that it keeps, and the token that each of them reads."""
        kept = going
        if self.keeps_rows and 2 * len(going) > sum(map(len, self.sequences)):
            # Finished sequences keep their rows and read padding; their results are left out.
            kept = np.sort(np.concatenate(self.sequences))
        inputs = np.full(len(kept), PAD)
        inputs[np.searchsorted(kept, going)] = read
        stays = [np.isin(own, kept) for own in self.sequences]
        self.sequences = [
            np.array(own, np.int64)[some] for own, some in zip(self.sequences, stays, strict=True)
        ]
        rows = [np.flatnonzero(some).tolist() for some in stays]
        return rows, [inputs[np.searchsorted(kept, own)].tolist() for own in self.sequences]

    def _rows(self, going: np.ndarray, found: Sequence[Chosen | None]) -> Chosen:
        numbers, chosen = self._joined(found)
        return chosen.only(np.isin(numbers, going))

    def search(
        self, beams: Mapping[int, Sequence[tuple[int, int, float]]], last: bool
    ) -> tuple[np.ndarray, Candidates]:
        """Run one decode step of the beams of each sequence in ``beams``; the other sequences are finished.

        Args:
            beams: for each sequence its beams: (the beam of the step before, the token to read, the score so far).
            last: whether only ``</s>`` may follow.
        """
        rows, inputs, scores = [], [], []
        for numbers in self.sequences:
            mine = [(place, beam) for place, n in enumerate(numbers) for beam in beams.get(n, ())]
            rows.append([place * self.rows_each + beam for place, (beam, _, _) in mine])
            inputs.append([token for _, (_, token, _) in mine])
            scores.append([score for _, (_, _, score) in mine])
        self.sequences = [[n for n in numbers if n in beams] for numbers in self.sequences]
        self.rows_each = self.request.settings.beam_size
        return self._joined(self._call(decode.grow, rows, inputs, scores, last))

    def _joined(self, found: Sequence[Chosen | Candidates | None]) -> tuple[np.ndarray, Chosen | Candidates]:
        """The numbers of the sequences, ascending, and their rows of what the ranks found."""
        parts = [part for part in found if part is not None]
        numbers = np.concatenate([np.array(own, np.int64) for own in self.sequences])
        order = np.argsort(numbers)
        columns = zip(*parts, strict=True)
        return numbers[order], parts[0]._make(np.concatenate(column)[order] for column in columns)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            ended = self.model.ranks.call(decode.end, self.key)
        except RuntimeError:
            # The ranks are busy with another call, or they have ended together with their sequences.
            self.model.abandoned.append(self.key)
            return
        if kind is None:
            self.parts += itertools.chain.from_iterable(ended)
