"""Tensors that are cut over several files, joined again; what is quantised has to be, as a row's scale depends on all of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moekit.checkpoint.copying import Piece


def joined(parts: Sequence[tuple[int, Tensor]], shape: Sequence[int]) -> Tensor:
    """A tensor of which each part begins at an index: the part itself, where it is all."""
    if len(parts) == 1:
        return parts[0][1].view(shape)
    return torch.cat([part for _, part in sorted(parts, key=lambda part: part[0])]).view(shape)


class Joining:
    """Joins the parts of matrices that are cut over several files; the parts wait in their mapped files."""

    def __init__(self) -> None:
        self.parts: defaultdict[int, list[tuple[int, Piece]]] = defaultdict(list)

    def joined(self, piece: Piece, begin: int, whole: Tensor, scale: Tensor) -> Iterator[Piece]:
        """The piece of a matrix, once all of its parts were given.

        Args:
            piece: a part of the matrix, or all of it.
            begin: the index of its first number in the matrix.
            whole: [R, C], the numbers of the matrix, which are written.
            scale: [R], the scales of its rows, which are written.
        """
        if piece.source.shape == whole.shape:
            yield piece._replace(scale=scale)
            return
        parts = self.parts[whole.data_ptr()]
        parts.append((begin, piece))
        if sum(part.source.numel() for _, part in parts) < whole.numel():
            return
        del self.parts[whole.data_ptr()]
        checks = [part.check for _, part in parts if part.check is not None]

        def check() -> None:
            for one in checks:
                one()

        source = joined([(at, part.source) for at, part in parts], whole.shape)
        yield Piece(piece.name, source, whole, check, scale)
