"""Tells how much memory an optimizer's state takes before there is any."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from diffpipe.config.schema import OptimizerConfig
from diffpipe.optim import make_optimizer
from diffpipe.optim.named import EIGHT_BIT

SIDE = 256  # of the matrix and length of the vector that other optimizers are tried on
FEWEST = 4096  # elements of which bitsandbytes keeps averages in 8 bits; smaller tensors have them in 32
GROUP = 256  # elements that share a float32 scale in each of its two averages


def state_bytes(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of the state for ``parameters``, on meta or not.

    For 8-bit AdamW by its formula, since it runs on a GPU only; for any other by what one step of it leaves for a small
    matrix and a small vector of the same type.
    """
    return sum(_eight_bit(config.kind, p) if config.kind in EIGHT_BIT else _each(config, p) for p in parameters)


def _eight_bit(kind: str, parameter: Tensor) -> int:
    count = parameter.numel()
    averages = 8 * count if count < FEWEST else 2 * count + 2 * 4 * -(-count // GROUP)
    compensation = parameter.nbytes if kind == "adamw8bit-kahan" and parameter.dtype != torch.float32 else 0
    return averages + compensation


def _each(config: OptimizerConfig, parameter: Tensor) -> int:
    return round(_tried(config.model_dump_json(exclude_unset=True), parameter.dtype, parameter.ndim > 1) * parameter.numel())


@cache
def _tried(config: str, dtype: torch.dtype, matrix: bool) -> float:
    """Bytes of state for each element."""
    weight = nn.Parameter(torch.zeros((SIDE, SIDE) if matrix else (SIDE,), dtype=dtype))
    optimizer = make_optimizer(OptimizerConfig.model_validate_json(config), [("weight", weight)])
    weight.grad = torch.full_like(weight, 1e-3)
    with torch.random.fork_rng(devices=[]):
        optimizer.step()
    return sum(t.nbytes for t in tree_leaves(optimizer.state[weight]) if isinstance(t, Tensor)) / weight.numel()
