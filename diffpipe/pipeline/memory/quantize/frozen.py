"""A frozen linear layer whose weight is kept in few bits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diffpipe.models.weights import WeightSource


class FrozenLinear(nn.Module, ABC):
    """Takes a linear layer's place.

    What it keeps are frozen parameters, as the layer's weight was, so that they stream, move and are counted likewise:
    ``codes`` and what tells their size.

    Args:
        inner: the layer on meta; its name and bias stay.
    """

    codes: nn.Parameter

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = inner.in_features, inner.out_features
        self.dtype = inner.weight.dtype
        self.bias = inner.bias

    @property
    def weight(self) -> Tensor:
        """What the codes stand for, in the type that the layer had. DoRA measures its rows."""
        return self.dequantized(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        kind = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        bias = None if self.bias is None else self.bias.to(kind)
        out = self.product(x.to(kind).reshape(-1, self.in_features), bias)
        return out.view(*x.shape[:-1], self.out_features)

    @abstractmethod
    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output for rows."""

    @abstractmethod
    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """What the codes stand for."""

    @abstractmethod
    def encoded(self, source: WeightSource, name: str, device: torch.device) -> dict[str, Tensor]:
        """What the layer keeps of the weight ``name``, made on ``device``."""

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def empty(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """A frozen parameter on meta."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


class Dequantized(torch.autograd.Function):
    """x W^T + b, the weight brought to the type of x for the product alone: of it, only the codes are kept for backward."""

    @staticmethod
    def forward(ctx: Any, dequantized: Callable[..., Tensor], x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, scale)
        ctx.dequantized = dequantized
        return nn.functional.linear(x, dequantized(codes, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        codes, scale = ctx.saved_tensors
        return None, gradient @ ctx.dequantized(codes, behind(scale, gradient), gradient.dtype), None, None, None


def behind(tensor: Tensor, gradient: Tensor) -> Tensor:
    """The tensor as it is, though a compiler must think that it depends on the gradient. It would bring a weight to another type
    or layout in the forward pass, where that can be done too, and keep the result for backward."""
    return tensor + (gradient[0, 0].abs() < 0).to(tensor.dtype)
