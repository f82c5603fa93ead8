"""What a compiled unit holds in memory, found from the graphs that the compiler would get."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from diffpipe.pipeline.cut import Fakes
from diffpipe.pipeline.memory.footprint import Call, Footprint
from diffpipe.pipeline.memory.fusion import Kernel, fuses, kernels_of, reduces
from diffpipe.pipeline.memory.graphs import Joint, first_pass, halves, trace
from diffpipe.pipeline.memory.ledger import Work, rounded, scratch, work_of
from diffpipe.pipeline.memory.tags import WRITTEN, Buffer, root, tensors

INLINE = 4  # buffers that a computation may read and still be done again for each of its uses: inductor's realize_reads_threshold


class Compiled:
    """A unit as torch.compile would make it.

    Args:
        unit: on meta or fake tensors; not changed.
    """

    def __init__(self, unit: nn.Module, call: Call, fakes: Fakes) -> None:
        self.joint = trace(unit, call, fakes)
        given = [x for x in call.leaves if isinstance(x, Tensor)]
        self.copied = {i: rounded(x.nbytes) for i, x in enumerate(given) if not x.is_contiguous()}  # by ``compiling``
        self.cuts: dict[str, tuple[_Kernels, _Kernels]] = {}

    def footprint(self, policy: str, threshold: int | None) -> Footprint:
        """The unit's footprint.

        Args:
            policy: as ``memory.recompute``.
            threshold: bytes from which saved activations are moved to the host; None moves none.
        """
        if policy not in self.cuts:
            ahead, back = halves(self.joint, policy)
            self.cuts[policy] = _Kernels(ahead), _Kernels(back)
        return _Halves(self.joint, *self.cuts[policy], self.copied, threshold).footprint()

    def ahead(self) -> Footprint:
        """The unit's footprint where no gradients are asked for."""
        kernels = _Kernels(first_pass(self.joint))
        made = sum(kernels.size(b) for b in {b for b in kernels.results if b is not None and b[0] in kernels.reads})
        forward = kernels.peak() - made + sum(self.copied.values())
        return Footprint(0, (), 0, 0, forward, 0, 0, ahead=kernels.work(), back=Work())


