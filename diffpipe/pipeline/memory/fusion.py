"""Which pointwise operations and reductions of a graph inductor puts into one kernel, and in which order the kernels run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from diffpipe.pipeline.memory.tags import Buffer, tensors

FAR = 64  # places between operations from which inductor puts them together only where one reads the other (are_long_distant_nodes)
TRADE = 32  # bytes of memory that it spends at most for each byte that need not be read twice (can_fusion_increase_peak_memory)
LOOPED = 1024  # values that a reduction adds up at once; of more, it reads what it has written again (its persistent reductions)
LITTLE = 1 << 20  # bytes that two kernels share below which they are put together last: by then each is what it reads and writes

Size = Callable[[Buffer], int]
Reads = Mapping[fx.Node, set[Buffer]]


def fuses(node: fx.Node) -> bool:
    """Whether inductor makes it a part of a kernel of its own, rather than calling a library's."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in ("aten", "prims"):
        return False
    return target._overloadpacket not in flop_registry and (len(tensors(node)) == 1 or target is torch.ops.aten.var_mean.correction)


def reduces(node: fx.Node) -> bool:
    return bool(_loop(node)[1])


@dataclass
class Kernel:
    """One operation, or several that are computed together.

    Attributes:
        members: the operations, in the graph's order.
        places: of the first and of the last of them in that order.
        points: values that its loop goes over; 0 for a library's kernel.
        rows: values that reductions among them leave; 0 without one.
        reads: buffers that others write.
    """

    members: list[fx.Node]
    places: tuple[int, int]
    points: int
    rows: int
    reads: set[Buffer]

    def fits(self, other: Kernel) -> bool:
        """Whether one loop may compute both: over the same values, or over the rows that it leaves of them."""
        if not self.points or not other.points or (self.rows and other.rows and self.rows != other.rows):
            return False
        points, rows = max(self.points, other.points), self.rows or other.rows
        return all(k.points == points or (k.points == rows and not k.rows) for k in (self, other))

    def distance(self, other: Kernel) -> int:
        return max(abs(self.places[0] - other.places[1]), abs(other.places[0] - self.places[1]))

    def join(self, other: Kernel) -> None:
        """Become both."""
        self.members += other.members
        self.places = min(self.places[0], other.places[0]), max(self.places[1], other.places[1])
        self.points, self.rows = max(self.points, other.points), self.rows or other.rows
        mine = set(self.members)
        self.reads = {b for b in self.reads | other.reads if b[0] not in mine}

    def reread(self, reads: Reads) -> set[fx.Node]:
        """Members whose results it writes for itself: to be read in a later pass over the rows, when a reduction knows its result."""
        if self.points <= LOOPED * self.rows or not self.rows:
            return set()
        later: set[fx.Node] = set()  # members that wait for a reduction
        for node in self.members:
            if any(b[0] in later or (b[0] in self.members and reduces(b[0])) for b in reads[node]):
                later.add(node)
        return {b[0] for node in later for b in reads[node] if b[0] in self.members and b[0] not in later and not reduces(b[0])}


def kernels_of(order: Sequence[fx.Node], reads: Reads, size: Size) -> list[Kernel]:
    """The kernels of a graph, as they follow each other.

    As inductor does it, pairs that share most of what they read and write become one first, unless one would have to wait for what waits
    for the other, or what is saved is little beside memory that others could have had again.

    Args:
        order: operations whose results are written, where each is alone.
        reads: what each reads.
        size: bytes of a buffer.
    """
    kernels = {i: Kernel([n], (i, i), *(_loop(n) if fuses(n) else (0, 0)), set(reads[n])) for i, n in enumerate(order)}
    before, behind = _reach(order, reads)
    least = LITTLE
    while least:
        found = len(kernels)
        for common, a, b in sorted(_pairs(kernels, size), reverse=True):
            if a not in kernels or b not in kernels or not kernels[a].fits(kernels[b]):
                continue
            tied = (behind[a] | before[a]) >> b & 1
            both = 1 << a | 1 << b
            if not tied and (common < least or kernels[a].distance(kernels[b]) > FAR):
                continue
            if ((behind[a] & before[b]) | (behind[b] & before[a])) & ~both or _spent(kernels, a, b, size) > TRADE * common:
                continue
            kernels[a].join(kernels.pop(b))
            before[a], behind[a] = (before[a] | before[b]) & ~both, (behind[a] | behind[b]) & ~both
            for i in kernels:
                if behind[a] >> i & 1:
                    before[i] = (before[i] | before[a] | 1 << a) & ~(1 << b)
                if before[a] >> i & 1:
                    behind[i] = (behind[i] | behind[a] | 1 << a) & ~(1 << b)
        if len(kernels) == found:
            least = 0 if least == 1 else 1
    place = {node: i for i, node in enumerate(order)}
    for kernel in kernels.values():
        kernel.members.sort(key=place.__getitem__)
    return _arranged(sorted(kernels.values(), key=lambda k: k.places))


def _loop(node: fx.Node) -> tuple[int, int]:
    """The values that a loop goes over, and those that it leaves of them where it is a reduction."""
    made = tensors(node)[0]
    count = 0 if made is None else made.numel()
    given = max((t.numel() for n in node.all_input_nodes for t in tensors(n) if t is not None), default=0)
    return (given, count) if made is not None and 2 * count <= given else (count, 0)


def _reach(order: Sequence[fx.Node], reads: Reads) -> tuple[list[int], list[int]]:
    """For each place in the order, as bits: those that it waits for, and those that wait for it."""
    place = {node: i for i, node in enumerate(order)}
    before, behind = [0] * len(order), [0] * len(order)
    for i, node in enumerate(order):
        for other in {place[b[0]] for b in reads[node] if b[0] in place}:
            before[i] |= before[other] | 1 << other
        for j in range(i):
            if before[i] >> j & 1:
                behind[j] |= 1 << i
    return before, behind


def _pairs(kernels: Mapping[int, Kernel], size: Size) -> list[tuple[int, int, int]]:
    """Bytes that two kernels have in common, and the two."""
    users: dict[Buffer, list[int]] = {}
    for i, kernel in kernels.items():
        written = {(node, k) for node in kernel.members for k in range(len(tensors(node)))}
        for buffer in kernel.reads | written if kernel.points else ():
            users.setdefault(buffer, []).append(i)
    common: Counter[tuple[int, int]] = Counter()
    for buffer, who in users.items():
        count = size(buffer)
        for j, a in enumerate(who):
            for b in who[j + 1 :]:
                common[a, b] += count
    return [(count, a, b) for (a, b), count in common.items()]


def _spent(kernels: Mapping[int, Kernel], a: int, b: int, size: Size) -> int:
    """Bytes that two kernels, where they are one, hold at once of what each alone reads: apart, one could write where the other read."""
    users = Counter(buffer for kernel in kernels.values() for buffer in kernel.reads)
    one, other = ({size(buffer) for buffer in kernels[i].reads if users[buffer] == 1} for i in (a, b))
    return sum(one & other)


def _arranged(kernels: Sequence[Kernel]) -> list[Kernel]:
    """The same, each behind those whose results it reads."""
    writer = {node: i for i, kernel in enumerate(kernels) for node in kernel.members}
    done: dict[int, Kernel] = {}
    for i in range(len(kernels)):
        waiting = [i]
        while waiting:
            waits = {writer[b[0]] for b in kernels[waiting[-1]].reads if b[0] in writer} - done.keys()
            if waits:
                waiting.append(min(waits))
            else:
                number = waiting.pop()
                done.setdefault(number, kernels[number])
    return list(done.values())
