"""Flux Kontext sees its control picture as its pipeline shows it, and learns from the predicted tokens alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxKontextPipeline

from diffpipe.config.schema import ModelConfig, ObjectiveConfig
from diffpipe.data.loader import _prepare_one
from diffpipe.flow import Key
from diffpipe.models import make_model
from diffpipe.models.base import DiffusionModel
from diffpipe.pipeline.stage import sum_errors
from tests.families import encoded, encoders_of, filled

KEYS = [Key(0, 0, i, 0) for i in range(2)]


@pytest.fixture
def model(toys: Callable[[str], Path]) -> DiffusionModel:
    return make_model(ModelConfig(family="flux-kontext", path=str(toys("flux-kontext")), dtype="float32"), ObjectiveConfig())


def test_the_control_is_what_the_pipeline_makes_of_the_picture(model: DiffusionModel) -> None:
    pipeline: FluxKontextPipeline = encoders_of(model).pipeline
    pixels = torch.rand((2, 3, 32, 48), generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = model.encode_media(encoders_of(model), pixels.unsqueeze(2))["latents"]
        _, shown, ids, shown_ids = pipeline.prepare_latents(pixels, 2, latents.shape[1], 32, 48, torch.float32, pixels.device)
    batch = {**encoded(model, rows=2, columns=3), "control_latents": latents}
    inputs, _ = model.prepare(batch, KEYS)
    tokens = len(ids)
    torch.testing.assert_close(inputs["hidden_states"][:, tokens:], shown, rtol=1e-5, atol=1e-5)
    assert torch.equal(inputs["img_ids"], torch.cat([ids, shown_ids]))


@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_is_that_of_the_predicted_tokens(model: DiffusionModel, masked: bool) -> None:
    batch = encoded(model, rows=2, columns=3)
    mask = torch.zeros(2, 1, *batch["latents"].shape[-2:])
    mask[:, :, 1:] = 1
    given = {**batch, "mask": mask} if masked else dict(batch)
    inputs, targets = _prepare_one(model, given, KEYS, normalize=False)
    output = filled(model.load_denoiser())(**inputs, return_dict=False)[0]
    tokens = batch["latents"].shape[-2] // 2 * (batch["latents"].shape[-1] // 2)
    target = targets[0][0][:, :tokens]
    weight = model.spread(mask, target) if masked else torch.ones(())
    wanted = (weight * (output[:, :tokens] - target) ** 2).mean()
    torch.testing.assert_close(sum_errors((output,), targets), wanted, rtol=1e-5, atol=0)


def test_another_control_gives_another_prediction(model: DiffusionModel) -> None:
    module, batch = filled(model.load_denoiser()), encoded(model, rows=2, columns=3)
    outputs = []
    for control in (batch["control_latents"], -batch["control_latents"]):
        inputs, _ = model.prepare({**batch, "control_latents": control}, KEYS)
        outputs.append(module(**inputs, return_dict=False)[0][:, :24])
    assert not torch.allclose(*outputs, atol=1e-3)
