"""What a compiled unit holds in memory, found from the graphs that the compiler would get."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.flop_counter import flop_registry

from diffpipe.pipeline.cut import Fakes, duplicate
from diffpipe.pipeline.memory.as_on_cuda import as_on_cuda
from diffpipe.pipeline.memory.footprint import Call, Footprint
from diffpipe.pipeline.memory.ledger import Work, rounded, scratch, work_of
from diffpipe.pipeline.memory.recompute import COSTLY

Buffer = tuple[fx.Node, int]  # a node, and which of its outputs
INLINE = 4  # buffers that a computation may read and still be done again for each of its uses: inductor's realize_reads_threshold


@dataclass(frozen=True)
class Joint:
    """A unit's forward and backward pass in one graph.

    Attributes:
        module: the graph.
        outputs: how many of its results are the forward pass's; the rest are gradients.
        weights, leaves: how many of its inputs are the unit's parameters and buffers, and the tensors that it is called with.
    """

    module: fx.GraphModule
    outputs: int
    weights: int
    leaves: int


def trace(unit: nn.Module, call: Call, fakes: Fakes) -> Joint:
    """The graph of a unit, on meta or fake tensors, as AOTAutograd gives it to inductor."""
    from functorch.compile import aot_function, min_cut_rematerialization_partition, nop
    from torch._inductor.decomposition import select_decomp_table

    twin = duplicate(unit)
    fakes.fill(twin)
    named = {**dict(twin.named_parameters()), **dict(twin.named_buffers())}
    tensors = [x for x in call.leaves if isinstance(x, Tensor)]
    with fakes.mode:
        inputs = [torch.empty_strided(x.size(), x.stride(), dtype=x.dtype).requires_grad_(x.requires_grad) for x in tensors]
    kept: list[tuple[fx.GraphModule, int]] = []

    def run(weights: list[Tensor], given: list[Tensor]) -> list[Tensor]:
        each = iter(given)
        args, kwargs = tree_unflatten([next(each) if isinstance(x, Tensor) else x for x in call.leaves], call.tree)
        out = functional_call(twin, dict(zip(named, weights, strict=True)), args, kwargs)
        return [x for x in tree_flatten(out)[0] if isinstance(x, Tensor)]

    def keep(joint: fx.GraphModule, given: Any, *, num_fwd_outputs: int, **more: Any) -> Any:
        kept.append((copy.deepcopy(joint), num_fwd_outputs))
        return min_cut_rematerialization_partition(joint, given, num_fwd_outputs=num_fwd_outputs, **more)

    traced = aot_function(as_on_cuda(run, fused=False), nop, nop, partition_fn=keep, decompositions=select_decomp_table())
    with fakes.mode, call.precision():
        traced(list(named.values()), inputs)
    return Joint(*kept[0], len(named), len(inputs))


def footprint_of(joint: Joint, policy: str, threshold: int | None, around: bool = True) -> Footprint:
    """The footprint of a compiled unit.

    Args:
        policy: as ``memory.recompute``.
        threshold: bytes from which saved activations are moved to the host; None moves none.
        around: whether the compiler sees what is computed again, as ``MemoryLayer`` has it; else a checkpoint runs the compiled unit.
    """
    if policy == "none" or around:
        return _Halves(joint, *(_Kernels(graph) for graph in _cut(joint, policy)), threshold).footprint()
    return _again(joint, footprint_of(joint, "none", None), threshold)


def _again(joint: Joint, inner: Footprint, threshold: int | None) -> Footprint:
    """The footprint when all that a compiled unit keeps is computed again, from what goes in."""
    nodes = [n for n in joint.module.graph.nodes if n.op == "placeholder"][joint.weights : joint.weights + joint.leaves]
    sizes = [_Kernels.size((node, 0)) for node in nodes]
    moved = {i for i, size in enumerate(sizes) if threshold is not None and size >= threshold}
    return replace(
        inner,
        kept=0,
        held=tuple(i for i in range(joint.leaves) if i not in moved),
        moved=sum(sizes[i] for i in moved),
        backward=max(inner.forward, inner.kept + inner.backward),
        back=inner.ahead + inner.back,
    )


def _cut(joint: Joint, policy: str) -> tuple[fx.Graph, fx.Graph]:
    """The forward and the backward pass, cut where inductor cuts them."""
    from functorch.compile import min_cut_rematerialization_partition

    module = copy.deepcopy(joint.module)
    if policy != "none":
        _tag(module.graph, policy)
    hidden = {_hide(node): node_target for node in module.graph.nodes if (node_target := node.target) and _is_random(node)}
    # Weights are there anyway: to save them costs nothing.
    weights = list(range(joint.weights))
    halves = min_cut_rematerialization_partition(module, (), num_fwd_outputs=joint.outputs, static_lifetime_input_indices=weights)
    for half in halves:
        for node in half.graph.nodes:
            node.target = hidden.get(node.target, node.target)
    forward, backward = halves
    return forward.graph, backward.graph


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _hide(node: fx.Node) -> Callable[..., Any]:
    """Call something in an operation's place that nothing tells to be random: the partitioner would ask for a device's random
    state to compute it again, attention without dropout included."""
    target: Any = node.target

    def random(*args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    node.target = random
    return random


def _tag(graph: fx.Graph, policy: str) -> None:
    """Mark what is to be computed again, as torch.compile does for what a checkpoint holds."""
    behind: set[fx.Node] = set()  # of the backward pass
    for node in graph.nodes:
        if (node.op == "placeholder" and "tangents" in node.name) or any(n in behind for n in node.all_input_nodes):
            behind.add(node)
        elif node.op == "call_function":
            schema = getattr(_root(node)[0].target, "_schema", None)
            costly = policy == "selective" and schema is not None and schema.name.removeprefix("aten::") in COSTLY
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE if costly else CheckpointPolicy.PREFER_RECOMPUTE
            node.meta["ac_graph_id"] = 1


def _tensors(node: fx.Node) -> list[Tensor | None]:
    value = node.meta.get("val")
    each = value if isinstance(value, tuple | list) else (value,)
    return [x if isinstance(x, Tensor) else None for x in each]


def _root(node: fx.Node) -> Buffer:
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


def _fuses(node: fx.Node) -> bool:
    """Whether inductor makes it a part of a kernel of its own, rather than calling a library's."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in ("aten", "prims"):
        return False
    return target._overloadpacket not in flop_registry and len(_tensors(node)) == 1


