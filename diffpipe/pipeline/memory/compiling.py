"""Compiles units: once for each kind of unit and bucket, not once for each unit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_map

from diffpipe.config.schema import MemoryConfig
from diffpipe.pipeline.memory.recompute import kind_of, recompute
from diffpipe.pipeline.memory.tags import Cut

# torch gives a function up, and runs it uncompiled from then on, after 8 kinds of inputs; buckets and kinds of units are more.
MOST = 4096


def allow_many() -> None:
    """Have functions compiled for as many kinds of inputs as there are."""
    torch._dynamo.config.recompile_limit = MOST
    torch._dynamo.config.accumulated_recompile_limit = MOST


def compiled(forward: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """``forward`` compiled for the shapes that it is given; units of one kind share what is compiled.

    Args:
        policy: what the backward pass computes again, as ``memory.recompute``. The compiler sees both passes, so that the forward
            pass need not write what is computed again.
    """
    allow_many()

    def given(*args: Any, **kwargs: Any) -> Any:
        return tree_map(on_its_own, forward(*args, **kwargs))

    inner = torch.compile(given, dynamic=False, options={"custom_partitioner_fn": Cut(policy)})

    def called(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map(lambda x: _dense(x) if isinstance(x, Tensor) else x, (args, kwargs))
        return inner(*args, **kwargs)

    return called


def run_by(unit: nn.Module, memory: MemoryConfig, number: int) -> Callable[..., Any]:
    """A unit's ``forward`` as a memory section has it computed: compiled or not, its activations kept or computed again."""
    forward, policy = unit.forward, memory.policy_of(number, kind_of(unit))
    if memory.compile:
        return compiled(forward, policy)
    return forward if policy == "none" else recompute(forward, policy)


def on_its_own(result: Any) -> Any:
    """What a unit gives, in memory of its own where it is a part of a larger result, as the picture's tokens are of a picture's and a
    text's: autograd would else put the gradients of all parts together outside of the graph, each in zeros of the whole's size."""
    if isinstance(result, Tensor) and result._base is not None and result.numel() < result._base.numel():
        return result.clone()
    return result


def _dense(tensor: Tensor) -> Tensor:
    """The tensor laid out row by row, its dims of size 1 too: a unit's inputs may be views of the result of the unit before it,
    those of the first are not, and one graph should do for both."""
    tensor = tensor.contiguous()
    plain = [1]
    for size in reversed(tensor.shape[1:]):
        plain.append(plain[-1] * size)
    return tensor if list(tensor.stride()) == plain[::-1][: tensor.ndim] else tensor.flatten().view(tensor.shape)


def graphs() -> int:
    """How many graphs this process has compiled: more after the first steps of each bucket are time lost."""
    return int(counters["stats"]["unique_graphs"])
