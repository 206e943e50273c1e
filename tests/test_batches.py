"""Batches on their way to the ranks."""

import pickle

import numpy as np
import pytest

from moekit.batches import Batch, shares
from moekit.symbols import PAD


def batch(index: int, tokens: list[list[int]], targets: list[list[int]]) -> Batch:
    rows = len(tokens)
    ids = np.arange(rows * index, rows * (index + 1))
    return Batch(index, ids, np.array(tokens, np.int32), np.array(targets, np.int32), np.arange(rows))


STEPS = {
    "targets follow": [batch(i, [[2, 5 + i, 6], [2, 7, 8]], [[5 + i, 6, 9], [7, 8, PAD]]) for i in range(3)],
    "targets do not": [batch(i, [[2, 5, 6 + i]], [[5, 6, 9]]) for i in range(3)],
    "large ids": [batch(i, [[2, 70_000, 6]], [[70_000, 6, 65_536 + i]]) for i in range(3)],
    "a large last target": [batch(0, [[2, 5, 6]], [[5, 6, 65_536]])],
    "padded": [batch(0, [[2, 5, PAD]], [[5, PAD, PAD]])],
    "one token": [batch(0, [[2]], [[5]])],
}


def test_a_token_takes_two_bytes_on_its_way():
    """Its target is the next token, and ids of a dictionary of that size fit."""
    ids = np.random.default_rng(1).integers(4, 50_000, 2049)
    step = [batch(0, [ids[:-1]], [ids[1:]])]
    assert len(pickle.dumps(shares(step, 1)[0])) < 2.5 * 2048


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_a_share_arrives_as_it_left(step):
    # A rank without batches, too.
    for share in shares(step, 4):
        found = pickle.loads(pickle.dumps(share))
        assert len(found.batches) == len(share.batches)
        assert (found.count, found.shape, found.padded, found.trailing) == (
            share.count,
            share.shape,
            share.padded,
            share.trailing,
        )
        for one, other in zip(found.batches, share.batches, strict=True):
            assert one.index == other.index
            for name in ("ids", "tokens", "targets", "starts"):
                left, right = getattr(one, name), getattr(other, name)
                assert left.dtype == right.dtype and np.array_equal(left, right), name
