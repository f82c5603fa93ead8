"""The noise schedule of SD and SDXL: whole steps from 0 to 999, what is mixed at each, and how much its error counts."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor

STEPS = 1000
Prediction = Literal["epsilon", "v"]


@cache
def alphas_cumprod(zero_terminal_snr: bool) -> Tensor:
    """The share of signal variance left at each of the 1000 steps, float32.

    Stable Diffusion's schedule: the square roots of beta rise linearly from those of 0.00085 to those of 0.012.

    Args:
        zero_terminal_snr: shift and scale the square roots so that the first stays and the last is 0 (Lin et al. 2023,
            "Common Diffusion Noise Schedules and Sample Steps are Flawed", algorithm 1).
    """
    left = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, STEPS) ** 2).cumprod(0)
    if not zero_terminal_snr:
        return left
    root = left.sqrt()
    left = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    # By way of the betas, as schedulers keep them, so that every step is theirs to the last bit.
    betas = 1 - torch.cat([left[:1], left[1:] / left[:-1]])
    return (1 - betas).cumprod(0)


def step_of(t: Tensor) -> Tensor:
    """The step of each t in [0, 1], int64; 999 is the noisiest."""
    return (t * STEPS).long().clamp(max=STEPS - 1)


def mix(clean: Tensor, noise: Tensor, step: Tensor, zero_terminal_snr: bool = False) -> Tensor:
    """sqrt(a) x_0 + sqrt(1 - a) e, with one step per sample (a of ``alphas_cumprod``)."""
    signal, sigma = _roots(clean, step, zero_terminal_snr)
    return signal * clean + sigma * noise


def velocity(clean: Tensor, noise: Tensor, step: Tensor, zero_terminal_snr: bool = False) -> Tensor:
    """sqrt(a) e - sqrt(1 - a) x_0 (Salimans and Ho 2022)."""
    signal, sigma = _roots(clean, step, zero_terminal_snr)
    return signal * noise - sigma * clean


def loss_weights(
    step: Tensor, prediction: Prediction, *, zero_terminal_snr: bool = False, min_snr: float | None = None, debiased: bool = False
) -> Tensor | None:
    """What the squared error of each sample is multiplied by; None where nothing is asked for.

    The signal-to-noise ratio is a / (1 - a) of the schedule that is trained with, 0 at its last step with ``zero_terminal_snr``.

    Args:
        min_snr: gamma of min(snr, gamma) / snr for epsilon, min(snr, gamma) / (snr + 1) for v (Hang et al. 2023).
        debiased: 1 / sqrt(min(snr, 1000)) for epsilon, 1 / (min(snr, 1000) + 1) for v (Yu et al. 2024). For epsilon it has no
            bound where the ratio may be 0.
    """
    if min_snr is None and not debiased:
        return None
    left = alphas_cumprod(zero_terminal_snr)[step]
    snr = left / (1 - left)
    weights = torch.ones_like(snr)
    if min_snr is not None:
        # min(snr, gamma) / snr, which is 1 also where snr is 0.
        weights = (min_snr / snr).clamp(max=1) if prediction == "epsilon" else snr.clamp(max=min_snr) / (snr + 1)
    if debiased:
        bounded = snr.clamp(max=1000)
        weights = weights * (bounded.rsqrt() if prediction == "epsilon" else 1 / (bounded + 1))
    return weights


def _roots(clean: Tensor, step: Tensor, zero_terminal_snr: bool) -> tuple[Tensor, Tensor]:
    left = alphas_cumprod(zero_terminal_snr)[step].view(-1, *[1] * (clean.ndim - 1))
    return left.sqrt(), (1 - left).sqrt()
