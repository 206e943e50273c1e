"""Dispatch through the peers' memory (peers.py): the host does not need the number of rows that go to each rank.

Shape letters: N rows, K choices per row, D model dim, E experts in all, M the most rows that a rank brings.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.nn.dispatch import AllToAll, Dispatch, owned
from moekit.nn.experts import Assignment, Experts
from moekit.nn.graphs import MOST_TOKENS
from moekit.nn.kernels import peers
from moekit.nn.kernels.grouped import gathered_ffn
from moekit.nn.kernels.peers import FEWEST, Mailbox
from moekit.nn.peer_memory import symmetric

# Bytes that the gathered rows and the hidden layer of the experts may take. Passes of up to MOST_TOKENS rows, which may be
# captured, are not compared with it.
MOST_BYTES = 8 << 30


class PeerDispatch(Dispatch):
    """Dispatch among the ranks of one host; :func:`moekit.nn.dispatch.owned` assigns the experts to the ranks.

    Each mailbox has room for a power of two of rows. It is kept, since captured graphs go on using it. If the number of
    expected rows is not known, ``otherwise`` moves the rows.
    """

    by_expectation = True

    def __init__(self, experts: int, choices: int, dim: int, dtype: torch.dtype, device: torch.device):
        self.otherwise = AllToAll(experts)
        self.rank, self.world_size = self.otherwise.rank, self.otherwise.world_size
        self.first = owned(experts, self.world_size, self.rank).start
        self.of = choices, experts, dim, dtype, self.world_size
        self.device = device
        self.boxes: dict[int, Mailbox] = {}
        self.gave_up = torch.zeros(1, dtype=torch.int32, device=device)

    def mailbox(self, rows: int) -> Mailbox:
        """The mailbox for ``rows`` rows; a collective if no mailbox of its size exists yet."""
        size = max(FEWEST, 1 << (rows - 1).bit_length())
        if size not in self.boxes:
            how = (size, *self.of)
            self.boxes[size] = Mailbox(
                *symmetric(Mailbox.size(*how), self.device), self.rank, self.gave_up, how
            )
        return self.boxes[size]

    def __call__(
        self, experts: Experts, x: Tensor, assignment: Assignment, rows_expected: int | None = None
    ) -> Tensor:
        if rows_expected is None or self.too_many(experts, x, rows_expected):
            return self.otherwise(experts, x, assignment)
        assert len(x) <= rows_expected, (
            f"a rank brings {len(x)} rows where at most {rows_expected} are expected"
        )
        box = self.mailbox(rows_expected)
        peers.publish(box, x, assignment)
        peers.meet(box)
        gathered_ffn(experts, box, self.first, rows_expected)
        peers.meet(box)
        return box.home[: len(x)].flatten(0, 1)

    def too_many(self, experts: Experts, x: Tensor, rows_expected: int) -> bool:
        """Whether a large pass would take more memory for the worst case than ``MOST_BYTES``; every rank finds the same."""
        choices = self.world_size * rows_expected * self.of[0]
        return (
            rows_expected > MOST_TOKENS and choices * (x.shape[1] + experts.width) * x.itemsize > MOST_BYTES
        )

    def check(self) -> None:
        """Raise an error if a wait of this rank for a peer has timed out; reads a flag from the device."""
        if int(self.gave_up):
            raise RuntimeError(f"a peer did not come to an exchange within {peers.LIMIT:g} s or more")
