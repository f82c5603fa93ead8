"""Whatever the streams' speeds, no copy meets what it copies or overwrites in use: every pair of accesses is ordered by an event."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffpipe.config.schema import MemoryConfig, OptimizerConfig
from diffpipe.optim import make_optimizer
from diffpipe.pipeline.memory.layer import MemoryLayer

CPU = torch.device("cpu")
UNTOUCHED = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "zeros_like")  # read no more than a shape


class Lane:
    """A stream that knows of each other how much of its work is done before its own next."""

    def __init__(self, streams: Streams) -> None:
        self.streams, self.number = streams, len(streams.lanes)
        self.seen: dict[int, int] = {}
        self.ticks = 0
        streams.lanes.append(self)

    def learn(self, seen: dict[int, int]) -> None:
        self.seen |= {lane: max(tick, self.seen.get(lane, 0)) for lane, tick in seen.items()}

    def wait_event(self, event: Event) -> None:
        if "event" not in self.streams.deaf:
            self.learn(event.seen)

    def wait_stream(self, other: Lane) -> None:
        if "stream" not in self.streams.deaf:
            self.learn({**other.seen, other.number: other.ticks})


class Event:
    def __init__(self) -> None:
        self.seen: dict[int, int] = {}

    def record(self, lane: Lane) -> None:
        self.seen = {**lane.seen, lane.number: lane.ticks}


class Streams:
    """Stands for ``torch.cuda``: work is done at once, and who waits for whom is noted.

    Args:
        deaf: kinds of waiting that are left out.
    """

    Event = Event

    def __init__(self, deaf: tuple[str, ...] = ()) -> None:
        self.deaf = deaf
        self.lanes: list[Lane] = []
        self.current = Lane(self)

    def Stream(self, device: torch.device) -> Lane:
        return Lane(self)

    def current_stream(self, device: torch.device) -> Lane:
        return self.current

    @contextmanager
    def stream(self, lane: Lane) -> Iterator[None]:
        before, self.current = self.current, lane
        yield
        self.current = before

    def synchronize(self, device: torch.device) -> None:
        for lane in self.lanes:
            lane.learn({other.number: other.ticks for other in self.lanes})


class Races(TorchDispatchMode):
    """Finds accesses to the same bytes on two streams, one of them a write, neither of which waits for the other.

    Memory that is freed and taken again counts as the same bytes, as it does with torch's allocator on a device.
    """

    def __init__(self, streams: Streams) -> None:
        super().__init__()
        self.streams = streams
        self.done: dict[int, list[tuple[int, int, int, bool, str]]] = {}  # by lane: tick, first byte, end, whether written, by what
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name not in UNTOUCHED:
            given = [*zip(func._schema.arguments, args, strict=False)]
            given += [(a, kwargs[a.name]) for a in func._schema.arguments if a.name in (kwargs or {})]
            self.streams.current.ticks += 1
            for argument, value in given:
                # What is neither read nor written is viewed.
                if argument.alias_info is None or argument.alias_info.is_write:
                    self.meet(value, argument.alias_info is not None, name)
            if all(r.alias_info is None for r in func._schema.returns):
                self.meet(out, True, name)
        return out

    def meet(self, values: Any, written: bool, name: str) -> None:
        lane = self.streams.current
        for t in tree_leaves(values):
            if not isinstance(t, Tensor) or not t.numel():
                continue
            begin = t.data_ptr()
            end = begin + (sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1) * t.itemsize
            for other, accesses in self.done.items():
                if other == lane.number:
                    continue
                for tick, first, last, wrote, what in reversed(accesses):
                    if tick <= lane.seen.get(other, 0):
                        break
                    if first < end and begin < last and (wrote or written):
                        self.found.append(f"{name} on stream {lane.number} while {what} on stream {other}")
            self.done.setdefault(lane.number, []).append((lane.ticks, begin, end, written, name))


class Unit(nn.Module):
    """Its shift's weight is read by a backward pass only where the condition needs a gradient."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shift, self.up, self.down = nn.Linear(32, 64), nn.Linear(64, width), nn.Linear(width, 64)
        self.condition = torch.randn(1, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x + self.shift(self.condition))))


def units_of(trained: bool) -> list[Unit]:
    torch.manual_seed(0)
    return [Unit(96 + 32 * (i % 3)).requires_grad_(trained) for i in range(7)]


Order = Callable[[Sequence[nn.Module], list[Tensor]], list[Tensor]]


def forward(units: Sequence[nn.Module], x: Tensor) -> Tensor:
    for unit in units:
        x = unit(x)
    return x.square().mean()


def one_by_one(units: Sequence[nn.Module], inputs: list[Tensor]) -> list[Tensor]:
    losses: list[Tensor] = []
    for x in inputs:
        losses.append(forward(units, x))
        losses[-1].backward()
    return [loss.detach() for loss in losses]


def layer_by_layer(units: Sequence[nn.Module], inputs: list[Tensor]) -> list[Tensor]:
    for unit in units:
        inputs = [unit(x) for x in inputs]
    losses = [x.square().mean() for x in inputs]
    torch.stack(losses).sum().backward()
    return [loss.detach() for loss in losses]


def two_in_flight(units: Sequence[nn.Module], inputs: list[Tensor]) -> list[Tensor]:
    """As the first of two stages does under 1F1B."""
    losses: list[Tensor] = []
    for i in range(len(inputs) + 1):
        if i < len(inputs):
            losses.append(forward(units, inputs[i]))
        if i:
            losses[i - 1].backward()
    return [loss.detach() for loss in losses]


Outcome = tuple[list[Tensor], list[Tensor | None], list[Tensor]]


