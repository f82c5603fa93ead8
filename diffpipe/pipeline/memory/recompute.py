"""Keeps only the inputs of a unit and computes the rest again in backward."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute(unit: nn.Module) -> None:
    """Make ``unit`` recompute its activations; names, values and gradients stay as they are.

    The instance's ``forward`` is replaced rather than the module, because a wrapping module would rename
    every parameter. Non-reentrant: the reentrant kind gives no gradient when only adapters inside train.
    """
    inner = unit.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(inner, *args, use_reentrant=False, **kwargs)

    unit.forward = forward
