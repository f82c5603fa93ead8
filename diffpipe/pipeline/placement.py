"""Chooses where a model is cut and in which order its passes run, from what each unit takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from diffpipe.config.schema import Config, MeshConfig, fills_rounds
from diffpipe.metrics import amount
from diffpipe.models.base import DiffusionModel
from diffpipe.pipeline.calibrate import Seconds
from diffpipe.pipeline.memory.cards import Card
from diffpipe.pipeline.memory.planner import is_open
from diffpipe.pipeline.order import in_flight, passes_of
from diffpipe.pipeline.rehearsal import Dims, Rehearsal, Unit, largest
from diffpipe.pipeline.simulate import Course, simulate
from diffpipe.pipeline.split import Span, balance, check_units

SPANS = (2, 3, 4)  # of each stage, that are tried where the config names none
GAIN = 0.03  # part of a step that a schedule must save to be taken before a plainer one, which sends and holds less
LATENCY = 20e-6  # seconds that a payload takes to begin
CLOSE = 0.85  # part of its memory from which on a stage's is rehearsed rather than added up
TRIES = 4

# What a stage holds: by its number, some of its spans, and how many times these.
Held = Callable[..., float]


@dataclass(frozen=True)
class Placement:
    """How a mesh runs a model.

    Attributes:
        mesh: with schedule, spans and split as they were chosen.
        spans: of all stages.
        course: of a step of the bucket that takes most.
        held: by stage, bytes at the most, added up from units.
        sent: by stage, bytes that it sends in a step.
        reasons: what was chosen, and why, for a person.
    """

    mesh: MeshConfig
    spans: tuple[Span, ...]
    course: Course
    held: tuple[int, ...]
    sent: tuple[int, ...]
    reasons: tuple[str, ...] = ()

    def lines(self) -> Iterator[str]:
        """The choice, and what it is foreseen to come to."""
        yield from self.reasons
        starts = ", ".join(str(start) for start, _ in self.spans[1:])
        yield (
            f"predicted: bubble {self.course.bubble:.1%} of a step ({', '.join(f'{b:.0%}' for b in self.course.bubbles)} by stage),"
            f" balance {self.course.balance:.2f}, with spans that begin at units 0, {starts}"
        )


class Placer:
    """Places one model on meshes of any size.

    Args:
        card: that each stage has.
        buckets: that train.
        limits: by stage, bytes that it may hold; None where nothing limits them.
        measured: by stage and bucket, seconds of each unit's passes; None takes those that the card is estimated to need.
        units: of the model, where they are known already.
    """

    def __init__(
        self,
        config: Config,
        model: DiffusionModel,
        card: Card,
        buckets: Sequence[Dims],
        limits: Sequence[int] | None = None,
        measured: Sequence[Mapping[Dims, Sequence[Seconds]]] | None = None,
        units: Sequence[Unit] | None = None,
    ) -> None:
        self.config, self.model, self.card, self.limits = config, model, card, limits
        self.dearest = largest(buckets)
        self.units = units or whole(config, model, card).inventory(self.dearest)
        estimated = {self.dearest: [(card.seconds(unit.ahead), card.seconds(unit.back)) for unit in self.units]}
        self.times = measured or [estimated] * config.mesh.stages
        self.overs = [1.0] * config.mesh.stages  # by stage, how much more it was rehearsed to hold than units add up to

    def place(self) -> Placement:
        """The placement of least time that fits; of those that nearly tie, the plainest. Where none fits, the plainest.

        Raises:
            ConfigError: when there are more spans than units.
        """
        check_units(self.config.mesh, len(self.units))
        for _ in range(TRIES):
            chosen = self._best()
            if not self._corrected(chosen):
                break
        return chosen

    def _best(self) -> Placement:
        placements = [self._placed(schedule, spans) for schedule, spans in self._candidates()]
        fitting = [p for p in placements if self._fits(p)] or placements[:1]
        least = min(p.course.seconds for p in fitting)
        best = next(p for p in fitting if p.course.seconds <= least * (1 + GAIN))
        return self._told(best, placements)

    def _candidates(self) -> Iterator[tuple[str, int]]:
        """Schedules and spans that the config allows, the plainest first."""
        config, mesh = self.config, self.config.mesh
        count, stages = config.batch.accumulate, mesh.stages
        if stages == 1:
            yield ("gpipe" if mesh.schedule == "gpipe" else "1f1b"), 1
            return
        free = [v for v in SPANS if stages * v <= len(self.units)]
        several = [mesh.spans] if mesh.spans else [] if isinstance(mesh.split, list) else free
        if mesh.schedule in ("1f1b", "eager-1f1b", "gpipe"):
            yield mesh.schedule, 1
        elif mesh.schedule == "interleaved":
            yield from (("interleaved", v) for v in several or [mesh.all_spans // stages])
        elif mesh.schedule == "zero-bubble":
            yield from (("zero-bubble", v) for v in ([mesh.spans] if mesh.spans else [1, *several]))
        else:
            rounds = fills_rounds(count, stages) and count >= stages
            if mesh.spans in (None, 1):
                yield "1f1b", 1
                if rounds and not is_open(config.memory):
                    yield "eager-1f1b", 1
            # Streamed weights come by once for each span and microbatch: that is left to who asks for it.
            if mesh.spans or (rounds and not is_open(config.memory) and config.memory.swap == 0):
                yield from (("interleaved", v) for v in several if v > 1)
            if rounds and not config.against_zero_bubble:
                yield from (("zero-bubble", v) for v in ([mesh.spans] if mesh.spans else [1, *several]))

    def _placed(self, schedule: str, count: int) -> Placement:
        mesh = self.config.mesh
        stages, microbatches = mesh.stages, self.config.batch.accumulate
        passes = passes_of(schedule, stages, count, microbatches)
        flights = [in_flight(each) / count for each in passes]
        held = self._holding(flights)
        spans = self._cut(count, held)
        ahead, back = (self._seconds(spans, self.dearest, which) for which in (0, 1))
        crossing = [self._crossing(stop) for _, stop in spans[:-1]]
        course = simulate(passes, ahead, back, [size / self.card.link + LATENCY for size in crossing])
        sent = [0] * stages
        for number, size in enumerate(crossing):  # from the stage before a border ahead, and from the one behind it back
            sent[number % stages] += microbatches * size
            sent[(number + 1) % stages] += microbatches * size
        sums = [held(n, spans[n::stages]) for n in range(stages)]
        settled = mesh.model_copy(update={"schedule": schedule, "spans": count, "split": [start for start, _ in spans[1:]]})
        return Placement(settled, tuple(spans), course, tuple(int(s) for s in sums), tuple(sent))

    def _holding(self, flights: Sequence[float]) -> Held:
        fixed, saved = ([0, *accumulate(getattr(u, name) for u in self.units)] for name in ("fixed", "saved"))

        def held(stage: int, spans: Sequence[Span], times: int = 1) -> float:
            kept = sum(fixed[stop] - fixed[start] + flights[stage] * (saved[stop] - saved[start]) for start, stop in spans)
            workspace = max(u.workspace for start, stop in spans for u in self.units[start:stop])
            return (times * kept + workspace + self.card.library) * self.overs[stage]

        return held

    def _cut(self, count: int, held: Held) -> list[Span]:
        """The spans that ``mesh.split`` asks for, where any such fit; else those that would hold least of what there is."""
        mesh, units = self.config.mesh, len(self.units)
        stages = mesh.stages
        if isinstance(mesh.split, list):
            return list(pairwise([0, *mesh.split, units]))
        bytes_ = [0, *accumulate(u.parameters for u in self.units)]
        seconds = [[0.0, *accumulate(sum(sum(b[n]) for b in times.values()) for n in range(units))] for times in self.times]

        def full(number: int, start: int, stop: int) -> float:
            stage = number % stages
            return held(stage, [(start, stop)], count) / (self.limits[stage] if self.limits else 1)

        def cost(number: int, start: int, stop: int) -> float:
            if self._limited and full(number, start, stop) > 1:
                return math.inf
            if mesh.split == "parameters":
                return bytes_[stop] - bytes_[start]
            times = seconds[number % stages]
            return times[stop] - times[start]

        found = None if mesh.split == "memory" else balance(units, stages * count, cost)
        found = found or balance(units, stages * count, full)
        assert found is not None
        return found

    @property
    def _limited(self) -> bool:
        """Whether limits decide about the cut; else what a stage holds is made to fit them."""
        return self.limits is not None and not is_open(self.config.memory) and self.config.memory.swap == 0

    def _fits(self, placement: Placement) -> bool:
        if self.limits is None or not self._limited:
            return True
        return all(h <= limit for h, limit in zip(placement.held, self.limits, strict=True))

    def _corrected(self, chosen: Placement) -> bool:
        """Whether a stage that should nearly fill its memory proved to need more than it has, so that the choice is not valid."""
        if self.limits is None or not self._limited or isinstance(self.config.mesh.split, list):
            return False
        found = False
        settled = self.config.model_copy(update={"mesh": chosen.mesh})
        for stage, (held, limit) in enumerate(zip(chosen.held, self.limits, strict=True)):
            if CLOSE * limit < held:
                exact = Rehearsal(settled, self.model, stage, self.card).estimate(self.dearest, settled.memory).peak
                self.overs[stage] *= max(1.0, exact / held)
                found |= exact > limit >= held
        return found

    def _seconds(self, spans: Sequence[Span], bucket: Dims, which: int) -> list[float]:
        stages = self.config.mesh.stages
        return [sum(pair[which] for pair in self.times[n % stages][bucket][start:stop]) for n, (start, stop) in enumerate(spans)]

    def _crossing(self, border: int) -> int:
        """Bytes of a microbatch that cross in front of a unit."""
        return sum(self.units[unit].sent for unit in self.model.spec.live(border))

    def _told(self, best: Placement, placements: Sequence[Placement]) -> Placement:
        """The placement with its reasons."""
        mesh, told = self.config.mesh, []
        if mesh.stages > 1 and mesh.schedule == "auto":
            others = [
                f"{_named(p.mesh)} {p.course.seconds:.3g} s" + ("" if self._fits(p) else f", too much with {amount(max(p.held))}")
                for p in placements
                if p is not best
            ]
            told.append(
                f"mesh.schedule: {_named(best.mesh)} (a step takes {best.course.seconds:.3g} s; {'; '.join(others) or 'the only one'})"
            )
        return Placement(best.mesh, best.spans, best.course, best.held, best.sent, tuple(told))


def _named(mesh: MeshConfig) -> str:
    return f"{mesh.schedule} of {mesh.spans} spans" if (mesh.spans or 1) > 1 else mesh.schedule


def whole(config: Config, model: DiffusionModel, card: Card) -> Rehearsal:
    """The rehearsal of a config's model on one stage."""
    alone = {"stages": 1, "schedule": "1f1b", "spans": 1, "split": "parameters", "memory": None}
    return Rehearsal(config.model_copy(update={"mesh": config.mesh.model_copy(update=alone)}), model, 0, card)
