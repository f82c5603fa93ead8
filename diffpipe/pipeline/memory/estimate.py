"""Adds up what a stage holds at the moment of a step at which it holds most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from itertools import pairwise, product

from diffpipe.metrics import amount
from diffpipe.pipeline.memory.footprint import Footprint
from diffpipe.pipeline.memory.ledger import Work
from diffpipe.pipeline.memory.timeline import Change, Timeline, Visit

Choose = Callable[[Visit], Footprint]


@dataclass(frozen=True)
class Moment:
    """What is held at a moment of a step beside weights, in bytes.

    Attributes:
        saved: activations kept for backward passes.
        workspace: what the running unit, or what lies outside of units, holds beside.
        gradients: of trained parameters.
        flight: activations on their way to the host or back.
        inputs: of the model, with its targets.
    """

    saved: int = 0
    workspace: int = 0
    gradients: int = 0
    flight: int = 0
    inputs: int = 0

    @property
    def whole(self) -> int:
        return self.saved + self.workspace + self.gradients + self.flight + self.inputs


@dataclass(frozen=True)
class Held:
    """Bytes on a device at once, by name."""

    parts: dict[str, int]

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    @property
    def most(self) -> str:
        """The largest part's name."""
        return max(self.parts, key=self.parts.__getitem__)

    def told(self) -> str:
        """The peak and its parts, for a person."""
        parts = sorted(((n, b) for n, b in self.parts.items() if b >= self.peak / 100), key=lambda p: -p[1])
        return f"{amount(self.peak)} (" + ", ".join(f"{name} {amount(count)}" for name, count in parts) + ")"


@dataclass(frozen=True)
class Estimate:
    """What steps of one bucket hold and take on one stage; bytes, and seconds of a step.

    Attributes:
        weights: that stay on the device.
        trained: parameters.
        optimizer: its state.
        arena: where streamed weights lie by turns.
        library: what cuBLAS keeps for itself.
        moment: what is held beside those when most is.
        homes: streamed weights in host memory.
        buffers: moved activations in host memory.
        to_device, to_host: copied in a step.
        gathered: sharded weights that are whole at once.
    """

    weights: int
    trained: int
    optimizer: int
    arena: int
    library: int
    moment: Moment
    homes: int
    buffers: int
    to_device: int
    to_host: int
    seconds: float
    gathered: int = 0

    @property
    def parts(self) -> dict[str, int]:
        """What is on the device at the peak, by name."""
        return {
            "weights": self.weights,
            "streamed weights": self.arena,
            "gathered weights": self.gathered,
            "trained parameters": self.trained,
            "gradients": self.moment.gradients,
            "optimizer state": self.optimizer,
            "saved activations": self.moment.saved,
            "moving activations": self.moment.flight,
            "workspace": self.moment.workspace + self.moment.inputs + self.library,
        }

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    @property
    def host(self) -> int:
        return self.homes + self.buffers

    @property
    def always(self) -> dict[str, int]:
        """Of the parts those that every bucket has alike."""
        return {
            name: self.parts[name] for name in ("weights", "streamed weights", "gathered weights", "trained parameters", "optimizer state")
        }

    def told(self) -> str:
        """The peak and its parts, for a person."""
        return Held(self.parts).told()


@dataclass
class Peak:
    """The course of a step.

    Attributes:
        moment: at which most is held.
        moved: bytes of activations that go to the host in a microbatch.
        held: the most of them there at once.
        ahead, back: the work of a microbatch's passes.
    """

    moment: Moment = field(default_factory=Moment)
    moved: int = 0
    held: int = 0
    ahead: Work = field(default_factory=Work)
    back: Work = field(default_factory=Work)


def find_peak(
    timeline: Timeline,
    footprint: Choose,
    in_flight: int,
    microbatches: int,
    together: bool = False,
    released: Collection[int] = (),
) -> Peak:
    """Go through a step's passes: forward ones of ``in_flight`` microbatches, and the backward pass of the first of them.

    Args:
        footprint: of the unit that a visit is to.
        microbatches: of a step; with more than are in flight there are gradients of earlier ones.
        together: all that are in flight go back through a unit before any goes on, as ``memory.order`` "layer" has it.
        released: units whose gradients do not outlive their backward passes.
    """
    return _Replay(timeline, footprint, in_flight, microbatches, together, released).run()


