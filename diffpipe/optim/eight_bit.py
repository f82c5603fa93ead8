"""8-bit AdamW over many small tensors as fast as over few large ones."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import bitsandbytes.functional as F
import torch
from bitsandbytes.optim import AdamW8bit
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

BLOCK = 256  # elements that share a scale in the library's 8-bit state
SMALL = 1 << 20  # elements up to which a parameter is stepped together with others
PACK = 1 << 24  # elements that are stepped at once
PACKED = ("state1", "state2", "absmax1", "absmax2")


class Pack:
    """Small parameters that are stepped as one.

    Args:
        parameters: of one type, on one device, that have moved equally often.
        states: what the optimizer keeps of each.
    """

    def __init__(self, parameters: list[nn.Parameter], states: list[dict[str, Any]]) -> None:
        self.parameters, self.states = parameters, states
        # Entries that lay side by side when last looked at; to ask each of a thousand where it lies takes the host long.
        self.known: dict[str, list[weakref.ref[Tensor]]] = {}

    def fits(self, optimizer: AdamW8bit) -> bool:
        """Whether it still is what the optimizer keeps."""
        count = self.states[0]["step"]
        pairs = zip(self.parameters, self.states, strict=True)
        return all(state["step"] == count and optimizer.state[p] is state for p, state in pairs)

    def weights(self) -> Tensor:
        """All weights side by side, as one would step a single one."""
        return _flatten_dense_tensors(tuple(self.parameters))

    def gradients(self) -> Tensor:
        """All gradients side by side."""
        return _flatten_dense_tensors([p.grad for p in self.parameters if p.grad is not None])

    def put(self, weights: Tensor) -> None:
        """Let the parameters be these, side by side."""
        torch._foreach_copy_(tuple(self.parameters), _unflatten_dense_tensors(weights, tuple(self.parameters)))

    def entry(self, name: str) -> Tensor:
        """An entry of all states as one flat tensor, whose views the states' own are from then on."""
        tensors: list[Tensor] = [state[name] for state in self.states]
        known = self.known.get(name)
        if known is None or not all(ref() is t for ref, t in zip(known, tensors, strict=True)):
            if not _side_by_side(tensors):
                flat = _flatten_dense_tensors(tuple(tensors))
                for state, part in zip(self.states, _unflatten_dense_tensors(flat, tuple(tensors)), strict=True):
                    state[name] = part
            tensors = [state[name] for state in self.states]
            self.known[name] = [weakref.ref(t) for t in tensors]
        return tensors[0].as_strided((sum(t.numel() for t in tensors),), (1,))


def _side_by_side(tensors: Sequence[Tensor]) -> bool:
    """Whether each begins where the one before it ends, and not by chance."""
    place, offset = tensors[0].data_ptr(), tensors[0].storage_offset()
    for t in tensors:
        if t.data_ptr() != place or t.storage_offset() != offset:
            return False
        place, offset = place + t.nbytes, offset + t.numel()
    return True


class PackedAdamW8bit(AdamW8bit):
    """bitsandbytes' AdamW8bit, which steps a parameter at a time and waits for each, with one step for a pack of small ones.

    An adapter has a thousand small tensors. The states of a pack lie side by side; each parameter's own are views, the same as
    if it were stepped alone, since blocks that share a scale never cross from one parameter to the next.
    """

    @cached_property
    def packs(self) -> dict[tuple[int, ...], list[Pack]]:
        """What was packed, by the parameters that moved."""
        return {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Move every weight that has a gradient."""
        for number, group in enumerate(self.param_groups):
            moving = {place: p for place, p in enumerate(group["params"]) if p.grad is not None}
            for place, p in moving.items():
                if not self.state[p]:
                    self.init_state(group, p, number, place)
            packs = self._packed(list(moving.values()))
            packed = {p for pack in packs for p in pack.parameters}
            for pack in packs:
                self.move_pack(pack, group)
            for place, p in moving.items():
                if p not in packed:
                    self.update_step(group, p, number, place)

    def _packed(self, parameters: list[nn.Parameter]) -> list[Pack]:
        key = tuple(id(p) for p in parameters)
        if key not in self.packs or not all(pack.fits(self) for pack in self.packs[key]):
            self.packs[key] = list(_packs(self, parameters))
        return self.packs[key]

    def move_pack(self, pack: Pack, group: dict[str, Any]) -> None:
        """Step the parameters of a pack as one."""
        weights = pack.weights()
        self.move(weights, pack, group, group["weight_decay"])
        pack.put(weights)

    def move(self, weights: Tensor, pack: Pack, group: dict[str, Any], decay: float) -> None:
        """Step ``weights``, as long as the pack's parameters together, by their gradients."""
        flat = {name: pack.entry(name) for name in PACKED}
        first = pack.states[0]
        for state in pack.states:
            state["step"] += 1
        F.optimizer_update_8bit_blockwise(
            self.optimizer_name,
            pack.gradients(),
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


def _packs(optimizer: AdamW8bit, parameters: Sequence[nn.Parameter]) -> Iterator[Pack]:
    """Small parameters with 8-bit state that can be stepped as one."""
    kinds: dict[Any, list[nn.Parameter]] = {}
    counts: Counter[Any] = Counter()  # elements of each

    def packed(key: Any) -> Pack:
        chosen = kinds.pop(key)
        del counts[key]
        return Pack(chosen, [optimizer.state[p] for p in chosen])

    for p in parameters:
        state = optimizer.state[p]
        if p.grad is None or "absmax1" not in state or p.numel() > SMALL or p.numel() % BLOCK:
            continue
        key = (p.dtype, p.grad.dtype, p.device, state["step"])
        if key in kinds and counts[key] + p.numel() > PACK:
            yield packed(key)
        kinds.setdefault(key, []).append(p)
        counts[key] += p.numel()
    for key in [*kinds]:
        yield packed(key)
