"""Reads pictures with Pillow: upright, on white, whole or not at all; moving ones frame by frame."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
from PIL import Image, ImageOps

from diffpipe.data.files import File
from diffpipe.errors import MediaError

# Pillow recognises these by their first bytes but has no decoder of its own for them.
IDENTIFIED_ONLY = frozenset({"BUFR", "GRIB", "HDF5", "MPEG", "WMF"})
SHORTEST = 0.02  # seconds that a frame without a time of its own is shown, as browsers do it: 0.1 for GIF's 0 and 1 hundredths
UNTIMED = 0.1


@cache
def suffixes() -> frozenset[str]:
    """Of everything that Pillow can open."""
    known = Image.registered_extensions()  # loads all of Pillow's formats
    return frozenset(s for s, f in known.items() if f in Image.OPEN and f not in IDENTIFIED_ONLY)


@contextmanager
def faults(file: File) -> Iterator[None]:
    """Turns whatever Pillow raises on a bad file into a MediaError; nothing of an image is used unless all of it is there."""
    try:
        yield
    except (MediaError, PermissionError):
        raise
    except Image.DecompressionBombError as fault:
        raise MediaError("an image too large to open safely", where=str(file), fix="scale it down") from fault
    except Exception as fault:  # decoders raise what they please: OSError, SyntaxError, struct.error, EOFError ...
        said = str(fault).partition(" <_io")[0].replace(repr(str(file)), "the file") or type(fault).__name__
        raise MediaError(f"not a readable image: {said}", where=str(file), fix="replace the file or take it out") from fault


def look(file: File) -> tuple[int, int, list[float]]:
    """Width and height seen upright, and for a moving picture the seconds that each frame is shown (empty for a still one)."""
    with faults(file), file.open() as stream, Image.open(stream) as image:
        width, height = image.size
        if image.format != "TIFF" and image.getexif().get(0x0112, 1) in (5, 6, 7, 8):  # a TIFF opens upright
            width, height = height, width
        count = getattr(image, "n_frames", 1) if image.format in ("GIF", "WEBP", "PNG", "AVIF") else 1
        times = [_shown(image, i) for i in range(count)] if count > 1 else []
    return width, height, times


def _shown(image: Image.Image, frame: int) -> float:
    image.seek(frame)
    if image.format == "WEBP":
        image.load()  # tells a frame's duration only once it is decoded
    seconds = float(image.info.get("duration", 0)) / 1000
    return seconds if seconds > SHORTEST / 2 else UNTIMED


def read_still(file: File) -> Image.Image:
    """The first picture of a file as 8-bit RGB: upright, transparency on white."""
    with faults(file), file.open() as stream, Image.open(stream) as opened:
        return _plain(opened)


def read_moving(file: File) -> Iterator[Image.Image]:
    """The frames of a moving picture in order, each as ``read_still`` gives it."""
    with faults(file), file.open() as stream, Image.open(stream) as opened:
        for i in range(getattr(opened, "n_frames", 1)):
            opened.seek(i)
            yield _plain(opened)


def read_mask(file: File) -> Image.Image:
    """A mask as 8-bit grey, upright: white counts fully, black not at all."""
    with faults(file), file.open() as stream, Image.open(stream) as opened:
        return _upright(opened).convert("L")


def _plain(opened: Image.Image) -> Image.Image:
    image = _upright(opened)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        seen = image.convert("RGBA")
        white = Image.new("RGBA", seen.size, "white")
        return Image.alpha_composite(white, seen).convert("RGB")
    return image.convert("RGB")


def _upright(opened: Image.Image) -> Image.Image:
    """All of a picture, of at most 8 bits a channel."""
    opened.load()
    image = ImageOps.exif_transpose(opened)
    return _eight_bits(image) if image.mode == "F" or image.mode.startswith("I") else image


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16-bit, 32-bit or float values, which Pillow's own conversion would clip at 255."""
    values = np.asarray(image).astype(np.float64)
    top = float(values.max(initial=0.0))
    if image.mode == "F":
        full = next((f for f in (1.0, 255.0, 65535.0) if top <= f), top)
    else:
        full = 65535.0 if top <= 65535 else float(2**31 - 1)
    return Image.fromarray(np.clip(np.nan_to_num(values) / full * 255 + 0.5, 0, 255).astype(np.uint8))


def png(picture: np.ndarray) -> bytes:
    """A picture H W 3 uint8 as a PNG file."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    return stream.getvalue()


def gif(frames: np.ndarray, fps: float, most: int = 320) -> bytes:
    """Frames F H W 3 uint8 as a moving picture for programs that show no video, its sides at most ``most`` pixels."""
    shown = [Image.fromarray(frame) for frame in frames]
    for picture in shown:
        picture.thumbnail((most, most))
    stream = io.BytesIO()
    shown[0].save(stream, "GIF", save_all=True, append_images=shown[1:], duration=round(1000 / fps), loop=0)
    return stream.getvalue()


def crop_of(width: int, height: int, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """What of a picture shows in a bucket: left, top, right and bottom in the picture's pixels, around its centre.

    Args:
        size: width and height of the bucket.
    """
    scale = min(width / size[0], height / size[1])
    wide, high = size[0] * scale, size[1] * scale
    left, top = (width - wide) / 2, (height - high) / 2
    return left, top, left + wide, top + high


def fit(image: Image.Image, size: tuple[int, int], stretch: float = 1.0) -> Image.Image:
    """Scale to cover ``size`` (width, height) and crop around the centre, in one filtered step.

    Args:
        stretch: width of a pixel over its height, 1 for square ones.
    """
    left, top, right, bottom = crop_of(round(image.width * stretch), image.height, size)
    box = (left / stretch, top, min(right / stretch, image.width), bottom)
    return image.resize(size, Image.Resampling.LANCZOS, box=box)
