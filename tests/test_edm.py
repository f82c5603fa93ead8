"""EDM's scales are those of diffusers' scheduler, and sigma has the distribution that the config's t gives it."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import EDMEulerScheduler

from diffpipe import edm
from diffpipe.config.schema import ObjectiveConfig
from diffpipe.flow import Key, timesteps

DATA = 0.5
SIGMAS = torch.tensor([0.0002, 0.01, 0.5, 3.0, 80.0], dtype=torch.float64)


def draw(seed: int) -> torch.Tensor:
    return torch.randn(len(SIGMAS), 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_what_goes_in_and_comes_out_is_as_diffusers_scales_it() -> None:
    scheduler = EDMEulerScheduler(sigma_data=DATA)
    clean, noise = DATA * draw(0), draw(1)
    noisy = edm.mix(clean, noise, SIGMAS)
    wide = SIGMAS.view(-1, 1, 1)
    torch.testing.assert_close(noisy, clean + wide * noise)
    torch.testing.assert_close(edm.scale_input(noisy, SIGMAS, DATA), scheduler.precondition_inputs(noisy, wide))
    torch.testing.assert_close(edm.condition(SIGMAS), scheduler.precondition_noise(SIGMAS))
    # A network that gives the target is one whose denoised sample is the data.
    denoised = scheduler.precondition_outputs(noisy, edm.target(clean, noise, SIGMAS, DATA), wide)
    torch.testing.assert_close(denoised, clean, rtol=1e-9, atol=1e-9)


def test_the_plain_error_of_the_target_is_the_weighted_error_of_the_data() -> None:
    scheduler = EDMEulerScheduler(sigma_data=DATA)
    clean, noise, output = DATA * draw(0), draw(1), draw(2)
    wide = SIGMAS.view(-1, 1, 1)
    denoised = scheduler.precondition_outputs(edm.mix(clean, noise, SIGMAS), output, wide)
    weight = (wide**2 + DATA**2) / (wide * DATA) ** 2
    torch.testing.assert_close((output - edm.target(clean, noise, SIGMAS, DATA)) ** 2, weight * (denoised - clean) ** 2)


@pytest.mark.parametrize(("scale", "shift"), [(1.0, None), (0.6, None), (1.0, 3.0)])
def test_the_logarithm_of_sigma_is_normal(scale: float, shift: float | None) -> None:
    objective = ObjectiveConfig(timesteps="logit_normal", scale=scale, shift=shift)
    keys = [Key(0, 0, 0, 0, (i + 0.5) / 500) for i in range(500)]
    logarithm = edm.sigma_of(timesteps(keys, objective, tokens=1)).log()
    expected = torch.distributions.Normal(math.log(shift or 1), scale).icdf(torch.arange(0.5, 500) / 500)
    torch.testing.assert_close(logarithm, expected, rtol=1e-4, atol=1e-4)


def test_the_ends_of_t_stay_finite() -> None:
    assert edm.sigma_of(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([edm.SIGMA_MIN, edm.SIGMA_MAX])