class _Kernels:
    """A graph as kernels: which results are written to memory, from what, and when the last one reads them.

    What only pointwise operations and reductions read, and few of them, is computed within them and never written.

    Attributes:
        order: nodes whose results are written.
        reads: the buffers that each node reads.
        kernels: those nodes as inductor puts them together.
        results: the buffers of the graph's outputs, None where an output is no tensor.
    """

    def __init__(self, graph: fx.Graph) -> None:
        nodes = list(graph.nodes)
        self.given = [n for n in nodes if n.op == "placeholder"]
        outputs = nodes[-1].args[0]
        self.results = [root(n) if isinstance(n, fx.Node) else None for n in outputs]  # pyright: ignore[reportGeneralTypeIssues, reportOptionalIterable]
        self.final = [n for n in outputs if isinstance(n, fx.Node)]  # pyright: ignore[reportGeneralTypeIssues, reportOptionalIterable]
        users = self._users(nodes)
        self.order: list[fx.Node] = []
        self.reads: dict[fx.Node, set[Buffer]] = {}
        written: set[fx.Node] = set(self.given)
        for node in nodes:
            if node.op != "call_function" or root(node)[0] is not node:
                continue
            self.reads[node] = reads = set()
            for other in node.all_input_nodes:
                buffer = root(other)
                reads |= {buffer} if buffer[0] in written else self.reads.get(buffer[0], set())
            mine = users.get(node, [])
            if (
                not fuses(node)
                or reduces(node)
                or WRITTEN in node.meta
                or any(u.op == "output" or not fuses(u) for u in mine)
                or (len(mine) > 1 and len(reads) > INLINE)
            ):
                written.add(node)
                self.order.append(node)
        self.kernels = kernels_of(self.order, self.reads, self.size)

    @staticmethod
    def _users(nodes: list[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
        """Who reads what a node wrote, through views."""
        found: dict[fx.Node, list[fx.Node]] = {}
        for node in nodes:
            if node.op == "output" or (node.op == "call_function" and root(node)[0] is node):
                for other in node.all_input_nodes:
                    found.setdefault(root(other)[0], []).append(node)
        return found

    @staticmethod
    def size(buffer: Buffer) -> int:
        results = tensors(buffer[0])
        tensor = results[buffer[1]] if buffer[1] < len(results) else None
        return 0 if tensor is None else rounded(tensor.nbytes)

    def peak(self, freed: Iterable[Buffer] = ()) -> int:
        """The most that is held at once above what is there at the start.

        Args:
            freed: buffers, there at the start, that go once they were read last.
        """
        staying = {b for b in self.results if b is not None}
        last: dict[Buffer, int] = {b: -1 for b in freed if b not in staying}
        for i, kernel in enumerate(self.kernels):
            for buffer in kernel.reads:
                if buffer not in staying and (buffer in last or buffer[0] in self.reads):
                    last[buffer] = i
        going: dict[int, list[Buffer]] = {}
        for buffer, i in last.items():
            going.setdefault(i, []).append(buffer)
        live = peak = -sum(self.size(b) for b in going.get(-1, ()))
        for i, kernel in enumerate(self.kernels):
            made = {(n, k) for n in kernel.members for k in range(len(tensors(n)))}
            lasting = {b for b in made if b in last or b in staying}
            free, size = going.get(i, []), sum(self.size(b) for b in lasting)
            if kernel.points:
                inside = sum(self.size((n, 0)) for n in kernel.reread(self.reads) if (n, 0) not in lasting)
                inside -= self._over(kernel, lasting, free)
            else:
                inside = sum(self.size(b) for b in made - lasting)
                inside += rounded(scratch(kernel.members[0].target, self._values(kernel.members[0].args)))
            peak = max(peak, live + size + inside)
            live += size - sum(self.size(b) for b in free)
        return peak

    def _over(self, kernel: Kernel, lasting: set[Buffer], free: list[Buffer]) -> int:
        """Bytes of a kernel's results that are written over what it reads last: each over one of its size that it is computed from value
        by value, at once where the kernel has reductions."""
        given, whole = list(free), 0
        for node in kernel.members:
            if (node, 0) not in lasting:
                continue
            under, open_ = set(self.reads[node]), list(self.reads[node])
            while open_ and not kernel.rows:
                other = open_.pop()[0]
                if other in kernel.members and (other, 0) not in lasting:
                    open_ += self.reads[other] - under
                    under |= self.reads[other]
            place = next((b for b in given if b in under and self.size(b) == self.size((node, 0))), None)
            if place is not None:
                given.remove(place)
                whole += self.size(place)
        return whole

    def work(self) -> Work:
        """What its kernels compute and move; the host queues them all at once."""
        whole = Work()
        for node in self.order:
            if fuses(node):
                moved = sum(self.size(b) for b in self.reads[node]) + self.size((node, 0))
                whole += Work(traffic=moved)
            else:
                whole += work_of(node.target, self._values(node.args), self._values(node.kwargs), node.meta.get("val"))
        return replace(whole, queued=0)

    @staticmethod
    def _values(given: Any) -> Any:
        return tree_map(lambda a: a.meta.get("val") if isinstance(a, fx.Node) else a, given)


class _Halves:
    """A cut graph's two halves as a footprint."""

    def __init__(self, joint: Joint, forward: _Kernels, backward: _Kernels, copied: dict[int, int], threshold: int | None) -> None:
        self.joint, self.ahead, self.back, self.copied, self.threshold = joint, forward, backward, copied, threshold

    def footprint(self) -> Footprint:
        ahead, joint = self.ahead, self.joint
        first = len(joint.weights)
        leaves = {(node, 0): i for i, node in enumerate(ahead.given[first : first + joint.leaves])}
        weights = {(node, 0): name for node, name in zip(ahead.given, joint.weights, strict=False)}
        results = ahead.results[: joint.outputs]
        for i, buffer in enumerate(results):
            if buffer is not None:
                leaves.setdefault(buffer, joint.leaves + i)
        kept: dict[Buffer, int] = {}
        held, moved, own, read = [], 0, set(), set()
        for node in ahead.final[joint.outputs :]:
            buffer, tensor = root(node), tensors(node)[0]
            if buffer in weights:
                read.add(weights[buffer])
            if buffer in weights or tensor is None:
                continue
            if self.threshold is not None and ahead.size(buffer) >= self.threshold:
                moved += rounded(tensor.nbytes)
            elif buffer in leaves and leaves[buffer] not in self.copied:
                held.append(leaves[buffer])
            else:
                kept[buffer] = ahead.size(buffer)
                own.add(node.name)
        made = sum(ahead.size(b) for b in {b for b in results if b is not None and b[0] in ahead.reads})
        tangents = [n for n in self.back.given if "tangents" in n.name]
        freed = [(n, 0) for n in self.back.given if n.name in own or n in tangents]
        gradients = [b for b in self.back.results[:first] if b is not None]
        return Footprint(
            kept=sum(kept.values()),
            held=tuple(held),
            moved=moved,
            casts=0,
            forward=ahead.peak() - made + sum(self.copied.values()),
            backward=self.back.peak(freed),
            gradients=sum(self.back.size(b) for b in gradients),
            ahead=ahead.work(),
            back=self.back.work(),
            read=frozenset(read),
        )
