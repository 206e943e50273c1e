"""The one kind of progress bar that preparing data shows."""

from __future__ import annotations

from tqdm import tqdm


def bar(label: str, total: int, done: int = 0) -> tqdm:
    """A bar over ``total`` bytes with rate and time left; what takes less than a second shows none."""
    return tqdm(
        desc=label,
        total=total,
        initial=done,
        unit="B",
        unit_scale=True,
        mininterval=0.5,
        delay=1.0,
        leave=False,
    )
