"""Bytes and their units."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from moekit.arguments import Number

GIB = 2**30
# Bytes of each unit that a text may name.
UNITS = {
    "b": 1,
    "kb": 1e3,
    "mb": 1e6,
    "gb": 1e9,
    "tb": 1e12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": GIB,
    "tib": 2**40,
}


@dataclass(frozen=True)
class Memory:
    """Bytes, as a number or as a text with a unit; or "auto"."""

    optional: bool = False
    expected = "a text such as '14GiB', a number of bytes of at least a MiB, 'auto'"

    def convert(self, value: Any) -> float | str:
        if isinstance(value, str):
            text = value.strip().lower()
            if text == "auto":
                return text
            number = text.rstrip("kmgtib ")
            unit = text[len(number) :].strip() or "b"
            value = float(number) * UNITS[unit] if unit in UNITS else math.nan
        size = Number(above=0).convert(value)
        if size < UNITS["mib"]:
            raise ValueError
        return size