def _reduces(node: fx.Node) -> bool:
    given = max((t.numel() for n in node.all_input_nodes for t in _tensors(n) if t is not None), default=0)
    made = _tensors(node)[0]
    return made is not None and made.numel() * 2 <= given


class _Kernels:
    """A graph as kernels: which results are written to memory, from what, and when the last one reads them.

    What only pointwise operations and reductions read is computed within them and never written.

    Attributes:
        order: nodes that are kernels, or begin one.
        reads: the buffers that each reads.
        results: the buffers of the graph's outputs, None where an output is no tensor.
    """

    def __init__(self, graph: fx.Graph) -> None:
        nodes = list(graph.nodes)
        self.given = [n for n in nodes if n.op == "placeholder"]
        outputs = nodes[-1].args[0]
        self.results = [_root(n) if isinstance(n, fx.Node) else None for n in outputs]  # pyright: ignore[reportGeneralTypeIssues, reportOptionalIterable]
        self.final = [n for n in outputs if isinstance(n, fx.Node)]  # pyright: ignore[reportGeneralTypeIssues, reportOptionalIterable]
        users = self._users(nodes)
        self.order: list[fx.Node] = []
        self.reads: dict[fx.Node, set[Buffer]] = {}
        written: set[fx.Node] = set(self.given)
        for node in nodes:
            if node.op != "call_function" or _root(node)[0] is not node:
                continue
            self.reads[node] = reads = set()
            for other in node.all_input_nodes:
                buffer = _root(other)
                reads |= {buffer} if buffer[0] in written else self.reads.get(buffer[0], set())
            mine = users.get(node, [])
            if (
                not _fuses(node)
                or _reduces(node)
                or any(u.op == "output" or not _fuses(u) for u in mine)
                or (len(mine) > 1 and len(reads) > INLINE)
            ):
                written.add(node)
                self.order.append(node)

    @staticmethod
    def _users(nodes: list[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
        """Who reads what a node wrote, through views."""
        found: dict[fx.Node, list[fx.Node]] = {}
        for node in nodes:
            if node.op == "output" or (node.op == "call_function" and _root(node)[0] is node):
                for other in node.all_input_nodes:
                    found.setdefault(_root(other)[0], []).append(node)
        return found

    @staticmethod
    def size(buffer: Buffer) -> int:
        tensors = _tensors(buffer[0])
        tensor = tensors[buffer[1]] if buffer[1] < len(tensors) else None
        return 0 if tensor is None else rounded(tensor.nbytes)

    def peak(self, freed: Iterable[Buffer] = ()) -> int:
        """The most that is held at once above what is there at the start.

        Args:
            freed: buffers, there at the start, that go once they were read last.
        """
        staying = {b for b in self.results if b is not None}
        last: dict[Buffer, int] = {b: -1 for b in freed if b not in staying}
        for i, node in enumerate(self.order):
            for buffer in self.reads[node]:
                if buffer not in staying and (buffer in last or buffer[0] in self.reads):
                    last[buffer] = i
        going: dict[int, list[Buffer]] = {}
        for buffer, i in last.items():
            going.setdefault(i, []).append(buffer)
        live = peak = -sum(self.size(b) for b in going.get(-1, ()))
        for i, node in enumerate(self.order):
            made = [(node, k) for k in range(len(_tensors(node)))]
            free = sum(self.size(b) for b in going.get(i, ()))
            size = sum(self.size(b) for b in made)
            if _fuses(node):  # may write over what it reads last
                live -= free
                peak = max(peak, live + size)
            else:
                peak = max(peak, live + size + rounded(scratch(node.target, [a.meta["val"] if isinstance(a, fx.Node) else a for a in node.args])))
                live -= free
            live += size - sum(self.size(b) for b in made if b not in last and b not in staying)
        return peak

    def work(self) -> Work:
        """What its kernels compute and move."""
        whole = Work()
        for node in self.order:
            values = [self._value(a) for a in node.args]
            named = {k: self._value(v) for k, v in node.kwargs.items()}
            if _fuses(node):
                moved = sum(self.size(b) for b in self.reads[node]) + self.size((node, 0))
                whole += Work(traffic=moved, kernels=1)
            else:
                whole += work_of(node.target, values, named, node.meta.get("val"))
        return whole

    @staticmethod
    def _value(given: Any) -> Any:
        return tree_map(lambda a: a.meta.get("val") if isinstance(a, fx.Node) else a, given)


class _Halves:
    """A cut graph's two halves as a footprint."""

    def __init__(self, joint: Joint, forward: _Kernels, backward: _Kernels, threshold: int | None) -> None:
        self.joint, self.ahead, self.back, self.threshold = joint, forward, backward, threshold

    def footprint(self) -> Footprint:
        ahead, joint = self.ahead, self.joint
        leaves = {(node, 0): i for i, node in enumerate(ahead.given[joint.weights : joint.weights + joint.leaves])}
        weights = {(node, 0) for node in ahead.given[: joint.weights]}
        results = ahead.results[: joint.outputs]
        for i, buffer in enumerate(results):
            if buffer is not None:
                leaves.setdefault(buffer, joint.leaves + i)
        kept: dict[Buffer, int] = {}
        held, moved, own = [], 0, set()
        for node in ahead.final[joint.outputs :]:
            buffer, tensor = _root(node), _tensors(node)[0]
            if buffer in weights or tensor is None:
                continue
            if self.threshold is not None and tensor.nbytes >= self.threshold:
                moved += rounded(tensor.nbytes)
            elif buffer in leaves:
                held.append(leaves[buffer])
            else:
                kept[buffer] = ahead.size(buffer)
                own.add(node.name)
        made = sum(ahead.size(b) for b in {b for b in results if b is not None and b[0] in ahead.reads})
        tangents = [n for n in self.back.given if "tangents" in n.name]
        freed = [(n, 0) for n in self.back.given if n.name in own or n in tangents]
        gradients = [b for b in self.back.results[: joint.weights] if b is not None]
        return Footprint(
            kept=sum(kept.values()),
            held=tuple(held),
            moved=moved,
            casts=0,
            forward=ahead.peak() - made,
            backward=self.back.peak(freed),
            gradients=sum(self.back.size(b) for b in gradients),
            ahead=ahead.work(),
            back=self.back.work(),
        )
