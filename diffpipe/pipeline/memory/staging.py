"""Copies to a device from host memory that is not page-locked, through a few page-locked buffers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Staging:
    """Page-locked buffers that copies pass through by turns.

    A copy from pageable memory would stop the host until it is done; through a page-locked buffer the host only waits
    for its own memory. Slower than memory that is page-locked from the start, for machines that may not lock so much.

    Args:
        size: bytes of each buffer; larger copies go in parts.
        count: buffers.
    """

    def __init__(self, size: int = 64 << 20, count: int = 4) -> None:
        self.buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(count)]
        self.free: list[Any] = [None] * count
        self.turn = 0

    def copy(self, source: Tensor, target: Tensor, stream: Any) -> None:
        """Queue a copy of bytes on a stream; returns when ``source`` has been read."""
        size = self.buffers[0].numel()
        for begin in range(0, source.numel(), size):
            part = source[begin : begin + size]
            number = self.turn % len(self.buffers)
            self.turn += 1
            if self.free[number] is not None:
                self.free[number].synchronize()
            buffer = self.buffers[number][: part.numel()]
            buffer.copy_(part)
            target[begin : begin + part.numel()].copy_(buffer, non_blocking=True)
            self.free[number] = torch.cuda.Event()
            self.free[number].record(stream)
