"""What tests need of a family, the same way for each: encoded examples and filled weights, from its own tiny checkpoint."""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from diffpipe.config.schema import Config, MeshConfig
from diffpipe.data.dataset import stack
from diffpipe.flow import Key
from diffpipe.models.adapters import base_name, is_adapter
from diffpipe.models.base import DiffusionModel, Targets
from diffpipe.pipeline.build import outline
from diffpipe.pipeline.cut import duplicate

CAPTIONS = ("a red circle on a blue background", "a square", "a green triangle moving left on a white background")
CPU = torch.device("cpu")


@cache
def encoders_of(model: DiffusionModel) -> Any:
    return model.load_encoders(CPU)


def encoded(model: DiffusionModel, rows: int = 2, columns: int = 3, frames: int = 1, count: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Cached tensors of ``count`` drawn examples, stacked; rows and columns in the family's smallest steps."""
    generator = torch.Generator().manual_seed(seed)
    step = model.geometry.multiple
    size = (rows * step, columns * step)
    pixels = torch.rand((count, 3, frames, *size), generator=generator) * 2 - 1
    encoders = encoders_of(model)
    with torch.no_grad():
        media = dict(model.encode_media(encoders, pixels))
        if model.takes_controls:
            media |= {f"control_{name}": t for name, t in model.encode_media(encoders, pixels.flip(-1)).items()}
        text = model.encode_text(encoders, [CAPTIONS[(seed + i) % len(CAPTIONS)] for i in range(count)])
    framing = [framed(size, generator) for _ in range(count)]
    made = {**media, **text, "framing": framing}
    return stack(model.align([{name: tensors[i] for name, tensors in made.items()} for i in range(count)]))


def framed(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """``framing`` of a drawn picture cut to ``size``: its own height and width, the crop's top and left, the size."""
    own = [int(side * (1 + 2 * torch.rand((), generator=generator))) for side in size]
    scale = max(side / of for side, of in zip(size, own, strict=True))
    crop = [round((of * scale - side) / 2) for side, of in zip(size, own, strict=True)]
    return torch.tensor([*own, *crop, *size], dtype=torch.float32)


def microbatch(model: DiffusionModel, **given: int) -> tuple[dict[str, Any], Targets]:
    """Inputs and targets of ``encoded`` examples."""
    batch = encoded(model, **given)
    return model.prepare(batch, [Key(given.get("seed", 0), 0, i, 0) for i in range(len(next(iter(batch.values()))))])


def frames_of(model: DiffusionModel) -> int:
    """A clip of two latent frames for video families, one picture for the others."""
    return model.geometry.temporal + 1 if model.geometry.fps else 1


def drawn(name: str, shape: torch.Size) -> Tensor:
    """Values that depend on the name alone, so that any cut of a model gets the same; none is zero."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def filled(module: nn.Module) -> nn.Module:
    """The module with every weight drawn by its name."""
    for prefix, owner in module.named_modules():
        for leaf, p in owner._parameters.items():
            if p is not None:
                name = f"{prefix}.{leaf}" if prefix else leaf
                owner._parameters[leaf] = nn.Parameter(drawn(name, p.shape), requires_grad=p.requires_grad)
    return module


def apart(module: nn.Module) -> nn.Module:
    """The module again, to take apart: the same weights, gradients of its own."""
    made = duplicate(module)
    for owner in made.modules():
        for leaf, p in owner._parameters.items():
            if p is not None:
                owner._parameters[leaf] = nn.Parameter(p.detach(), requires_grad=p.requires_grad)
    return made


def whole_of(config: Config, model: DiffusionModel) -> nn.Module:
    """The model that a config trains, whole in this process, adapters drawn."""
    whole, _ = outline(config.model_copy(update={"mesh": MeshConfig()}), model)
    return with_weights(whole, model)


def with_weights(module: nn.Module, model: DiffusionModel) -> nn.Module:
    """The module with the weights of the model's checkpoint, adapters drawn."""
    source = model.weights()
    for prefix, owner in module.named_modules():
        for leaf, p in owner._parameters.items():
            if p is not None:
                name = f"{prefix}.{leaf}" if prefix else leaf
                value = drawn(name, p.shape) if is_adapter(name) else source.read(base_name(name), torch.float32)
                owner._parameters[leaf] = nn.Parameter(value, requires_grad=p.requires_grad)
    return module
