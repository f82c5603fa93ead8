"""Samples: what training reads, one cached example after another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffpipe.data.buckets import Bucket
from diffpipe.data.cache import Cache


@dataclass(frozen=True)
class Sample:
    """One media file at one bucket.

    Attributes:
        media, text: keys into the cache.
        repeats: times an epoch shows it.
        source: (height, width) of the file's picture, seen upright.
    """

    path: Path
    caption: str
    bucket: Bucket
    repeats: int
    media: str
    text: str
    source: tuple[int, int] = (0, 0)


class Samples:
    """All samples of a run, in an order that depends on the config and the folders alone."""

    def __init__(self, entries: list[Sample], cache: Cache) -> None:
        self.entries, self._cache = entries, cache

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """The cached tensors of a sample, mapped from disk, and ``framing``: height and width of the picture as it was, top
        and left of the crop in the picture as it was scaled, height and width of the bucket; 6 float32, in pixels."""
        entry = self.entries[index]
        return {**self._cache[entry.media], **self._cache[entry.text], "framing": _framing(entry)}

    @property
    def buckets(self) -> list[Bucket]:
        return [e.bucket for e in self.entries]

    @property
    def repeats(self) -> list[int]:
        return [e.repeats for e in self.entries]


def stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Samples as a microbatch: each tensor with a first dim B."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _framing(entry: Sample) -> Tensor:
    height, width = entry.source
    size = (entry.bucket.height, entry.bucket.width)
    scale = max(size[0] / height, size[1] / width) if height and width else 1.0
    crop = (max(0.0, (height * scale - size[0]) / 2), max(0.0, (width * scale - size[1]) / 2))
    return torch.tensor([height, width, *(round(c) for c in crop), *size], dtype=torch.float32)
