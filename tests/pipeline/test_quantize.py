"""Weights in fp8: near what they stand for, multiplied as fp8 too, and no reason to keep activations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diffpipe.pipeline.memory.quantize import FEW, Fp8Linear, quantize, quantized
from diffpipe.pipeline.memory.recompute import recompute

BY_ROW = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)  # earlier ones scale fp8 products by row on CUDA only


def layers(products: bool) -> tuple[nn.Linear, Fp8Linear]:
    """A linear layer and the same in fp8."""
    torch.manual_seed(0)
    plain = nn.Linear(256, 512).requires_grad_(False)
    small = Fp8Linear(plain, products)
    weight, scale = quantized(plain.weight)
    small.weight, small.scale = (nn.Parameter(t, requires_grad=False) for t in (weight, scale))
    return plain, small


@pytest.mark.parametrize("products", [False, pytest.param(True, marks=pytest.mark.skipif(not BY_ROW, reason="needs CUDA"))])
def test_output_and_gradient_are_near_those_of_the_weight(products: bool) -> None:
    plain, small = layers(products)
    x = torch.randn(2 * FEW, 256, generator=torch.Generator().manual_seed(1))
    found = []
    for layer in (plain, small):
        given = x.clone().requires_grad_()
        out = layer(given)
        out.square().mean().backward()
        found.append((out.detach(), given.grad))
    # e4m3 keeps three bits after the first: each factor is off by at most 1/16, about 2 % of its size on average.
    for got, wanted in zip(found[1], found[0], strict=True):
        assert got is not None and wanted is not None
        assert (got - wanted).norm() / wanted.norm() < (0.06 if products else 0.04)


@pytest.mark.skipif(not BY_ROW, reason="needs CUDA")
def test_a_compiled_block_that_is_recomputed_keeps_no_result() -> None:
    _, small = layers(products=True)
    block = torch.compile(recompute(lambda x: torch.relu(small(x)), "block"), backend="aot_eager_decomp_partition", dynamic=False)
    saved: list[tuple[int, ...]] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = block(torch.randn(2 * FEW, 256, requires_grad=True))
    out.sum().backward()
    assert (2 * FEW, 256) in saved and (2 * FEW, 512) not in saved


def test_layers_that_train_or_must_stay_exact_are_left_alone() -> None:
    block = nn.ModuleDict({"a": nn.Linear(16, 16), "norm": nn.Linear(16, 16), "b": nn.Linear(16, 16)}).requires_grad_(False)
    block["b"].weight.requires_grad_(True)
    assert quantize(block, [r"^norm"], products=False) == ["a"]
    assert isinstance(block["a"], Fp8Linear) and type(block["norm"]) is nn.Linear