def stepped(units: Sequence[nn.Module], order: Order, count: int, layer: MemoryLayer | None) -> Outcome:
    """Losses of some steps and evaluations, the inputs' gradients, and the weights in the end."""
    named = [(f"{i}.{n}", p) for i, unit in enumerate(units) for n, p in unit.named_parameters()]
    optimizer = make_optimizer(OptimizerConfig(lr=1e-2), named)
    step_rest = optimizer.step if layer is None else layer.release_with(optimizer, lambda gradients: None).step_rest
    losses: list[Tensor] = []
    gradients: list[Tensor | None] = []
    for step in range(4):
        inputs = [torch.randn(32, 64, generator=torch.Generator().manual_seed(10 * step + i)).requires_grad_() for i in range(count)]
        for training in (True, False):
            with torch.set_grad_enabled(training):
                if layer is not None:
                    layer.begin(count)
                losses += order(units, inputs) if training else [forward(units, x) for x in inputs]
                if layer is not None:
                    layer.end()
            if training:
                step_rest()
                optimizer.zero_grad()
        gradients += [x.grad for x in inputs]
        if layer is not None and step == 2:
            layer.settle()
    if layer is not None:
        layer.settle()
        for home in layer.homes.values():
            home.bind(home.views(home.flat))
    return losses, gradients, [p.detach().clone() for unit in units for p in unit.parameters()]


def layer_of(units: Sequence[nn.Module], streams: Streams, places: float | None, stepping: dict[str, Any], **memory: Any) -> MemoryLayer:
    """A layer whose arena holds so many of the largest units; None for the least. Where all is kept, backward passes are taken to read
    what autograd saved, as those of compiled units do."""
    largest = max(sum(p.nbytes for p in unit.parameters()) for unit in units)
    room = None if places is None else places * (largest + 1024) / 2**20
    config = MemoryConfig.model_validate({"swap": "all", "room": room, "offload": True, "offload_threshold": 0.001, **memory})
    layer = MemoryLayer(config, [*units], CPU, OptimizerConfig(**stepping), streams)
    layer.wrap()
    assert layer.stream is not None
    layer.stream.told = config.recompute == "none"
    return layer


SOME = {"swap": 4, "recompute": "none"}
ALL = {"swap": "all", "recompute": "none"}
APART = {"release": True, "offload": True}


@pytest.mark.parametrize("places", [None, 5])
@pytest.mark.parametrize(
    ("trained", "memory", "stepping"),
    [
        (False, {}, {}),
        (False, SOME, {}),
        (False, ALL, {}),
        (True, {}, {}),
        (True, SOME, {}),
        (True, SOME, {"offload": True}),
        (True, SOME, APART),
    ],
    ids=["frozen", "some-frozen", "told", "trained", "some-trained", "late", "released"],
)
@pytest.mark.parametrize(
    ("order", "count"), [(one_by_one, 1), (one_by_one, 3), (layer_by_layer, 3), (two_in_flight, 3)], ids=lambda v: getattr(v, "__name__", v)
)
def test_whoever_is_late_nothing_is_read_or_overwritten_too_early(
    order: Order, count: int, trained: bool, memory: dict[str, Any], stepping: dict[str, Any], places: float | None
) -> None:
    plain = stepped(units_of(trained), order, count, None)
    units, streams = units_of(trained), Streams()
    layer = layer_of(units, streams, places, stepping, **memory)
    with Races(streams) as races:
        got = stepped(units, order, count, layer)
    assert not races.found, sorted(set(races.found))
    assert all(torch.equal(a, b) for ours, theirs in zip(got, plain, strict=True) for a, b in zip(ours, theirs, strict=True))
    # The computation, what comes, activations that go; stepped weights' way home, and state both ways.
    assert len(races.done) == (6 if trained else 3)


def test_weights_that_only_some_steps_backward_passes_read_are_left_out_of_the_others_copies_alone() -> None:
    units, plain, streams = units_of(False), units_of(False), Streams()
    layer = layer_of(units, streams, None, {}, **ALL)
    stream = layer.stream
    assert stream is not None
    moved = []
    with Races(streams) as races:
        for step in range(6):
            wanting = step in (3, 4)
            for unit in (*units, *plain):
                unit.condition = unit.condition.detach().requires_grad_(wanting)
            x = torch.randn(32, 64, generator=torch.Generator().manual_seed(step))
            before = stream.moved
            layer.begin(1)
            forward(units, x.requires_grad_()).backward()
            layer.end()
            moved.append(stream.moved - before)
            forward(plain, other := x.detach().requires_grad_()).backward()
            assert x.grad is not None and other.grad is not None and torch.equal(x.grad, other.grad)
            for unit, same in zip(units, plain, strict=True):
                assert not wanting or torch.equal(unit.condition.grad, same.condition.grad)  # pyright: ignore[reportArgumentType]
    assert not races.found, sorted(set(races.found))
    assert moved[2] < moved[3] and moved[4] > moved[2], moved


def test_settings_that_change_after_a_broken_step_take_no_memory_that_is_still_copied_to() -> None:
    units, streams = units_of(False), Streams()
    layer = layer_of(units, streams, 5, {})
    with Races(streams) as races:
        layer.begin(1)
        forward(units[:5], torch.randn(32, 64).requires_grad_())  # and no backward pass
        layer.change(layer.config.model_copy(update={"room": None, "recompute": "block"}))
        stepped(units, one_by_one, 1, layer)
    assert not races.found, sorted(set(races.found))


@pytest.mark.parametrize("deaf", ["event", "stream"])
def test_a_stream_that_does_not_wait_is_found(deaf: str) -> None:
    units, streams = units_of(True), Streams((deaf,))
    layer = layer_of(units, streams, None, {})
    with Races(streams) as races:
        stepped(units, one_by_one, 1, layer)
    assert races.found
