"""Plans where and when streamed units lie in a device's memory, from the order in which they will be used."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

START = -1  # as a visit: before the plan begins


@dataclass(frozen=True)
class Load:
    """A copy of a unit's weights into the arena.

    Attributes:
        unit: which.
        offset: in bytes.
        after: the visit whose end frees the place; ``START`` when it is free before the plan begins.
    """

    unit: int
    offset: int
    after: int


@dataclass
class Plan:
    """What to copy when, for a sequence of visits.

    Attributes:
        visits: units in the order of use.
        before: for each visit, the loads to start before its work is queued.
        behind: for each visit, the loads to start once its work is queued, whose place it frees.
        places: the offset of each unit in the arena at its visit.
        resident: units and their offsets after the last visit.
        moved: bytes copied.
    """

    visits: tuple[int, ...]
    before: list[list[Load]] = field(default_factory=list)
    behind: list[list[Load]] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    resident: dict[int, int] = field(default_factory=dict)
    moved: int = 0


def make_plan(visits: Sequence[int], sizes: Mapping[int, int], room: int, resident: Mapping[int, int]) -> Plan:
    """Keep in ``room`` bytes what is used soonest (Belady's rule), and load ahead as far as that leaves space.

    After the last visit the sequence is taken to begin again, as training steps do.

    Args:
        visits: units in the order of use.
        sizes: bytes of each unit.
        room: bytes of the arena, at least the largest unit's.
        resident: what lies in the arena before the first visit, by offset.
    """
    return _Planner(visits, sizes, room, resident).run()


class _Planner:
    def __init__(self, visits: Sequence[int], sizes: Mapping[int, int], room: int, resident: Mapping[int, int]) -> None:
        self.visits, self.sizes, self.room = tuple(visits), sizes, room
        self.uses: dict[int, list[int]] = {}
        for i, unit in enumerate(self.visits):
            self.uses.setdefault(unit, []).append(i)
        self.held = dict(resident)
        self.last: dict[int, int] = {}  # each resident unit's last visit so far
        self.ghosts: list[tuple[int, int, int]] = []  # begin, end and last visit of what lay there before
        self.plan = Plan(self.visits)

    def run(self) -> Plan:
        for i, unit in enumerate(self.visits):
            self.plan.before.append([])
            self.plan.behind.append([])
            if unit not in self.held:
                load = self._place(unit, i, forced=True)
                assert load is not None, "the arena holds the largest unit"
                self.plan.before[i].append(load)
            self.plan.places.append(self.held[unit])
            self.last[unit] = i
            self._ahead(i)
        self.plan.resident = dict(self.held)
        return self.plan

    def _ahead(self, i: int) -> None:
        """Load what comes next while the visit ``i`` is computed."""
        coming: dict[int, None] = {}
        for unit in (*self.visits[i + 1 :], *self.visits[: i + 1]):
            coming.setdefault(unit)
        for unit in coming:
            if unit in self.held:
                continue
            load = self._place(unit, i, forced=False)
            if load is None:
                return
            (self.plan.behind if load.after == i else self.plan.before)[i].append(load)

    def _next_use(self, unit: int, i: int) -> float:
        """The first use after the visit ``i``, in the next round where there is none in this one."""
        uses = self.uses.get(unit)
        if not uses:
            return inf
        place = bisect_right(uses, i)
        return uses[place] if place < len(uses) else uses[0] + len(self.visits)

    def _place(self, unit: int, i: int, forced: bool) -> Load | None:
        """The place where a unit displaces what is used latest; None where that would be used sooner than the unit itself."""
        size = self.sizes[unit]
        wanted = i if forced else self._next_use(unit, i)
        best: tuple[float, int, list[int]] | None = None
        offsets = {0, self.room - size, *(o + self.sizes[u] for u, o in self.held.items()), *(o - size for o in self.held.values())}
        for offset in sorted(o for o in offsets if o >= 0 and o + size <= self.room):
            over = [u for u, o in self.held.items() if o < offset + size and offset < o + self.sizes[u]]
            soonest = min((self._next_use(u, i) for u in over), default=inf)
            if best is None or soonest > best[0]:
                best = (soonest, offset, over)
        if best is None or (not forced and best[0] <= wanted):
            return None
        _, offset, over = best
        for other in over:
            place = self.held.pop(other)
            self.ghosts.append((place, place + self.sizes[other], self.last.pop(other, START)))
        after = max((v for begin, end, v in self.ghosts if begin < offset + size and offset < end), default=START)
        self.held[unit] = offset
        self.plan.moved += size
        return Load(unit, offset, after)


def smallest_room(sizes: Mapping[int, int], visits: Sequence[int], ahead: int = 1) -> int:
    """Bytes that hold any unit and the ``ahead`` units used after it."""
    rooms = [sum(sizes[u] for u in dict.fromkeys((*visits[i : i + 1 + ahead],))) for i in range(len(visits))]
    return max([*rooms, *(sizes[u] for u in sizes)], default=0)
