"""Averages gradients of two replicas, of which one does not use every weight.

torchrun --nproc_per_node=2 tests/pipeline/averaging_program.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from diffpipe.pipeline.averaging import Averaging


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    weights = [nn.Parameter(torch.full((3,), float(i + 1))) for i in range(4)]
    assert dist.group.WORLD is not None
    averaging = Averaging(weights, dist.group.WORLD, limit=24)  # two in a bucket
    for passes in (2, 0):  # sent within the backward pass, and behind it
        averaging.begin(passes)
        for _ in range(2):
            # The first is used by both replicas, the second by rank 1, the third by neither, the fourth by both.
            used = [weights[0], *([weights[1]] if rank else []), weights[3]]
            torch.stack([w.sum() * (1 + rank) for w in used]).sum().backward()
        averaging.finish()
        got = [None if w.grad is None else w.grad.tolist() for w in weights]
        assert got == [[3.0] * 3, [2.0] * 3, None, [3.0] * 3], got
        for w in weights:
            w.grad = None
    print(f"averaged on rank {rank}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
