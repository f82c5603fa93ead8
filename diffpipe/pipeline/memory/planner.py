"""Chooses what is recomputed, streamed and offloaded so that steps fit a budget at the least time."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import inf

from diffpipe.config.schema import Config, MemoryConfig
from diffpipe.errors import DiffpipeError
from diffpipe.metrics import amount
from diffpipe.pipeline.memory.estimate import Estimate, Held
from diffpipe.pipeline.memory.shortage import SMALLER_PREVIEWS, remedies

LOWER = 0.85  # part of what was held that is aimed at when it was too much
EVERY = (1, 2, 3, 4)  # what recompute_every may be chosen to be
Judge = Callable[[MemoryConfig], Estimate]


@dataclass(frozen=True)
class Choice:
    """A memory section without anything left to choose.

    Attributes:
        memory: the section.
        estimate: of the bucket that takes most.
        reasons: by key, why it is as it is.
    """

    memory: MemoryConfig
    estimate: Estimate
    reasons: dict[str, str] = field(default_factory=dict)


def is_open(memory: MemoryConfig) -> bool:
    """Whether something is left to choose."""
    return memory.budget is not None or memory.swap == "auto"


def choose(memory: MemoryConfig, units: int, budget: int, judge: Judge, host: float = inf) -> Choice | None:
    """The fastest settings that fit, of equally fast ones the plainest; None where none fits.

    Keys that are set stay as they are.

    Args:
        units: of the stage.
        judge: estimates the dearest bucket under a section.
        host: bytes of host memory that may be held.
    """
    found = [(judge(each), i, each) for i, each in enumerate(_settings(memory, units))]
    fitting = [f for f in found if f[0].peak <= budget and f[0].host <= host]
    if not fitting:
        return None
    estimate, _, best = min(fitting, key=lambda f: (f[0].seconds, f[1]))
    return Choice(best, estimate, _reasons(memory, best, budget, judge))


def lower(memory: MemoryConfig, units: int, judge: Judge, host: float = inf) -> MemoryConfig | None:
    """The fastest settings that hold clearly less than these, whatever of them was set, or less at all; None where there are none."""
    free = {"recompute", "recompute_every", "recompute_kinds", "swap", "offload"}
    asked = MemoryConfig.model_validate({k: getattr(memory, k) for k in memory.model_fields_set - free})
    held = judge(memory).peak
    choice = choose(asked, units, int(held * LOWER), judge, host) or choose(asked, units, held - 1, judge, host)
    return None if choice is None else choice.memory


def least(memory: MemoryConfig, units: int, judge: Judge) -> Estimate:
    """The estimate of what holds least of all that may be chosen."""
    return min((judge(each) for each in _settings(memory, units)), key=lambda e: e.peak)


def fewest_streamed(memory: MemoryConfig, units: int, fits: Callable[[MemoryConfig], bool]) -> MemoryConfig:
    """The section with as many streamed units as it takes to fit, with all where that does not do."""

    def streaming(count: int) -> MemoryConfig:
        return memory.model_copy(update={"swap": count})

    if not units or fits(streaming(0)):
        return streaming(0)
    return streaming(1 + bisect_left(range(1, units), True, key=lambda count: fits(streaming(count))))


def exhausted(memory: MemoryConfig) -> MemoryConfig:
    """The section with all that may be chosen at its last resort, for there is nothing left to advise of it."""
    last = {"recompute": "block", "recompute_every": 1, "swap": "all", "offload": True}
    return memory.model_copy(update={k: v for k, v in last.items() if k not in memory.model_fields_set or getattr(memory, k) == "auto"})


def does_not_fit(where: str, estimate: Estimate, limit: int, what: str, config: Config) -> DiffpipeError:
    """The fault of a bucket that cannot train.

    Args:
        where: the bucket and the stage.
        what: whose limit it is.
    """
    return DiffpipeError(
        f"{where} needs {estimate.told()}",
        where=what if what in ("memory.budget", "mesh.memory") else "memory",
        expected=f"at most {amount(limit)}, {what}",
        fix="; or ".join(remedies(config)),
    )


def preview_does_not_fit(number: int, doing: str, held: Held, limit: int, what: str) -> DiffpipeError:
    """The fault of a preview that there is no memory for.

    Args:
        number: of its prompt.
        doing: what is done with it, and on which stage.
        what: whose limit it is.
    """
    return DiffpipeError(
        f"{doing} needs {held.told()}",
        where=f"preview.prompts.{number}",
        expected=f"at most {amount(limit)}, {what}",
        fix="; or ".join(SMALLER_PREVIEWS),
    )


def too_much_for_the_host(where: str, estimate: Estimate, limit: int, what: str) -> DiffpipeError:
    """The fault of a bucket that host memory does not do for.

    Args:
        where: the bucket and the stage.
        what: whose limit it is.
    """
    return DiffpipeError(
        f"{where} needs {amount(estimate.host)} of host memory ({amount(estimate.homes)} for weights and state,"
        f" {amount(estimate.buffers)} for activations)",
        where="memory.host_budget",
        expected=f"at most {amount(limit)}, {what}",
        fix="lower memory.swap; or memory.offload: false; or more mesh.stages; or a smaller bucket",
    )


def _settings(memory: MemoryConfig, units: int) -> Iterator[MemoryConfig]:
    """Every section that may be chosen, the plainest first."""
    given = memory.model_fields_set
    policies = [(memory.recompute, memory.recompute_every)]
    if "recompute" not in given:
        every = EVERY if "recompute_every" not in given else (memory.recompute_every,)
        kinds = ("selective", "parts", "block") if memory.compile else ("selective", "block")
        policies = [("none", 1), *product(kinds, sorted(every, reverse=True))]
    elif "recompute_every" not in given and memory.recompute != "none":
        policies = [(memory.recompute, k) for k in sorted(EVERY, reverse=True)]
    offloads = (memory.offload,) if "offload" in given else (False, True)
    swaps = range(units + 1) if "swap" not in given or memory.swap == "auto" else (memory.swap,)
    for offload, (recompute, every), swap in product(offloads, policies, swaps):
        yield memory.model_copy(update={"offload": offload, "recompute": recompute, "recompute_every": every, "swap": swap})


def _reasons(asked: MemoryConfig, best: MemoryConfig, budget: int, judge: Judge) -> dict[str, str]:
    """Why each key is as it is: set, free, or what the next cheaper setting would have held."""
    reasons = {}
    cheaper: dict[str, Sequence[tuple[str, dict[str, object]]]] = {
        "recompute": [("none", {"recompute": "none"}), ("selective", {"recompute": "selective"})],
        "recompute_every": [(f"every {k}", {"recompute_every": k}) for k in (best.recompute_every + 1,) if k in EVERY],
        "swap": [(f"{n} blocks", {"swap": n}) for n in (int(best.swap) - 1,)] if isinstance(best.swap, int) and best.swap else [],
        "offload": [("without", {"offload": False})],
    }
    for key, options in cheaper.items():
        if key == "recompute_every" and best.recompute == "none":
            continue
        value = getattr(best, key)
        if key in asked.model_fields_set and value == getattr(asked, key):
            reasons[key] = "set in the config"
            continue
        told = []
        for name, changes in options:
            if changes[key] == value:
                break
            other = judge(best.model_copy(update=changes))
            over = other.peak > budget
            told.append(f"{name}: {amount(other.peak)}" + (", too much" if over else f" and {other.seconds:.3g} s, no faster"))
        reasons[key] = "; ".join(told) or "fits, and is the fastest"
    return reasons
