"""Drawn pictures and short clips with captions."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {
    "red": (210, 40, 40),
    "green": (40, 170, 70),
    "blue": (50, 80, 210),
    "yellow": (235, 210, 60),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle")
SIZES = ((128, 128), (160, 112), (112, 160))  # width, height
WAYS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
FPS = 16


def draw(shape: str, colour: str, background: str, size: tuple[int, int], centre: tuple[float, float], radius: float) -> Image.Image:
    """One shape on a plain ground; centre and radius in pixels."""
    picture = Image.new("RGB", size, COLOURS[background])
    pen = ImageDraw.Draw(picture)
    x, y = centre
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        pen.ellipse(box, fill=COLOURS[colour])
    elif shape == "square":
        pen.rectangle(box, fill=COLOURS[colour])
    else:
        pen.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=COLOURS[colour])
    return picture


def _choose(rng: random.Random) -> tuple[str, str, str]:
    colour, background = rng.sample(sorted(COLOURS), 2)
    return rng.choice(SHAPES), colour, background


def make_pictures(folder: Path, count: int, seed: int) -> None:
    """``count`` pictures, JPEG and PNG by turns, in three aspect ratios."""
    rng = random.Random(seed)
    for i in range(count):
        shape, colour, background = _choose(rng)
        width, height = SIZES[i % len(SIZES)]
        centre = (rng.uniform(0.35, 0.65) * width, rng.uniform(0.35, 0.65) * height)
        picture = draw(shape, colour, background, (width, height), centre, rng.uniform(0.2, 0.3) * min(width, height))
        file = folder / f"picture-{i:03d}.{'png' if i % 2 else 'jpg'}"
        picture.save(file, quality=92)
        file.with_suffix(".txt").write_text(f"a {colour} {shape} on a {background} background", encoding="utf-8")


def make_greys(folder: Path, count: int, seed: int) -> None:
    """The same pictures as ``make_pictures`` makes, without their colours and captions: controls of one that colours them."""
    make_pictures(folder, count, seed)
    for file in sorted(folder.iterdir()):
        if file.suffix == ".txt":
            file.unlink()
        else:
            with Image.open(file) as picture:
                grey = picture.convert("L").convert("RGB")
            grey.save(file)


def make_clips(folder: Path, count: int, seed: int) -> None:
    """``count`` MP4 clips of 9 to 17 frames, and a still beside every third."""
    rng = random.Random(seed)
    for i in range(count):
        shape, colour, background = _choose(rng)
        way = rng.choice(sorted(WAYS))
        size = SIZES[i % len(SIZES)]
        frames = [_frame(shape, colour, background, size, way, n / 16) for n in range((9, 13, 17)[i % 3])]
        file = folder / f"clip-{i:03d}.mp4"
        write_clip(file, frames)
        file.with_suffix(".txt").write_text(f"a {colour} {shape} moving {way} on a {background} background", encoding="utf-8")
        if i % 3 == 0:
            still = folder / f"still-{i:03d}.png"
            frames[0].save(still)
            still.with_suffix(".txt").write_text(f"a {colour} {shape} on a {background} background", encoding="utf-8")


def _frame(shape: str, colour: str, background: str, size: tuple[int, int], way: str, time: float) -> Image.Image:
    (dx, dy), (width, height) = WAYS[way], size
    centre = (width * (0.5 + dx * (time - 0.5) * 0.5), height * (0.5 + dy * (time - 0.5) * 0.5))
    return draw(shape, colour, background, size, centre, 0.22 * min(size))


def write_clip(file: Path, frames: Iterable[Image.Image], fps: int = FPS) -> None:
    """The frames as an MP4 file."""
    import av

    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps, options={"qscale": "3"})
        stream.pix_fmt = "yuv420p"
        for number, frame in enumerate(frames):
            if not number:
                stream.width, stream.height = frame.size
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
