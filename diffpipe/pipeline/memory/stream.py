"""Streams weights: they lie in host memory, and each unit's are in the device's arena while it is used."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from diffpipe.models.adapters import is_adapter
from diffpipe.pipeline.clock import Clock
from diffpipe.pipeline.memory.arena import START, Load, Place, Plan, Share, Use, make_plan, room_to_settle, smallest_room
from diffpipe.pipeline.memory.ferry import end_of
from diffpipe.pipeline.memory.host import ALIGNED, HostMemory
from diffpipe.pipeline.memory.saved import Packer
from diffpipe.pipeline.memory.staging import Staging

State = tuple[tuple[tuple[int, Place], ...], tuple[Any, ...]]  # units with their places; with what their backward passes do without
PLANS = 1024  # that are kept: where steps never come back to a state of the arena, each has one
WORTH = 32  # a weight is left out of a copy where it is more than such a part of its unit: each gap makes one copy more


@dataclass(frozen=True)
class Slice:
    """Where a weight lies in its unit's flat buffer."""

    name: str  # in the unit
    owner: nn.Module
    leaf: str
    begin: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def end(self) -> int:
        return self.begin + self.shape.numel() * self.dtype.itemsize

    def of(self, flat: Tensor) -> Tensor:
        """The weight as a view of the buffer."""
        return flat[self.begin : self.end].view(self.dtype).view(self.shape)


