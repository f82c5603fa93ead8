"""Tensors come back from the host as they went, those that lie side by side in one copy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffpipe.pipeline.memory.ferry import Ferry
from diffpipe.pipeline.memory.host import HostMemory


class Copies(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.copy_.default
        return func(*args, **(kwargs or {}))


def test_what_lies_side_by_side_travels_as_one_and_all_comes_back_as_it_was() -> None:
    device = torch.device("cpu")
    ferry = Ferry(device, HostMemory(False), torch.cpu)
    values = torch.randn(5 * 256)
    left, right = torch.randn(4, 512).split(256, dim=1)  # each a view with gaps
    parts: list[Tensor] = [*values.view(5, 16, 16), left, right, torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)]
    parts += [*torch.arange(512, dtype=torch.uint8).split(256), torch.randn(512, dtype=torch.float64).bfloat16()]
    hosts = [ferry.host_like(t) for t in parts]
    with Copies() as copies:
        ferry.send(parts, hosts)
    assert copies.count == 6, "five, two of four with gaps and one in another order by themselves, two, one"
    kept = [t.clone() for t in parts]
    for t in parts:
        t.zero_()
    places, _ = ferry.bring(hosts)
    for place, before in zip(places, kept, strict=True):
        assert torch.equal(place, before) and place.dtype == before.dtype and place.stride() == torch.empty_like(before).stride()
