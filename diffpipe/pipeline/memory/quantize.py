"""Keeps frozen linear weights in fewer bits: fp8 with scales, multiplied as fp8 where the card can, or nf4."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
FEW = 64  # rows below which a product is too small to gain from fp8
LENGTH = 16  # what fp8 products need both sides of a weight to be a multiple of


class Fp8Linear(nn.Module):
    """A frozen linear layer whose weight is fp8 times a scale for each output.

    Args:
        inner: the layer on meta; its names stay, ``scale`` (float32, output features) is added.
        products: multiply in fp8, the input scaled for each row as it comes. The gradient of the input is computed
            likewise, the gradient's rows multiplied by the weight's scales first. Else the weight is brought to the input's type.
    """

    def __init__(self, inner: nn.Linear, products: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = inner.in_features, inner.out_features
        self.products = products and inner.in_features % LENGTH == 0 and inner.out_features % LENGTH == 0
        self.weight = nn.Parameter(torch.empty(inner.weight.shape, dtype=FP8, device="meta"), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(inner.out_features, dtype=torch.float32, device="meta"), requires_grad=False)
        self.bias = inner.bias

    def forward(self, x: Tensor) -> Tensor:
        kind = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        bias = None if self.bias is None else self.bias.to(kind)
        flat = x.to(kind).reshape(-1, x.shape[-1])
        if self.products and flat.shape[0] >= FEW:
            out = _Product.apply(flat, self.weight, self.scale)
            out = out if bias is None else out + bias
        else:
            out = nn.functional.linear(flat, dequantized(self.weight, self.scale, kind), bias)
        return out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, products={self.products}"


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight as fp8 and the scale of each row, such that the row's largest value is the largest of e4m3."""
    values = weight.float()
    scale = (values.abs().amax(1) / LARGEST).clamp(min=1e-12)
    return (values / scale[:, None]).to(FP8), scale


def dequantized(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What an fp8 weight stands for."""
    return weight.to(dtype) * scale[:, None].to(dtype)


def _by_row(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as fp8, each with a scale of its own."""
    scale = (x.abs().amax(1, keepdim=True).float() / LARGEST).clamp(min=1e-12)
    return (x.float() / scale).to(FP8), scale


class _Product(torch.autograd.Function):
    """x W^T in fp8, forward and for the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        rows, by = _by_row(x)
        return torch._scaled_mm(rows, weight.t(), scale_a=by, scale_b=scale[None], out_dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        weight, scale = ctx.saved_tensors
        rows, by = _by_row(gradient * scale.to(gradient.dtype))
        # The second factor must lie column by column.
        columns = weight.t().contiguous().t()
        ones = torch.ones((1, weight.shape[1]), dtype=torch.float32, device=weight.device)
        return torch._scaled_mm(rows, columns, scale_a=by, scale_b=ones, out_dtype=gradient.dtype), None, None


def has_products(device: torch.device) -> bool:
    """Whether the card multiplies fp8: compute capability 8.9 (Ada), 9.0 (Hopper) and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def quantize(unit: nn.Module, high: Sequence[str], products: bool) -> list[str]:
    """Replace the frozen linear layers of a unit on meta by fp8 ones; gives their names within the unit.

    Args:
        high: patterns of names that stay as they are.
    """
    keep = re.compile("|".join(high) or r"(?!)")
    changed = []
    for name, module in list(unit.named_modules()):
        if type(module) is nn.Linear and not module.weight.requires_grad and not keep.search(name):
            owner, _, leaf = name.rpartition(".")
            setattr(unit.get_submodule(owner), leaf, Fp8Linear(module, products))
            changed.append(name)
    return changed
