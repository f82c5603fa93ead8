"""AdamW whose small steps are not lost in bfloat16: it rounds up or down by chance, so that the mean is right."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class RoundedAdamW(Optimizer):
    """AdamW (Loshchilov and Hutter 2019) computed in float32 one parameter at a time; weights and both averages are kept in the
    weight's own type, and rounded stochastically where that is bfloat16.

    What is drawn depends on the parameter's name and the step alone: replicas draw alike, and a resumed run goes on as if unbroken.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._generators: dict[torch.device, torch.Generator] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Move every weight that has a gradient."""
        for group in self.param_groups:
            for name, p in zip(group["names"], group["params"], strict=True):
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                state["step"] += 1
                self._move(p, state, group, self._generator(p.device, name, state["step"]))

    def _move(self, p: Tensor, state: dict[str, Any], group: dict[str, Any], generator: torch.Generator) -> None:
        beta1, beta2 = group["betas"]
        assert p.grad is not None
        gradient = p.grad.float()
        weight, mean, square = (t.float() for t in (p, state["exp_avg"], state["exp_avg_sq"]))
        mean.lerp_(gradient, 1 - beta1)
        square.lerp_(gradient.square(), 1 - beta2)
        size = (square / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        weight.mul_(1 - group["lr"] * group["weight_decay"]).addcdiv_(mean, size, value=-group["lr"] / (1 - beta1 ** state["step"]))
        for kept, value in ((p, weight), (state["exp_avg"], mean), (state["exp_avg_sq"], square)):
            round_into(kept, value, generator)

    def _generator(self, device: torch.device, name: str, step: int) -> torch.Generator:
        found = self._generators.setdefault(device, torch.Generator(device))
        return found.manual_seed(int.from_bytes(blake2b(f"{step} {name}".encode(), digest_size=7).digest(), "little"))


def round_into(kept: Tensor, value: Tensor, generator: torch.Generator) -> None:
    """Put float32 values into a tensor: bfloat16 gets one of its two neighbours by chance, the nearer the likelier; others the nearest."""
    if kept.dtype != torch.bfloat16:
        kept.copy_(value)
        return
    chance = torch.randint(0, 1 << 16, value.shape, dtype=torch.int32, device=value.device, generator=generator)
    # bfloat16 is the upper half of float32: what is added to the lower half carries over as often as it is near the next value.
    kept.copy_(chance.add_(value.view(torch.int32)).bitwise_and_(-1 << 16).view(torch.float32))
