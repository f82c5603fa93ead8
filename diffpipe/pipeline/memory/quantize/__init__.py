"""Keeps the frozen linear weights of blocks in fewer bits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn

from diffpipe.config.schema import MemoryConfig
from diffpipe.errors import ConfigError
from diffpipe.models.adapters import base_name
from diffpipe.models.base import DiffusionModel
from diffpipe.models.weights import WeightSource
from diffpipe.pipeline.memory.quantize.fp7 import Fp7Linear, fits
from diffpipe.pipeline.memory.quantize.fp8 import BlockFp8Linear, Fp8Linear, PlainFp8Linear
from diffpipe.pipeline.memory.quantize.frozen import FrozenLinear
from diffpipe.pipeline.memory.quantize.nf4 import Nf4Linear


def quantize(
    module: nn.Module,
    units: Iterable[str],
    config: MemoryConfig,
    model: DiffusionModel,
    multiplies: bool,
    source: WeightSource | None = None,
) -> list[str]:
    """Replace the frozen linear layers of units on meta, but those that the family keeps as they are; gives their names.

    Args:
        units: names of the units within ``module``.
        multiplies: whether the device multiplies fp8.
        source: of the weights, some of which may be kept as fp8 already; None where that does not matter.

    Raises:
        ConfigError: when the device or this installation cannot.
    """
    if config.quantize == "none":
        return []
    make = _maker(config, multiplies)
    keep = re.compile("|".join(model.high_precision) or r"(?!)")
    changed = []
    for unit in units:
        for inner, layer in list(module.get_submodule(unit).named_modules()):
            if type(layer) is nn.Linear and not layer.weight.requires_grad and not keep.search(inner):
                name = f"{unit}.{inner}"
                # Codes of a file fit no other blocks than they were made with.
                held = source is not None and config.quantize == "fp8-block" and source.has_codes(base_name(f"{name}.weight"))
                owner, _, leaf = name.rpartition(".")
                setattr(module.get_submodule(owner), leaf, Fp8Linear(layer, products=False) if held else make(layer))
                changed.append(name)
    return changed


def has_products(device: torch.device) -> bool:
    """Whether the card multiplies fp8: compute capability 8.9 (Ada), 9.0 (Hopper) and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _maker(config: MemoryConfig, multiplies: bool) -> Callable[[nn.Linear], FrozenLinear]:
    """What makes a layer of the kind that is asked for."""
    if config.quantize == "nf4":
        return Nf4Linear
    if config.quantize == "fp8-block":
        return BlockFp8Linear
    products = multiplies if config.products is None else config.products
    if products and not multiplies:
        raise ConfigError(
            "the device does not multiply fp8",
            where="memory.products",
            expected="a card of Ada, Hopper or later",
            fix="set it to null",
        )
    plain = partial(PlainFp8Linear if config.quantize == "fp8-plain" else Fp8Linear, products=products)
    if config.quantize != "fp7":
        return plain
    return lambda layer: Fp7Linear(layer, products) if fits(layer) else plain(layer)