class _Replay:
    def __init__(
        self,
        timeline: Timeline,
        footprint: Choose,
        in_flight: int,
        microbatches: int,
        together: bool,
        released: Collection[int],
    ) -> None:
        self.released = released
        self.timeline, self.footprint, self.in_flight, self.microbatches = timeline, footprint, in_flight, microbatches
        self.back = range(in_flight if together else 1)
        self.holders: Counter[tuple[int, int]] = Counter()  # units that hold a microbatch's storage for backward
        self.there: set[tuple[int, int]] = set()  # storages that are alive outside of units
        self.kept = self.loose = self.casts = self.gradients = self.flight = self.host = 0
        self.leaving: list[int] = []  # bytes of each unit's activations on their way to the host
        self.inputs = sum(timeline.bytes.get(s, 0) for s in timeline.given) * microbatches + timeline.arriving * in_flight
        self.peak = Peak()

    def run(self) -> Peak:
        if self.microbatches > self.in_flight:
            visits = [e for e in self.timeline.back if isinstance(e, Visit)]
            self.gradients = sum(self.footprint(v).gradients for v in visits)
            self.gradients += sum(self.timeline.bytes[s] for s in self.timeline.gradients)
        for number in range(self.in_flight):
            for event in self.timeline.ahead:
                self._change(event, number) if isinstance(event, Change) else self._forward(event, number)
            self.casts = 0
        before = dict(pairwise(e for e in self.timeline.back if isinstance(e, Visit)))
        for event, number in product(self.timeline.back, self.back):
            self._change(event, number) if isinstance(event, Change) else self._backward(event, number, before.get(event))
        self.peak.ahead += self.timeline.work
        return self.peak

    def _forward(self, visit: Visit, number: int) -> None:
        taken = self.footprint(visit)
        # The unit's own copies begin when those of the unit before the last one were waited for.
        self.leaving = self.leaving[-1:]
        self.flight = sum(self.leaving)
        self._look(taken.forward)
        self.leaving.append(taken.moved)
        self.flight += taken.moved
        self.kept += taken.kept
        self.casts += taken.casts
        self.host += taken.moved
        self.peak.held = max(self.peak.held, self.host)
        for place in set(taken.held):
            self._hold((number, visit.leaves[place]), 1)
        if number == 0:
            self.peak.moved += taken.moved
            self.peak.ahead += taken.ahead

    def _backward(self, visit: Visit, number: int, before: Visit | None) -> None:
        """A unit's backward pass, while what the unit before it needs for its own comes back from the host."""
        taken = self.footprint(visit)
        self.flight = taken.moved + (self.footprint(before).moved if before is not None else 0)
        self._look(taken.backward)
        self.flight -= taken.moved
        self.host -= taken.moved
        self.kept -= taken.kept
        for place in set(taken.held):
            self._hold((number, visit.leaves[place]), -1)
        if number == 0:
            self.gradients += taken.gradients if self.microbatches <= self.in_flight and visit.unit not in self.released else 0
            self.peak.back += taken.back

    def _hold(self, storage: tuple[int, int], count: int) -> None:
        size = self.timeline.bytes.get(storage[1], 0) if storage[1] not in self.timeline.given else 0
        before = self.holders[storage]
        self.holders[storage] += count
        if (before == 0) != (self.holders[storage] == 0):
            self.kept += size if before == 0 else -size
            if storage in self.there:
                self.loose += size if before else -size

    def _change(self, event: Change, number: int) -> None:
        storage = (number, event.storage)
        if event.storage in self.timeline.given:
            return
        if event.storage in self.timeline.gradients:
            if self.microbatches <= self.in_flight and event.bytes > 0 and number == 0:
                self.gradients += event.bytes
            return
        self.there.add(storage) if event.bytes > 0 else self.there.discard(storage)
        if not self.holders[storage]:
            self.loose += event.bytes
            self._look(0)

    def _look(self, more: int) -> None:
        """Whether now is the moment, with ``more`` bytes in the running unit."""
        whole = self.kept + self.loose + self.casts + self.gradients + self.flight + self.inputs + more
        if whole > self.peak.moment.whole:
            self.peak.moment = Moment(self.kept, self.loose + self.casts + more, self.gradients, self.flight, self.inputs)
