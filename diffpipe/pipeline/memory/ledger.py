"""Counts what a computation on fake tensors would hold on a device, and the work it would be."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

THIN = 100  # operations a byte below which a product, as those of adapters are, takes as long as its operands take to read
BLOCK = 512  # bytes that torch's CUDA allocator rounds every tensor up to (kMinBlockSize)


def rounded(count: int) -> int:
    """The bytes that the allocator counts for a tensor of ``count`` bytes."""
    return -(-count // BLOCK) * BLOCK


@dataclass(frozen=True)
class Work:
    """What a computation asks of a card.

    Attributes:
        half, full, eight: floating-point operations of matrix products in 16, 32 and 8 bits.
        attention: those of attention kernels.
        traffic: bytes that all other operations read and write in the card's memory.
        queued: operations that the host queues one by one.
    """

    half: int = 0
    full: int = 0
    eight: int = 0
    attention: int = 0
    traffic: int = 0
    queued: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def times(self, count: int) -> Work:
        """This work done ``count`` times."""
        return Work(*(getattr(self, f.name) * count for f in fields(self)))


def work_of(func: Any, args: Any, kwargs: Any, out: Any) -> Work:
    """The work of one operation that is no view."""
    tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
    if "empty" in str(func):
        return Work()
    # A storage once, and of what is expanded only what there is.
    reach = {t.untyped_storage()._cdata: min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors}
    traffic = sum(reach.values())
    count = flop_registry.get(getattr(func, "_overloadpacket", func))
    if count is None:
        return Work(traffic=traffic, queued=1)
    flops = int(count(*args, **kwargs, out_val=out))
    if "attention" in str(func):
        return Work(attention=flops, queued=1)
    if flops < THIN * traffic:
        return Work(traffic=traffic, queued=1)
    size = min(t.dtype.itemsize for t in tensors if t.ndim > 1)
    return Work(**{"eight" if size == 1 else "half" if size == 2 else "full": flops}, queued=1)


def is_view(func: Any, args: Any, out: Any) -> bool:
    """Whether an operation gave views of its arguments and did nothing else."""
    if not isinstance(func, torch._ops.OpOverload) or func._schema.is_mutable:
        return False
    given = {t.untyped_storage()._cdata for t in tree_leaves(args) if isinstance(t, Tensor)}
    return all(t.untyped_storage()._cdata in given for t in tree_leaves(out) if isinstance(t, Tensor))


def scratch(func: Any, args: Any) -> int:
    """Bytes that a kernel takes inside and no tensor shows.

    FlashAttention-2's backward pass adds up the gradient of the queries in float32 and keeps a float32 for each query
    (``dq_accum`` and ``softmax_d``). Where padding is left out, keys and values are packed, and so are their gradients.
    """
    name = str(func)
    packed = 2 * args[2 if "backward" in name else 1].nbytes if "padded_attention" in name else 0
    if "attention_backward" not in name:
        return packed
    queries = args[1]
    return 2 * packed + 4 * queries.numel() + 4 * queries.numel() // queries.shape[-1]


class Ledger(TorchDispatchMode):
    """Follows the storages that are made while it is on, under a fake tensor mode.

    Attributes:
        live: bytes held now.
        peak: the most since it was last set to ``live``.
        work: done so far.
        entries: bytes by storage, of those that live.
    """

    def __init__(self, on_change: Callable[[int, int], None] = lambda storage, count: None) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.work = Work()
        self.entries: dict[int, int] = {}
        self.on_change, self.paused = on_change, False
        self._numbers: dict[int, int] = {}
        self._next = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.paused:
            return out
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.number(tensor)
        if not is_view(func, args, out):
            self.peak = max(self.peak, self.live + rounded(scratch(func, args)))
            self.work += work_of(func, args, kwargs, out)
        return out

    def number(self, tensor: Tensor, counted: bool = True) -> int:
        """The number of a tensor's storage, which is entered when it is new, ``counted`` or not."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._numbers:
            return self._numbers[key]
        number = self._numbers[key] = self._next
        self._next += 1
        self.entries[number] = rounded(storage.nbytes()) if counted else 0
        self._change(number, self.entries[number])
        weakref.finalize(storage, self._gone, key, number)
        return number

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What is made meanwhile is not entered."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False

    def _gone(self, key: int, number: int) -> None:
        self._numbers.pop(key, None)
        self._change(number, -self.entries.pop(number))

    def _change(self, number: int, count: int) -> None:
        self.live += count
        self.peak = max(self.peak, self.live)
        self.on_change(number, count)
