"""The text of a sequence, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moekit.data.codec import Codec, Ids


class Text:
    """The text of a sequence, token by token; a character may need several tokens."""

    def __init__(self, codec: Codec | Ids, stop: Sequence[str]):
        self.codec, self.stop = codec, stop
        self.pending: list[int] = []
        # The end of the text, in which a stop text may begin.
        self.tail = ""
        self.stopped = False

    def add(self, token: int) -> str | None:
        """The text that ``token`` adds, which is empty until a character is whole; None without a codec."""
        if not self.codec.reads_text:
            return None
        self.pending.append(token)
        piece = self.codec.decode(self.pending)
        if piece.endswith("\ufffd") and len(self.pending) < 4:
            # UTF-8 has at most four bytes per character.
            return ""
        self.pending = []
        self.tail += piece
        self.stopped = any(stop in self.tail for stop in self.stop)
        self.tail = self.tail[-max(map(len, self.stop), default=1) :]
        return piece

    def stops_at(self, tokens: list[int]) -> int | None:
        """Read ``tokens``: the number of those up to the one that completes a stop text, which ends the reading, or None."""
        whole = self.codec.decode([*self.pending, *tokens])
        text = self.tail + whole
        # Most bursts complete none, and are read at once. The pieces differ from the whole only if some bytes are no character.
        if "\ufffd" not in whole and not any(stop in text for stop in self.stop):
            self.pending, self.tail = [], text[-max(map(len, self.stop), default=1) :]
            return None
        for place, token in enumerate(tokens, start=1):
            self.add(token)
            if self.stopped:
                return place
        return None

    def of(self, tokens: Sequence[int]) -> str:
        """The whole text of ``tokens``, the same as their pieces one after the other."""
        whole = self.codec.decode(tokens)
        # The pieces differ from the whole only if some bytes are no character.
        if "\ufffd" not in whole:
            return whole
        return "".join([self.add(int(token)) for token in tokens]) + self.rest()

    def rest(self) -> str:
        """The bytes of a character that never became whole, as U+FFFD."""
        rest, self.pending = self.codec.decode(self.pending), []
        return rest
