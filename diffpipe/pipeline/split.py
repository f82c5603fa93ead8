"""Decides which units each stage holds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from diffpipe.config.schema import MeshConfig
from diffpipe.errors import ConfigError
from diffpipe.models.base import StageSpec
from diffpipe.pipeline.cut import expand

Span = tuple[int, int]  # first unit, and one past the last


def split(module: nn.Module, spec: StageSpec, config: MeshConfig) -> list[Span]:
    """One span of units per stage: those of ``mesh.partition``, else the cut whose largest stage has the fewest bytes.

    Raises:
        ConfigError: when there are more stages than units, or a partition point is not a unit.
    """
    units = expand(module, spec.units)
    if config.stages > len(units):
        raise ConfigError(f"{config.stages} stages for {len(units)} units", where="mesh.stages", expected=f"at most {len(units)}")
    if config.partition is not None:
        if config.partition and config.partition[-1] >= len(units):
            raise ConfigError(
                f"{config.partition} has a point past the last unit", where="mesh.partition", expected=f"points from 1 to {len(units) - 1}"
            )
        edges = [0, *config.partition, len(units)]
        return list(pairwise(edges))
    return balance(stage_bytes(module, spec), config.stages)


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


def balance(sizes: Sequence[int], stages: int) -> list[Span]:
    """Contiguous, non-empty spans whose largest sum is least; earlier stages are the smaller ones among equals."""
    count = len(sizes)
    total = [0]
    for size in sizes:
        total.append(total[-1] + size)
    # best[s][n]: the least possible largest sum when the first n units form s stages, and where the last begins.
    best: list[list[tuple[int, int]]] = [[(0, 0)] * (count + 1) for _ in range(stages + 1)]
    for n in range(1, count + 1):
        best[1][n] = (total[n], 0)
    for s in range(2, stages + 1):
        for n in range(s, count + 1):
            best[s][n] = min((max(best[s - 1][b][0], total[n] - total[b]), b) for b in range(s - 1, n))
    edges = [count]
    for s in range(stages, 0, -1):
        edges.append(best[s][edges[-1]][1])
    edges.reverse()
    return list(pairwise(edges))
