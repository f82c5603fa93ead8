"""Measures on this device how long each kind of unit takes."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_unflatten

from diffpipe.pipeline.build import precision_of
from diffpipe.pipeline.cut import duplicate
from diffpipe.pipeline.memory.compiling import run_by
from diffpipe.pipeline.memory.footprint import Call
from diffpipe.pipeline.memory.timeline import Visit
from diffpipe.pipeline.rehearsal import Dims, Rehearsal

Seconds = tuple[float, float]  # of a forward and a backward pass
REPEATS = 3


def sizes(buckets: Sequence[Dims]) -> list[Dims]:
    """Of the buckets the largest, and those at most half as large as the one before: shape matters little beside size."""
    chosen: list[Dims] = []
    for bucket in sorted(buckets, key=lambda b: (b[0] * b[1] * b[2], b), reverse=True):
        if not chosen or 2 * bucket[0] * bucket[1] * bucket[2] <= chosen[-1][0] * chosen[-1][1] * chosen[-1][2]:
            chosen.append(bucket)
    return chosen


def measure(whole: Rehearsal, buckets: Sequence[Dims], device: torch.device, known: Mapping[str, Seconds]) -> dict[str, Seconds]:
    """How long units take that ``known`` has nothing of, by what decides it; one unit of each kind is on the device at a time.

    Args:
        whole: a rehearsal of all units.
    """
    fresh: dict[str, Seconds] = {}
    for bucket in buckets:
        timeline = whole.timeline(bucket)
        for visit, key in zip(_visits(whole, bucket), keys(whole, bucket, device), strict=True):
            if key not in known and key not in fresh:
                fresh[key] = _timed(visit.unit, timeline.calls[visit.kind][1], whole, device)
    return fresh


def keys(whole: Rehearsal, bucket: Dims, device: torch.device) -> list[str]:
    """By unit what decides how long it takes: how it is made and called, how it is run, the device and torch's version."""
    memory = whole.config.memory
    run = (
        whole.config.model.dtype,
        memory.compile,
        memory.feed_forward_chunks,
        memory.quantize,
        memory.products,
        whole.config.model.attention,
    )
    place = (_name(device), torch.__version__)
    return [
        hashlib.blake2b(repr((visit.kind, whole.policy(memory, visit.unit), run, place)).encode(), digest_size=16).hexdigest()
        for visit in _visits(whole, bucket)
    ]


def _visits(whole: Rehearsal, bucket: Dims) -> list[Visit]:
    return [event for event in whole.timeline(bucket).ahead if isinstance(event, Visit)]


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"


def _timed(number: int, call: Call, whole: Rehearsal, device: torch.device) -> Seconds:
    """The median of a few runs with random weights, behind one that is not counted."""
    unit = _made(whole.plain[number], device)
    forward = run_by(unit, whole.config.memory, number)
    args, kwargs = tree_unflatten([_random(x, device) if isinstance(x, Tensor) else x for x in call.leaves], call.tree)
    precision = precision_of(whole.config, device)
    found: list[Seconds] = []
    for _ in range(1 + REPEATS):
        begun = _now(device)
        with precision():
            out = [x for x in tree_leaves(forward(*args, **kwargs)) if isinstance(x, Tensor) and x.requires_grad]
        ahead = _now(device)
        if out:
            torch.autograd.backward(out, [torch.ones_like(x) for x in out])
        found.append((ahead - begun, _now(device) - ahead))
        unit.zero_grad(set_to_none=True)
    return statistics.median(t for t, _ in found[1:]), statistics.median(t for _, t in found[1:])


def _made(plain: nn.Module, device: torch.device) -> nn.Module:
    unit = duplicate(plain)
    for owner in unit.modules():
        for leaf, p in owner._parameters.items():
            if p is not None:
                owner._parameters[leaf] = nn.Parameter(_random(p.detach(), device), requires_grad=p.requires_grad)
        for leaf, b in owner._buffers.items():
            if b is not None:
                owner._buffers[leaf] = _random(b, device)
    return unit


def _random(like: Tensor, device: torch.device) -> Tensor:
    """Small numbers, masks that hide nothing, zeros elsewhere."""
    if like.dtype == torch.bool:
        return torch.ones(like.shape, dtype=torch.bool, device=device)
    if not like.dtype.is_floating_point:
        return torch.zeros(like.shape, dtype=like.dtype, device=device)
    made = torch.randn(like.shape, device=device).mul_(0.02).to(like.dtype)
    return made.requires_grad_(like.requires_grad)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
