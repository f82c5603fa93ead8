"""Adds an adapter's product to its layer's where that lies: neither a second result nor their sum is written to memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.library import Library, register_fake
from torch.utils.flop_counter import register_flop_formula

from diffpipe.pipeline.memory.merging import NARROW, made

aten = torch.ops.aten
# Not by ``torch.library.custom_op``, whose checks take the host longer than what is saved.
LIBRARY = Library("diffpipe", "FRAGMENT")
LIBRARY.define("adapted_mm(Tensor x, Tensor weight, Tensor? bias, Tensor low, Tensor up, float alpha) -> Tensor")
LIBRARY.define(
    "adapted_scaled_mm(Tensor x, Tensor weight, Tensor by, Tensor scale, Tensor? bias, ScalarType dtype, "
    "Tensor low, Tensor up, float alpha) -> Tensor"
)


def adapted_mm(x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor, up: Tensor, alpha: float) -> Tensor:
    """x W + bias + alpha (low up).

    Args:
        x, weight: N K and K M.
        bias: M.
        low, up: N R and R M.
    """
    out = torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)
    return out.addmm_(low, up, alpha=alpha)


def adapted_scaled_mm(
    x: Tensor, weight: Tensor, by: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, low: Tensor, up: Tensor, alpha: float
) -> Tensor:
    """The same of x and a weight in fp8, whose product is of another type.

    Args:
        by, scale: N 1 and 1 M, of the rows of x and the columns of the weight.
    """
    out = torch._scaled_mm(x, weight, scale_a=by, scale_b=scale, bias=bias, out_dtype=dtype)
    return out.addmm_(low, up, alpha=alpha)


for _implementation in (adapted_mm, adapted_scaled_mm):
    LIBRARY.impl(_implementation.__name__, _implementation, "CompositeExplicitAutograd")


@register_fake("diffpipe::adapted_mm", lib=LIBRARY)
def _(x: Tensor, weight: Tensor, *more: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@register_fake("diffpipe::adapted_scaled_mm", lib=LIBRARY)
def _(x: Tensor, weight: Tensor, by: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, *more: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1], dtype=dtype)


@register_flop_formula([torch.ops.diffpipe.adapted_mm, torch.ops.diffpipe.adapted_scaled_mm])
def _(x: Any, weight: Any, *more: Any, out_shape: Any = None, **given: Any) -> int:
    return 2 * x[0] * x[1] * weight[1]  # the adapter's are little beside them


def add_in_place(graph: fx.Graph) -> None:
    """Put one operation in the place of each layer's product, its bias, its adapter's product and their sum."""
    for node in list(graph.nodes):
        found = _layer(node)
        if found is None:
            continue
        with graph.inserting_before(node):
            out = made(graph, found.target, found.args, node)
            if _value(out).shape != _value(node).shape:
                out = made(graph, aten.view.default, (out, [*_value(node).shape]), node)
        node.replace_all_uses_with(out)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))  # torch keeps what might draw random numbers


@dataclass
class _Layer:
    """What a sum comes to: an operation and its arguments."""

    target: Any
    args: tuple[Any, ...]


def _layer(node: fx.Node) -> _Layer | None:
    """What a sum is when it is that of a layer's product and its adapter's, each of which is used for nothing else."""
    if node.target is not aten.add.Tensor or node.kwargs or len(node.all_input_nodes) != 2:
        return None
    for base, thin in (node.args, node.args[::-1]):
        adapter, alpha = _adapter(thin)
        product, bias = _base(base) if adapter is not None else (None, None)
        if adapter is None or product is None or not all(_alike(n, node) for n in (product, adapter)):
            continue
        given: Any = product.args
        if product.target is aten._scaled_mm.default and len(given) == 7 and given[4] is given[5] is None:
            x, weight, by, scale, _, _, dtype = given
            return _Layer(torch.ops.diffpipe.adapted_scaled_mm.default, (x, weight, by, scale, bias, dtype, *adapter.args, alpha))
        if product.target is aten.mm.default:
            return _Layer(torch.ops.diffpipe.adapted_mm.default, (*given, bias, *adapter.args, alpha))
        if product.target is aten.addmm.default and bias is None and not product.kwargs and _value(given[0]).ndim == 1:
            return _Layer(torch.ops.diffpipe.adapted_mm.default, (given[1], given[2], given[0], *adapter.args, alpha))
    return None


def _adapter(node: Any) -> tuple[fx.Node | None, float]:
    """The narrow product that a result is, and what it is multiplied by."""
    alpha = 1.0
    while isinstance(node, fx.Node) and len(node.users) == 1:
        given: Any = node.args
        if node.target is aten.mul.Tensor and isinstance(given[1], int | float):
            alpha *= given[1]
        elif node.target is aten.mm.default and _value(given[0]).shape[1] <= NARROW:
            return node, alpha
        elif node.target is not aten.view.default:
            break
        node = given[0]
    return None, alpha


def _base(node: Any) -> tuple[fx.Node | None, fx.Node | None]:
    """The product that a result is, and the bias that is added to it."""
    bias = None
    while isinstance(node, fx.Node) and len(node.users) == 1:
        given: Any = node.args
        if node.target in (aten._scaled_mm.default, aten.addmm.default, aten.mm.default):
            return node, bias
        if bias is None and node.target is aten.add.Tensor and isinstance(given[1], fx.Node) and _value(given[1]).ndim == 1:
            bias = given[1]
        elif node.target is not aten.view.default:
            break
        node = given[0]
    return None, None


def _alike(product: fx.Node, total: fx.Node) -> bool:
    """Whether a sum has the values of a product, perhaps in another shape."""
    mine, other = _value(product), _value(total)
    return mine.dtype == other.dtype and mine.numel() == other.numel() and mine.shape[-1] == other.shape[-1]


def _value(node: fx.Node) -> Tensor:
    return node.meta["val"]
