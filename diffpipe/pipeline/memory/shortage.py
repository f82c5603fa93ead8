"""What a person should know and change when a device has no memory left."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from diffpipe.config.schema import Config
from diffpipe.errors import ShortageError, causes
from diffpipe.metrics import GIB

SMALLER_PREVIEWS = ("smaller preview.width and preview.height", "fewer preview.frames", "more mesh.stages")  # what makes them fit


@contextmanager
def explained(doing: str, device: torch.device, fixes: Iterable[str]) -> Iterator[None]:
    """Turns a shortage of device memory into a fault that says what was asked for, what is held and what would make it fit.

    Raises:
        ShortageError: in its place.

    Args:
        doing: in what the memory may run out, such as the bucket of a step.
    """
    try:
        yield
    except RuntimeError as fault:
        # torch's pipelining wraps what a stage raises.
        shortage = next((c for c in causes(fault) if isinstance(c, torch.OutOfMemoryError)), None)
        if shortage is None:
            raise
        asked = re.search(r"Tried to allocate ([\d.]+ \w+)", str(shortage))
        found = f"the memory of {device} ran out in {doing}" + (f", which asked for {asked[1]}" if asked else "") + _held(device)
        raise ShortageError(found, where="memory", fix="; or ".join(fixes)) from fault


def _held(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    free, whole = torch.cuda.mem_get_info(device)
    held, kept = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    return f"; {free / GIB:.2f} of {whole / GIB:.2f} GiB are free, {held / GIB:.2f} in tensors, {(kept - held) / GIB:.2f} lie between them"


def remedies(config: Config) -> Iterator[str]:
    """What is left to set, what costs least time first."""
    memory = config.memory
    if memory.cuda_graphs:
        yield "memory.cuda_graphs: false"
    if not memory.policies <= {"block", "parts"} or memory.recompute_every > 1:
        kind = "parts" if memory.recompute == "parts" else "block"
        yield f"memory.recompute: {kind} with recompute_every: 1" + (" and no recompute_kinds" if memory.recompute_kinds else "")
    if config.adapter is not None and memory.quantize == "none":
        yield "memory.quantize: fp8"
    if config.adapter is None and config.optimizer.kind == "adamw":
        yield "optimizer.kind: adamw8bit"
    if config.batch.micro > 1:
        yield f"batch.micro: 1 with batch.accumulate: {config.batch.micro * config.batch.accumulate}"
    if memory.swap != "all" and config.mesh.shard == 1:
        clipped = config.adapter is None and config.optimizer.clip is not None
        yield "memory.swap: auto or all" + (" with optimizer.clip: null" if clipped else "")
    if not memory.offload:
        yield "memory.offload: true"
    if config.mesh.shard > 1 and not config.mesh.reshard:
        yield "mesh.reshard: true"
    yield "more mesh.stages"
    if memory.swap == 0:
        yield "more mesh.shard"
    yield "smaller data.resolutions or data.frames"
