"""A stage of torch's that has memory for what it receives only while it needs it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage


class ReceivingStage(PipelineStage):
    """Takes memory for a payload or its gradients when they are about to be received, and leaves it to the passes that use them.

    From torch 2.15 on ``PipelineStage`` does so itself. Before, it holds memory for every microbatch of a step, both ways, as long as
    its schedule is there: for eight microbatches of Wan 14B at 9,216 tokens more than 2 GiB. Here only until the first pass begins.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.emptied = False

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> Any:
        self._empty_all()
        _fill(self.args_recv_info[fwd_chunk_id], self.device)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> Any:
        _fill(self.grad_recv_info.get(bwd_chunk_id, ()), self.device)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        self._empty_all()
        out = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        _empty(self.args_recv_info[fwd_chunk_id])
        return out

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        out = super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        _empty(self.grad_recv_info.get(bwd_chunk_id, ()))
        return out

    def _empty_all(self) -> None:
        """Give up what was taken when the stage was made ready: before the first pass none of it is in use."""
        if not self.emptied:
            self.emptied = True
            for infos in (*self.args_recv_info.values(), *self.grad_recv_info.values()):
                _empty(infos)


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
    if isinstance(buffer, Tensor):
        info.buffer = torch.empty_like(buffer.detach(), device=device).requires_grad_(buffer.requires_grad)
