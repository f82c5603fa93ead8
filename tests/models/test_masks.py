"""A mask of latent cells weighs just what those cells are in every family's target."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffpipe.config.schema import ModelConfig, ObjectiveConfig
from diffpipe.flow import Key
from diffpipe.models import MODELS, make_model, model_class
from tests.families import encoded, frames_of


@pytest.mark.parametrize("family", sorted(MODELS))
def test_a_mask_weighs_the_parts_of_the_target_that_its_cells_decide(toys: Callable[[str], Path], family: str) -> None:
    # Noise alone, which SDXL's target is unless it predicts velocity, would not tell which cells it belongs to.
    objective = ObjectiveConfig(prediction="v" if "objective.prediction" in model_class(family).options else None)
    model = make_model(ModelConfig(family=family, path=str(toys(family)), dtype="float32"), objective)
    keys = [Key(0, 0, i, 0) for i in range(2)]
    batch = encoded(model, frames=frames_of(model))
    _, [(target, _)] = model.prepare(dict(batch), keys)
    mask = torch.zeros(2, 1, *batch["latents"].shape[-2:])
    mask[0, :, 1, 2:] = 1
    mask[1, :, 2:, 0] = 1
    shifted = batch["latents"] + (mask if batch["latents"].ndim == 4 else mask.unsqueeze(2))
    _, [(other, _)] = model.prepare({**batch, "latents": shifted}, keys)
    weight = model.spread(mask, target).expand_as(target)
    assert torch.equal(weight != 0, other != target)


@pytest.mark.parametrize("family", sorted(MODELS))
def test_no_family_caches_a_tensor_under_the_name_that_masks_have_in_a_batch(toys: Callable[[str], Path], family: str) -> None:
    # The loader takes "mask" out of a batch before the family sees it (diffpipe/data/loader.py).
    assert "mask" not in encoded(make_model(ModelConfig(family=family, path=str(toys(family)), dtype="float32"), ObjectiveConfig()))
