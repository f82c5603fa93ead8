"""What one unit holds in memory during its forward and backward passes, found by running it on fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from diffpipe.pipeline.cut import Fakes, duplicate
from diffpipe.pipeline.memory.as_on_cuda import as_on_cuda
from diffpipe.pipeline.memory.ledger import Ledger, Work, rounded
from diffpipe.pipeline.memory.offload import kept_alive
from diffpipe.pipeline.memory.recompute import recompute


@dataclass(frozen=True)
class Footprint:
    """Bytes that a unit's passes take beside weights, what goes in and what comes out.

    Attributes:
        kept: of its own, from the forward to the backward pass.
        held: which of its tensors stay for the backward pass too: places among those that go in, then those that come out.
        moved: of tensors that ``memory.offload`` takes to the host in between.
        casts: weights in the type of computation that autocast keeps until the whole forward pass is over.
        forward: the most that the forward pass holds, what it keeps included.
        backward: the most that the backward pass holds, with what it computes again, above what there is when it begins.
        gradients: of the unit's own parameters.
        ahead, back: the work of either pass.
        read: names of the weights that the backward pass reads, of a unit that is compiled.
    """

    kept: int
    held: tuple[int, ...]
    moved: int
    casts: int
    forward: int
    backward: int
    gradients: int
    ahead: Work
    back: Work
    read: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Call:
    """How a unit is called.

    Attributes:
        leaves, tree: its arguments; tensors are fake.
        precision: makes the context of the computation's type.
    """

    leaves: tuple[Any, ...]
    tree: TreeSpec
    precision: Callable[[], AbstractContextManager[Any]]


class _Source(torch.autograd.Function):
    """Tensors that need gradients and that nothing but the unit's graph holds on to."""

    @staticmethod
    def forward(ctx: Any, begin: Tensor, *like: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in like)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        return (None,) * (1 + len(gradients))


class _Seed(torch.autograd.Function):
    """Begins a backward pass with gradients that nobody else holds."""

    @staticmethod
    def forward(ctx: Any, begun: Callable[[], None], *outputs: Tensor) -> Tensor:
        ctx.begun, ctx.like = begun, [(t.shape, t.dtype) for t in outputs]
        return outputs[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        made = [torch.empty(shape, dtype=dtype) for shape, dtype in ctx.like]
        ctx.begun()
        return (None, *made)


def measure(unit: nn.Module, call: Call, fakes: Fakes, policy: str, threshold: int | None) -> Footprint:
    """The footprint of a unit that is run as it is, operation by operation.

    Args:
        unit: on meta or fake tensors; not changed.
        policy: as ``memory.recompute``.
        threshold: bytes from which saved activations are moved to the host; None moves none.
    """
    twin = duplicate(unit)
    fakes.fill(twin)
    forward = as_on_cuda(twin.forward)
    return _Trial(twin, forward if policy == "none" else recompute(forward, policy), call, fakes, threshold).run()


class _Trial:
    """One forward and backward pass."""

    def __init__(self, unit: nn.Module, forward: Callable[..., Any], call: Call, fakes: Fakes, threshold: int | None) -> None:
        self.unit, self.forward, self.call, self.fakes, self.threshold = unit, forward, call, fakes, threshold
        self.ledger = Ledger()
        self.weights = [*unit.parameters(), *unit.buffers()]
        self.moved = 0
        self.leaving: list[Tensor] = []  # moved ones, which are let go later

    def run(self) -> Footprint:
        ledger = self.ledger
        with self.fakes.mode, ledger:
            fixed = {ledger.number(weight) for weight in self.weights}
            inputs = self._inputs()
            leaves = [ledger.number(x) for x in inputs if isinstance(x, Tensor)]
            start, before = ledger.live, ledger.work
            ledger.peak = start
            with self.call.precision():
                outputs = self._forward(inputs, fixed)
                within = ledger.live
            casts, peak, ahead = within - ledger.live, ledger.peak, ledger.work + before.times(-1)
            self.leaving.clear()
            del inputs
            results = [ledger.number(x) for x in outputs]
            made = sum(ledger.entries[n] for n in set(results) - set(leaves))
            begin, loss = self._seeded(outputs)
            del outputs
            # What still lives when nobody but autograd holds anything.
            left = {n: count for n, count in ledger.entries.items() if n not in fixed}
            leaves += results
            before = ledger.work
            if loss is not None:
                loss.backward()
        return Footprint(
            kept=sum(count for n, count in left.items() if n not in leaves),
            held=tuple(leaves.index(n) for n in left if n in leaves),
            moved=self.moved,
            casts=casts,
            forward=peak - start - made,
            backward=ledger.peak - begin[0] if loss is not None else 0,
            gradients=sum(rounded(p.grad.nbytes) for p in self.unit.parameters() if p.grad is not None),
            ahead=ahead,
            back=ledger.work + before.times(-1),
        )

    def _inputs(self) -> list[Any]:
        fresh = [torch.empty_strided(x.size(), x.stride(), dtype=x.dtype) if isinstance(x, Tensor) else x for x in self.call.leaves]
        wanting = [i for i, x in enumerate(self.call.leaves) if isinstance(x, Tensor) and x.requires_grad]
        if wanting:
            begin = torch.empty(0, requires_grad=True)
            for i, made in zip(wanting, _Source.apply(begin, *(fresh[i] for i in wanting)), strict=True):
                fresh[i] = made
        return fresh

    def _forward(self, inputs: list[Any], fixed: set[int]) -> list[Tensor]:
        args, kwargs = tree_unflatten(inputs, self.call.tree)

        def pack(tensor: Tensor) -> Any:
            if self.threshold is None or kept_alive(tensor) < self.threshold or self.ledger.number(tensor) in fixed:
                return tensor
            self.moved += rounded(tensor.nbytes)
            self.leaving.append(tensor)
            return tensor.size(), tensor.stride(), tensor.dtype

        def unpack(kept: Any) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            with self.ledger.pause():
                back = torch.empty_strided(kept[0], kept[1], dtype=kept[2])
            self.ledger.number(back, counted=False)  # it was there before this pass began
            return back

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return [x for x in tree_flatten(self.forward(*args, **kwargs))[0] if isinstance(x, Tensor)]

    def _seeded(self, outputs: list[Tensor]) -> tuple[list[int], Tensor | None]:
        """What is held when the backward pass begins, known then; and what it begins from."""
        begin = [0]

        def begun() -> None:
            begin[0] = self.ledger.peak = self.ledger.live

        trained = [x for x in outputs if x.requires_grad]
        return begin, _Seed.apply(begun, *trained) if trained else None
