"""Which of torch's attention kernels a run takes."""

from __future__ import annotations

import torch


class Attention:
    """Takes cuDNN's kernels where they are asked for, as long as their gradients are finite, or steps cannot be repeated.

    torch prefers them on Hopper and later cards, where they are the fastest, but at some lengths, layouts and masks their backward
    pass has given NaN from finite inputs (pytorch/pytorch#196678; torch 2.11 to 2.13), and values that are wrong (benchmarks/RESULTS.md).

    Args:
        kind: as ``model.attention``: "sdpa" is all kernels but cuDNN's.
        repeats: whether a step can be repeated: not where weights move in its backward pass.

    Attributes:
        retreated: whether cuDNN's kernels were given up.
    """

    def __init__(self, kind: str, repeats: bool = True) -> None:
        self.cudnn, self.repeats, self.retreated = kind == "cudnn", repeats, False
        torch.backends.cuda.enable_cudnn_sdp(self.cudnn)

    def retreat(self) -> bool:
        """Take cuDNN's kernels no more; whether they may have been in use, and a step without them is worth a try."""
        if not self.cudnn or not self.repeats:
            return False
        self.cudnn, self.retreated = False, True
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.compiler.reset()  # which kernel runs is part of what was compiled
        return torch.cuda.is_available()
