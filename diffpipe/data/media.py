"""Reads images and videos: what a file holds, and its pixels at a bucket's size, upright, on white and whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from diffpipe.errors import DiffpipeError, MediaError

if TYPE_CHECKING:
    from diffpipe.data.buckets import Bucket

VIDEO_SUFFIXES = frozenset(
    f".{s}" for s in ("3gp", "avi", "flv", "m2ts", "m4v", "mkv", "mov", "mp4", "mpeg", "mpg", "mts", "ogv", "ts", "webm", "wmv")
)
# Pillow recognises these by their first bytes but has no decoder of its own for them.
IDENTIFIED_ONLY = frozenset({"BUFR", "GRIB", "HDF5", "MPEG", "WMF"})
PIXELS = 1  # raised when the same file would give other pixels: part of the cache's keys
CHUNK = 8  # video frames held at source size at once
Kind = Literal["image", "video"]


@dataclass(frozen=True)
class MediaInfo:
    """What a file holds, seen upright.

    Attributes:
        width, height: pixels after the rotation that the file asks for.
        frames: pictures in a video, counted in the stream; 1 for an image.
        fps: frames over the time they are shown; 0 for an image.
    """

    kind: Kind
    width: int
    height: int
    frames: int = 1
    fps: float = 0.0

    def frames_at(self, fps: float) -> int:
        """Frames of a video resampled to ``fps``: one for each middle of a new frame that the video still shows."""
        return round(self.frames / self.fps * fps)


def kind_of(path: Path) -> Kind | None:
    """What a file's suffix says it is; None for files that are no media. No file is opened."""
    suffix = path.suffix.lower()
    if suffix in VIDEO_SUFFIXES:
        return "video"
    return "image" if suffix in _image_suffixes() else None


def probe(path: Path) -> MediaInfo:
    """Size, frames and rate of a file, from its headers and its packet table.

    Raises:
        MediaError: when it cannot be read as what its suffix says.
    """
    if kind_of(path) == "video":
        video = _open_video(path)
        height, width, _ = _frames(video, [0], path).shape[1:]
        frames, shown = len(video), _times(video)
        return MediaInfo("video", width, height, frames, frames / max(float(shown[-1, 1] - shown[0, 0]), 1e-3))
    with _image_faults(path), Image.open(path) as image:
        width, height = image.size
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    return MediaInfo("image", height, width) if turned else MediaInfo("image", width, height)


def read(path: Path, bucket: Bucket, fps: float | None = None) -> Tensor:
    """Pixels of an image or of the start of a video, scaled to cover the bucket and cropped around the centre.

    Args:
        fps: rate that a video's frames are taken at, counted from its first frame.

    Returns:
        C F H W float32 in [-1, 1].

    Raises:
        MediaError: when any part of what is needed cannot be decoded.
    """
    size = (bucket.width, bucket.height)
    if kind_of(path) == "video":
        assert fps is not None
        pixels = _read_clip(path, bucket.frames, size, fps)
    else:
        pixels = np.asarray(_fit(_read_image(path), size))[None]
    return torch.from_numpy(pixels.copy()).permute(3, 0, 1, 2).float().div_(127.5).sub_(1).contiguous()


# -- images ----------------------------------------------------------------------------------------------------------


@cache
def _image_suffixes() -> frozenset[str]:
    known = Image.registered_extensions()  # loads all of Pillow's formats
    return frozenset(s for s, f in known.items() if f in Image.OPEN and f not in IDENTIFIED_ONLY) - VIDEO_SUFFIXES


@contextmanager
def _image_faults(path: Path) -> Iterator[None]:
    """Turns whatever Pillow raises on a bad file into a MediaError; nothing of an image is used unless all of it is there."""
    try:
        yield
    except Image.DecompressionBombError as fault:
        raise MediaError("an image too large to open safely", where=str(path), fix="scale it down") from fault
    except Exception as fault:  # decoders raise what they please: OSError, SyntaxError, struct.error, EOFError ...
        said = str(fault).replace(repr(str(path)), "the file") or type(fault).__name__
        raise MediaError(f"not a readable image: {said}", where=str(path), fix="replace the file or take it out") from fault


