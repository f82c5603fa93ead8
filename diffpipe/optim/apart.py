"""Steps some of an optimizer's parameters before the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.optim import Optimizer

from diffpipe.errors import ConfigError

MEMBERS = ("params", "names")
COUNT = "step"


@contextmanager
def only(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """The optimizer with these parameters alone.

    Raises:
        ConfigError: when it keeps state for all parameters together, which parts of them would change in turn. A count of steps is
            no such state: it is the same for each part, and goes on with the last, for which all parameters are there.
    """
    chosen, groups = set(parameters), optimizer.param_groups
    parts = []
    for group in groups:
        kept = [i for i, p in enumerate(group["params"]) if p in chosen]
        parts.append({**group, **{what: [group[what][i] for i in kept] for what in MEMBERS}})
    before = [{k: v for k, v in part.items() if k not in MEMBERS} for part in parts]
    optimizer.param_groups = parts
    try:
        yield
    finally:
        optimizer.param_groups = groups
    for part, was in zip(parts, before, strict=True):
        changed = [k for k, v in part.items() if k not in (*MEMBERS, COUNT) and v is not was.get(k) and bool(v != was.get(k))]
        if changed:
            raise ConfigError(
                f"{type(optimizer).__name__} keeps {', '.join(changed)} for all weights together, but they are stepped block by block",
                where="optimizer.kind",
                fix="take adamw, adamw8bit or adamw8bit-kahan; or set optimizer.release and optimizer.offload to false, and memory.swap"
                " to 0 where weights stream that train",
            )
