"""Every family's loss is its official one, and its adapters have the names that ComfyUI reads."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from diffpipe.config.schema import AdapterConfig, ModelConfig, ObjectiveConfig
from diffpipe.flow import Key, noise, timesteps
from diffpipe.models import MODELS, make_model
from diffpipe.models.adapter_files import name_adapter
from diffpipe.models.adapters import adapter_tensors, attach, resolve_targets
from diffpipe.models.base import DiffusionModel
from diffpipe.pipeline.stage import sum_errors
from tests.families import encoded, frames_of, with_weights


@pytest.fixture(params=sorted(MODELS))
def model(request: pytest.FixtureRequest, toys: Callable[[str], Path]) -> DiffusionModel:
    return make_model(ModelConfig(family=request.param, path=str(toys(request.param)), dtype="float32"), ObjectiveConfig())


def official(model: DiffusionModel) -> Any:
    return import_module(f"tests.models.official.{model.name.replace('-', '_')}")


def test_loss_and_gradients_are_those_of_the_official_formula(model: DiffusionModel) -> None:
    batch = encoded(model, frames=frames_of(model), count=2)
    keys = [Key(7, 0, i, 0) for i in range(2)]
    results = []
    for own in (True, False):
        module = with_weights(model.load_denoiser().requires_grad_(True), model)
        if own:
            inputs, targets = model.prepare(batch, keys)
            loss = sum_errors(module(**inputs, return_dict=False), targets)
        else:
            clean = batch["latents"]
            t = timesteps(keys, model.objective, tokens=1)
            loss = official(model).loss(module, model.blueprint["vae"].folder.parent, batch, noise(keys, clean.shape[1:]), t)
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in module.named_parameters() if p.grad is not None}))
    (loss, gradients), (expected, theirs) = results
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == theirs.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_a_default_lora_has_the_layers_that_comfyui_knows(model: DiffusionModel) -> None:
    module = model.load_denoiser()
    config = AdapterConfig(rank=2)
    attach(module, resolve_targets(model, module, config), config, torch.float32)
    zeros = {n: torch.zeros(t.shape) for n, t in adapter_tensors(module).items()}
    named = name_adapter(zeros, model, "comfyui")
    layers = {n.rpartition(".lora_")[0] for n in named}
    assert all(layer.startswith("diffusion_model.") for layer in layers)
    first = re.compile(getattr(official(model), "FIRST", r"\D*\b0\."))
    assert {n for layer in layers if first.match(n := layer.removeprefix("diffusion_model."))} == set(official(model).COMFYUI)
    kohya = {n.rpartition(".lora_")[0] for n in name_adapter(zeros, model, "kohya") if not n.endswith(".alpha")}
    assert kohya == {"lora_unet_" + layer.removeprefix("diffusion_model.").replace(".", "_") for layer in layers}
