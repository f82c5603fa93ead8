"""Noise and time: what a sample is mixed with, drawn from the sample's key alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Normal

from diffpipe.config.schema import ObjectiveConfig

NORMAL = Normal(0.0, 1.0)


class Key(NamedTuple):
    """Names one look at one sample; everything random about it follows from these numbers.

    Attributes:
        seed: the run's seed.
        epoch: the pass over the data, from 0.
        sample: the sample's number in the data.
        repeat: which of the sample's repeats in the epoch.
        quantile: for evaluation, the quantile of the timestep distribution instead of a draw.
    """

    seed: int
    epoch: int
    sample: int
    repeat: int
    quantile: float | None = None

    def generator(self, purpose: str) -> torch.Generator:
        """A CPU generator for one purpose; the quantile does not enter, so an evaluation shares its noise."""
        text = f"{purpose}/{self.seed}/{self.epoch}/{self.sample}/{self.repeat}"
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def noise(keys: Sequence[Key], shape: Sequence[int]) -> Tensor:
    """Standard normal noise, B then ``shape``, float32, one draw per key."""
    return torch.stack([torch.randn(tuple(shape), generator=key.generator("noise")) for key in keys])


def timesteps(keys: Sequence[Key], objective: ObjectiveConfig, tokens: int) -> Tensor:
    """One t in [0, 1] per key, float32; 1 is pure noise.

    t is drawn from the distribution that ``objective`` names, shifted, and cut to [min_t, max_t] by drawing
    only from the matching range of probability, so the shape inside the range is kept.

    Args:
        tokens: image tokens of the sample, which the ``resolution`` shift depends on.
    """
    uniform = torch.tensor(
        [
            torch.rand((), generator=key.generator("time"), dtype=torch.float64).item() if key.quantile is None else key.quantile
            for key in keys
        ],
        dtype=torch.float64,
    )
    shift = shift_factor(objective, tokens)
    low, high = (_probability(_unshift(t, shift), objective) for t in (objective.min_t, objective.max_t))
    return _shift(_quantile(low + uniform * (high - low), objective), shift).clamp(objective.min_t, objective.max_t).float()


def shift_factor(objective: ObjectiveConfig, tokens: int) -> float:
    """The s of t' = s t / (1 + (s - 1) t).

    ``resolution`` takes s = exp(mu) with mu linear in the number of tokens, 0.5 at 256 and 1.15 at 4096, as
    Flux's pipeline in diffusers does when sampling.
    """
    if objective.shift == "resolution":
        return math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))
    return 1.0 if objective.shift is None else float(objective.shift)


def mix(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x_0 + t e, with one t per sample (rectified flow; its velocity is e - x_0)."""
    t = t.view(-1, *[1] * (clean.ndim - 1))
    return (1 - t) * clean + t * noise


def _shift(t: Tensor, s: float) -> Tensor:
    return s * t / (1 + (s - 1) * t)


def _unshift(t: float, s: float) -> Tensor:
    value = torch.tensor(t, dtype=torch.float64)
    return value / (s - (s - 1) * value)


def _quantile(probability: Tensor, objective: ObjectiveConfig) -> Tensor:
    if objective.timesteps == "uniform":
        return probability
    # The ends of the open interval are infinite for the normal; the nearest doubles give t of 0 and 1 to float32.
    inside = probability.clamp(1e-12, 1 - 1e-12)
    return torch.sigmoid(objective.scale * NORMAL.icdf(inside))


def _probability(t: Tensor, objective: ObjectiveConfig) -> Tensor:
    """The share of unshifted draws below ``t``."""
    if objective.timesteps == "uniform":
        return t
    return NORMAL.cdf(torch.logit(t) / objective.scale)
