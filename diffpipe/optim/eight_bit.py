"""8-bit AdamW over many small tensors as fast as over few large ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import bitsandbytes.functional as F
import torch
from bitsandbytes.optim import AdamW8bit
from torch import Tensor, nn

BLOCK = 256  # elements that share a scale in the library's 8-bit state
SMALL = 1 << 20  # elements up to which a parameter is stepped together with others
PACK = 1 << 24  # elements that are stepped at once
PACKED = ("state1", "state2", "absmax1", "absmax2")
Packed = list[tuple[nn.Parameter, dict[str, Any]]]


class PackedAdamW8bit(AdamW8bit):
    """bitsandbytes' AdamW8bit, which steps a parameter at a time and waits for each, with one step for a pack of small ones.

    An adapter has a thousand small tensors. The states of a pack lie side by side; each parameter's own are views, the same as
    if it were stepped alone, since blocks that share a scale never cross from one parameter to the next.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Move every weight that has a gradient."""
        for number, group in enumerate(self.param_groups):
            for place, p in enumerate(group["params"]):
                if p.grad is not None and not self.state[p]:
                    self.init_state(group, p, number, place)
            packs = list(_packs(self, group))
            packed = {p for pack in packs for p, _ in pack}
            for pack in packs:
                self.move_pack(pack, group)
            for place, p in enumerate(group["params"]):
                if p.grad is not None and p not in packed:
                    self.update_step(group, p, number, place)

    def move_pack(self, pack: Packed, group: dict[str, Any]) -> None:
        """Step the parameters of a pack as one."""
        weights = _joined([p for p, _ in pack])
        self.move(weights, pack, group, group["weight_decay"])
        _apart(weights, [p for p, _ in pack])

    def move(self, weights: Tensor, pack: Packed, group: dict[str, Any], decay: float) -> None:
        """Step ``weights``, as long as the pack's parameters together, by their gradients."""
        states = [state for _, state in pack]
        flat = {name: side_by_side(states, name) for name in PACKED}
        first = states[0]
        for state in states:
            state["step"] += 1
        F.optimizer_update_8bit_blockwise(
            self.optimizer_name,
            torch.cat([p.grad.reshape(-1) for p, _ in pack if p.grad is not None]),
            weights,
            flat["state1"],
            flat["state2"],
            group["betas"][0],
            group["betas"][1],
            0.0,  # of optimizers with a third average, as is the next
            0.0,
            group["eps"],
            first["step"],
            group["lr"],
            first["qmap1"],
            first["qmap2"],
            flat["absmax1"],
            flat["absmax2"],
            decay,
        )


def _packs(optimizer: AdamW8bit, group: dict[str, Any]) -> Iterator[Packed]:
    """Small parameters with 8-bit state that can be stepped as one, of one type, device and number of steps."""
    kinds: dict[Any, Packed] = {}
    counts: Counter[Any] = Counter()  # elements of each
    for p in group["params"]:
        state = optimizer.state.get(p)
        if p.grad is None or not state or "absmax1" not in state or p.numel() > SMALL or p.numel() % BLOCK:
            continue
        key = (p.dtype, p.grad.dtype, p.device, state["step"])
        if key in kinds and counts[key] + p.numel() > PACK:
            yield kinds.pop(key)
            del counts[key]
        kinds.setdefault(key, []).append((p, state))
        counts[key] += p.numel()
    yield from kinds.values()


def side_by_side(states: list[dict[str, Any]], name: str) -> Tensor:
    """An entry of several states as one flat tensor, whose views the entries are from then on."""
    tensors = [state[name] for state in states]
    first, total = tensors[0], sum(t.numel() for t in tensors)
    storage = first.untyped_storage()
    place = first.data_ptr()
    for t in tensors:
        if t.data_ptr() != place or t.untyped_storage().data_ptr() != storage.data_ptr():
            break
        place += t.nbytes
    else:
        return first.new_empty(0).set_(storage, first.storage_offset(), (total,))
    flat = _joined(tensors)
    for state, part, t in zip(states, flat.split([t.numel() for t in tensors]), tensors, strict=True):
        state[name] = part.view(t.shape)
    return flat


def _joined(tensors: list[Any]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def _apart(flat: Tensor, tensors: list[nn.Parameter]) -> None:
    parts = flat.split([t.numel() for t in tensors])
    torch._foreach_copy_([t.data for t in tensors], [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)])
