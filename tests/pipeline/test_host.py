"""Parts of host memory."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from diffpipe.pipeline.memory.host import HostMemory


@given(st.lists(st.integers(1, 1 << 24), min_size=1, max_size=40))
def test_parts_lie_side_by_side_in_buffers_of_powers_of_two(sizes: list[int]) -> None:
    memory = HostMemory(pinned=False)
    parts = [memory.take(size) for size in sizes]
    places = sorted((p.data_ptr(), p.data_ptr() + p.numel()) for p in parts)
    assert [p.numel() for p in parts] == sizes
    assert all(end <= begin for (_, end), (begin, _) in pairwise(places))
    buffers = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parts}
    assert all(size & (size - 1) == 0 for size in buffers.values())
    assert memory.taken == sum(buffers.values()) <= max(1 << 20, 4 * sum(sizes))


def test_many_like_parts_waste_little() -> None:
    memory = HostMemory(pinned=False)
    for _ in range(57):  # Flux' blocks in fp8, a thousandth in size
        memory.take(198_000)
    assert memory.taken < 1.5 * 57 * 198_000


def test_a_part_for_a_tensor_is_laid_out_as_the_tensor() -> None:
    tensor = torch.arange(24.0).view(2, 3, 4).transpose(0, 2)
    part = HostMemory(pinned=False).like(tensor)
    assert (part.shape, part.stride(), part.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)
    assert torch.equal(part.copy_(tensor), tensor)
