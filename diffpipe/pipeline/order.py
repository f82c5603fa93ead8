"""Which passes each stage runs in a step, one after another, in every schedule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["ahead", "back", "inputs", "weights"]  # the latter are the halves of a backward pass: gradients of inputs, then of weights


@dataclass(frozen=True)
class Pass:
    """One microbatch's way through one span."""

    kind: Kind
    span: int
    microbatch: int


def passes_of(schedule: str, stages: int, spans: int, microbatches: int) -> list[list[Pass]]:
    """The passes of each stage in the order in which torch's schedule of that name runs them.

    Eager 1F1B (arXiv:2211.05322) is interleaved 1F1B (arXiv:2104.04473) of one span: forward passes run so far ahead that what crosses has
    a pass of time; zero-bubble is ZB-H1 (arXiv:2401.10241).

    Args:
        schedule: as ``mesh.schedule`` has it, but auto.
        spans: that each stage holds; stage ``n`` those numbered n, n + stages, ...
        microbatches: of a step; but in gpipe and 1f1b they make rounds of one size.
    """
    if schedule == "gpipe" or (schedule == "1f1b" and microbatches < stages):
        return [[Pass(kind, n, m) for kind in ("ahead", "back") for m in range(microbatches)] for n in range(stages)]
    halves = schedule == "zero-bubble"
    more = 2 if schedule in ("eager-1f1b", "interleaved") else 1  # microbatches ahead for each stage behind
    round_ = microbatches // max(1, microbatches // stages)
    passes = []
    for n in range(stages):
        early = min((spans - 1) * round_ + more * (stages - 1 - n), spans * microbatches)
        back = _back(n, spans, stages, microbatches, round_, "inputs" if halves else "back")
        turns = _by_turns(_ahead(n, spans, stages, microbatches, round_), back, early)
        passes.append(_with_weights(turns, n) if halves else turns)
    return passes


def _ahead(stage: int, spans: int, stages: int, microbatches: int, round_: int) -> list[Pass]:
    """Forward passes: a round of microbatches through each span in turn."""
    return _counted("ahead", [stage + step // round_ % spans * stages for step in range(spans * microbatches)])


def _back(stage: int, spans: int, stages: int, microbatches: int, round_: int, kind: Kind) -> list[Pass]:
    return _counted(kind, [stage + (spans - 1 - step // round_ % spans) * stages for step in range(spans * microbatches)])


def _counted(kind: Kind, spans: Sequence[int]) -> list[Pass]:
    """A pass for each entry, of the microbatch that comes next in that span."""
    done = Counter[int]()
    passes = []
    for span in spans:
        passes.append(Pass(kind, span, done[span]))
        done[span] += 1
    return passes


def _by_turns(ahead: Sequence[Pass], back: Sequence[Pass], early: int) -> list[Pass]:
    """Some forward passes, then one of each by turns, then the backward passes that are left."""
    turns = [each for pair in zip(ahead[early:], back, strict=False) for each in pair]
    return [*ahead[:early], *turns, *back[len(ahead) - early :]]


def _with_weights(turns: Sequence[Pass], stage: int) -> list[Pass]:
    """The gradients of weights behind those of inputs: each as many passes later as the stage's number, the last at the end."""
    passes: list[Pass] = []
    waiting: list[Pass] = []
    seen = 0
    for each in turns:
        passes.append(each)
        if each.kind == "inputs":
            waiting.append(Pass("weights", each.span, each.microbatch))
            seen += 1
            if seen > stage:
                passes.append(waiting.pop(0))
    return passes + waiting


def in_flight(passes: Sequence[Pass]) -> int:
    """The most microbatches, counted once for each span they are in, that a stage keeps activations of at once."""
    most = now = 0
    for each in passes:
        now += {"ahead": 1, "back": -1, "inputs": 0, "weights": -1}[each.kind]
        most = max(most, now)
    return most
