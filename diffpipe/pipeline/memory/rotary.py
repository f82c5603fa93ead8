"""Turns pairs of values, as rotary embeddings do, by reading of each value the other one of its pair, and no more."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from diffpipe.pipeline.memory.merging import CONVERT, made

aten, prims = torch.ops.aten, torch.ops.prims


def by_swapping(graph: fx.Graph) -> None:
    """Put the pairs swapped, times -1 and 1, in the place of each stack of the second value of pairs and the first, one of them negative.

    For each value of such a stack inductor reads both of the pair, each where the value is of its half, and computes both as far back as it
    has not written them. The result is the same, to the bit.
    """
    for node in list(graph.nodes):
        found = _turned(node)
        if found is None:
            continue
        pairs, first = found
        value = pairs.meta["val"]
        with graph.inserting_before(node):
            place = graph.call_function(
                prims.iota.default, (2,), {"start": 0, "step": 1, "dtype": torch.int64, "device": value.device, "requires_grad": False}
            )
            place.meta = {key: kept for key, kept in node.meta.items() if key not in ("val", "tensor_meta")}
            place.meta["val"] = value.new_empty(2, dtype=torch.int64)
            # -1 and 1, or 1 and -1.
            signs = made(
                graph, aten.add.Tensor, (made(graph, aten.mul.Tensor, (place, 2 if first else -2), node), -1 if first else 1), node
            )
            swapped = made(graph, prims.rev.default, (pairs, [value.ndim - 1]), node)
            turned = made(graph, aten.mul.Tensor, (swapped, made(graph, CONVERT, (signs, value.dtype), node)), node)
        node.replace_all_uses_with(turned)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))  # torch keeps what might draw random numbers


def _turned(node: fx.Node) -> tuple[fx.Node, bool] | None:
    """The pairs that a result is a turn of, and whether the first value of each is the negative one."""
    given: Any = node.args
    if node.target is not aten.cat.default or len(given[0]) != 2:
        return None
    last = node.meta["val"].ndim - 1
    if len(given) < 2 or given[1] % (last + 1) != last:
        return None
    halves = [_half(part, last) for part in given[0]]
    if halves[0] is None or halves[1] is None:
        return None
    (pairs, second, negative), (others, first, other) = halves
    alike = pairs is others and pairs.meta["val"].dtype == node.meta["val"].dtype
    return (pairs, negative) if alike and (second, first) == (1, 0) and negative != other else None


def _half(part: fx.Node, last: int) -> tuple[fx.Node, int, bool] | None:
    """The pairs of which a part of a stack has one value each, which one, and whether that is negative."""
    given: Any = part.args
    if part.target is not aten.unsqueeze.default or given[1] % (last + 1) != last:
        return None
    chosen: Any = given[0]
    negative = chosen.target is aten.neg.default
    if negative:
        (chosen,) = chosen.args
    if chosen.target is aten.select.int:
        pairs, dim, number = chosen.args
    elif chosen.target is operator.getitem and chosen.args[0].target is aten.unbind.int:
        pairs, dim = (*chosen.args[0].args, 0)[:2]
        number = chosen.args[1]
    else:
        return None
    shape = pairs.meta["val"].shape
    return (pairs, number, negative) if len(shape) == last + 1 and dim % (last + 1) == last and shape[-1] == 2 else None
