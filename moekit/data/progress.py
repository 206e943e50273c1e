"""The progress bar that preparing data shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moekit import progress

if TYPE_CHECKING:
    from tqdm import tqdm


def bar(label: str, total: int, done: int = 0) -> tqdm:
    """A bar over ``total`` bytes with rate and time left; what takes less than a second shows none."""
    return progress.bar(label, total, "B", done=done, delay=1.0)
