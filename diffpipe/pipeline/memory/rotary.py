"""Turns pairs of values, as rotary embeddings do, by reading of each value the other one of its pair, and no more."""

from __future__ import annotations

import operator
from dataclasses import dataclass
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
    first, second = (_half(part, last) for part in given[0])
    if first is None or second is None or first.pairs is not second.pairs or (first.place, second.place) != (1, 0):
        return None
    alike = first.pairs.meta["val"].dtype == node.meta["val"].dtype
    return (first.pairs, first.negative) if alike and first.negative != second.negative else None


@dataclass
class _Half:
    """One value of each pair, as it is or negative."""

    pairs: fx.Node
    place: int
    negative: bool


def _half(part: fx.Node, last: int) -> _Half | None:
    """What a part of a stack is, where it is one value of each pair."""
    given: Any = part.args
    if part.target is not aten.unsqueeze.default or given[1] % (last + 1) != last:
        return None
    chosen: Any = given[0]
    negative = chosen.target is aten.neg.default
    if negative:
        (chosen,) = chosen.args
    if chosen.target is aten.select.int:
        pairs, dim, place = chosen.args
    elif chosen.target is operator.getitem and chosen.args[0].target is aten.unbind.int:
        (pairs, *dims), place = chosen.args[0].args, chosen.args[1]
        dim = dims[0] if dims else 0
    else:
        return None
    shape = pairs.meta["val"].shape
    return _Half(pairs, place, negative) if len(shape) == last + 1 and dim % (last + 1) == last and shape[-1] == 2 else None
