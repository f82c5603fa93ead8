"""Decides what autograd keeps of the tensors that a unit saves for its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Substitute(Protocol):
    """What is kept in a saved tensor's place."""

    def restore(self) -> Tensor:
        """The tensor; called in backward."""
        ...


Packer = Callable[[Tensor], Substitute | None]


def saving(forward: Callable[..., Any], packers: Callable[[], Sequence[Packer]]) -> Callable[..., Any]:
    """``forward`` with each saved tensor given to the packers, the first of which that answers decides.

    One pair of hooks for all: of nested ones torch would ask the innermost alone.

    Args:
        packers: called at each forward pass.
    """

    def saved(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        asked = packers()

        def pack(tensor: Tensor) -> Tensor | Substitute:
            for packer in asked:
                substitute = packer(tensor)
                if substitute is not None:
                    return substitute
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept if isinstance(kept, Tensor) else kept.restore()):
            return forward(*args, **kwargs)

    return saved