class Home:
    """A unit's weights, but an adapter's, in one flat host buffer.

    Args:
        unit: the module; its parameters become views of the buffer. Those on meta are read into it later.
        memory: where the buffer is taken from.

    Attributes:
        trained: the parameters among them that train.
    """

    def __init__(self, unit: nn.Module, memory: HostMemory) -> None:
        self.slices: list[Slice] = []
        begin = 0
        for path, owner in unit.named_modules():
            for leaf, p in owner._parameters.items():
                if p is not None and not is_adapter(f"{path}.{leaf}"):
                    begin = -(-begin // ALIGNED) * ALIGNED
                    name = f"{path}.{leaf}" if path else leaf
                    self.slices.append(Slice(name, owner, leaf, begin, p.shape, p.dtype))
                    begin = self.slices[-1].end
        self.flat = memory.take(begin)
        for s in self.slices:
            parameter, view = s.owner._parameters[s.leaf], s.of(self.flat)
            assert parameter is not None
            if parameter.is_meta:
                s.owner._parameters[s.leaf] = nn.Parameter(view, requires_grad=parameter.requires_grad)
            else:
                view.copy_(parameter.detach())
                parameter.data = view
        self.trained = [p for p in self.parameters() if p.requires_grad]

    @property
    def size(self) -> int:
        return -(-self.flat.numel() // ALIGNED) * ALIGNED

    def views(self, place: Tensor) -> list[Tensor]:
        """The weights as views of a place on the device that holds them."""
        return [s.of(place) for s in self.slices]

    def bind(self, views: Sequence[Tensor]) -> None:
        """Make the weights these views. The parameters stay the objects they are, so what autograd or a compiled block keeps of them
        stays valid."""
        for parameter, view in zip(self.parameters(), views, strict=True):
            parameter.data = view

    def spared(self, read: Collection[str]) -> list[tuple[int, int]]:
        """Where in the buffer those weights lie, large ones alone, that a backward pass does not read: it can do without them.

        Args:
            read: names of those that it reads.
        """
        if self.trained:
            return []  # they are stepped there
        worth = self.flat.numel() // WORTH
        return [(s.begin, s.end) for s in self.slices if s.name not in read and s.end - s.begin > worth]

    def name_at(self, offset: int) -> str:
        """The weight that a byte of the buffer belongs to."""
        return self.slices[bisect_right(self.slices, offset, key=lambda s: s.begin) - 1].name

    def parameters(self) -> list[nn.Parameter]:
        found = [s.owner._parameters[s.leaf] for s in self.slices]
        return [p for p in found if p is not None]


@dataclass(frozen=True)
class Placed:
    """A view of streamed weights that autograd saved: found again where its unit lies in backward."""

    stream: Stream
    unit: int
    begin: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def restore(self) -> Tensor:
        """The view, in the place where the unit's weights are now."""
        self.stream.require(self.unit, self.begin)
        typed = self.stream.typed(self.dtype)
        return typed.as_strided(self.shape, self.stride, (self.stream.bound[self.unit] + self.begin) // self.dtype.itemsize)


class Stream:
    """Brings units' weights to the device in the order in which a step uses them.

    A step's visits are known when it begins: those of the last step that looked the same. Where a step goes another way than
    foreseen, each unit is brought when it is entered, and the next such step is foreseen by what this one did.

    Args:
        homes: of the units that stream, by number.
        device: CUDA, or the CPU, where the same copies are made without streams.
        room: bytes of the arena; None takes what holds a unit and the one after it.
        staging: copies from host memory that is not page-locked; None where it is.
        streams: torch's module of the device's streams and events.
        told: whether autograd is told of all weights that backward passes read, which then come without the others.
        into: the stream on which weights come; None for one of their own.

    Attributes:
        clock: time in which the computation waited for weights.
    """

    def __init__(
        self,
        homes: dict[int, Home],
        device: torch.device,
        room: int | None = None,
        staging: Staging | None = None,
        streams: Any = None,
        told: bool = False,
        into: Any = None,
    ) -> None:
        self.homes, self.device, self.staging, self.told = homes, device, staging, told
        self.streams = streams or torch.get_device_module(device)
        self.sizes = {n: home.size for n, home in homes.items()}
        order = sorted(homes)
        least = smallest_room(self.sizes, [*order, *reversed(order)])
        self.arena = torch.empty(max(room or least, max(self.sizes.values())), dtype=torch.uint8, device=device)
        self.views: dict[tuple[int, int], list[Tensor]] = {}  # of a unit's weights at an offset; made anew they would cost more than a copy
        self.types: dict[torch.dtype, Tensor] = {}
        self.copies, self.out = into or self.streams.Stream(device), self.streams.Stream(device)
        self.known: dict[Any, tuple[Use, ...]] = {}
        self.rooms: dict[Any, int] = {}  # by what a step uses, that of the arena which it is planned with
        self.plans: dict[Any, Plan] = {}
        self.read: dict[int, set[str]] = {}  # by unit, weights that autograd has saved of it
        self.spared: dict[int, list[tuple[int, int]]] = {}  # by unit, what its backward pass does without
        self.resident: dict[int, Place] = {}
        self.bound: dict[int, int] = {}
        self.ready: dict[int, Any] = {}  # by unit, the event of its last copy
        self.done: dict[int, Any] = {}  # by visit, the event of its end
        self.key: Any = None
        self.plan: Plan | None = None
        self.trace: list[Use] = []
        self.inside: int | None = None
        self.written: dict[int, Any] = {}  # by unit, the event of its stepped weights' copy to their home
        self.moved = 0
        self.clock = Clock(device)

    def begin(self, key: Any) -> None:
        """A step begins.

        Args:
            key: of what decides the order of use: training or evaluation, the number of microbatches.
        """
        self.end()
        self.key, self.trace, self.inside = key, [], None
        if self.told:
            self.spare(self.read)
        visits = self.known.get(key)
        self.plan = self._planned(visits) if visits else None
        self.done = {}
        self._start()

    def end(self) -> None:
        """The step is over: what it did is what the next one like it is expected to do."""
        if self.key is None:
            return
        self.leave()
        if self.plan is not None and len(self.trace) == len(self.plan.visits):
            self.resident = dict(self.plan.resident)
        self.known[self.key] = tuple(self.trace)
        self.key = None

    def enter(self, unit: int, back: bool = False) -> None:
        """Have a unit's weights on the device for what is queued from here on.

        Args:
            back: its backward pass; else any.
        """
        if self.inside == unit:
            if not back:
                self._complete()
            return
        self.leave()
        visit = len(self.trace)
        if self.plan is not None and (visit >= len(self.plan.visits) or self.plan.visits[visit].unit != unit):
            self._forget()
        self.inside = unit
        self.clock.start()
        if self.plan is None:
            self.trace.append(Use(unit, back))
            self._bring(unit)
        else:
            for load in self.plan.before[visit]:
                self._copy(load)
            self.trace.append(self.plan.visits[visit])
            self._use(unit, self.plan.places[visit])
            if not back:
                self._complete()
        self.clock.stop()

    def require(self, unit: int, offset: int) -> None:
        """The backward pass that is run reads the weight at an offset in its unit; it is there but where an earlier one read it not."""
        if unit == self.inside and any(begin <= offset < end for begin, end in self.spared.get(unit, ())):
            self._complete()

    def _complete(self) -> None:
        """Have all weights of the unit that is visited on the device, should they not have been foreseen."""
        unit = self.trace[-1].unit
        if not self.trace[-1].back:
            return
        self.trace[-1] = Use(unit)
        if self.plan is not None and unit in self.spared:
            self._copy(Load(unit, self.bound[unit], len(self.trace) - 2, Share.REST))  # behind the visit before this one, if any
            self._use(unit, self.bound[unit])

    def leave(self, changed: bool = False) -> None:
        """The work of the unit that was entered last is queued.

        Args:
            changed: whether it steps what the unit trains: weights of its home must then go there.
        """
        if self.inside is None:
            return
        visit, unit, self.inside = len(self.trace) - 1, self.inside, None
        if changed and self.homes[unit].trained:
            self._write_back(unit)
            self.done[visit] = self.written[unit]
        else:
            self.done[visit] = self._event()
        if self.plan is not None:
            for load in self.plan.behind[visit]:
                self._copy(load)

    def _write_back(self, unit: int) -> None:
        """Copy a unit's stepped weights to their home; its place in the arena is not free before."""
        home = self.homes[unit]
        place = self.arena[self.bound[unit] : self.bound[unit] + home.flat.numel()]
        self.out.wait_stream(self.streams.current_stream(self.device))
        with self.streams.stream(self.out):
            home.flat.copy_(place, non_blocking=True)
        self.written[unit] = self._event(self.out)

    def settle(self) -> None:
        """Let the parameters be what lies at home, for whoever reads or writes them between steps."""
        self.end()
        self.streams.synchronize(self.device)
        for home in self.homes.values():
            # Those of frozen weights too: their places in the arena hold others' by now.
            home.bind(home.views(home.flat))
        self.bound, self.resident = {}, {}

    def state(self) -> State:
        """Where units lie in the arena, and what backward passes do without."""
        spared = tuple((unit, *spans) for unit, spans in sorted(self.spared.items()))
        return tuple(sorted(self.resident.items())), spared

    def assume(self, state: State) -> None:
        """Units lie in the arena where they lay when this was the state."""
        self.resident = dict(state[0])

    def side_streams(self) -> tuple[Any, ...]:
        """Those that copies to the device and from it are made on."""
        return self.copies, self.out

    def packer(self) -> Packer:
        """Keeps which weights were saved, not where they lay: in backward they lie elsewhere."""
        start = self.arena.data_ptr()
        end = start + self.arena.numel()

        def pack(tensor: Tensor) -> Placed | None:
            if self.inside is None or not start <= tensor.data_ptr() < end:
                return None
            begin = tensor.data_ptr() - start - self.bound[self.inside]
            self.read.setdefault(self.inside, set()).add(self.homes[self.inside].name_at(begin))
            return Placed(self, self.inside, begin, tensor.shape, tensor.stride(), tensor.dtype)

        return pack

    def typed(self, dtype: torch.dtype) -> Tensor:
        """The arena as elements of a type."""
        if dtype not in self.types:
            self.types[dtype] = self.arena[: self.arena.numel() // ALIGNED * ALIGNED].view(dtype)
        return self.types[dtype]

    def _planned(self, visits: tuple[Use, ...]) -> Plan:
        parts = self.parts()
        course = visits, tuple(sorted(parts.items()))
        if course not in self.rooms:
            self.rooms[course] = room_to_settle(visits, self.sizes, self.arena.numel(), self.resident, parts)
        signature = *course, tuple(sorted(self.resident.items()))
        if signature not in self.plans:
            if len(self.plans) == PLANS:
                self.plans.clear()
            self.plans[signature] = make_plan(visits, self.sizes, self.rooms[course], self.resident, parts)
        return self.plans[signature]

    def parts(self) -> dict[int, int]:
        """Bytes that backward passes read, of those units of which they do not read all."""
        return {unit: self.sizes[unit] - sum(end - begin for begin, end in spared) for unit, spared in self.spared.items()}

    def spare(self, read: Mapping[int, Collection[str]]) -> None:
        """Do without the other weights in backward passes; what lies in the arena without others by now is not used again.

        Args:
            read: by unit, names of those that its backward pass reads.
        """
        found = {unit: spared for unit, names in read.items() if (spared := self.homes[unit].spared(names))}
        if found != self.spared:
            self.resident = {unit: place for unit, place in self.resident.items() if place.whole}
            self.spared = found

    def _forget(self) -> None:
        """Go on without a plan: nothing in the arena is where it was foreseen."""
        self.plan, self.resident, self.bound = None, {}, {}

    def _start(self) -> None:
        """All of the arena is free when what is queued now is done, stepped weights' way home too."""
        self.copies.wait_stream(self.out)
        self.done[START] = self._event()

    def _bring(self, unit: int) -> None:
        """Copy a unit to the beginning of the arena once everything queued is done with it."""
        if self.resident != {unit: Place(0)}:
            self._start()
            self._copy(Load(unit, 0, START))
            self.resident = {unit: Place(0)}
        self._use(unit, 0)

    def _copy(self, load: Load) -> None:
        home = self.homes[load.unit]
        place = self.arena[load.offset : load.offset + home.flat.numel()]
        with self.streams.stream(self.copies):
            self.copies.wait_event(self.done[load.after])
            if load.unit in self.written:
                self.copies.wait_event(self.written[load.unit])
            for begin, end in self._spans(load):
                self.moved += end - begin
                if self.staging is None:
                    place[begin:end].copy_(home.flat[begin:end], non_blocking=True)
                else:
                    self.staging.copy(home.flat[begin:end], place[begin:end], self.copies)
            self.ready[load.unit] = self._event(self.copies)

    def _spans(self, load: Load) -> list[tuple[int, int]]:
        """From where to where in the unit's buffer a load copies."""
        whole = self.homes[load.unit].flat.numel()
        if load.share is Share.WHOLE:
            return [(0, whole)]
        spared = self.spared[load.unit]
        if load.share is Share.REST:
            return spared
        edges = [0, *(edge for span in spared for edge in span), whole]
        return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]

    def _use(self, unit: int, offset: int) -> None:
        # It may have stayed in the arena since it last changed: that must be home before it changes again.
        for events in (self.ready, self.written):
            if unit in events:
                self.streams.current_stream(self.device).wait_event(events[unit])
        if self.bound.get(unit) != offset:
            if (unit, offset) not in self.views:
                self.views[unit, offset] = self.homes[unit].views(self.arena[offset : offset + self.sizes[unit]])
            self.homes[unit].bind(self.views[unit, offset])
            self.bound[unit] = offset

    def _event(self, stream: Any = None) -> Any:
        return end_of(stream or self.streams.current_stream(self.device), self.streams)


class _Enter(torch.autograd.Function):
    """Identity behind a unit; in backward the first that is met of it."""

    @staticmethod
    def forward(ctx: Any, call: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ctx.call()
        return (None, *gradients)


def watch(forward: Callable[..., Any], enter: Callable[[bool], None]) -> Callable[..., Any]:
    """``forward`` with ``enter(False)`` before its work, and ``enter(True)`` before that of its backward pass.

    An identity on the tensors that come out, rather than hooks on a module: a hook would make a compiled module run
    uncompiled.
    """

    def watched(*args: Any, **kwargs: Any) -> Any:
        enter(False)
        out = forward(*args, **kwargs)
        if not torch.is_grad_enabled():
            return out
        leaves, spec = tree_flatten(out)
        chosen = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]
        if chosen:
            for i, x in zip(chosen, _Enter.apply(partial(enter, True), *(leaves[i] for i in chosen)), strict=True):
                leaves[i] = x
        return tree_unflatten(leaves, spec)

    return watched


def streamed(units: Sequence[nn.Module], chosen: Sequence[int], memory: HostMemory) -> dict[int, Home]:
    """Homes for the chosen units, by number."""
    return {n: Home(units[n], memory) for n in chosen}
