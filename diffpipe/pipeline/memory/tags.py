"""Cuts the graph of a compiled unit into its two passes, by what the backward pass computes again."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomPartitionerFn, get_hash_for_files
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.flop_counter import flop_registry

from diffpipe.pipeline.memory import adapted, gelu, merging, recompute, rotary
from diffpipe.pipeline.memory.adapted import add_in_place
from diffpipe.pipeline.memory.gelu import by_sigmoid
from diffpipe.pipeline.memory.merging import CONVERT, merge
from diffpipe.pipeline.memory.recompute import LONG, is_attention
from diffpipe.pipeline.memory.rotary import by_swapping

Buffer = tuple[fx.Node, int]  # a node, and which of its results
WRITTEN = "inductor_realize_to_strides"  # in a node's meta: inductor writes its result to memory
THIN = 64  # how many times smaller than its weight both rows and result of a product are, for the result to be kept
WIDE = 8 * LONG  # from here on, a value of a product takes as long to compute as one of long attention, whose arithmetic is slower
SLACK = 1.1  # what may pass at a narrow point, in parts of what the unit gives: the main stream of activations and little else


@dataclass(frozen=True)  # equal ones are one to torch.compile, and units compiled with them share their graphs
class Cut(CustomPartitionerFn):
    """A step of torch.compile's, with the graph of both passes in its hands.

    Attributes:
        policy: as ``memory.recompute``.
    """

    policy: str

    def __call__(self, gm: fx.GraphModule, joint_inputs: Any, **given: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        return cut(gm, self.policy, joint_inputs, **given)

    def uuid(self) -> Any:
        # What was compiled before is found again by it: as long as nothing that decides the cut has changed.
        return get_hash_for_files((__file__, *(m.__file__ for m in (adapted, gelu, merging, recompute, rotary))), self.policy)


def cut(module: fx.GraphModule, policy: str, inputs: Any = (), **given: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The forward and the backward pass.

    Args:
        module: the graph of both, which is taken apart.
        policy: as ``memory.recompute``.
        given: as to torch's partitioner, which does the work.
    """
    from functorch.compile import min_cut_rematerialization_partition

    module.graph = merge(module.graph)
    by_sigmoid(module.graph)
    add_in_place(module.graph)
    by_swapping(module.graph)
    if policy != "none":
        tag(module.graph, policy)
    _write_sums(module.graph)
    hidden = {_hide(node): target for node in module.graph.nodes if _draws_nothing(node) and (target := node.target)}
    halves = min_cut_rematerialization_partition(module, inputs, **given)
    for half in halves:
        for node in half.graph.nodes:
            node.target = hidden.get(node.target, node.target)
        half.recompile()
    return halves


def _write_sums(graph: fx.Graph) -> None:
    """Have the sums of a layer's and its adapter's products written where they are read more than once: inductor would add again for
    each use, and so hold both products instead of their sum."""
    for node in graph.nodes:
        if len(_readers(node)) > 1 and _summed(node) > 1:
            node.meta[WRITTEN] = True


def _readers(node: fx.Node) -> set[fx.Node]:
    """What reads a result, through views and changes of type."""
    through = {u for u in node.users if u.op == "call_function" and (root(u)[0] is node or u.target is CONVERT)}
    return set(node.users) - through | {reader for view in through for reader in _readers(view)}


def _summed(node: fx.Node) -> int:
    """How many products a result is the sum of, scaled or not; 0 where it is no such sum."""
    if node.target is torch.ops.aten.mul.Tensor and len(node.all_input_nodes) == 1:
        node = root(node.all_input_nodes[0])[0]
    if _is_heavy(node):
        return 1
    if node.target is not torch.ops.aten.add.Tensor:
        return 0
    # Of its own size: not the few values of a modulation, which it adds to every row.
    return sum(_summed(root(n)[0]) for n in node.all_input_nodes if _width(n) == _width(node))


def _draws_nothing(node: fx.Node) -> bool:
    """Whether an operation is attention without dropout. torch takes it for random, and would put it, where it is computed again,
    into a call that keeps the device's random state: slower, and not to be had from C++."""
    if not is_attention(node.target):
        return False
    given = {a.name: v for a, v in zip(node.target._schema.arguments, node.args, strict=False)} | node.kwargs  # pyright: ignore[reportAttributeAccessIssue, reportFunctionMemberAccess]
    return not given.get("dropout_p", 0)


