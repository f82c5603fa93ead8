"""EDM (Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models"): noise is added, data stays as it is."""

from __future__ import annotations

from torch import Tensor

# The range that Cosmos is sampled in; what lies beyond is so rarely drawn that it only makes numbers overflow.
SIGMA_MIN, SIGMA_MAX = 0.0002, 80.0


def sigma_of(t: Tensor) -> Tensor:
    """The deviation of the noise for each t in [0, 1]: t / (1 - t), the share of noise to that of data in ``flow.mix``.

    So a logit-normal t = sigmoid(scale z) gives ln sigma = scale z ~ N(0, scale^2), and a shift s of t multiplies sigma by s:
    ln sigma ~ N(ln s, scale^2). Kept within [SIGMA_MIN, SIGMA_MAX], for t of 0 and 1 would give 0 and infinity.
    """
    return (t / (1 - t)).clamp(SIGMA_MIN, SIGMA_MAX)


def mix(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x = x_0 + sigma e, with one sigma per sample."""
    return clean + _wide(sigma, clean) * noise


def scale_input(noisy: Tensor, sigma: Tensor, data: float) -> Tensor:
    """What the network is given: c_in x, of deviation 1 when the data's is ``data``."""
    return noisy / (_wide(sigma, noisy) ** 2 + data**2).sqrt()


def condition(sigma: Tensor) -> Tensor:
    """c_noise = ln(sigma) / 4, given to the network as its timestep."""
    return sigma.log() / 4


def target(clean: Tensor, noise: Tensor, sigma: Tensor, data: float) -> Tensor:
    """What the network is to give: (x_0 - c_skip x) / c_out, whose plain squared error is the weighted one of x_0.

    With c_skip = d^2 / (s^2 + d^2) and c_out = s d / sqrt(s^2 + d^2) (table 1 there) it is (s x_0 - d^2 e) / (d sqrt(s^2 + d^2)),
    which is exact also where sigma is so small that x_0 and c_skip x cancel.
    """
    s = _wide(sigma, clean)
    return (s * clean - data**2 * noise) / (data * (s**2 + data**2).sqrt())


def _wide(sigma: Tensor, like: Tensor) -> Tensor:
    return sigma.view(-1, *[1] * (like.ndim - 1))
