"""Plans where and when streamed units lie in a device's memory, from the order in which they will be used."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import chain, islice
from math import inf
from typing import NamedTuple

START = -1  # as a visit: before the plan begins
ROUNDS = 12  # steps in which the arena should come to be left as it was found
PARTS, LEFT = 128, 8  # of how many parts of the room how many may be left unused for that


class Share(Enum):
    """What is copied of a unit's weights."""

    WHOLE = "whole"
    BACK = "back"  # what a backward pass reads
    REST = "rest"  # the others, where that is there


class Use(NamedTuple):
    """A visit to a unit.

    Attributes:
        back: only its backward pass is run, or passes that read no more than that.
    """

    unit: int
    back: bool = False


class Place(NamedTuple):
    """Where a unit lies in the arena.

    Attributes:
        offset: in bytes.
        whole: whether all of its weights are there, or only what a backward pass reads.
    """

    offset: int
    whole: bool = True


@dataclass(frozen=True)
class Load:
    """A copy of a unit's weights into the arena.

    Attributes:
        unit: which.
        offset: of the unit's place, in bytes.
        after: the visit whose end frees the place; ``START`` when it is free before the plan begins.
        share: what is copied.
    """

    unit: int
    offset: int
    after: int
    share: Share = Share.WHOLE


@dataclass
class Plan:
    """What to copy when, for a sequence of visits.

    Attributes:
        visits: in their order.
        before: for each visit, the loads to start before its work is queued.
        behind: for each visit, the loads to start once its work is queued, whose place it frees.
        places: the offset of each unit in the arena at its visit.
        resident: where units lie after the last visit.
        moved: bytes copied.
    """

    visits: tuple[Use, ...]
    before: list[list[Load]] = field(default_factory=list)
    behind: list[list[Load]] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    resident: dict[int, Place] = field(default_factory=dict)
    moved: int = 0


def make_plan(
    visits: Sequence[Use], sizes: Mapping[int, int], room: int, resident: Mapping[int, Place], parts: Mapping[int, int] | None = None
) -> Plan:
    """Keep in ``room`` bytes what is used soonest (Belady's rule), and load ahead as far as that leaves space.

    After the last visit the sequence is taken to begin again, as training steps do. A unit has a place for all of it, also where
    only what a backward pass reads is brought.

    Args:
        visits: in their order.
        sizes: bytes of each unit.
        room: bytes of the arena, at least the largest unit's.
        resident: what lies in the arena before the first visit.
        parts: bytes that a backward pass reads, of those units of which it does not read all.
    """
    return _Planner(visits, sizes, room, resident, parts or {}).run()


