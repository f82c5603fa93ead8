"""Optimizers of other packages: bitsandbytes' 8-bit AdamW, and all of pytorch-optimizer by name."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from torch.optim import Optimizer

from diffpipe.config.schema import OptimizerConfig
from diffpipe.errors import ConfigError

# They want more than gradients (the model, the loss again, its curvature, pairs of matrices in order, matrices alone), wrap another
# optimizer, do the backward pass or the exchange between ranks themselves, or keep what a resumed run
# needs elsewhere than in the state of parameters and groups, or as objects that are no data. A2Grad has no rate.
SPECIAL = frozenset(
    {
        *("a2grad", "adahessian", "adalomo", "adammini", "adashift", "alig", "bsam", "conda", "demo", "distributedmuon", "kron", "lbfgs"),
        *("lomo", "lorarite", "madgrad", "magma", "scalableshampoo", "sophiah", "spam", "spectralsphere", "stablespam"),
    }
)
EIGHT_BIT = ("adamw8bit", "adamw8bit-kahan")
# They step each element of a weight by what its own gradients were (in 8 bits: with scales of its neighbours), unless an option of
# theirs says otherwise: ranks that hold parts of a weight step them as one that holds all of it would.
BY_ELEMENT = frozenset(
    {
        *("adamw", *EIGHT_BIT, "adabelief", "adabound", "adadelta", "adam", "adamax", "adan", "ademamix", "adopt", "aggmo", "grams"),
        *("laprop", "lion", "nadam", "qhadam", "qhm", "radam", "rmsprop", "sgd", "sgdw", "signsgd", "simplifiedademamix", "tiger", "yogi"),
    }
)
# They find one rate for all weights, whatever those of groups are.
ONE_RATE = frozenset({"dadaptadagrad", "dadaptadam", "dadaptadan", "dadaptlion", "prodigy"})
# They step a weight by what they know of all weights that they have.
TOGETHER = ONE_RATE | {"adagc", "adai", "adams", "asgd", "avagrad", "dadaptsgd", "swats"}
# What is taken where options say nothing else: by its own default Adafactor's rate follows from the step, whatever lr and schedule are.
DEFAULTS: dict[str, dict[str, Any]] = {"adafactor": {"relative_step": False}}


def make(config: OptimizerConfig, groups: list[dict[str, Any]]) -> Optimizer:
    """The optimizer that ``config.kind`` names, over groups with rates and decays of their own.

    Raises:
        ConfigError: when there is none of that name, it cannot be used here, or does not know an option.
    """
    kind = _eight_bit(config.kind) if config.kind in EIGHT_BIT else _by_name(config.kind)
    known = inspect.signature(kind).parameters
    given: dict[str, Any] = {"lr": config.lr}
    # Each has defaults of its own, so that only what the config says is given.
    given |= {name: getattr(config, name) for name in ("betas", "eps") if name in config.model_fields_set}
    given |= DEFAULTS.get(config.kind, {}) | config.options
    own = {"params", "lr", "weight_decay", "kwargs", "args"}
    for name in given:
        if name not in known or (name in config.options and name in own):
            raise ConfigError(
                f"{config.kind} has no option {name!r}",
                where=f"optimizer.{'options' if name in config.options else name}",
                expected=", ".join(sorted(set(known) - own)),
            )
    others = sorted({g.lr for g in config.groups if g.lr} - {config.lr})
    if config.kind in ONE_RATE and others:
        raise ConfigError(
            f"{config.kind} finds one rate for all weights, but groups have others: {', '.join(f'{lr:g}' for lr in others)}",
            where="optimizer.groups",
            expected=f"lr null, {config.lr:g} or 0, which freezes",
        )
    for group in groups:
        group["use_muon"] = all(p.ndim > 1 for p in group["params"])  # for those that step matrices and vectors differently
    try:
        return kind(groups, **given)
    except (TypeError, ValueError) as fault:
        raise ConfigError(f"{config.kind} refuses its options: {fault}", where="optimizer.options") from fault


def arguments(kind: str) -> dict[str, Any]:
    """What the optimizer ``kind`` of pytorch-optimizer takes beside parameters, with its defaults.

    Raises:
        ConfigError: when there is none of that name, or it cannot be used here.
    """
    known = inspect.signature(_by_name(kind)).parameters
    return {name: p.default for name, p in known.items() if name not in ("params", "kwargs", "args")}


def _eight_bit(kind: str) -> type[Optimizer]:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as missing:
        raise ConfigError(
            "bitsandbytes is not installed here",
            where="optimizer.kind",
            expected=f"{kind} needs it",
            fix="pip install bitsandbytes, or take adamw",
        ) from missing
    from diffpipe.optim.eight_bit import PackedAdamW8bit
    from diffpipe.optim.kahan import AdamW8bitKahan

    return PackedAdamW8bit if kind == "adamw8bit" else AdamW8bitKahan


def _by_name(kind: str) -> type[Optimizer]:
    from pytorch_optimizer import get_supported_optimizers, load_optimizer

    names = {"adamw", *EIGHT_BIT, *get_supported_optimizers()} - SPECIAL
    if kind not in names:
        near = difflib.get_close_matches(kind, names, 1, 0.6)
        raise ConfigError(
            f"{kind} cannot be used here" if kind in SPECIAL else f"there is no optimizer {kind!r}",
            where="optimizer.kind",
            expected=", ".join(sorted(names)),
            fix=f"did you mean {near[0]}?" if near and kind not in SPECIAL else "name one of these",
        )
    found: Any = load_optimizer(kind)
    if hasattr(found, "eval"):
        raise ConfigError(
            f"{kind} trains other weights than it means to be used, which checkpoints and exports here would hold",
            where="optimizer.kind",
            fix="take another one",
        )
    return found
