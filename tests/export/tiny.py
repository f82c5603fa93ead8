"""Tiny trained denoisers, and inputs for their forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diffpipe.config.schema import Config
from diffpipe.models import make_model
from diffpipe.models.base import DiffusionModel
from diffpipe.models.lora import attach_lora, init_lora, is_lora, resolve_targets

MakeConfig = Callable[..., Config]


def model_of(config: Config) -> DiffusionModel:
    return make_model(config.model, config.objective)


def trained(config: Config) -> nn.Module:
    """The tiny denoiser with its weights, changed as a training would: the adapter's B, or all weights."""
    model = model_of(config)
    module = model.load_denoiser()
    if config.adapter is not None:
        attach_lora(module, resolve_targets(model, module, config.adapter), config.adapter, torch.float32)
        init_lora(module, model, config.adapter, 0, torch.device("cpu"))
    weights = model.weights()
    noise = torch.Generator().manual_seed(1)
    for name, parameter in list(module.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        value = parameter if is_lora(name) else weights.read(name.replace(".base_layer.", "."), torch.float32)
        if config.adapter is None or ".lora_B." in name:
            value = value + 0.05 * torch.randn(value.shape, generator=noise)
        setattr(module.get_submodule(owner), leaf, nn.Parameter(value.detach()))
    return module.eval()


def inputs_of(family: str) -> dict[str, Any]:
    """Keyword inputs of the tiny denoiser's forward."""
    g = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    if family == "wan":
        return {"hidden_states": draw(1, 4, 2, 4, 4), "timestep": torch.tensor([300.0]), "encoder_hidden_states": draw(1, 16, 32)}
    ids = torch.zeros(16, 3)
    ids[:, 2] = torch.arange(16)
    return {
        "hidden_states": draw(1, 16, 16),
        "encoder_hidden_states": draw(1, 16, 32),
        "pooled_projections": draw(1, 32),
        "timestep": torch.tensor([0.3]),
        "img_ids": ids,
        "txt_ids": torch.zeros(16, 3),
        "guidance": torch.ones(1),
    }


@torch.no_grad()
def output_of(module: nn.Module, family: str) -> Tensor:
    return module(**inputs_of(family), return_dict=False)[0]


def aligned(module: nn.Module) -> nn.Module:
    """The module with its weights moved to aligned memory: a mapped file's are not, and then sums round differently."""
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
    return module
