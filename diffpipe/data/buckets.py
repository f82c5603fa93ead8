"""Finds the shapes that each image or video trains at: nearest aspect ratio, longest frame count that fits, and which clips."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from diffpipe.config.schema import AspectConfig, MediaConfig
from diffpipe.data.media import MediaInfo
from diffpipe.errors import MediaError
from diffpipe.models.base import Geometry


@dataclass(frozen=True, order=True)
class Bucket:
    """The pixel shape of a sample: all samples of a step share one."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


@dataclass(frozen=True)
class Placed:
    """One sample of a file: its bucket, and where its clip begins.

    Attributes:
        start: seconds into the file; None for an image.
    """

    bucket: Bucket
    start: float | None = None


@dataclass(frozen=True)
class Buckets:
    """All shapes that a config allows.

    Attributes:
        groups: for each resolution (one group for explicit sizes), by (height, width) the frame counts that videos may
            have there, longest first; images may take any of the sizes.
        clips: what of a longer video trains, as ``data.clips`` has it.
        fps: rate that frames are taken at; None where the family takes no video.
    """

    groups: tuple[dict[tuple[int, int], tuple[int, ...]], ...]
    clips: str
    fps: float | None

    def place(self, info: MediaInfo, start: float | None = None, end: float | None = None) -> list[Placed]:
        """The samples of one file, or of its part from ``start`` to ``end`` seconds: at each resolution one or several.

        Raises:
            MediaError: when a video, or the part, is shorter than every bucket.
        """
        aspect = math.log(info.width / info.height)

        def distance(size: tuple[int, int]) -> tuple[float, tuple[int, int]]:
            return abs(math.log(size[1] / size[0]) - aspect), size

        if info.kind == "image":
            return [Placed(b) for b in sorted({Bucket(1, *min(sizes, key=distance)) for sizes in self.groups})]
        begin, stop = start or 0.0, min(end if end is not None else math.inf, info.seconds)
        assert self.fps is not None, "the scan sets videos aside for families that take none"
        available = info.frames_at(self.fps, max(0.0, stop - begin))
        found: dict[Placed, None] = {}
        for sizes in self.groups:
            size = next((s for s in sorted(sizes, key=distance) if any(n <= available for n in sizes[s])), None)
            if size is None:
                raise self._too_short(info, available, start, end)
            found |= dict.fromkeys(
                Placed(Bucket(frames, *size), begin + first / self.fps) for first, frames in self._cut(sizes[size], available)
            )
        return sorted(found, key=lambda p: (p.bucket, p.start))

    def _cut(self, counts: Sequence[int], available: int) -> list[tuple[int, int]]:
        """First frame and length of each clip of a video of ``available`` frames."""
        longest = next(n for n in counts if n <= available)
        if self.clips == "first":
            return [(0, longest)]
        if self.clips == "middle":
            return [((available - longest) // 2, longest)]
        if self.clips == "cover":
            number = -(-available // longest)
            return [(round(i * (available - longest) / max(1, number - 1)), longest) for i in range(number)]
        clips, first = [], 0
        while fitting := next((n for n in counts if n <= available - first), None):
            clips.append((first, fitting))
            first += fitting
        return clips

    def _too_short(self, info: MediaInfo, available: int, start: float | None, end: float | None) -> MediaError:
        shortest = min((counts[-1] for sizes in self.groups for counts in sizes.values() if counts), default=None)
        if shortest is None:
            return MediaError(
                "a video, but data.frames has no count above 1", fix="add a frame count such as 33 to data.frames, or take the videos out"
            )
        part = start is not None or end is not None
        what = f"its part from {start or 0:g} s to {'the end' if end is None else f'{end:g} s'} has" if part else "a video of"
        return MediaError(
            f"{what} {available} frames at the model's {self.fps:g} fps ({info.frames} at its own {info.fps:g})",
            expected=f"at least {shortest} frames, the shortest bucket",
            fix=f"add a smaller count to data.frames, or take the {'row' if part else 'file'} out",
        )


def make_buckets(config: MediaConfig, geometry: Geometry) -> Buckets:
    """The buckets of a folder, every side a multiple of what the family needs and every frame count valid for it."""
    frames = _counts(config.frames, geometry)
    if config.sizes is not None:
        explicit: dict[tuple[int, int], set[int]] = {}
        for width, height, *count in config.sizes:
            size = (_side(height, geometry), _side(width, geometry))
            explicit.setdefault(size, set()).update(_counts(count, geometry) if count else frames)
        groups = ({size: tuple(sorted(counts, reverse=True)) for size, counts in explicit.items()},)
        return Buckets(groups, config.clips, geometry.fps)
    ratios = _ratios(config.aspect)
    groups = tuple(
        dict.fromkeys(((_side(r / math.sqrt(a), geometry), _side(r * math.sqrt(a), geometry)) for a in ratios), frames)
        for r in sorted(set(config.resolutions))
    )
    return Buckets(groups, config.clips, geometry.fps)


def _ratios(aspect: AspectConfig | list[float]) -> list[float]:
    if not isinstance(aspect, AspectConfig):
        return aspect
    if aspect.count == 1:
        return [math.sqrt(aspect.min * aspect.max)]
    return [aspect.min * (aspect.max / aspect.min) ** (i / (aspect.count - 1)) for i in range(aspect.count)]


def _counts(frames: Sequence[int], geometry: Geometry) -> tuple[int, ...]:
    return tuple(sorted({geometry.frames(n) for n in frames} - {1}, reverse=True))


def _side(pixels: float, geometry: Geometry) -> int:
    return max(1, round(pixels / geometry.multiple)) * geometry.multiple
