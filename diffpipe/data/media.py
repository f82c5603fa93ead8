"""What a media file holds, and its pixels at a bucket's size: upright, on white, and whole or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from diffpipe.data import images, videos
from diffpipe.data.files import File
from diffpipe.durable import write_durably
from diffpipe.errors import MediaError, told_of_disk

if TYPE_CHECKING:
    from diffpipe.data.buckets import Bucket

PIXELS = 2  # raised when the same file would give other pixels: part of the cache's keys
MASKS = 3  # the same for masks
Kind = Literal["image", "video"]


@dataclass(frozen=True)
class MediaInfo:
    """What a file holds, seen upright.

    Attributes:
        width, height: pixels after the rotation that the file asks for, in square pixels.
        frames: pictures in a video, counted in the container; 1 for an image.
        fps: frames over the time they are shown; 0 for an image.
    """

    kind: Kind
    width: int
    height: int
    frames: int = 1
    fps: float = 0.0

    @property
    def seconds(self) -> float:
        """How long a video is shown."""
        return self.frames / self.fps if self.fps else 0.0

    def frames_at(self, fps: float, seconds: float | None = None) -> int:
        """Frames of a video (or of ``seconds`` of it) resampled to ``fps``: one for each middle of a new frame that it still shows."""
        return round((self.seconds if seconds is None else seconds) * fps)


def kind_of(file: File | Path) -> Kind | None:
    """What a file's suffix says it is; None for files that are no media. No file is opened: a GIF counts as an image here."""
    suffix = file.suffix.lower()
    if suffix in videos.SUFFIXES:
        return "video"
    return "image" if suffix in images.suffixes() else None


def probe(file: File) -> MediaInfo:
    """Size, frames and rate of a file, from its headers and its packet table. A moving picture (GIF, WebP, APNG) is a video.

    Raises:
        MediaError: when it cannot be read as what its suffix says.
    """
    if kind_of(file) == "video":
        width, height, frames, seconds = videos.look(file)
        return MediaInfo("video", width, height, frames, frames / seconds)
    width, height, times = images.look(file)
    if times:
        return MediaInfo("video", width, height, len(times), len(times) / sum(times))
    return MediaInfo("image", width, height)


def read(file: File, bucket: Bucket, fps: float | None = None, start: float = 0.0) -> Tensor:
    """Pixels of an image or of a clip, scaled to cover the bucket and cropped around the centre.

    Args:
        fps: rate that a video's frames are taken at; None for an image.
        start: seconds into the video at which the clip begins.

    Returns:
        C F H W float32 in [-1, 1].

    Raises:
        MediaError: when any part of what is needed cannot be decoded.
    """
    size = (bucket.width, bucket.height)
    if fps is None:
        pixels = np.asarray(images.fit(images.read_still(file), size))[None]
    elif kind_of(file) == "video":
        pixels = videos.read(file, bucket.frames, size, fps, start)
    else:
        pixels = _moving(file, bucket.frames, size, fps, start)
    return torch.from_numpy(pixels.copy()).permute(3, 0, 1, 2).float().div_(127.5).sub_(1).contiguous()


@dataclass(frozen=True)
class Written:
    """A picture or clip in a file.

    Attributes:
        thumbnail: what programs that show no video have of it, as PNG or GIF.
    """

    path: Path
    thumbnail: bytes


def write(pixels: Tensor, fps: float | None, path: Path) -> Written:
    """Pixels as a PNG, or an MP4 of several frames; whole or not at all.

    Args:
        pixels: C F H W, about in [-1, 1].
        fps: rate of the frames; None where there is but one.
        path: without a suffix.

    Raises:
        DiffpipeError: when it cannot be written.
    """
    frames = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 3, 0).numpy()
    if fps is None or len(frames) == 1:
        suffix, content = ".png", images.png(frames[0])
        thumbnail = content
    else:
        suffix, content, thumbnail = ".mp4", videos.mp4(frames, fps), images.gif(frames, fps)
    file = path.with_name(path.name + suffix)
    with told_of_disk(f"{file.name} cannot be written", str(path.parent), "free some space"):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_durably(file, content)
    return Written(file, thumbnail)


def read_mask(file: File, bucket: Bucket, cell: int, picture: tuple[int, int]) -> Tensor:
    """How much each latent cell counts: the mask scaled and cropped as its picture, averaged over cells.

    Args:
        cell: pixels of a latent cell along each side.
        picture: width and height of the picture that it masks.

    Returns:
        1 h w float32 in [0, 1].

    Raises:
        MediaError: when the mask cannot be read, or has another shape than its picture.
    """
    mask = images.read_mask(file)
    if mask.size != picture:
        raise MediaError(
            f"a mask of {mask.width}x{mask.height} for a picture of {picture[0]}x{picture[1]}",
            where=str(file),
            expected="the picture's own size",
            fix="draw the mask over the picture, or take it out",
        )
    grey = torch.from_numpy(np.asarray(images.fit(mask, (bucket.width, bucket.height))).copy()).float().div_(255)
    return torch.nn.functional.avg_pool2d(grey[None], cell)


def _moving(file: File, count: int, size: tuple[int, int], fps: float, start: float) -> np.ndarray:
    _, _, times = images.look(file)
    ends = np.array(list(accumulate(times)))
    middles = start + (np.arange(count) + 0.5) / fps - videos.SLACK
    picks = np.clip(np.searchsorted(ends, middles, side="right"), 0, len(ends) - 1)
    pixels = np.empty((count, size[1], size[0], 3), np.uint8)
    for number, picture in enumerate(images.read_moving(file)):
        chosen = picks == number
        if chosen.any():
            pixels[chosen] = np.asarray(images.fit(picture, size))
        if number == picks[-1]:
            break
    return pixels
