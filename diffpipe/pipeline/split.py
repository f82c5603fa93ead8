"""Decides which units each span holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

from torch import nn

from diffpipe.config.schema import MeshConfig
from diffpipe.errors import ConfigError
from diffpipe.models.base import StageSpec
from diffpipe.pipeline.cut import expand

Span = tuple[int, int]  # first unit, and one past the last
Cost = Callable[[int, int, int], float]  # of a span by its number, first unit and one past the last; infinite where it must not be


def split(module: nn.Module, spec: StageSpec, config: MeshConfig) -> list[Span]:
    """The spans of ``mesh.split`` where it lists them; else, before a planner has, those whose largest has the fewest bytes.

    Raises:
        ConfigError: when there are more spans than units, or a span begins past the last unit.
    """
    units = expand(module, spec.units)
    check_units(config, len(units))
    if isinstance(config.split, list):
        return list(pairwise([0, *config.split, len(units)]))
    return balance_bytes(stage_bytes(module, spec), config.all_spans)


def check_units(config: MeshConfig, units: int) -> None:
    """Raise where a mesh cuts a model into more spans than it has units, or past the last of them."""
    if config.all_spans > units:
        spans = f" of {config.all_spans // config.stages} spans" if config.all_spans > config.stages else ""
        found = f"{config.stages} stages{spans} for {units} units"
        raise ConfigError(found, where="mesh.stages", expected=f"at most {units} spans in all", fix="lower it, or mesh.spans")
    if isinstance(config.split, list) and config.split and config.split[-1] >= units:
        raise ConfigError(f"{config.split} has a point past the last unit", where="mesh.split", expected=f"points from 1 to {units - 1}")


def stage_bytes(module: nn.Module, spec: StageSpec) -> list[int]:
    """Parameter bytes by unit; what comes before the units counts to the first, what comes after to the last."""
    units = expand(module, spec.units)
    post = set(expand(module, spec.post))
    sizes = [0] * len(units)
    index = {unit: i for i, unit in enumerate(units)}
    for name, parameter in module.named_parameters():
        owners = _prefixes(name)
        unit = next((u for u in owners if u in index), None)
        place = index[unit] if unit is not None else 0 if post.isdisjoint(owners) else len(units) - 1
        sizes[place] += parameter.numel() * parameter.element_size()
    return sizes


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]


def balance_bytes(sizes: Sequence[float], spans: int) -> list[Span]:
    """Spans whose largest sum of sizes is least."""
    total = [0, *accumulate(sizes)]
    found = balance(len(sizes), spans, lambda number, start, stop: total[stop] - total[start])
    assert found is not None
    return found


def balance(units: int, spans: int, cost: Cost) -> list[Span] | None:
    """Contiguous, non-empty spans whose largest cost is least; earlier ones are the smaller among equals. None where none may be."""
    # best[s][n]: the least possible largest cost when the first n units form s spans, and where the last begins.
    best: list[list[tuple[float, int]]] = [[(math.inf, 0)] * (units + 1) for _ in range(spans + 1)]
    for n in range(1, units + 1):
        best[1][n] = (cost(0, 0, n), 0)
    for s in range(2, spans + 1):
        for n in range(s, units + 1):
            best[s][n] = min((max(best[s - 1][b][0], cost(s - 1, b, n)), b) for b in range(s - 1, n))
    if math.isinf(best[spans][units][0]):
        return None
    edges = [units]
    for s in range(spans, 0, -1):
        edges.append(best[s][edges[-1]][1])
    edges.reverse()
    return list(pairwise(edges))
