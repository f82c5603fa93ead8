"""Which operations are foreseen to run as one kernel, as inductor has it, and so hold at once all that they read and write."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from diffpipe.pipeline.memory.fusion import kernels_of
from diffpipe.pipeline.memory.tags import tensors

ROWS, WIDTH = 2048, 512


def kernels(function: Callable[..., object], *shapes: tuple[int, ...]) -> list[list[str]]:
    """The names of the operations in each kernel, in the order in which they run."""
    with FakeTensorMode():
        graph = make_fx(function)(*(torch.empty(s) for s in shapes)).graph
    order = [n for n in graph.nodes if n.op == "call_function"]
    reads = {n: {(other, 0) for other in n.all_input_nodes} for n in order}
    made = kernels_of(order, reads, lambda buffer: sum(t.nbytes for t in tensors(buffer[0]) if t is not None))
    return [[str(n.target).split(".")[1] for n in kernel.members] for kernel in made]


def test_operations_on_the_same_values_run_as_one() -> None:
    assert kernels(lambda x, w: (x.sin() @ w, x.cos() @ w), (ROWS, WIDTH), (WIDTH, WIDTH)) == [["sin", "cos"], ["mm"], ["mm"]]


def test_what_waits_for_a_product_does_not_run_with_what_the_product_waits_for() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        return (x.sin() @ w).mul(x)

    assert kernels(function, (ROWS, WIDTH), (WIDTH, WIDTH)) == [["sin"], ["mm"], ["mul"]]


def test_a_reduction_runs_with_what_makes_its_values_and_with_no_other_loop() -> None:
    def function(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return (x * x).sum(-1), y.cos()

    assert kernels(function, (ROWS, WIDTH), (ROWS // 2, WIDTH)) == [["mul", "sum"], ["cos"]]
