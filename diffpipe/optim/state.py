"""An optimizer's state as named tensors, whatever optimizer it is."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from diffpipe.errors import CheckpointError

NOTHING = "(nothing)"  # the name of what a stage that trains nothing gives its optimizer
# What groups hold by the config; anything else in a group is state that the optimizer keeps there.
CONFIGURED = frozenset({"params", "names", "lr", "peak_lr", "weight_decay", "initial_lr", "use_muon"})


def state_of(optimizer: Optimizer) -> dict[str, Tensor]:
    """The state of every parameter under ``<parameter>//<what>``, its group's own under ``<parameter>//group.<what>``.

    What is no tensor is the bytes that torch.save makes of it, under a name that ends in ``:saved``. A parameter without any state
    has a placeholder, ``<parameter>//``, so that what was trained is known.

    Raises:
        CheckpointError: when an optimizer keeps an object that is no data.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter, group in _named(optimizer):
        held = dict(optimizer.state.get(parameter, {}))
        held |= {f"group.{what}": value for what, value in group.items() if _moves(optimizer, what, value)}
        for what, value in held.items():
            if isinstance(value, Tensor):
                tensors[f"{name}//{what}"] = value
            else:
                tensors[f"{name}//{what}:saved"] = _bytes(value, type(optimizer).__name__)
        if not held:
            tensors[f"{name}//"] = torch.zeros(1)
    return tensors


def by_element(key: str, tensor: Tensor) -> bool:
    """Whether an entry of ``state_of`` belongs to elements of its parameter rather than to all of it."""
    what = key.partition("//")[2]
    return bool(what) and tensor.ndim > 0 and not what.startswith("group.") and not what.endswith(":saved")


def restore_state(optimizer: Optimizer, tensors: Mapping[str, Tensor], on_host: Collection[nn.Parameter] = ()) -> None:
    """Put back what ``state_of`` gave, for the parameters this optimizer holds.

    Args:
        on_host: those whose state stays in host memory.

    Raises:
        CheckpointError: when a parameter has no state in ``tensors``.
    """
    states: dict[str, dict[str, Any]] = {}
    for key, value in tensors.items():
        name, _, what = key.partition("//")
        held = states.setdefault(name, {})
        if what.endswith(":saved"):
            held[what.removesuffix(":saved")] = _value(value)
        elif what:
            held[what] = value
    for name, parameter, group in _named(optimizer):
        if name not in states:
            raise CheckpointError(f"no optimizer state for {name}", expected="a checkpoint of the same trained parameters")
        own: dict[str, Any] = {}
        for what, value in states[name].items():
            value = _beside(value, parameter, optimizer, parameter in on_host) if isinstance(value, Tensor) else value
            if what.startswith("group."):
                group[what.removeprefix("group.")] = value
            else:
                own[what] = value
        if own:
            optimizer.state[parameter] = own


def _moves(optimizer: Optimizer, what: str, value: Any) -> bool:
    """Whether an entry of a group is state: no key of the config, nor what the optimizer was made with."""
    if what in CONFIGURED:
        return False
    made = optimizer.defaults.get(what, None)
    return isinstance(value, Tensor) or what not in optimizer.defaults or bool(value != made)


def _bytes(value: Any, kind: str) -> Tensor:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    saved = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    if not isinstance(value, int | float | None):
        try:
            _value(saved)
        except UnpicklingError:
            raise CheckpointError(
                f"{kind} keeps a {type(value).__name__} in its state, which no checkpoint can hold",
                where="optimizer",
                fix="take another optimizer.kind, or out of optimizer.options what makes it do so",
            ) from None
    return saved


def _value(saved: Tensor) -> Any:
    return torch.load(io.BytesIO(saved.numpy().tobytes()), weights_only=True)


def _beside(value: Tensor, parameter: nn.Parameter, optimizer: Optimizer, on_host: bool) -> Tensor:
    """A state tensor where the optimizer wants it: torch keeps step counts on the CPU unless it is fused, when they never wait there."""
    on_cpu = on_host if value.ndim else not optimizer.defaults.get("fused")
    return value.clone() if on_cpu else value.to(parameter.device, copy=True)


def _named(optimizer: Optimizer) -> list[tuple[str, nn.Parameter, dict[str, Any]]]:
    groups = optimizer.param_groups
    return [(n, p, group) for group in groups for n, p in zip(group["names"], group["params"], strict=True) if n != NOTHING]
