"""Host memory that a device copies from and to."""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNED = 256  # bytes: each part begins where any kernel may read it fastest
SMALLEST, LARGEST = 1 << 20, 1 << 30  # bytes of a buffer, unless a part is larger


class HostMemory:
    """Gives out parts of large buffers, for as long as a run lasts.

    torch rounds each page-locked buffer up to a power of two, which may double what it takes; here the buffers are powers of two, and
    parts lie in them side by side.

    Args:
        pinned: page-lock it, so that a device copies while it computes.

    Attributes:
        taken: bytes of the buffers.
    """

    def __init__(self, pinned: bool) -> None:
        self.pinned, self.taken = pinned, 0
        self.rests: list[Tensor] = []

    def take(self, count: int) -> Tensor:
        """A part of ``count`` bytes."""
        size = -(-count // ALIGNED) * ALIGNED
        place = next((i for i, r in enumerate(self.rests) if r.numel() >= size), len(self.rests))
        if place == len(self.rests):
            # As much as there is already, within bounds: few buffers, and never more than twice what is used.
            buffer = _power(max(size, min(max(self.taken, SMALLEST), LARGEST)))
            self.rests.append(torch.empty(buffer, dtype=torch.uint8, pin_memory=self.pinned))
            self.taken += buffer
        rest = self.rests[place]
        # In its place: what is taken next lies behind it, and may travel with it.
        self.rests[place : place + 1] = [rest[size:]] if rest.numel() > size else []
        return rest[:count]

    def like(self, tensor: Tensor) -> Tensor:
        """A part for a tensor, laid out as ``torch.empty_like`` would."""
        laid = torch.empty_like(tensor, device="meta")
        return self.take(tensor.nbytes).view(tensor.dtype).as_strided(laid.shape, laid.stride())


def _power(count: int) -> int:
    """The smallest power of two that is no less."""
    return 1 << (count - 1).bit_length()
