"""Optimizers and learning-rate schedules, and an optimizer's state as named tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from diffpipe.config.schema import OptimizerConfig, ScheduleConfig
from diffpipe.errors import CheckpointError, ConfigError

NamedParameters = Iterable[tuple[str, nn.Parameter]]
NOTHING = "(nothing)"


def make_optimizer(config: OptimizerConfig, parameters: NamedParameters) -> Optimizer:
    """The optimizer over the trained parameters, with a group per rate and decay.

    Every group holds its rate after warm-up as ``peak_lr``, and its parameters' names as ``names``. Parameters
    with fewer than two dims (biases, norms) do not decay.
    """
    groups: dict[tuple[float, float], dict] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        lr, decay = rates(config, name)
        decay = decay if parameter.ndim > 1 else 0.0
        group = groups.setdefault((lr, decay), {"params": [], "names": [], "lr": lr, "peak_lr": lr, "weight_decay": decay})
        group["params"].append(parameter)
        group["names"].append(name)
    if not groups:
        # A stage may train nothing, but no optimizer takes an empty list.
        groups[0.0, 0.0] = {"params": [nn.Parameter(torch.zeros(1))], "names": [NOTHING], "lr": 0.0, "peak_lr": 0.0, "weight_decay": 0.0}
    given = list(groups.values())
    if config.kind == "adamw8bit":
        return _adamw8bit(config, given)
    fused = all(p.is_cuda for group in given for p in group["params"])
    return torch.optim.AdamW(given, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def rates(config: OptimizerConfig, name: str) -> tuple[float, float]:
    """Learning rate and weight decay of the parameter ``name``: those of the first group that matches."""
    group = next((g for g in config.groups if re.search(g.match, name)), None)
    if group is None:
        return config.lr, config.weight_decay
    return (config.lr if group.lr is None else group.lr, config.weight_decay if group.weight_decay is None else group.weight_decay)


def _adamw8bit(config: OptimizerConfig, groups: list[dict]) -> Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as missing:
        raise ConfigError(
            "bitsandbytes is not installed here",
            where="optimizer.kind",
            expected="adamw8bit needs it",
            fix="pip install bitsandbytes, or take adamw",
        ) from missing
    return AdamW8bit(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def factor(schedule: ScheduleConfig, step: int, total: int) -> float:
    """What the rate of step ``step`` (from 1) of ``total`` is multiplied by.

    Warm-up rises as step/warmup; after it the rate stays, or falls on a line or half a cosine that would reach 0
    one step after the last.
    """
    if step <= schedule.warmup:
        return step / schedule.warmup
    if schedule.kind == "constant":
        return 1.0
    done = min(1.0, (step - schedule.warmup - 1) / max(1, total - schedule.warmup))
    return 1.0 - done if schedule.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def set_rates(optimizer: Optimizer, scale: float) -> None:
    """Give every group ``scale`` times its rate after warm-up."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * scale


def state_of(optimizer: Optimizer) -> dict[str, Tensor]:
    """The state of every parameter as tensors, under ``<parameter>//<what>``; whole numbers end in ``:int``."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in _named(optimizer):
        for what, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}//{what}"] = value
            else:
                tensors[f"{name}//{what}:int"] = torch.tensor(int(value))
    return tensors


def restore_state(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what ``state_of`` gave, for the parameters this optimizer holds.

    Raises:
        CheckpointError: when a parameter has no state in ``tensors``.
    """
    states: dict[str, dict[str, Tensor | int]] = {}
    for key, value in tensors.items():
        name, _, what = key.partition("//")
        states.setdefault(name, {})[what] = value
    for name, parameter in _named(optimizer):
        if name not in states:
            raise CheckpointError(f"no optimizer state for {name}", expected="a checkpoint of the same trained parameters")
        optimizer.state[parameter] = {
            what.removesuffix(":int"): int(value) if what.endswith(":int") else _beside(value, parameter, optimizer)
            for what, value in states[name].items()
        }


def _beside(value: Tensor | int, parameter: nn.Parameter, optimizer: Optimizer) -> Tensor:
    """A state tensor where the optimizer wants it: torch keeps step counts on the CPU unless it is fused."""
    assert isinstance(value, Tensor)
    on_cpu = value.ndim == 0 and not optimizer.defaults.get("fused")
    return value.clone() if on_cpu else value.to(parameter.device, copy=True)


def _named(optimizer: Optimizer) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for group in optimizer.param_groups for n, p in zip(group["names"], group["params"], strict=True) if n != NOTHING]
