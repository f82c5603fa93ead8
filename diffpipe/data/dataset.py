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
    """

    path: Path
    caption: str
    bucket: Bucket
    repeats: int
    media: str
    text: str


class Samples:
    """All samples of a run, in an order that depends on the config and the folders alone."""

    def __init__(self, entries: list[Sample], cache: Cache) -> None:
        self.entries, self._cache = entries, cache

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """The cached tensors of a sample, mapped from disk."""
        entry = self.entries[index]
        return {**self._cache[entry.media], **self._cache[entry.text]}

    def stack(self, indices: list[int]) -> dict[str, Tensor]:
        """A microbatch: each tensor with a first dim B."""
        rows = [self[i] for i in indices]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    @property
    def buckets(self) -> list[Bucket]:
        return [e.bucket for e in self.entries]

    @property
    def repeats(self) -> list[int]:
        return [e.repeats for e in self.entries]