def _read_image(path: Path) -> Image.Image:
    """The first picture of an image file as 8-bit RGB: upright, transparency on white."""
    with _image_faults(path), Image.open(path) as opened:
        opened.load()
        image = ImageOps.exif_transpose(opened)
        if image.mode == "F" or image.mode.startswith("I"):
            image = _eight_bits(image)
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            seen = image.convert("RGBA")
            white = Image.new("RGBA", seen.size, "white")
            return Image.alpha_composite(white, seen).convert("RGB")
        return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16-bit, 32-bit or float values, which Pillow's own conversion would clip at 255."""
    values = np.asarray(image).astype(np.float64)
    top = float(values.max(initial=0.0))
    if image.mode == "F":
        full = next((f for f in (1.0, 255.0, 65535.0) if top <= f), top)
    else:
        full = 65535.0 if top <= 65535 else float(2**31 - 1)
    return Image.fromarray(np.clip(np.nan_to_num(values) / full * 255 + 0.5, 0, 255).astype(np.uint8))


def _fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale to cover ``size`` (width, height) and crop around the centre, in one filtered step."""
    scale = min(image.width / size[0], image.height / size[1])
    width, height = size[0] * scale, size[1] * scale
    left, top = (image.width - width) / 2, (image.height - height) / 2
    return image.resize(size, Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))


# -- videos ----------------------------------------------------------------------------------------------------------


def _read_clip(path: Path, count: int, size: tuple[int, int], fps: float) -> np.ndarray:
    """``count`` frames at ``fps`` from the first on, F H W C uint8; holds a few at source size at once."""
    video = _open_video(path)
    starts = _times(video)[:, 0]
    starts = starts - starts[0]
    # Each new frame shows what the video shows in the middle of that frame's time. Containers round times to
    # milliseconds, so a middle that falls on a border (every second frame of 2x the rate) must not hop across it.
    middles = (np.arange(count) + 0.5) / fps - 0.002
    picks = np.clip(np.searchsorted(starts, middles, side="right") - 1, 0, len(video) - 1)
    pixels = np.empty((count, size[1], size[0], 3), np.uint8)
    # Read on without a gap: decord reaches a frame further off by seeking, and in HEVC and AVI files lands on another
    # frame than the one asked for. What lies after the last pick is never read.
    for first in range(0, int(picks[-1]) + 1, CHUNK):
        frames = _frames(video, list(range(first, min(first + CHUNK, int(picks[-1]) + 1))), path)
        for i in np.nonzero((picks >= first) & (picks < first + CHUNK))[0]:
            pixels[i] = np.asarray(_fit(Image.fromarray(frames[picks[i] - first]), size))
    return pixels


def _open_video(path: Path) -> Any:
    try:
        import decord
    except (ImportError, OSError) as fault:
        raise DiffpipeError(f"videos need decord, which cannot be imported: {fault}", where=str(path), fix="pip install decord") from fault
    decord.logging.set_level(decord.logging.QUIET)
    try:
        with open(path, "rb"):
            pass  # a missing or locked file tells its reason here
        video = decord.VideoReader(str(path), num_threads=1)
        height, width, channels = video.next().shape
        if channels != 3:
            # Rows of a narrow video are padded, which decord mistakes for a fourth channel; a width of 64 has no padding.
            return decord.VideoReader(str(path), num_threads=1, width=64, height=max(1, round(height * 64 / width)))
        video.seek(0)
        return video
    except (decord.DECORDError, OSError, RuntimeError, IndexError, StopIteration) as fault:
        raise MediaError(
            f"not a readable video: {_reason(fault)}",
            where=str(path),
            fix="replace the file, or turn it into H.264 (ffmpeg -i IN -c:v libx264 -crf 14 OUT.mp4)",
        ) from fault


def _frames(video: Any, indices: list[int], path: Path) -> np.ndarray:
    """N H W C uint8."""
    import decord

    try:
        return video.get_batch(indices).asnumpy()
    except (decord.DECORDError, RuntimeError, IndexError) as fault:
        raise MediaError(
            f"frames {indices[0]} to {indices[-1]} cannot be decoded: {_reason(fault)}",
            where=str(path),
            fix="replace the file or take it out",
        ) from fault


def _times(video: Any) -> np.ndarray:
    """When each frame begins and ends, in seconds, N 2."""
    times = np.asarray(video.get_frame_timestamp(np.arange(len(video))), np.float64)
    if np.all(np.diff(times[:, 0]) > 0) and abs(times[0, 0]) < 1e9:
        return times
    borders = np.arange(len(video) + 1) / max(video.get_avg_fps(), 1e-3)  # AVI and raw streams know their rate only
    return np.stack([borders[:-1], borders[1:]], 1)


def _reason(fault: BaseException) -> str:
    """The one line of decord's message that is for people."""
    lines = [line for line in str(fault).splitlines() if line.strip()] or [type(fault).__name__]
    return lines[0].rsplit("Error: ", 1)[-1].rsplit(".cc:", 1)[-1].strip()
