"""Finds the shape that each image or video trains at: nearest aspect ratio, longest frame count that fits."""

from __future__ import annotations

import math
from dataclasses import dataclass

from diffpipe.config.schema import DataConfig
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
class Buckets:
    """All shapes that a config allows.

    Attributes:
        sizes: for each resolution, its (height, width) pairs.
        frames: frame counts of videos, longest first.
        fps: rate that those frames are taken at; None where the family takes no video.
    """

    sizes: tuple[tuple[tuple[int, int], ...], ...]
    frames: tuple[int, ...]
    fps: float | None

    def place(self, info: MediaInfo) -> list[Bucket]:
        """The buckets of one file, one for each resolution (fewer when two resolutions meet in one bucket).

        Raises:
            MediaError: when a video is shorter than every bucket.
        """
        frames = self._frames(info) if info.kind == "video" else 1
        aspect = math.log(info.width / info.height)
        nearest = [min(sizes, key=lambda s: (abs(math.log(s[1] / s[0]) - aspect), s)) for sizes in self.sizes]
        return sorted({Bucket(frames, height, width) for height, width in nearest})

    def _frames(self, info: MediaInfo) -> int:
        assert self.fps is not None, "the scan sets videos aside for families that take none"
        available = info.frames_at(self.fps)
        fitting = [n for n in self.frames if n <= available]
        if fitting:
            return fitting[0]
        if not self.frames:
            raise MediaError(
                "a video, but data.frames has no count above 1", fix="add a frame count such as 33 to data.frames, or take the videos out"
            )
        raise MediaError(
            f"a video of {available} frames at the model's {self.fps:g} fps ({info.frames} at its own {info.fps:g})",
            expected=f"at least {self.frames[-1]} frames, the shortest bucket",
            fix="add a smaller count to data.frames, or take the file out",
        )


def make_buckets(config: DataConfig, geometry: Geometry) -> Buckets:
    """The buckets of a data section, every side a multiple of what the family needs and every frame count valid for it."""
    aspect = config.aspect
    steps = max(aspect.count - 1, 1)
    ratios = [aspect.min * (aspect.max / aspect.min) ** (i / steps) for i in range(aspect.count)]
    if aspect.count == 1:
        ratios = [math.sqrt(aspect.min * aspect.max)]
    sizes = tuple(
        tuple(dict.fromkeys((_side(r / math.sqrt(a), geometry), _side(r * math.sqrt(a), geometry)) for a in ratios))
        for r in sorted(set(config.resolutions))
    )
    frames = {geometry.frames(n) for n in config.frames} - {1}
    return Buckets(sizes, tuple(sorted(frames, reverse=True)), geometry.fps)


def _side(pixels: float, geometry: Geometry) -> int:
    return max(1, round(pixels / geometry.multiple)) * geometry.multiple
