"""Reads videos with PyAV: every frame known by its time in the container, and only what is needed decoded."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image

from diffpipe.data.files import File
from diffpipe.data.images import fit
from diffpipe.errors import MediaError

SUFFIXES = frozenset(
    f".{s}" for s in ("3gp", "avi", "flv", "m2ts", "m4v", "mkv", "mov", "mp4", "mpeg", "mpg", "mts", "ogv", "ts", "webm", "wmv")
)
AHEAD = 2.0  # seconds: what begins sooner is reached by decoding on, what begins later by a jump to a key frame
# Containers (FFmpeg's names) that give a time to few frames: behind a jump FFmpeg counts on from one that may be another frame's.
UNTIMED = frozenset({"mpeg", "mpegvideo"})
# Containers round times to milliseconds, so a middle that falls on a border must not hop across it.
SLACK = 0.002


def look(file: File) -> tuple[int, int, int, float]:
    """Width and height seen upright and in square pixels, the number of frames, and the seconds they are shown together.

    Frames are counted in the container's packets, of which none but the first is decoded.

    Raises:
        MediaError: when it cannot be read as a video.
    """
    with _opened(file) as (container, stream):
        first = next(container.decode(stream), None)
        if first is None:
            raise _unreadable(file, "it has no picture")
        width, height = _upright(first, stream)
        container.seek(0)
        begins, ends, count = [], [], 0
        for packet in container.demux(stream):
            if packet.size == 0 or packet.is_discard:
                continue
            count += 1
            if packet.pts is not None:
                begins.append(packet.pts)
                ends.append(packet.pts + (packet.duration or 0))
        if count == 0:
            raise _unreadable(file, "it has no picture")
        return width, height, count, _seconds(begins, ends, count, stream)


def _seconds(begins: Sequence[int], ends: Sequence[int], count: int, stream: Any) -> float:
    rate = float(stream.average_rate or stream.guessed_rate or 0) or 25.0
    if len(begins) < count or len(set(begins)) < len(begins):
        return count / rate  # AVI and raw streams know their rate only
    base = float(stream.time_base)
    begin, end = min(begins), max(ends)
    if end == max(begins):  # the last frame has no length of its own: as long as they are on average
        end += (end - begin) / (count - 1) if count > 1 else 1 / rate / base
    return max((end - begin) * base, 1e-3)


def read(file: File, count: int, size: tuple[int, int], fps: float, start: float = 0.0) -> np.ndarray:
    """Frames of a clip, each scaled to cover ``size`` and cropped around the centre; at most two are held at source size.

    Args:
        count: frames to give.
        size: width and height.
        fps: their rate. Each shows what the video shows in the middle of its own time.
        start: seconds after the video's first frame at which the first of them begins.

    Returns:
        F H W C uint8.

    Raises:
        MediaError: when any frame that is needed cannot be decoded.
    """
    middles = start + (np.arange(count) + 0.5) / fps - SLACK
    pixels = np.empty((count, size[1], size[0], 3), np.uint8)
    filled = 0
    with _opened(file) as (container, stream):
        frames = _frames(container, stream, file, start)
        shown, _, end = next(frames)
        scaled: np.ndarray | None = None
        for frame, begin, ends in frames:
            while filled < count and middles[filled] < begin:
                scaled = _scaled(shown, stream, size) if scaled is None else scaled
                pixels[filled] = scaled
                filled += 1
            if filled == count:
                return pixels
            shown, scaled, end = frame, None, ends
        # The last frame stays until its end; a clip's last middle may lie half a frame of its own beyond.
        while filled < count and middles[filled] < end + 1 / fps:
            scaled = _scaled(shown, stream, size) if scaled is None else scaled
            pixels[filled] = scaled
            filled += 1
    if filled < count:
        raise MediaError(
            f"frames {filled} to {count - 1} of the video's clip at {start:g} s are missing: it ends at {end:.2f} s",
            where=str(file),
            fix="replace the file or take it out",
        )
    return pixels


def mp4(frames: np.ndarray, fps: float) -> bytes:
    """Frames F H W 3 uint8, H and W even, as an MP4 file that browsers show."""
    import av

    stream = io.BytesIO()
    # Builds of FFmpeg without GPL parts lack it.
    codec, options = ("libx264", {"crf": "14"}) if "libx264" in av.codecs_available else ("mpeg4", {"qscale": "3"})
    with av.open(stream, "w", format="mp4") as container:
        video: Any = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options)
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(video.encode())
    return stream.getvalue()


def _frames(container: Any, stream: Any, file: File, start: float) -> Iterator[tuple[Any, float, float]]:
    """Decoded frames with the seconds at which each begins and ends, counted from the first frame of the video.

    Begins at the frame shown at ``start`` or some way before it.
    """
    rate = float(stream.average_rate or stream.guessed_rate or 0) or 25.0
    base = float(stream.time_base)
    decoded = container.decode(stream)
    first = next(decoded, None)
    if first is None:
        raise _unreadable(file, "it has no picture")
    if first.pts is None:  # no times at all: frames are counted
        yield first, 0.0, 1 / rate
        for number, frame in enumerate(decoded, 1):
            yield frame, number / rate, (number + 1) / rate
        return
    origin = first.pts
    if start > AHEAD and container.format.name not in UNTIMED:
        landed = _jump(container, stream, origin + int(start / base))
        if landed is not None and landed.pts is not None and (landed.pts - origin) * base <= start:
            first, decoded = landed, container.decode(stream)
        else:
            container.seek(0)  # the jump went too far, or nowhere: decode from the beginning
            decoded = container.decode(stream)
            first = next(decoded)
    for frame in _and_then(first, decoded):
        begin = (frame.pts - origin) * base if frame.pts is not None else 0.0
        yield frame, begin, begin + (float(frame.duration) * base if frame.duration else 1 / rate)


def _jump(container: Any, stream: Any, pts: int) -> Any:
    import av

    try:
        container.seek(pts, stream=stream, backward=True)
        return next(container.decode(stream), None)
    except av.FFmpegError:
        return None


def _and_then(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _scaled(frame: Any, stream: Any, size: tuple[int, int]) -> np.ndarray:
    picture = np.rot90(frame.to_ndarray(format="rgb24"), _turns(frame))
    stretch = _stretch(stream)
    return np.asarray(fit(Image.fromarray(np.ascontiguousarray(picture)), size, 1 / stretch if _turns(frame) % 2 else stretch))


def _turns(frame: Any) -> int:
    """Quarter turns, counter-clockwise, that make the frame upright."""
    return round(frame.rotation / 90) % 4


def _stretch(stream: Any) -> float:
    return float(stream.sample_aspect_ratio or 1) or 1.0


def _upright(frame: Any, stream: Any) -> tuple[int, int]:
    width, height = max(1, round(frame.width * _stretch(stream))), frame.height
    return (height, width) if _turns(frame) % 2 else (width, height)


@contextmanager
def _opened(file: File) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream; whatever FFmpeg raises becomes a MediaError."""
    import av

    av.logging.set_level(None)
    try:
        with file.open() as raw, av.open(raw if file.member else str(file.path)) as container:
            stream = next((s for s in container.streams.video if not int(s.disposition) & ATTACHED_PICTURE), None)
            if stream is None or stream.codec_context is None:
                raise _unreadable(file, "it has no video stream that can be decoded")
            stream.thread_type = "AUTO"
            stream.codec_context.thread_count = 2
            yield container, stream
    except (PermissionError, MediaError):
        raise
    except (av.FFmpegError, OSError, ValueError, IndexError, StopIteration) as fault:
        raise _unreadable(file, _reason(fault)) from fault


ATTACHED_PICTURE = 0x0400  # AV_DISPOSITION_ATTACHED_PIC: a cover beside the sound, no video


def _reason(fault: BaseException) -> str:
    return str(getattr(fault, "strerror", None) or fault).partition(":")[0] or type(fault).__name__


def _unreadable(file: File, said: str) -> MediaError:
    return MediaError(
        f"not a readable video: {said}",
        where=str(file),
        fix="replace the file, or turn it into H.264 (ffmpeg -i IN -c:v libx264 -crf 14 OUT.mp4)",
    )
