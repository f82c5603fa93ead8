"""Draws numbers as bars of characters."""

from __future__ import annotations

import math
from collections.abc import Collection
from itertools import pairwise

EIGHTHS = " ▁▂▃▄▅▆▇█"
ASCII = " .:-=+*#@"  # by ink, for consoles without UTF-8


class Series:
    """Numbers of a whole run in bounded memory: when there are too many, two neighbours become their mean."""

    def __init__(self, most: int = 2000) -> None:
        self.most = most
        self.values: list[float] = []
        self._waiting: list[float] = []
        self._each = 1

    def add(self, value: float) -> None:
        self._waiting.append(value)
        if len(self._waiting) == self._each:
            self.values.append(sum(self._waiting) / self._each)
            self._waiting.clear()
        if len(self.values) == self.most:
            self.values = [(a + b) / 2 for a, b in zip(self.values[::2], self.values[1::2], strict=True)]
            self._each *= 2


def chart(values: Collection[float], width: int, height: int = 1, ascii_only: bool = False) -> list[str]:
    """The values from left to right as bars in ``height`` lines, the smallest a sliver and the largest full.

    Args:
        values: those that are not finite are left out.
        width: columns; where there are more values, a column is the mean of several.
    """
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return [""] * height
    columns = _squeezed(finite, width)
    low, high = min(columns), max(columns)
    ink = ASCII if ascii_only else EIGHTHS
    full = len(ink) - 1
    levels = [1 + round((v - low) / (high - low) * (full * height - 1)) if high > low else 1 for v in columns]
    return ["".join(ink[min(max(level - full * row, 0), full)] for level in levels) for row in reversed(range(height))]


def bar(share: float, width: int, ascii_only: bool = False) -> tuple[str, str]:
    """A line of ``width`` columns, as its part that is done and the rest."""
    done = min(width, round(share * width))
    return ("#" if ascii_only else "━") * done, ("-" if ascii_only else "─") * (width - done)


def _squeezed(values: list[float], width: int) -> list[float]:
    if len(values) <= width:
        return values
    edges = [i * len(values) // width for i in range(width + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
