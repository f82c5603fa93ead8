"""Puts narrow products of a graph that share a factor together, those of adapters above all: fewer kernels, and the factor is read once.

Adapters of queries, keys and values are given the same rows x. With them side by side, x [A1; A2; A3]^T is one product, of which each takes
its columns; so are the gradients of A1, A2 and A3, which share x too, and the three parts that they add to the gradient of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

aten = torch.ops.aten
CONVERT = torch.ops.prims.convert_element_type.default
NARROW = 256  # columns of what lies side by side: up to there, a product takes as long as the wide factor takes to be read


def merge(graph: fx.Graph) -> fx.Graph:
    """The graph with such products put together; what is computed twice is computed once first.

    A sum of products comes out nearer to its exact value: it is rounded once.
    """
    from torch._functorch.compile_utils import fx_graph_cse
    from torch._inductor.pattern_matcher import stable_topological_sort

    graph = fx_graph_cse(graph)
    sides = _Sides(graph)
    for shared in (0, 1):
        for group in _sharing(graph, shared):
            sides.share(group, shared)
    for total in [n for n in graph.nodes if _is_sum(n) and not any(_is_sum(u) and len(n.users) == 1 for u in n.users)]:
        for group in _alike(total):
            sides.add(group)
    stable_topological_sort(graph)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))  # torch keeps what might draw random numbers
    return graph


class _Sides:
    """Makes one product of several.

    Attributes:
        made: what lies side by side already, by its parts and the dim.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.made: dict[tuple[tuple[fx.Node, ...], int], fx.Node] = {}

    def share(self, group: Sequence[fx.Node], shared: int) -> None:
        """One product in the place of those that have the factor of that number in common."""
        dim = 1 - shared
        parts = [_given(node)[dim] for node in group]
        with self.graph.inserting_before(group[0]):
            beside, common = self.beside(parts, dim), _given(group[0])[shared]
            factors = (common, beside) if shared == 0 else (beside, common)
            whole = self.made_of(aten.mm.default, factors, group[0])
            begin = 0
            for node in group:
                end = begin + node.meta["val"].shape[dim]
                node.replace_all_uses_with(self.made_of(aten.slice.Tensor, (whole, dim, begin, end), node))
                begin = end

    def add(self, group: Sequence[list[fx.Node]]) -> None:
        """One product in the place of several that are added up.

        Args:
            group: of each, the product and what is done with it until it is added.
        """
        products, last = [path[0] for path in group], group[-1]
        with self.graph.inserting_before(last[0]):
            factors = tuple(self.beside([_given(p)[i] for p in products], 1 - i) for i in (0, 1))
            last[0].replace_all_uses_with(self.made_of(aten.mm.default, factors, last[0]))
        for path in group[:-1]:
            (total,) = path[-1].users
            total.replace_all_uses_with(next(n for n in total.all_input_nodes if n is not path[-1]))
            self.graph.erase_node(total)

    def beside(self, parts: Sequence[fx.Node], dim: int) -> fx.Node:
        """Matrices side by side; where all are transposed, the matrices themselves are put together."""
        parts = tuple(_plain(part) for part in parts)
        if all(_is_turned(part) for part in parts):
            return self.made_of(aten.permute.default, (self.beside([_given(part)[0] for part in parts], 1 - dim), [1, 0]), parts[0])
        if (parts, dim) not in self.made:
            self.made[parts, dim] = self.made_of(aten.cat.default, ([*parts], dim), parts[0])
        return self.made[parts, dim]

    def made_of(self, target: Any, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
        """A new operation, of the same origin as another."""
        node = made(self.graph, target, args, like)
        for given in node.all_input_nodes:
            _raise(given, node)
        return node


def made(graph: fx.Graph, target: Any, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
    """A new operation at the place where the graph inserts, of the same origin as another."""
    node = graph.call_function(target, args)
    node.meta = {key: value for key, value in like.meta.items() if key not in ("val", "tensor_meta")}
    node.meta["val"] = target(*map_arg(args, lambda n: n.meta["val"]))
    return node


def _sharing(graph: fx.Graph, shared: int) -> list[list[fx.Node]]:
    """Products with a factor in common whose other factors are narrow, none of which needs another's result."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if _is_product(node) and node.meta["val"].shape[1 - shared] <= NARROW:
            found.setdefault(_given(node)[shared], []).append(node)
    groups = []
    for nodes in found.values():
        apart: list[fx.Node] = []
        for node in nodes:
            if not any(_reaches(other, node) for other in apart):
                apart.append(node)
        if len(apart) > 1:
            groups.append(apart)
    return groups


def _alike(total: fx.Node) -> list[list[list[fx.Node]]]:
    """Products in a sum that one product can be: with few columns to sum over, and treated alike until they are added."""
    found: dict[Any, list[list[fx.Node]]] = {}
    open_ = [total]
    while open_:
        node = open_.pop()
        for given in node.all_input_nodes:
            if _is_sum(given) and len(given.users) == 1:
                open_.append(given)
                continue
            path = [given]
            while path[0].target in (CONVERT, aten.view.default) and len(path[0].users) == 1:
                path.insert(0, path[0].all_input_nodes[0])
            first, alone = path[0], all(len(n.users) == 1 for n in path)
            if alone and _is_product(first) and _given(first)[0].meta["val"].shape[1] <= NARROW:
                key = (first.meta["val"].shape, first.meta["val"].dtype, *((n.target, str(n.args[1:])) for n in path[1:]))
                found.setdefault(key, []).append(path)
    place = {node: i for i, node in enumerate(total.graph.nodes)}
    return [sorted(paths, key=lambda path: place[path[0]]) for paths in found.values() if len(paths) > 1]


def _is_product(node: fx.Node) -> bool:
    return node.target is aten.mm.default


def _is_sum(node: fx.Node) -> bool:
    """Whether two different results of its own type and shape are added."""
    if node.target is not aten.add.Tensor or node.kwargs or len(node.all_input_nodes) != 2:
        return False
    mine = node.meta["val"]
    return all(n.meta["val"].shape == mine.shape and n.meta["val"].dtype == mine.dtype for n in node.all_input_nodes)


def _is_turned(node: fx.Node) -> bool:
    return node.target is aten.permute.default and node.meta["val"].ndim == 2 and tuple(_given(node)[1]) == (1, 0)


def _plain(node: fx.Node) -> fx.Node:
    """The same matrix, not transposed twice."""
    while _is_turned(node) and _is_turned(_given(node)[0]):
        node = _given(_given(node)[0])[0]
    return node


def _given(node: fx.Node) -> tuple[Any, ...]:
    """A node's arguments; those of a product are the two matrices."""
    return node.args


def _reaches(first: fx.Node, node: fx.Node) -> bool:
    """Whether one result is needed for another."""
    seen, open_ = {node}, [node]
    while open_:
        for given in open_.pop().all_input_nodes:
            if given is first:
                return True
            if given not in seen:
                seen.add(given)
                open_.append(given)
    return False


def _raise(node: fx.Node, place: fx.Node) -> None:
    """Move what a weight goes through on its way to a product in front of one that came before, so that this does not wait."""
    chain = [node]
    while chain[-1].op == "call_function" and len(chain[-1].all_input_nodes) == 1:
        chain.append(chain[-1].all_input_nodes[0])
    if chain.pop().op == "placeholder":
        for each in reversed(chain):
            if place < each:
                place.prepend(each)
