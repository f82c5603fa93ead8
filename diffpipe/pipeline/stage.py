"""torch's view of a part: a module that takes a payload and the number of a microbatch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffpipe.config.schema import ObjectiveConfig
from diffpipe.models.base import Targets
from diffpipe.pipeline.cut import Layout, Part


@dataclass
class StepInputs:
    """What every stage knows of the step it is in.

    Attributes:
        microbatches: keyword inputs of forward and the targets, on this rank's device.
        layout: the structure of arriving payloads.
        arriving, leaving: the ragged dim of each tensor that crosses, None where none is.
        unused: for each microbatch, how much shorter than on the wire those dims are.
        instead: what leaves, zeros in its place, where memory runs out: other stages wait for this one. None where that ends the step.
    """

    microbatches: list[tuple[dict[str, Any], Targets]] = field(default_factory=list)
    layout: Layout | None = None
    arriving: tuple[int | None, ...] = ()
    leaving: tuple[int | None, ...] = ()
    unused: list[int] = field(default_factory=list)
    instead: tuple[Tensor, ...] | None = None


class _Arriving(torch.autograd.Function):
    """Identity on what came over a border. Gradients go back in memory of their own, zeros for what was not used: torch 2.11 sends all.

    Autograd may let a weight's ``.grad`` keep the very memory of a gradient that flows on, where an operation gives both the same (a
    table added to a modulation, at one sample); the next microbatch's gradient is added there while this one is still being sent.
    """

    @staticmethod
    def forward(ctx: Any, *payload: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.detach() for x in payload)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.clone(memory_format=torch.contiguous_format) for grad in grads)  # gloo refuses to send anything else


class _Leaving(torch.autograd.Function):
    """Identity on what goes over a border, in memory as ``_packed`` has it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, on_backward: Callable[[], None]) -> Tensor:
        ctx.on_backward = on_backward
        return _packed(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.on_backward()
        return grad, None


class Stage(nn.Module):
    """A part as ``torch.distributed.pipelining`` runs it: payload by position, all else looked up.

    Attributes:
        inputs: what the current step is about; set before the schedule runs.
        on_last_backward: called as the backward pass of the step's last microbatch begins; they come in the order of microbatches.
        losses: of each sample, by microbatch of the step; on the last stage.
        predictions: what the model gave for microbatches without targets, by number; on the last stage.
        shortage: what was said when memory ran out and zeros went on; None where it did not.
    """

    def __init__(
        self, part: Part, precision: Callable[[], AbstractContextManager[Any]], device: torch.device, objective: ObjectiveConfig
    ) -> None:
        super().__init__()
        self.part, self.precision, self.device, self.objective = part, precision, device, objective
        self.inputs = StepInputs()
        self.on_last_backward: Callable[[], None] = lambda: None
        self.losses: dict[int, Tensor] = {}
        self.predictions: dict[int, Tensor] = {}
        self.shortage: str | None = None

    def forward(self, *payload: Tensor, microbatch: Tensor) -> Tensor | tuple[Tensor, ...]:
        """What crosses to the next stage; on the last the microbatch's share of the step's loss, whose shape is always known."""
        number = int(microbatch)
        inputs, targets = self.inputs.microbatches[number]
        unused = self.inputs.unused[number]
        backward_begins = partial(self._backward_begins, number)
        trains = [t for t in payload if t.requires_grad]
        fresh = iter(_Arriving.apply(*trains) if trains else ())
        arrived = tuple(next(fresh) if t.requires_grad else t for t in payload)
        arrived = tuple(_shortened(t, dim, unused) for t, dim in zip(arrived, self.inputs.arriving, strict=True))
        try:
            with self.precision():
                sent, _ = self.part(arrived, self.inputs.layout, inputs)
        except torch.OutOfMemoryError as fault:
            if self.inputs.instead is None:
                raise
            self.shortage = str(fault)
            zeros = tuple(torch.zeros(t.shape, dtype=t.dtype, device=self.device) for t in self.inputs.instead)
            return zeros[0] if self.part.last else zeros
        if self.part.last and not targets:
            self.predictions[number] = sent[0].float()
            return sent[0].new_zeros(())
        if self.part.last:
            return self._share(sent, targets, number, backward_begins)
        sent = tuple(_lengthened(t, dim, unused) for t, dim in zip(sent, self.inputs.leaving, strict=True))
        return tuple(_Leaving.apply(t, backward_begins) if t.requires_grad else _packed(t) for t in sent)

    def _share(self, outputs: tuple[Tensor, ...], targets: Targets, microbatch: int, backward_begins: Callable[[], None]) -> Tensor:
        by_sample = outputs[0].new_zeros(len(outputs[0]), dtype=torch.float32)
        total = sum_errors(outputs, targets, self.objective.loss, self.objective.delta, by_sample) / len(self.inputs.microbatches)
        self.losses[microbatch] = by_sample
        if total.requires_grad:
            total.register_hook(lambda gradient: backward_begins())
        return total

    def _backward_begins(self, number: int) -> None:
        if number == len(self.inputs.microbatches) - 1:
            self.on_last_backward()


def _packed(tensor: Tensor) -> Tensor:
    """The tensor for a border: contiguous, since gloo refuses to send anything else; with a new tensor's strides also where a dim is 1
    long, since torch 2.11 compares them; and no view, since the halves of a backward pass (zero-bubble) detach it in place."""
    return tensor.contiguous().view(-1).view(tensor.shape).detach()


def _shortened(tensor: Tensor, dim: int | None, unused: int) -> Tensor:
    return tensor if dim is None or not unused else tensor.narrow(dim, 0, tensor.shape[dim] - unused)


def _lengthened(tensor: Tensor, dim: int | None, unused: int) -> Tensor:
    """The tensor with zeros at the end of a dim: a step's payloads have one shape on the wire."""
    if dim is None or not unused:
        return tensor
    return nn.functional.pad(tensor, [0, 0] * (tensor.ndim - 1 - dim) + [0, unused])


def sum_errors(
    outputs: tuple[Tensor, ...], targets: Targets, loss: str = "mse", delta: float = 1.0, by_sample: Tensor | None = None
) -> Tensor:
    """Sum over outputs of the mean of ``weight * error``, in float32.

    Args:
        loss: "mse", "huber" or "smooth_l1", as torch.nn.functional defines them.
        delta: where the latter two turn from square to linear.
        by_sample: B numbers; the same sum of each sample alone is added to them.
    """
    total = outputs[0].new_zeros((), dtype=torch.float32)
    for output, (target, weight) in zip(outputs, targets, strict=True):
        if loss == "mse":
            error = (output.float() - target.float()).square()
        elif loss == "huber":
            error = nn.functional.huber_loss(output.float(), target.float(), reduction="none", delta=delta)
        else:
            error = nn.functional.smooth_l1_loss(output.float(), target.float(), reduction="none", beta=delta)
        error = error if weight is None else error * weight
        total = total + error.mean()
        if by_sample is not None:
            by_sample += error.detach().flatten(1).mean(1)
    return total
