"""What one unit holds in memory where no gradients are asked for, found by running it on fake tensors."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_unflatten

from diffpipe.pipeline.cut import Fakes, duplicate
from diffpipe.pipeline.memory.as_on_cuda import as_on_cuda
from diffpipe.pipeline.memory.compiled import Compiled
from diffpipe.pipeline.memory.footprint import Call, Footprint
from diffpipe.pipeline.memory.ledger import Ledger, Work


def measure_ahead(unit: nn.Module, call: Call, fakes: Fakes, compiles: bool) -> Footprint:
    """The footprint of a unit whose forward pass is the only one: it keeps nothing.

    Args:
        unit: on meta or fake tensors; not changed.
        compiles: as ``memory.compile``.
    """
    twin = duplicate(unit).eval()
    fakes.fill(twin)
    if compiles:
        with torch.enable_grad():
            return Compiled(twin, _wanting(call, fakes), fakes).ahead()
    ledger = Ledger()
    with fakes.mode, torch.no_grad(), ledger:
        for weight in [*twin.parameters(), *twin.buffers()]:
            ledger.number(weight)
        inputs = [torch.empty_strided(x.size(), x.stride(), dtype=x.dtype) if isinstance(x, Tensor) else x for x in call.leaves]
        entering = {ledger.number(x) for x in inputs if isinstance(x, Tensor)}
        start = ledger.peak = ledger.live
        args, kwargs = tree_unflatten(inputs, call.tree)
        with call.precision():
            outputs = [x for x in tree_leaves(as_on_cuda(twin.forward)(*args, **kwargs)) if isinstance(x, Tensor)]
            within = ledger.live
        made = sum(ledger.entries[n] for n in {ledger.number(x) for x in outputs} - entering)
        return Footprint(
            kept=0,
            held=(),
            moved=0,
            casts=within - ledger.live,
            forward=ledger.peak - start - made,
            backward=0,
            gradients=0,
            ahead=ledger.work,
            back=Work(),
        )


def _wanting(call: Call, fakes: Fakes) -> Call:
    """The call with gradients, without which there is no graph of both passes to take the first from."""
    leaves = tuple(fakes.tensor(x).requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x for x in call.leaves)
    return replace(call, leaves=leaves)