class _Planner:
    def __init__(
        self, visits: Sequence[Use], sizes: Mapping[int, int], room: int, resident: Mapping[int, Place], parts: Mapping[int, int]
    ) -> None:
        self.visits, self.sizes, self.room, self.parts = tuple(visits), sizes, room, parts
        self.uses: dict[int, list[int]] = {}
        for i, use in enumerate(self.visits):
            self.uses.setdefault(use.unit, []).append(i)
        self.held = dict(resident)
        self.last: dict[int, int] = {}  # each resident unit's last visit so far
        self.ghosts: list[tuple[int, int, int]] = []  # begin, end and last visit of what lay there before
        self.plan = Plan(self.visits)

    def run(self) -> Plan:
        for i, use in enumerate(self.visits):
            self.plan.before.append([])
            self.plan.behind.append([])
            load = self._bring(use, i, forced=True)
            if load is not None:
                self.plan.before[i].append(load)
            self.plan.places.append(self.held[use.unit].offset)
            self.last[use.unit] = i
            self._ahead(i)
        self.plan.resident = dict(self.held)
        return self.plan

    def _ahead(self, i: int) -> None:
        """Load what comes next while the visit ``i`` is computed."""
        met: set[int] = set()
        for use in chain(islice(self.visits, i + 1, None), islice(self.visits, i + 1)):
            if use.unit in met:
                continue
            met.add(use.unit)
            if self._has(use):
                continue
            if use.unit == self.visits[i].unit and use.unit not in self.held:
                return  # it has just made room for others, and is still used where it lay
            load = self._bring(use, i, forced=False)
            if load is None:
                return
            (self.plan.behind if load.after == i else self.plan.before)[i].append(load)

    def _has(self, use: Use) -> bool:
        """Whether what a visit reads is there."""
        place = self.held.get(use.unit)
        return place is not None and (place.whole or self._partly(use))

    def _partly(self, use: Use) -> bool:
        return use.back and use.unit in self.parts

    def _bring(self, use: Use, i: int, forced: bool) -> Load | None:
        """The load for a visit; None where all is there, or room is kept for what is used sooner."""
        if self._has(use):
            return None
        size = self.sizes[use.unit]
        if use.unit in self.held:
            offset = self.held[use.unit].offset
            self.held[use.unit] = Place(offset)
            self.plan.moved += size - self.parts[use.unit]
            # The place is the unit's already; its last visit may have read more than was foreseen.
            return Load(use.unit, offset, self.last.get(use.unit, START), Share.REST)
        found = self._place(use.unit, i, forced)
        if found is None:
            assert not forced, "the arena holds the largest unit"
            return None
        partly = self._partly(use)
        self.held[use.unit] = Place(found[0], whole=not partly)
        self.plan.moved += self.parts[use.unit] if partly else size
        return Load(use.unit, *found, Share.BACK if partly else Share.WHOLE)

    def _next_use(self, unit: int, i: int) -> float:
        """The first use after the visit ``i``, in the next round where there is none in this one."""
        uses = self.uses.get(unit)
        if not uses:
            return inf
        place = bisect_right(uses, i)
        return uses[place] if place < len(uses) else uses[0] + len(self.visits)

    def _place(self, unit: int, i: int, forced: bool) -> tuple[int, int] | None:
        """The offset at which a unit displaces what is used latest, and the visit after which; None where that would be used sooner than
        the unit itself."""
        size = self.sizes[unit]
        wanted = i if forced else self._next_use(unit, i)
        best: tuple[float, int, list[int]] | None = None
        spans = {u: (p.offset, p.offset + self.sizes[u]) for u, p in self.held.items()}
        offsets = {0, self.room - size, *(end for _, end in spans.values()), *(begin - size for begin, _ in spans.values())}
        for offset in sorted(o for o in offsets if o >= 0 and o + size <= self.room):
            over = [u for u, (begin, end) in spans.items() if begin < offset + size and offset < end]
            soonest = min((self._next_use(u, i) for u in over), default=inf)
            if best is None or soonest > best[0]:
                best = (soonest, offset, over)
        if best is None or (not forced and best[0] <= wanted):
            return None
        _, offset, over = best
        for other in over:
            del self.held[other]
            self.ghosts.append((*spans[other], self.last.pop(other, START)))
        after = max((v for begin, end, v in self.ghosts if begin < offset + size and offset < end), default=START)
        return offset, after


def steady_plans(
    visits: Sequence[Use], sizes: Mapping[int, int], room: int, resident: Mapping[int, Place], parts: Mapping[int, int] | None = None
) -> Iterator[Plan]:
    """The plans of steps that follow one another, until one leaves the arena as it found it; at most ``ROUNDS``. The arguments are those
    of ``make_plan``."""
    for _ in range(ROUNDS):
        plan = make_plan(visits, sizes, room, resident, parts)
        yield plan
        if plan.resident == resident:
            return
        resident = plan.resident


def room_to_settle(
    visits: Sequence[Use], sizes: Mapping[int, int], room: int, resident: Mapping[int, Place], parts: Mapping[int, int] | None = None
) -> int:
    """The room to plan with so that steps come to leave the arena as they find it.

    With some rooms they take turns between several states, or come back to none for long. A little less is used there, if that changes
    it. The arguments are those of ``make_plan``.
    """
    least = smallest_room(sizes, [use.unit for use in visits])
    for unused in range(LEFT + 1):
        less = room - room * unused // PARTS
        if less >= least and len(list(steady_plans(visits, sizes, less, resident, parts))) < ROUNDS:
            return less
    return room


def smallest_room(sizes: Mapping[int, int], visits: Sequence[int], ahead: int = 1) -> int:
    """Bytes that hold any unit and the ``ahead`` units used after it."""
    rooms = [sum(sizes[u] for u in dict.fromkeys((*visits[i : i + 1 + ahead],))) for i in range(len(visits))]
    return max([*rooms, *(sizes[u] for u in sizes)], default=0)
