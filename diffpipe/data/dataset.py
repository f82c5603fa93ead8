"""Samples: what training reads, one cached example after another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffpipe.data.buckets import Bucket
from diffpipe.data.cache import Cache
from diffpipe.data.files import File
from diffpipe.flow import Key


@dataclass(frozen=True)
class Sample:
    """One picture or clip at one bucket.

    Attributes:
        captions: what may be said of it, one at a time.
        repeats: times an epoch shows it.
        media, texts, mask, control: keys into the cache; a text for each caption; no mask where all of the picture trains.
        mask_file, control_file: where those are read from.
        source: (height, width) of the file's picture, seen upright.
        start: seconds into the file at which its clip begins; None for an image.
        dropout: share of showings with the empty caption.
    """

    file: File
    captions: tuple[str, ...]
    bucket: Bucket
    repeats: float
    media: str
    texts: tuple[str, ...]
    mask: str | None = None
    mask_file: File | None = None
    control: str | None = None
    control_file: File | None = None
    source: tuple[int, int] = (0, 0)
    start: float | None = None
    dropout: float = 0.0


class Samples:
    """All samples of a run, in an order that depends on the config and the folders alone.

    Args:
        empty: the cache key of the empty caption, where any sample drops its own.
        cell: pixels of a latent cell, for samples without a mask among others with one.
    """

    def __init__(self, entries: list[Sample], cache: Cache, empty: str | None = None, cell: int = 8) -> None:
        self.entries, self._cache, self._empty, self._cell = entries, cache, empty, cell
        self._masked = any(e.mask is not None for e in entries)

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, index: int, key: Key) -> dict[str, Tensor]:
        """The cached tensors of one showing of a sample, mapped from disk.

        Beside what the family cached there is ``framing``: height and width of the picture as it was, top and left of
        the crop in the picture as it was scaled, height and width of the bucket (6 float32, in pixels); where any sample
        has a mask, ``mask`` (1 h w); and where it has a control, what the family cached of that, called ``control_`` before.

        Args:
            key: decides which caption is shown, and whether it is dropped. An evaluation shows the first.
        """
        entry = self.entries[index]
        row = {**self._cache[entry.media], **self._cache[self._text(entry, key)], "framing": _framing(entry)}
        if self._masked:
            cells = (1, entry.bucket.height // self._cell, entry.bucket.width // self._cell)
            row["mask"] = torch.ones(cells) if entry.mask is None else self._cache[entry.mask]["mask"]
        if entry.control is not None:
            row |= {f"control_{name}": tensor for name, tensor in self._cache[entry.control].items()}
        return row

    def keys(self) -> set[str]:
        """The cache keys of everything that the samples need."""
        own = {k for e in self.entries for k in (e.media, *e.texts, e.mask, e.control) if k is not None}
        return own if self._empty is None else own | {self._empty}

    def _text(self, entry: Sample, key: Key) -> str:
        if key.quantile is not None:
            return entry.texts[0]
        dropped, chosen = torch.rand(2, generator=key.generator("caption")).tolist()
        if dropped < entry.dropout and self._empty is not None:
            return self._empty
        return entry.texts[int(chosen * len(entry.texts))]

    @property
    def buckets(self) -> list[Bucket]:
        return [e.bucket for e in self.entries]

    @property
    def repeats(self) -> list[float]:
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
