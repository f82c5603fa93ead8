"""A stage of torch's that has memory for what crosses its borders only while it is needed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from packaging.version import Version
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _batch_p2p

FILLS = Version(torch.__version__).release[:2] >= (2, 15)  # torch itself takes memory to receive into when something comes


class CrossingStage(PipelineStage):
    """Takes memory for a payload or its gradients when they are about to come, and leaves it to the passes that use them.

    Schedules of several spans hold all that was sent until the step ends, and before torch 2.15 ``PipelineStage`` holds memory to receive
    into for every microbatch of a step, both ways, as long as its schedule is there: by the size of their payloads, for eight microbatches
    of Wan 14B at 9,216 tokens through two spans a stage, more than 2 GiB each. Here the latter is held only until the first pass begins.

    Args:
        behind: how many sends, each way, the computation may be ahead of before it waits for the oldest; None leaves all to the schedule.
            The next stage must be able to take as many before it gives anything back: no more than twice the stages are in one span.
    """

    def __init__(self, *args: Any, behind: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.behind, self.emptied = behind, False
        self.ahead: deque[list[dist.Work]] = deque()  # payloads under way
        self.back: deque[list[dist.Work]] = deque()  # and gradients

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> Any:
        self._empty_all()
        _fill(self.args_recv_info[fwd_chunk_id], self.device)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> Any:
        _fill(self.grad_recv_info.get(bwd_chunk_id, ()), self.device)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> Any:
        return self._send(super().get_fwd_send_ops(fwd_chunk_id), self.ahead)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> Any:
        return self._send(super().get_bwd_send_ops(bwd_chunk_id), self.back)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        self._empty_all()
        out = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        _empty(self.args_recv_info[fwd_chunk_id])
        return out

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        out = super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        _empty(self.grad_recv_info.get(bwd_chunk_id, ()))
        return out

    def settle(self) -> None:
        """Wait for what was sent; the step is over."""
        for sent in (self.ahead, self.back):
            while sent:
                _wait(sent.popleft())

    def _send(self, operations: Any, sent: deque[list[dist.Work]]) -> Any:
        """What is left for the schedule to send; it is told of nothing that is sent here, the way it would send it."""
        if self.behind is None or not operations:
            return operations
        sent.append(_batch_p2p(operations))
        if len(sent) > self.behind:
            _wait(sent.popleft())
        return []

    def _empty_all(self) -> None:
        """Give up what was taken when the stage was made ready: before the first pass none of it is in use."""
        if not self.emptied:
            self.emptied = True
            for infos in (*self.args_recv_info.values(), *self.grad_recv_info.values()):
                _empty(infos)


def _wait(works: Iterable[dist.Work]) -> None:
    for work in works:
        work.wait()


def _empty(infos: Iterable[Any]) -> None:
    """Leave what was received to those who use it, and keep its shape."""
    for info in infos:
        _replace(info, torch.device("meta"))


def _fill(infos: Iterable[Any], device: torch.device) -> None:
    """Take memory for what is about to come."""
    for info in infos:
        _replace(info, device)


def _replace(info: Any, device: torch.device) -> None:
    buffer = getattr(info, "buffer", None)
    if isinstance(buffer, Tensor) and not FILLS:
        info.buffer = torch.empty_like(buffer.detach(), device=device).requires_grad_(buffer.requires_grad)
