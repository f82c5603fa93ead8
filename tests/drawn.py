"""Real media files drawn for tests, and the smallest model that encodes them."""

from __future__ import annotations

import json
import pickle
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffpipe.config.schema import Config, ModelConfig, ObjectiveConfig
from diffpipe.flow import Key, mix, noise
from diffpipe.models.base import DiffusionModel, Geometry, StageSpec, Targets


def draw_image(path: Path, size: tuple[int, int] = (64, 48), caption: str | None = "a drawing", seed: int = 0, **options: Any) -> Path:
    """Smooth colours that differ from seed to seed, so that any way of resampling gives nearly the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    y, x = np.mgrid[:height, :width]
    r = 255 * x / max(width - 1, 1)
    g = 255 * y / max(height - 1, 1)
    b = np.full_like(r, seed * 37 % 256)
    Image.fromarray(np.stack([r, g, b], -1).astype(np.uint8)).save(path, **options)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def draw_clip(
    path: Path,
    frames: int,
    fps: int,
    size: tuple[int, int] = (64, 48),
    caption: str | None = "a clip",
    options: dict[str, str] | None = None,
    codec: str = "libx264",
    encoding: dict[str, str] | None = None,
) -> Path:
    """Frame i is grey of value 4 * i (a multiple of 4 below 256)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=fps)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv422p10le" if codec == "prores_ks" else "yuv420p"
        stream.options = {**(encoding or {"crf": "1", "preset": "ultrafast"})}
        for i in range(frames):
            grey = np.full((size[1], size[0], 3), i * 4 % 256, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


class Pool(DiffusionModel):
    """Latents are averages of 8 x 8 pixels and 4 frames; text is character codes."""

    name, title, spec, denoiser, pipeline = "pool", "Pool", StageSpec(units=("none",)), "none", "none"
    geometry = Geometry(spatial=8, temporal=4, patch=2, fps=16.0)

    def __init__(self, log: Path | None = None) -> None:
        super().__init__(ModelConfig(family="pool", path="none"), ObjectiveConfig())
        self.log = log

    def load_encoders(self, device: torch.device) -> Any:
        self._note("loaded")
        return torch.ones((), device=device)

    def encode_media(self, encoders: Any, pixels: Tensor) -> dict[str, Tensor]:
        for clip in pixels:
            self._note(f"media {tuple(clip.shape)}")
        first = torch.nn.functional.avg_pool3d(pixels[:, :, :1], (1, 8, 8))
        rest = torch.nn.functional.avg_pool3d(pixels[:, :, 1:], (4, 8, 8)) if pixels.shape[2] > 1 else first[:, :, :0]
        return {"latents": torch.cat([first, rest], 2) * encoders}

    def encode_text(self, encoders: Any, captions: Sequence[str]) -> dict[str, Tensor]:
        for caption in captions:
            self._note(f"text {caption}")
        rows = [torch.tensor([float(ord(c)) for c in caption[:16].ljust(16)]) for caption in captions]
        return {"text": torch.stack(rows) * encoders}

    def blank_text(self) -> dict[str, Tensor]:
        return {"text": torch.zeros(16)}

    def identity(self, part: str) -> str:
        return f"pool {part} 1"

    def prepare(self, batch: dict[str, Tensor], keys: Sequence[Key]) -> tuple[dict[str, Any], Targets]:
        clean = batch["latents"]
        e, t = noise(keys, clean.shape[1:]), self.times(clean, keys)
        return {"noisy": mix(clean, e, t), "t": t, "text": batch["text"]}, [(e - clean, None)]

    def _note(self, line: str) -> None:
        if self.log is not None:
            with open(self.log, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


class PicturePool(Pool):
    """The same for images alone."""

    geometry = Geometry(spatial=8, patch=2)


def together(world: int, work: Callable[[int, Callable[[Any], list[Any]]], Any]) -> list[Any]:
    """Runs ``work(rank, exchange)`` for every rank at once, in threads; gives what each returned or raised."""
    meeting, values = threading.Barrier(world, timeout=60), [b""] * world

    def run(rank: int) -> Any:
        def exchange(value: Any) -> list[Any]:
            values[rank] = pickle.dumps(value)
            meeting.wait()
            seen = [pickle.loads(v) for v in values]
            meeting.wait()
            return seen

        try:
            return work(rank, exchange)
        except Exception as fault:
            return fault

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(run, range(world)))


def config_of(folder: Path, output: Path, **data: Any) -> Config:
    """A config that trains on one folder."""
    settings = {"folders": [{"path": str(folder)}], "resolutions": [64], "encode_workers": 0, **data}
    return Config.model_validate(
        {"output_dir": str(output), "run": {"steps": 1}, "model": {"family": "pool", "path": "none"}, "data": settings}
    )