def _hide(node: fx.Node) -> Callable[..., Any]:
    """Call something in an operation's place that the partitioner does not know."""
    target: Any = node.target

    def hidden(*args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    node.target = hidden
    return hidden


def tag(graph: fx.Graph, policy: str) -> None:
    """Mark each result of the forward pass: kept for the backward pass, or computed again.

    Args:
        policy: "block" keeps only what goes in, and products of a few rows (of a modulation), which are less than what would have to be
            read again; "selective" keeps the results of long attention too, and those of the widest layers of which only a gate's
            gradient is made; "parts" keeps also what passes at the narrowest point before the widest layer, so that what comes before
            and after it is not there at once.
    """
    ahead = _forward(graph)
    first = set(ahead)
    kept = {root(n)[0] for n in ahead if _is_thin(n) or _is_seed(n) or (policy != "block" and (_is_costly(n) or _is_gated(n, first)))}
    if policy == "parts":
        kept |= _narrowest(graph, ahead)
    for node in ahead:
        # Not views of it: some versions of torch would keep them beside what they are views of.
        keeps = not _is_view(node) and root(node)[0] in kept
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE
        node.meta["ac_graph_id"] = 1


def tensors(node: fx.Node) -> list[Tensor | None]:
    """A node's results."""
    value = node.meta.get("val")
    each = value if isinstance(value, tuple | list) else (value,)
    return [x if isinstance(x, Tensor) else None for x in each]


def root(node: fx.Node) -> Buffer:
    """The node whose memory a node's result lies in, through views, and which of its results that is."""
    place = 0
    while node.op == "call_function":
        if node.target is operator.getitem:
            place, node = int(node.args[1]), node.args[0]  # pyright: ignore[reportArgumentType, reportAssignmentType]
        elif _views(node):
            node = node.all_input_nodes[0]
        else:
            break
    return node, place


def _views(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None or schema.is_mutable:
        return False
    return node.target is torch.ops.aten._unsafe_view.default or any(r.alias_info is not None for r in schema.returns)


def _is_view(node: fx.Node) -> bool:
    """Whether its memory is that of another result: of a view, or of one of several views."""
    return _views(node.all_input_nodes[0] if node.target is operator.getitem else node)


def _is_tangent(node: fx.Node) -> bool:
    return node.op == "placeholder" and "tangents" in node.name


def _forward(graph: fx.Graph) -> list[fx.Node]:
    """The operations that need no gradient."""
    behind: set[fx.Node] = set()
    ahead = []
    for node in graph.nodes:
        if _is_tangent(node) or any(n in behind for n in node.all_input_nodes):
            behind.add(node)
        elif node.op == "call_function":
            ahead.append(node)
    return ahead


def _is_costly(node: fx.Node) -> bool:
    made = root(node)[0]
    if not is_attention(made.target):
        return False
    keys = tensors(made.args[1])[0]  # pyright: ignore[reportArgumentType]
    return keys is not None and keys.shape[-2] >= LONG


def _is_gated(node: fx.Node, ahead: set[fx.Node]) -> bool:
    """Whether it is a wide layer's result, its adapter's included, that the backward pass only multiplies by its gradient and adds up: the
    gradient of the modulation's gate, or of another factor of few values, that a block multiplies the layer's result by."""
    if _inner(node) < WIDE:
        return False
    late = [n for n in _readers(node) if n not in ahead]
    return bool(late) and all(n.target is torch.ops.aten.mul.Tensor and _adds_up(n) for n in late)


def _adds_up(node: fx.Node) -> bool:
    """Whether nothing of a result is used but sums of its rows."""
    readers = _readers(node)
    return bool(readers) and all(n.target is torch.ops.aten.sum.dim_IntList and _over_rows(n) for n in readers)


def _over_rows(node: fx.Node) -> bool:
    """Whether a sum leaves one row, or few."""
    summed, dims = node.args[:2]
    ndim = next(t.ndim for t in tensors(summed) if t is not None)  # pyright: ignore[reportArgumentType]
    return THIN * _width(node) <= _width(summed) and all(d % ndim != ndim - 1 for d in dims)  # pyright: ignore[reportArgumentType, reportGeneralTypeIssues, reportOptionalIterable, reportOperatorIssue]


def _inner(node: fx.Node) -> int:
    """How many pairs of values are multiplied for each value of a product, or of the longest of the products that it is the sum of."""
    weight = _weight(node)
    if weight is not None:
        return next(t.shape[-2] for t in tensors(weight) if t is not None)
    return max((_inner(root(n)[0]) for n in node.all_input_nodes), default=0) if _summed(node) else 0


def _is_seed(node: fx.Node) -> bool:
    """Whether it draws what dropout draws from. It is a few bytes; to draw it again torch would keep the generator's state, which versions
    before 2.15 fail at on CUDA (``graphsafe_run_with_rng_state`` of an operation without tensors)."""
    return str(node.target).startswith("prims.inductor_seed")


def _is_thin(node: fx.Node) -> bool:
    """Whether it is a product with a weight beside which its rows and its result are small."""
    weight = _weight(node)
    if weight is None:
        return False
    rows = node.args[node.args.index(weight) - 1]
    return isinstance(rows, fx.Node) and THIN * max(_width(node), _width(rows)) <= _width(weight)


def _narrowest(graph: fx.Graph, ahead: list[fx.Node]) -> set[fx.Node]:
    """What passes from the operations before the widest one to those after it, at the last point before it where that is little."""
    inside = set(ahead)
    given = [n for n in graph.output_node().args[0] if isinstance(n, fx.Node) and n in inside]  # pyright: ignore[reportGeneralTypeIssues, reportOptionalIterable]
    needed, open_ = set(), list(given)
    while open_:
        node = open_.pop()
        if node not in needed:
            needed.add(node)
            open_ += node.all_input_nodes
    order = [n for n in ahead if n in needed]
    place = {n: i for i, n in enumerate(order)}
    last = {root(n)[0]: len(order) for n in given}
    for i, node in enumerate(order):
        for read in (root(n)[0] for n in node.all_input_nodes):
            if read in place:
                last[read] = max(last.get(read, 0), i)
    limit = SLACK * sum(_bytes(n) for n in {root(n)[0] for n in given})
    width = max((_width(n) for n in given), default=0)
    widest = _widest(order)
    worth = next((i for i, n in enumerate(order) if _is_heavy(n) and 2 * _width(n) >= width), len(order))
    for i in range(widest - 1, worth - 1, -1):
        passing = {n for n, end in last.items() if place.get(n, i + 1) <= i < end}
        if passing and sum(map(_bytes, passing)) <= limit:
            return passing
    return set()


def _widest(order: list[fx.Node]) -> int:
    """The place of the widest layer: products with one weight, of parts of the tokens each, are one layer."""
    layers: dict[Buffer, tuple[int, int]] = {}  # by what tells layers apart: where it begins, and its width
    for i, node in enumerate(order):
        weight = _weight(node)
        key = (node, 0) if weight is None else root(weight)
        begins, width = layers.get(key, (i, 0))
        layers[key] = begins, width + _width(node)
    return min(layers.values(), key=lambda found: (-found[1], found[0]), default=(0, 0))[0]


def _weight(node: fx.Node) -> fx.Node | None:
    """What a heavy operation, taken for a product of rows with a weight, has in the weight's place."""
    place = 2 if node.target is torch.ops.aten.addmm.default else 1
    weight = node.args[place] if _is_heavy(node) and len(node.args) > place else None
    return weight if isinstance(weight, fx.Node) else None


def _bytes(node: fx.Node) -> int:
    return sum(t.nbytes for t in tensors(node) if t is not None)


def _width(node: fx.Node) -> int:
    return max((t.numel() for t in tensors(node) if t is not None), default=0)


def _is_heavy(node: fx.Node) -> bool:
    """Whether it takes more than to write its result."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return target.namespace not in ("aten", "prims", "diffpipe") or target._overloadpacket in flop_registry
