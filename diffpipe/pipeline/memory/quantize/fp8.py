"""Linear layers in fp8 (e4m3), multiplied as fp8 where the card can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diffpipe.errors import ConfigError
from diffpipe.models.weights import WeightSource
from diffpipe.pipeline.memory.quantize.frozen import Dequantized, FrozenLinear, behind, empty

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
FEW = 64  # rows below which a product is too small to gain from fp8
LENGTH = 16  # what fp8 products need both sides of a weight to be a multiple of
BLOCK = 128  # rows and columns that share a scale


class Fp8Linear(FrozenLinear):
    """A weight in fp8 with a scale for each row. What a file has in e4m3 is taken as it is, with the file's scales.

    Args:
        products: multiply in fp8, the input scaled for each row as it comes. The gradient of the input is computed
            likewise, the gradient's rows multiplied by the weight's scales first. Else the weight is brought to the input's type.
    """

    def __init__(self, inner: nn.Linear, products: bool) -> None:
        super().__init__(inner)
        self.products = products and inner.in_features % LENGTH == 0 and inner.out_features % LENGTH == 0
        self.codes = empty(inner.out_features, inner.in_features, dtype=FP8)
        self.scale = empty(inner.out_features, dtype=torch.float32)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if not self.products or x.shape[0] < FEW:
            return Dequantized.apply(self.brought_to, x, self.codes, self.scale, bias)
        out = _Product.apply(self.as_fp8, x, self.codes, self.scale)
        return out if bias is None else out + bias

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        return self.brought_to(self.codes, self.scale, dtype)

    @staticmethod
    def as_fp8(codes: Tensor, after: Tensor | None) -> Tensor:
        """What is kept as values of e4m3, which a product multiplies.

        Args:
            after: the gradient, in a backward pass (``behind``).
        """
        return codes if after is None else behind(codes.view(torch.uint8), after).view(FP8)

    @staticmethod
    def brought_to(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight in another type."""
        return dequantized(codes, scale, dtype)

    def encoded(self, source: WeightSource, name: str, device: torch.device) -> dict[str, Tensor]:
        codes, scale = source.codes(name) or self.quantized(source.read(name).to(device).float(), name)
        return {"codes": codes, "scale": scale}

    def quantized(self, weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """A float32 weight as values of e4m3 and scales; its name is for messages."""
        scale = _scale(weight.abs().amax(1))
        return self.rounded(weight / scale[:, None]), scale

    def rounded(self, weight: Tensor) -> Tensor:
        """The values of e4m3 that stand for a weight."""
        return weight.to(FP8)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, products={self.products}"


class PlainFp8Linear(Fp8Linear):
    """A weight cast to fp8 as it is: all scales are 1, but those that a file brings."""

    def quantized(self, weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
        largest = weight.abs().amax().item()
        if largest > LARGEST:
            raise ConfigError(
                f"{name} has values up to {largest:g}",
                where="memory.quantize: fp8-plain",
                expected=f"none beyond {LARGEST:g}, the largest of e4m3",
                fix="set it to fp8, which scales each row",
            )
        return weight.to(FP8), torch.ones(weight.shape[0], device=weight.device)


class BlockFp8Linear(FrozenLinear):
    """A weight in fp8 with a scale for each block of 128 x 128, brought to the input's type for each product."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__(inner)
        self.codes = empty(inner.out_features, inner.in_features, dtype=FP8)
        self.scale = empty(-(-inner.out_features // BLOCK), -(-inner.in_features // BLOCK), dtype=torch.float32)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return Dequantized.apply(dequantized, x, self.codes, self.scale, bias)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        return dequantized(self.codes, self.scale, dtype)

    def encoded(self, source: WeightSource, name: str, device: torch.device) -> dict[str, Tensor]:
        weight = source.read(name).to(device).float()
        rows, columns = weight.shape
        padded = nn.functional.pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
        scale = _scale(padded.abs().unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).amax((1, 3)))
        return {"codes": (weight / _spread(scale, rows, columns)).to(FP8), "scale": scale}


def dequantized(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What fp8 codes stand for.

    Args:
        scale: one for each row, or for each block.
    """
    kind = torch.float32 if dtype == torch.float16 else dtype  # small scales are none of float16's values
    return (codes.to(kind) * _spread(scale.to(kind), *codes.shape)).to(dtype)


def _spread(scale: Tensor, rows: int, columns: int) -> Tensor:
    """Scales in a shape that broadcasts to their weight."""
    if scale.ndim == 1:
        return scale[:, None]
    return scale.repeat_interleave(BLOCK, 1)[:, :columns].repeat_interleave(BLOCK, 0)[:rows]


def _scale(largest: Tensor) -> Tensor:
    """The power of two that brings values up to ``largest`` into e4m3: bfloat16 holds a code times it exactly, so that the weight
    is the same there as in float32. Being a floating type, e4m3 is no less precise for it."""
    return torch.exp2((largest / LARGEST).clamp(min=2.0**-100).log2().ceil())


def _by_row(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as fp8, each with a scale of its own."""
    scale = (x.abs().amax(1, keepdim=True).float() / LARGEST).clamp(min=1e-12)
    return (x.float() * scale.reciprocal()).to(FP8), scale  # a division for each value would take a GPU longer


class _Product(torch.autograd.Function):
    """x W^T in fp8, forward and for the gradient of x."""

    @staticmethod
    def forward(ctx: Any, as_fp8: Callable[[Tensor, Tensor | None], Tensor], x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scale)
        ctx.as_fp8 = as_fp8
        rows, by = _by_row(x)
        return torch._scaled_mm(rows, as_fp8(codes, None).t(), scale_a=by, scale_b=scale[None], out_dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None, None]:
        (gradient,) = gradients
        codes, scale = ctx.saved_tensors
        rows, by = _by_row(gradient * scale.to(gradient.dtype))
        # Ada and Hopper multiply fp8 only where what is summed over lies side by side in both factors. Here those are a column's
        # values, so the weight is laid out by columns, whichever of the factors it is made.
        columns = ctx.as_fp8(codes, gradient).view(torch.uint8).t().contiguous().view(FP8).t()
        ones = torch.ones((1, columns.shape[1]), dtype=torch.float32, device=codes.device)
        return None, torch._scaled_mm(rows, columns, scale_a=by, scale_b=ones, out_dtype=gradient.dtype), None, None
