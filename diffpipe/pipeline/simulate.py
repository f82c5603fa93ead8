"""Plays a step's passes on any number of stages, by how long each takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffpipe.pipeline.order import Kind, Pass


@dataclass(frozen=True)
class Course:
    """How a step goes; times in seconds.

    Attributes:
        seconds: from its first pass until all are through.
        busy: by stage, of computing.
    """

    seconds: float
    busy: tuple[float, ...]

    @property
    def bubbles(self) -> tuple[float, ...]:
        """By stage the part of the step in which it waits for others."""
        return tuple(1 - busy / self.seconds for busy in self.busy)

    @property
    def bubble(self) -> float:
        """The mean of all stages."""
        return sum(self.bubbles) / len(self.busy)

    @property
    def balance(self) -> float:
        """The mean stage's work as a part of the largest: 1 where all have as much to do."""
        return sum(self.busy) / len(self.busy) / max(self.busy)


def simulate(order: Sequence[Sequence[Pass]], ahead: Sequence[float], back: Sequence[float], crossing: Sequence[float] = ()) -> Course:
    """The course of a step whose stages wait for nothing but what they need, and send while they compute.

    Args:
        order: the passes of each stage.
        ahead, back: seconds of each span's passes; half of a backward pass is for the gradients of weights.
        crossing: seconds that a payload takes behind each span but the last; none takes any.
    """
    spans = len(ahead)
    crossing = crossing or [0.0] * (spans - 1)
    took: dict[Kind, Sequence[float]] = {
        "ahead": ahead,
        "back": back,
        "inputs": [t / 2 for t in back],
        "weights": [t / 2 for t in back],
    }
    arrives: dict[tuple[bool, int, int], float] = {}  # by direction, span and microbatch, when what a pass needs is there
    clocks, busy, places = [0.0] * len(order), [0.0] * len(order), [0] * len(order)
    ready = list(range(len(order)))
    while ready:
        stage = ready.pop()
        while places[stage] < len(order[stage]):
            each = order[stage][places[stage]]
            forward = each.kind == "ahead"
            begins = each.kind == "weights" or each.span == (0 if forward else spans - 1)
            needs = 0.0 if begins else arrives.get((forward, each.span, each.microbatch))
            if needs is None:
                break
            seconds = took[each.kind][each.span]
            clocks[stage] = max(clocks[stage], needs) + seconds
            busy[stage] += seconds
            places[stage] += 1
            following = each.span + 1 if forward else each.span - 1
            if each.kind != "weights" and 0 <= following < spans:
                arrives[forward, following, each.microbatch] = clocks[stage] + crossing[min(each.span, following)]
                if following % len(order) != stage:
                    ready.append(following % len(order))
    assert all(place == len(passes) for place, passes in zip(places, order, strict=True)), "a pass waits for one that never comes"
    return Course(max(clocks), tuple(busy))
