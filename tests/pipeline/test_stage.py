"""The loss of a microbatch is the one that the config names."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from diffpipe.pipeline.stage import sum_errors

GENERATOR = torch.Generator().manual_seed(0)
OUTPUT, TARGET = (3 * torch.randn(2, 3, 4, generator=GENERATOR) for _ in range(2))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("mse", functional.mse_loss(OUTPUT, TARGET)),
        ("huber", functional.huber_loss(OUTPUT, TARGET, delta=0.7)),
        ("smooth_l1", functional.smooth_l1_loss(OUTPUT, TARGET, beta=0.7)),
    ],
)
def test_each_loss_is_torchs(loss: str, expected: torch.Tensor) -> None:
    torch.testing.assert_close(sum_errors((OUTPUT,), [(TARGET, None)], loss, 0.7), expected)


def test_weights_multiply_the_error_of_each_element() -> None:
    weight = torch.tensor([1.0, 0.0, 3.0]).view(1, 3, 1)
    expected = (weight * (OUTPUT - TARGET) ** 2).mean()
    torch.testing.assert_close(sum_errors((OUTPUT,), [(TARGET, weight)]), expected)


def test_several_outputs_add_up_in_float32() -> None:
    halves = (OUTPUT.bfloat16(), OUTPUT.bfloat16())
    got = sum_errors(halves, [(TARGET, None), (TARGET, None)])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, 2 * functional.mse_loss(OUTPUT.bfloat16().float(), TARGET))
