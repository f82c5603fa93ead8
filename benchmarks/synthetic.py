"""Models of released size with random weights, and random cached samples of the released shapes, without any file."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from diffpipe.config.schema import Config  # noqa: E402
from diffpipe.flow import Key  # noqa: E402
from diffpipe.models import model_class  # noqa: E402
from diffpipe.models.base import DiffusionModel  # noqa: E402
from diffpipe.models.weights import WeightSource, lazily  # noqa: E402

# The usual resolution (height, width) and frames of each family.
USUAL: dict[str, tuple[int, int, int]] = {
    "chroma": (1024, 1024, 1),
    "cosmos": (704, 1280, 49),
    "flux": (1024, 1024, 1),
    "flux-kontext": (1024, 1024, 1),
    "hunyuan-video": (544, 960, 49),
    "ltx-video": (512, 768, 49),
    "lumina2": (1024, 1024, 1),
    "sdxl": (1024, 1024, 1),
    "wan": (480, 832, 49),
    "wan-i2v": (480, 832, 49),
}

# The quickstart as a short run that is broken off and goes on, keys as --set takes them.
BRIEF: dict[str, Any] = {
    "mesh.timeout": 60,
    "batch.micro": 1,
    "batch.accumulate": 2,
    "adapter.rank": 4,
    "adapter.dropout": 0.1,  # so that random states count
    "data.resolutions": "[64]",
    "data.workers": 0,
    "data.encode_workers": 0,
    "eval.sets": "[]",
    "checkpoint.every_steps": 2,
}


def make_random(config: Config, changes: Mapping[str, Any] | None = None, kept: tuple[str, ...] = ()) -> DiffusionModel:
    """The family's released model with random weights, made on the GPU where there is one as they are asked for.

    Args:
        changes: to the config of its diffusers class, such as fewer layers.
        kept: patterns of layers that are not kept in few bits, beside the family's.
    """
    family = model_class(config.model.family)

    class Random(family):  # type: ignore[misc, valid-type]
        high_precision = (*family.high_precision, *kept)

        @cached_property
        def denoiser_config(self) -> dict[str, Any]:
            return {**super().denoiser_config, **(changes or {})}

        def weights(self) -> WeightSource:
            return WeightSource({n: lazily(s, torch.bfloat16, partial(_values, n, s)) for n, s in self.shapes.items()}, Path("random"))

    return Random(config.model, config.objective)


def _values(name: str, shape: tuple[int, ...]) -> Tensor:
    """Norm weights of one and small matrices and biases, as in a trained model: depth must not blow activations up. Always the same."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if len(shape) == 1 and not name.endswith("bias"):
        return torch.ones(shape, device=device, dtype=torch.bfloat16)
    return drawn(name, shape, device).mul_(0.01).to(torch.bfloat16)


def drawn(name: str, shape: tuple[int, ...], device: str | torch.device) -> Tensor:
    """Normal values that depend on the name alone."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little")
    return torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(seed))


def cached(model: DiffusionModel, height: int, width: int, frames: int, number: int = 0) -> dict[str, Tensor]:
    """The cached tensors of one sample, as a batch of one."""
    generator = torch.Generator().manual_seed(number)
    text = model.blank_text()
    batch: dict[str, Tensor] = {}
    for name, like in model.blank(frames, height, width).items():
        if name == "framing":
            batch[name] = like[None]
        elif like.dtype == torch.bool:
            batch[name] = torch.arange(len(like))[None] < len(like) // 3
        else:
            batch[name] = torch.randn((1, *like.shape), generator=generator) * (0.1 if name in text else 1)
    return batch


def microbatches(
    model: DiffusionModel, height: int, width: int, frames: int, count: int, step: int = 0
) -> list[tuple[dict[str, Any], Any]]:
    """A step's microbatches of one sample each."""
    return [model.prepare(cached(model, height, width, frames, step * count + i), [Key(0, step, i, 0)]) for i in range(count)]
