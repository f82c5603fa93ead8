"""Averages gradients over the replicas while the backward pass goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from weakref import WeakMethod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup, Work

from diffpipe.pipeline.mesh import wait_for


@dataclass
class Bucket:
    """Gradients that are sent together.

    Attributes:
        left: how often the step's backward passes have still to add to one of them.
        flat: all of them, one behind the other, from when they are sent.
        missing: those that are zero here because no backward pass came by, and where they lie.
    """

    parameters: list[nn.Parameter]
    left: int = 0
    flat: Tensor | None = None
    work: Work | None = None
    missing: tuple[tuple[nn.Parameter, Tensor], ...] = ()


class Averaging:
    """Adds up gradients over the replicas in buckets, each as soon as the step's last backward pass has been through all of it.

    Buckets are filled from the last parameter to the first, as backward passes come by, and sent in this order on every rank. The
    gradients are then parts of their bucket, so that they are not held twice.

    Args:
        parameters: those to average, in the order of forward passes.
        group: the replicas.
        limit: bytes that a bucket is closed at.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], group: ProcessGroup, limit: int = 1 << 25) -> None:
        self.group = group
        self.buckets = [Bucket(p) for p in _filled(parameters[::-1], limit)]
        self.sent = 0
        added = WeakMethod(self._added)  # a parameter must not keep the group until the interpreter ends, which has ended in an abort
        for number, bucket in enumerate(self.buckets):
            for p in bucket.parameters:
                p.register_post_accumulate_grad_hook(partial(_call, added, number))

    def begin(self, passes: int) -> None:
        """A step begins.

        Args:
            passes: backward passes of the step; 0 sends nothing before ``finish``, for a step that this rank may have to repeat alone.
        """
        self.sent = 0 if passes else len(self.buckets)
        for bucket in self.buckets:
            bucket.left = passes * len(bucket.parameters)

    def finish(self) -> None:
        """Behind the last backward pass: replace every gradient by its mean. One that only other replicas have comes to be here too."""
        for bucket in self.buckets:
            if bucket.flat is None:
                self._send(bucket)
        for bucket in self.buckets:
            assert bucket.flat is not None and bucket.work is not None
            wait_for(bucket.work)
            bucket.flat /= self.group.size()
            for p, place in bucket.missing:
                if place.any():
                    p.grad = place
            bucket.flat, bucket.work, bucket.missing = None, None, ()

    def _added(self, number: int) -> None:
        self.buckets[number].left -= 1
        while self.sent < len(self.buckets) and not self.buckets[self.sent].left:
            self._send(self.buckets[self.sent])
            self.sent += 1

    def _send(self, bucket: Bucket) -> None:
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket.parameters])
        missing = []
        for p, place in zip(bucket.parameters, flat.split([p.numel() for p in bucket.parameters]), strict=True):
            if p.grad is None:
                missing.append((p, place.view_as(p)))
            else:
                p.grad = place.view_as(p)
        bucket.flat, bucket.missing = flat, tuple(missing)
        bucket.work = dist.all_reduce(flat, group=self.group, async_op=True)


def _call(method: WeakMethod[Callable[[int], None]], number: int, parameter: nn.Parameter) -> None:
    if (alive := method()) is not None:
        alive(number)


def _filled(parameters: Sequence[nn.Parameter], limit: int) -> Iterator[list[nn.Parameter]]:
    """Runs of parameters of one type and device, each closed by the one that makes it ``limit`` bytes or more."""
    bucket: list[nn.Parameter] = []
    for p in parameters:
        if bucket and (sum(q.nbytes for q in bucket) >= limit or (p.dtype, p.device) != (bucket[0].dtype, bucket[0].device)):
            yield bucket
            bucket = []
        bucket.append(p)
    if bucket:
        yield bucket
