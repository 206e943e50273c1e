"""Ways to place a layer's experts on ranks, from how many rows each expert gets.

Shape letters: E experts, W ranks, P physical experts (EPLB's word): E and one for each redundant copy.
"""

from __future__ import annotations

import numpy as np

from moekit.nn.dispatch import owned


def sizes(physical: int, ranks: int) -> np.ndarray:
    """[W] int64, how many physical experts each rank has: as even as possible, as :func:`moekit.nn.dispatch.owned` deals."""
    return np.array([len(owned(physical, ranks, rank)) for rank in range(ranks)])


def contiguous(experts: int, ranks: int) -> np.ndarray:
    """[E] int64, the rank of each expert, in the order of their numbers."""
    return np.repeat(np.arange(ranks), sizes(experts, ranks))


def packed(load: np.ndarray, ranks: int) -> np.ndarray:
    """[P] int64, the rank of each physical expert: the heaviest first, each to the rank with the least so far that has room.

    That is the packing of DeepSeek's expert-parallel load balancer (EPLB; "balanced packing" in its description,
    github.com/deepseek-ai/EPLB), and the greedy rule for scheduling of Graham (1969) with as many jobs on each machine.

    Args:
        load: [P], rows of each physical expert.
    """
    free = sizes(len(load), ranks)
    so_far = np.zeros(ranks)
    found = np.zeros(len(load), dtype=np.int64)
    for expert in np.argsort(-load, kind="stable"):
        rank = int(np.where(free > 0, so_far, np.inf).argmin())
        found[expert] = rank
        so_far[rank] += load[expert]
        free[rank] -= 1
    return found


def replicated(load: np.ndarray, redundant: int) -> np.ndarray:
    """[P] int64, which expert each physical one is, where ``redundant`` of them are a second (third, ...) copy of an expert.

    Each goes to the expert with most rows a copy, as in EPLB's description ("redundant experts", DeepSeek-V3, arXiv
    2412.19437, section 3.4); copies share an expert's rows evenly. No choice of copies has a smaller maximum of rows a copy.

    Args:
        load: [E], rows of each expert.
    """
    copies = np.ones(len(load), dtype=np.int64)
    for _ in range(redundant):
        copies[(load / copies).argmax()] += 1
    return np.repeat(np.arange(len(load)), copies)


def loads(count: np.ndarray, of: np.ndarray, rank: np.ndarray, ranks: int) -> np.ndarray:
    """[..., E] rows of the experts -> [..., W] rows of the ranks.

    Args:
        of: [P], which expert each physical one is.
        rank: [P], its rank.
    """
    share = np.zeros((count.shape[-1], ranks))
    np.add.at(share, (of, rank), 1 / np.bincount(of, minlength=count.shape[-1])[of])
    return count @ share


def imbalance(of_ranks: np.ndarray) -> np.ndarray:
    """[..., W] rows of the ranks -> [...] those of the busiest one as a multiple of the mean; NaN without rows."""
    mean = of_ranks.mean(axis=-1)
    return np.divide(of_ranks.max(axis=-1), mean, out=np.full(np.shape(mean), np.nan), where=mean > 0)
