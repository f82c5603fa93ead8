"""SDXL's noise schedule is that of diffusers' scheduler, and its loss weights are those of their papers."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from diffpipe.ddpm import Prediction, alphas_cumprod, loss_weights, mix, step_of, velocity

STEPS = torch.tensor([0, 1, 500, 998, 999])
ZERO = pytest.mark.parametrize("zero", [False, True], ids=["plain", "zero-terminal"])


def scheduler(zero: bool) -> DDPMScheduler:
    return DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=zero)


def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(STEPS), 4, 3, 5, generator=generator), torch.randn(len(STEPS), 4, 3, 5, generator=generator)


@ZERO
def test_the_schedule_is_that_of_diffusers_scheduler(zero: bool) -> None:
    assert torch.equal(alphas_cumprod(zero), scheduler(zero).alphas_cumprod)
    assert (alphas_cumprod(zero)[-1] == 0) == zero


@ZERO
def test_noisy_samples_and_velocities_are_those_of_diffusers_scheduler(zero: bool) -> None:
    clean, noise = pair()
    torch.testing.assert_close(mix(clean, noise, STEPS, zero), scheduler(zero).add_noise(clean, noise, STEPS), rtol=0, atol=1e-7)
    torch.testing.assert_close(velocity(clean, noise, STEPS, zero), scheduler(zero).get_velocity(clean, noise, STEPS), rtol=0, atol=1e-7)


def test_the_last_step_of_the_rescaled_schedule_is_pure_noise() -> None:
    clean, noise = pair()
    assert torch.equal(mix(clean, noise, STEPS, True)[-1], noise[-1])
    assert torch.equal(velocity(clean, noise, STEPS, True)[-1], -clean[-1])


def test_every_step_has_a_thousandth_of_the_time() -> None:
    t = torch.tensor([0.0, 0.0009, 0.001, 0.5, 0.9989, 1.0])
    assert step_of(t).tolist() == [0, 0, 1, 500, 998, 999]


@ZERO
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_min_snr_weights_are_the_papers(zero: bool, prediction: Prediction) -> None:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    root = (1 - betas).cumprod(0).sqrt()
    if zero:
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    for step, signal in enumerate(root.tolist()):
        snr = signal**2 / (1 - signal**2)
        expected = min(snr, 5.0) / (snr + 1) if prediction == "v" else min(snr, 5.0) / snr if snr else 1.0
        got = loss_weights(torch.tensor([step]), prediction, zero_terminal_snr=zero, min_snr=5.0)
        assert got is not None
        assert got.item() == pytest.approx(expected, rel=2e-3, abs=1e-6)


def test_debiased_weights_are_the_papers_and_multiply_with_min_snr() -> None:
    left = scheduler(False).alphas_cumprod.double()
    snr = left / (1 - left)
    steps = torch.arange(1000)
    assert snr[0] > 1000
    for prediction, expected in (("epsilon", snr.clamp(max=1000) ** -0.5), ("v", 1 / (snr.clamp(max=1000) + 1))):
        debiased = loss_weights(steps, prediction, debiased=True)
        both = loss_weights(steps, prediction, debiased=True, min_snr=1.0)
        alone = loss_weights(steps, prediction, min_snr=1.0)
        assert debiased is not None and both is not None and alone is not None
        torch.testing.assert_close(debiased.double(), expected, rtol=1e-4, atol=0)
        assert torch.equal(both, alone * debiased)


def test_weights_are_finite_where_the_last_step_has_no_signal() -> None:
    for prediction, debiased in (("epsilon", False), ("v", False), ("v", True)):
        weights = loss_weights(torch.arange(1000), prediction, zero_terminal_snr=True, min_snr=5.0, debiased=debiased)
        assert weights is not None
        assert weights.isfinite().all()


def test_nothing_is_weighted_unless_asked_for() -> None:
    assert loss_weights(STEPS, "epsilon") is None
