"""The progress bar of the preparation of data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moekit import progress

if TYPE_CHECKING:
    from tqdm import tqdm


def bar(label: str, total: int, done: int = 0) -> tqdm:
    """A bar over ``total`` bytes with rate and time left; it appears after one second."""
    return progress.bar(label, total, "B", done=done, delay=1.0)
