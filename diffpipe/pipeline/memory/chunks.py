"""Feed-forward layers that take the tokens in parts, one after another."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

NAMES = re.compile(r"(^|\.)(ff|ffn|ff_context|feed_forward)$")  # what diffusers calls them, whatever the family


def chunk(unit: nn.Module, chunks: int, compiles: bool) -> None:
    """Have a unit's feed-forward layers take the tokens in ``chunks`` parts. Their width inside, several times the
    model's, is the most that a block holds; so of it only a part is there at once, in the forward and in the backward pass.

    Args:
        compiles: whether the unit is compiled: then the compiler, which sees both passes, computes each part again where it is
            needed. Else the part is checkpointed.
    """
    if chunks == 1:
        return
    for name, layer in list(unit.named_modules()):
        if NAMES.search(name):
            # Another class for the same module, as torch's fully_shard does: names stay, and all blocks share what is compiled.
            layer.__class__ = _chunked(type(layer))
            layer.chunks, layer.again = chunks, not compiles  # type: ignore[assignment]


@cache
def _chunked(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of feed-forward layers ``kind`` in parts."""

    class Chunked(kind):  # type: ignore[misc, valid-type]
        chunks: int
        again: bool

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            whole = super().forward
            parts = x.chunk(self.chunks, -2)
            if self.again and torch.is_grad_enabled():
                return torch.cat([checkpoint(whole, part, *args, use_reentrant=False, **kwargs) for part in parts], -2)
            return torch.cat([whole(part, *args, **kwargs) for part in parts], -2)

    Chunked.__name__ = Chunked.__qualname__ = kind.__name__
    return Chunked
