"""Which of torch's attention kernels a run takes."""

from __future__ import annotations

import torch


class Attention:
    """Takes cuDNN's kernels as long as their gradients are finite.

    torch prefers them on Hopper and later cards, where they are the fastest (benchmarks/RESULTS.md), but at some lengths, layouts
    and masks their backward pass has given NaN from finite inputs (pytorch/pytorch#196678; torch 2.11 to 2.13).

    Args:
        kind: "auto", or "sdpa" for all kernels but cuDNN's.
    """

    def __init__(self, kind: str) -> None:
        self.cudnn = kind == "auto"
        torch.backends.cuda.enable_cudnn_sdp(self.cudnn)

    def retreat(self) -> bool:
        """Take cuDNN's kernels no more; whether they may have been in use."""
        if not self.cudnn:
            return False
        self.cudnn = False
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.compiler.reset()  # which kernel runs is part of what was compiled
        return torch.cuda.is_available()
