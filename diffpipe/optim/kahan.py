"""8-bit AdamW for weights of 16 bits that small steps still move."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffpipe.optim.eight_bit import Pack, PackedAdamW8bit


class AdamW8bitKahan(PackedAdamW8bit):
    """AdamW8bit that carries what a 16-bit weight cannot hold of its updates on to the next ones, by Kahan's summation.

    It adds a ``compensation`` of the weight's own type to the state. Weights of 32 bits are stepped as by AdamW8bit.
    """

    @torch.no_grad()
    def init_state(self, group: dict[str, Any], p: nn.Parameter, gindex: int, pindex: int) -> None:
        super().init_state(group, p, gindex, pindex)
        if p.dtype != torch.float32:
            self.state[p]["compensation"] = torch.zeros_like(p)

    @torch.no_grad()
    def update_step(self, group: dict[str, Any], p: nn.Parameter, gindex: int, pindex: int) -> None:
        owed = self.state[p].get("compensation")
        if owed is None:
            super().update_step(group, p, gindex, pindex)
            return
        weight, decay = p.data, group["weight_decay"]
        _decay(owed, weight, group)
        group["weight_decay"], p.data = 0.0, owed
        try:
            super().update_step(group, p, gindex, pindex)
        finally:
            group["weight_decay"], p.data = decay, weight
        _pay(owed, weight)

    def move(self, weights: torch.Tensor, pack: Pack, group: dict[str, Any], decay: float) -> None:
        if weights.dtype == torch.float32:
            super().move(weights, pack, group, decay)
            return
        owed = pack.entry("compensation")
        _decay(owed, weights, group)
        super().move(owed, pack, group, 0.0)
        _pay(owed, weights)


def _decay(owed: torch.Tensor, weight: torch.Tensor, group: dict[str, Any]) -> None:
    """The decay belongs to the weight; the library would take it from what it is given to step, which is what is owed."""
    owed.add_(weight, alpha=-group["lr"] * group["weight_decay"])


def _pay(owed: torch.Tensor, weight: torch.Tensor) -> None:
    """Put into a weight what it can hold of what it is owed."""
    before = weight.clone()
    weight.add_(owed)
    owed.add_(before.sub_(weight))
