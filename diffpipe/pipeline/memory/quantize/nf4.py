"""Linear layers in nf4: bitsandbytes' 4 bits, with a scale for each 64 values."""

from __future__ import annotations

import importlib
from functools import partial

import torch
from torch import Tensor, nn

from diffpipe.errors import ConfigError
from diffpipe.models.weights import WeightSource
from diffpipe.pipeline.memory.quantize.frozen import Dequantized, FrozenLinear, empty

BLOCK = 64  # values that share a scale


class Nf4Linear(FrozenLinear):
    """A weight as pairs of codes, and float32 scales: 4.5 bits a value. It is brought to the input's type for each product."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__(inner)
        _register()
        count = inner.out_features * inner.in_features
        self.codes = empty(-(-count // 2), dtype=torch.uint8)
        self.scale = empty(-(-count // BLOCK), dtype=torch.float32)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return Dequantized.apply(partial(_dequantized, shape=[self.out_features, self.in_features]), x, self.codes, self.scale, bias)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        return _dequantized(self.codes, self.scale, dtype, [self.out_features, self.in_features])

    def encoded(self, source: WeightSource, name: str, device: torch.device) -> dict[str, Tensor]:
        weight = source.read(name).to(device).float()
        codes, scale = torch.ops.bitsandbytes.quantize_4bit(weight, BLOCK, "nf4", torch.uint8)
        return {"codes": codes.flatten(), "scale": scale}


def _register() -> None:
    """Have bitsandbytes register its operators.

    Raises:
        ConfigError: when it is not installed.
    """
    try:
        importlib.import_module("bitsandbytes")
    except ImportError as fault:
        raise ConfigError(
            "bitsandbytes is not installed here",
            where="memory.quantize: nf4",
            expected="a platform that bitsandbytes is made for",
            fix="pip install bitsandbytes, or take fp8",
        ) from fault


def _dequantized(codes: Tensor, scale: Tensor, dtype: torch.dtype, shape: list[int]) -> Tensor:
    return torch.ops.bitsandbytes.dequantize_4bit(codes, scale, BLOCK, "nf4", shape, dtype)
