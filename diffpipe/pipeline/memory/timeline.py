"""What a stage holds outside of its units in the course of a step, with the moments at which each unit runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from diffpipe.pipeline.cut import Fakes, signature_of, structure_of
from diffpipe.pipeline.memory.footprint import Call
from diffpipe.pipeline.memory.ledger import Ledger, Work

Kind = tuple[Any, ...]  # what decides a unit's footprint: its structure, and the shapes it is called with


@dataclass(frozen=True)
class Change:
    """A storage comes to be, or goes (negative bytes)."""

    storage: int
    bytes: int


@dataclass(frozen=True)
class Visit:
    """A unit's forward pass, or its backward pass.

    Attributes:
        unit: its number within the stage.
        kind: units of one kind called alike have one footprint.
        leaves: the storages that go in, then those that come out.
    """

    unit: int
    kind: Kind
    leaves: tuple[int, ...]
    backward: bool = False


@dataclass
class Timeline:
    """One microbatch's passes.

    Attributes:
        ahead, back: what happens in the forward and in the backward pass.
        bytes: of each storage.
        given: storages of the model's inputs and targets.
        arriving: bytes of what comes from other stages.
        gradients: storages of gradients of weights outside units.
        calls: how each kind of unit is called, with the number of one.
        work: outside of units.
    """

    ahead: list[Change | Visit] = field(default_factory=list)
    back: list[Change | Visit] = field(default_factory=list)
    bytes: dict[int, int] = field(default_factory=dict)
    given: set[int] = field(default_factory=set)
    arriving: int = 0
    gradients: set[int] = field(default_factory=set)
    calls: dict[Kind, tuple[int, Call]] = field(default_factory=dict)
    work: Work = field(default_factory=Work)


class _StandIn(torch.autograd.Function):
    """A unit that holds nothing: outputs from nowhere, and gradients for what goes in."""

    @staticmethod
    def forward(ctx: Any, begin: Tensor, back: Callable[[], None], like: list[Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.back, ctx.like = back, [(x.shape, x.dtype) if x.requires_grad else None for x in inputs]
        made = tuple(torch.empty_strided(t.size(), t.stride(), dtype=t.dtype) for t in like)
        ctx.mark_non_differentiable(*(t for t in made if not t.is_floating_point()))
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ctx.back()
        return (None, None, None, *(torch.empty(x[0], dtype=x[1]) if x is not None else None for x in ctx.like))


class Recorder:
    """Stands in for a stage's units, which are on fake tensors, and writes down when each runs.

    Args:
        precision: makes the context that the stage runs in.
    """

    def __init__(self, units: list[nn.Module], fakes: Fakes, precision: Callable[[], AbstractContextManager[Any]]) -> None:
        self.fakes, self.precision = fakes, precision
        self.structures = [structure_of(unit) for unit in units]
        self.shapes: dict[Kind, tuple[list[Any], Any]] = {}
        self.timeline = Timeline()
        self.events = self.timeline.ahead
        self.ledger = Ledger()
        for number, unit in enumerate(units):
            unit.forward = self._stand_in(number, unit, unit.forward)

    def record(self, weights: list[Tensor], given: list[Tensor], forward: Callable[[], list[Tensor]]) -> Timeline:
        """The timeline of ``forward``, which gives what leaves the stage, and of the backward pass from there.

        Args:
            weights: that are there before and after.
            given: the model's inputs and targets on the device.
        """
        self.timeline = timeline = Timeline()
        self.events = timeline.ahead
        self.ledger = Ledger(self._changed)
        with self.fakes.mode, self.ledger:
            with self.ledger.pause():
                for weight in weights:
                    self.ledger.number(weight, counted=False)
            timeline.given = {self.ledger.number(x) for x in given}
            leaving = forward()
            self.events = timeline.back
            trained = [x for x in leaving if x.requires_grad]
            if trained:
                torch.autograd.backward(trained, [torch.empty_like(x) for x in trained])
            timeline.gradients = {self.ledger.number(w.grad) for w in weights if w.grad is not None}
        for weight in weights:
            weight.grad = None
        timeline.work = self.ledger.work
        return timeline

    def _changed(self, storage: int, count: int) -> None:
        if count > 0:
            self.timeline.bytes[storage] = count
        self.events.append(Change(storage, count))

    def _stand_in(self, number: int, unit: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def standing(*args: Any, **kwargs: Any) -> Any:
            leaves, tree = tree_flatten((args, kwargs))
            inputs = [x for x in leaves if isinstance(x, Tensor)]
            kind = (self.structures[number], tree, signature_of(leaves), torch.is_autocast_enabled("cpu"))
            if kind not in self.shapes:
                with torch.no_grad(), self.ledger.pause():
                    self.shapes[kind] = tree_flatten(forward(*args, **kwargs))
            if kind not in self.timeline.calls:
                with self.ledger.pause():
                    like = tuple(_like(x) if isinstance(x, Tensor) else x for x in leaves)
                self.timeline.calls[kind] = (number, Call(like, tree, self.precision))
            made, out = self.shapes[kind]
            trained = any(x.requires_grad for x in inputs) or any(p.requires_grad for p in unit.parameters())
            begin = torch.empty(0, requires_grad=trained)
            visit: list[Visit] = []
            shapes = [x for x in made if isinstance(x, Tensor)]
            each = iter(_StandIn.apply(begin, lambda: self.events.append(visit[0]), shapes, *inputs))
            outputs = [next(each) if isinstance(x, Tensor) else x for x in made]
            storages = tuple(self.ledger.number(x) for x in (*inputs, *(x for x in outputs if isinstance(x, Tensor))))
            self.events.append(Visit(number, kind, storages))
            visit.append(Visit(number, kind, storages, backward=True))
            return tree_unflatten(outputs, out)

        return standing


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype).requires_grad_(tensor.requires_grad)
