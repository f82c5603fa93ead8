"""Tiny trained denoisers, and inputs for their forward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffpipe.config.schema import Config
from diffpipe.models import make_model
from diffpipe.models.adapters import attach, base_name, initialise, is_adapter, resolve_targets
from diffpipe.models.base import DiffusionModel
from tests.families import frames_of, microbatch

MakeConfig = Callable[..., Config]


def model_of(config: Config) -> DiffusionModel:
    return make_model(config.model, config.objective)


def trained(config: Config) -> nn.Module:
    """The tiny denoiser with its weights, changed as a training would: the adapter's B, or all weights."""
    model = model_of(config)
    module = model.load_denoiser()
    if config.adapter is not None:
        attach(module, resolve_targets(model, module, config.adapter), config.adapter, torch.float32)
    weights = model.weights()
    if config.adapter is not None:
        initialise(module, config.adapter, 0, torch.device("cpu"), None, lambda layer: weights.read(f"{layer}.weight"))
    noise = torch.Generator().manual_seed(1)
    for name, parameter in list(module.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        value = parameter if is_adapter(name) else weights.read(base_name(name), torch.float32)
        if config.adapter is None or is_adapter(name):
            value = value + 0.05 * torch.randn(value.shape, generator=noise)
        place = module.get_submodule(owner)
        if isinstance(place, nn.ParameterDict):
            place[leaf] = nn.Parameter(value.detach())
        else:
            setattr(place, leaf, nn.Parameter(value.detach()))
    return module.eval()


@torch.no_grad()
def output_of(module: nn.Module, model: DiffusionModel) -> Tensor:
    inputs, _ = microbatch(model, frames=frames_of(model))
    return module(**inputs, return_dict=False)[0]


def as_trained(loaded: nn.Module, model: DiffusionModel) -> nn.Module:
    """What ``from_pretrained`` gave, made again as the family makes the class: what its ``prepare`` does is no part of that."""
    made: nn.Module = type(loaded).from_config(model.class_config(dict(loaded.config)))
    made.load_state_dict(loaded.state_dict())
    whole = model.load_denoiser()
    if hasattr(whole, model.component):
        setattr(whole, model.component, made)
        return whole.eval()
    return made.eval()


def aligned(module: nn.Module) -> nn.Module:
    """The module with its weights moved to aligned memory: a mapped file's are not, and then sums round differently."""
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
    return module
