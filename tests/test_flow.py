"""Noise and time follow from keys alone, and have the distributions that the config names."""

from __future__ import annotations

import pytest
import torch

from diffpipe.config.schema import ObjectiveConfig
from diffpipe.flow import Key, mix, noise, timesteps

MANY = [Key(0, 0, i, 0) for i in range(4000)]


def test_the_same_key_draws_the_same_and_another_key_draws_other_noise() -> None:
    a, b = Key(1, 2, 3, 0), Key(1, 2, 3, 1)
    assert torch.equal(noise([a, b], (4,))[0], noise([a], (4,))[0])
    assert not torch.equal(noise([a], (4,)), noise([b], (4,)))


def test_an_evaluation_shares_noise_over_its_quantiles() -> None:
    assert torch.equal(noise([Key(0, 0, 0, 0, 0.1)], (4,)), noise([Key(0, 0, 0, 0, 0.9)], (4,)))


@pytest.mark.parametrize(("quantile", "t"), [(0.1, 0.217), (0.5, 0.5), (0.9, 0.783)])
def test_quantiles_of_the_logit_normal_are_the_known_ones(quantile: float, t: float) -> None:
    assert timesteps([Key(0, 0, 0, 0, quantile)], ObjectiveConfig(), 256).item() == pytest.approx(t, abs=1e-3)


@pytest.mark.parametrize(("tokens", "shift"), [(1024, 1.8773), (4096, 3.1582)])
def test_the_resolution_shift_is_fluxs(tokens: int, shift: float) -> None:
    t = timesteps([Key(0, 0, 0, 0, 0.5)], ObjectiveConfig(shift="resolution"), tokens).item()
    assert t == pytest.approx(shift * 0.5 / (1 + (shift - 1) * 0.5), abs=1e-4)


@pytest.mark.parametrize("kind", ["uniform", "logit_normal"])
def test_t_keeps_to_its_bounds_and_to_the_shape_inside_them(kind: str) -> None:
    free = timesteps(MANY, ObjectiveConfig(timesteps=kind, shift=3.0), 256)
    cut = timesteps(MANY, ObjectiveConfig(timesteps=kind, shift=3.0, min_t=0.4, max_t=0.8), 256)
    inside = free[(free >= 0.4) & (free <= 0.8)]
    assert cut.min() >= 0.4
    assert cut.max() <= 0.8
    assert cut.mean().item() == pytest.approx(inside.mean().item(), abs=0.01)


def test_mixing_goes_from_clean_to_noise() -> None:
    clean, e = torch.ones(3, 2), torch.zeros(3, 2)
    assert torch.equal(mix(clean, e, torch.tensor([0.0, 0.5, 1.0]))[:, 0], torch.tensor([1.0, 0.5, 0.0]))
