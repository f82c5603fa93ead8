"""Optimizers by name, and learning-rate schedules."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from diffpipe.config.schema import OptimizerConfig, ScheduleConfig
from diffpipe.errors import ConfigError
from diffpipe.optim.apart import only
from diffpipe.optim.state import NOTHING

NamedParameters = Iterable[tuple[str, nn.Parameter]]


def make_optimizer(config: OptimizerConfig, parameters: NamedParameters) -> Optimizer:
    """The optimizer over the trained parameters, with a group per rate, decay and whether its parameters are matrices.

    Every group holds its rate after warm-up as ``peak_lr``, and its parameters' names as ``names``. Parameters
    with fewer than two dims (biases, norms) do not decay.

    Raises:
        ConfigError: when there is no optimizer of that name, it cannot be used here, or does not know an option.
    """
    groups: dict[tuple[float, float, bool], dict] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        lr, decay = rates(config, name)
        matrix = parameter.ndim > 1
        decay = decay if matrix else 0.0
        group = groups.setdefault((lr, decay, matrix), {"params": [], "names": [], "lr": lr, "peak_lr": lr, "weight_decay": decay})
        group["params"].append(parameter)
        group["names"].append(name)
    if not groups:
        # A stage may train nothing, but no optimizer takes an empty list.
        group = {"params": [nn.Parameter(torch.zeros(1, 1))], "names": [NOTHING], "lr": 0.0, "peak_lr": 0.0, "weight_decay": 0.0}
        groups[0.0, 0.0, True] = group
    given = list(groups.values())
    if config.rounding == "stochastic" and config.kind != "adamw":
        raise ConfigError(f"{config.kind} rounds to the nearest", where="optimizer.rounding", fix="take optimizer.kind adamw")
    if config.kind != "adamw":
        from diffpipe.optim import named

        return named.make(config, given)
    if config.options:
        raise ConfigError(f"adamw has no options, found {', '.join(config.options)}", where="optimizer.options", fix="take them out")
    if config.rounding == "stochastic":
        from diffpipe.optim.rounding import RoundedAdamW

        return RoundedAdamW(given, lr=config.lr, betas=config.betas, eps=config.eps)
    fused = all(p.is_cuda for group in given for p in group["params"])
    return torch.optim.AdamW(given, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def check_optimizer(config: OptimizerConfig, apart: bool = False, sharded: bool = False) -> None:
    """Find out what is wrong with the section before anything is read.

    Args:
        apart: whether some weights are stepped before others, whatever the section says.
        sharded: whether ranks step parts of each weight.

    Raises:
        ConfigError: as ``make_optimizer`` and ``only`` do, and when parts of a weight would move otherwise than all of it.
    """
    weight = nn.Parameter(torch.ones(16, 16))
    optimizer = make_optimizer(config, [("weight", weight)])
    if apart or config.release or config.offload:
        weight.grad = torch.ones(16, 16)
        with only(optimizer, [weight]):
            optimizer.step()
    if sharded and not steps_by_element(config):
        from diffpipe.optim.named import BY_ELEMENT

        known = config.kind in BY_ELEMENT
        raise ConfigError(
            f"{config.kind} steps a weight by all of its gradient{' with these options' * known}, but ranks have a part each",
            where="optimizer.options" if known else "optimizer.kind",
            expected=f"one of {', '.join(sorted(BY_ELEMENT))}, since mesh.shard shares out weights that train",
            fix="take one of these without such options; or set mesh.shard to 1, and mesh.stages or mesh.replicate higher",
        )


def caution(config: OptimizerConfig, stages: int) -> str | None:
    """What a person should know of an optimizer over several stages: not every one moves weights there as on one."""
    from diffpipe.optim.named import TOGETHER

    if stages == 1 or config.kind not in TOGETHER:
        return None
    return f"{config.kind} steps a weight by what it knows of all, which are those of a stage: other mesh.stages give other numbers"


def steps_by_element(config: OptimizerConfig) -> bool:
    """Whether parts of a weight, stepped by an optimizer each, move as all of it does: known of a kind, and tried where it has options."""
    from diffpipe.optim.named import BY_ELEMENT

    return config.kind in BY_ELEMENT and (not config.options or halves_move_alike(config))


def halves_move_alike(config: OptimizerConfig) -> bool:
    """Whether two halves of a weight, stepped by an optimizer each, move as all of it does in a trial."""
    generator = torch.Generator().manual_seed(0)
    # The halves' gradients differ in size, lie across their weights, and keep their direction, which lets some optimizers gain speed.
    values = torch.randn((16, 16), generator=generator, dtype=torch.float64)
    gradient = torch.randn((16, 16), generator=generator, dtype=torch.float64) * torch.arange(1.0, 17.0)[:, None]
    gradient -= values * ((gradient * values).sum() / values.square().sum())
    weights = [nn.Parameter(part.clone()) for part in (values, *values.chunk(2))]
    optimizers = [make_optimizer(config, [("weight", weight)]) for weight in weights]
    with torch.random.fork_rng(devices=[]):
        for _ in range(8):
            for weight, optimizer, part in zip(weights, optimizers, (gradient, *gradient.chunk(2)), strict=True):
                weight.grad = part.clone()
                optimizer.step()
    whole, *halves = (weight.detach() - part for weight, part in zip(weights, (values, *values.chunk(2)), strict=True))
    return torch.allclose(torch.cat(halves), whole, rtol=1e-3, atol=1e-6 * whole.abs().max().item())


def rates(config: OptimizerConfig, name: str) -> tuple[float, float]:
    """Learning rate and weight decay of the parameter ``name``: those of the first group that matches."""
    group = next((g for g in config.groups if re.search(g.match, name)), None)
    if group is None:
        return config.lr, config.weight_decay
    return (config.lr if group.lr is None else group.lr, config.weight_decay if group.weight_decay is None else group.weight_decay)


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


def rate_of(optimizer: Optimizer) -> float:
    """The largest rate of its groups, times what Prodigy and D-Adaptation have found."""
    return max(group["lr"] * group.get("d", 1.0) for group in optimizer.param_groups)
