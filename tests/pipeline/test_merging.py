"""Adapters of layers that are given the same rows are multiplied together in compiled blocks, which changes no number but by rounding."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, fx, nn

from diffpipe.pipeline.memory.compiling import compiled
from diffpipe.pipeline.memory.merging import NARROW, merge

ROWS, WIDTH = 24, NARROW + 64


class Adapted(nn.Module):
    """Layers of one input, each with an adapter of its own, added up; each but the first turns the sum before it."""

    def __init__(self, ranks: tuple[int, ...], apart: bool = False) -> None:
        super().__init__()
        self.base = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False) for _ in ranks)
        self.down = nn.ModuleList(nn.Linear(WIDTH, rank, bias=False) for rank in ranks)
        self.up = nn.ModuleList(nn.Linear(rank, WIDTH, bias=False) for rank in ranks)
        self.apart = apart

    def forward(self, x: Tensor) -> Tensor:
        total = x
        for base, down, up in zip(self.base, self.down, self.up, strict=True):
            given = total if self.apart else x
            total = torch.tanh(total) + base(given) + up(down(given))
        return total


def products(block: nn.Module, x: Tensor) -> tuple[Counter[str], Counter[str]]:
    """How many products a block's two passes take in its joint graph, as it is and merged."""
    from functorch.compile import aot_function, min_cut_rematerialization_partition, nop
    from torch._inductor.decomposition import select_decomp_table

    found: list[Counter[str]] = []

    def count(graph: fx.Graph) -> Counter[str]:
        return Counter(str(n.target) for n in graph.nodes if n.op == "call_function")

    def look(joint: fx.GraphModule, given: object, **more: object) -> tuple[fx.GraphModule, fx.GraphModule]:
        found.append(count(joint.graph))
        joint.graph = merge(joint.graph)
        joint.graph.lint()
        found.append(count(joint.graph))
        return min_cut_rematerialization_partition(joint, given, **more)  # pyright: ignore[reportArgumentType]

    def run(weights: list[Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(dict(block.named_parameters()), weights, strict=True)), (x,))

    aot_function(run, nop, nop, partition_fn=look, decompositions=select_decomp_table())([*block.parameters()], x)
    return found[0], found[1]


def outcome(forward: nn.Module, block: nn.Module, x: Tensor) -> list[Tensor]:
    out = forward(x)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *(p for p in block.parameters() if p.requires_grad)])]


def test_adapters_of_one_input_are_one_product_each_way() -> None:
    torch.manual_seed(0)
    before, after = products(Adapted((4, 4, 8)), torch.randn(ROWS, WIDTH, requires_grad=True))
    # Down, its weights' gradients and its input's: one each in the place of three.
    assert before["aten.mm.default"] - after["aten.mm.default"] == 6, (before, after)


@pytest.mark.parametrize(("ranks", "apart"), [((4, 4, 8), True), ((NARROW + 1, NARROW + 2), False), ((4,), False)])
def test_layers_of_other_inputs_and_wide_ones_are_left_alone(ranks: tuple[int, ...], apart: bool) -> None:
    torch.manual_seed(0)
    before, after = products(Adapted(ranks, apart), torch.randn(ROWS, WIDTH, requires_grad=True))
    assert before["aten.mm.default"] == after["aten.mm.default"]


@pytest.mark.parametrize(("policy", "rows"), [("none", torch.float32), ("block", torch.bfloat16)])
def test_merged_products_change_no_number_but_by_rounding(policy: str, rows: torch.dtype) -> None:
    torch.manual_seed(0)
    block = Adapted((4, 4, 8))
    x = torch.randn(2, ROWS, WIDTH, requires_grad=True)
    with torch.autocast("cpu", rows, enabled=rows != torch.float32):
        got, want = outcome(compiled(block.forward, policy), block, x), outcome(block.forward, block, x)  # pyright: ignore[reportArgumentType]
    exact = outcome(block.forward, block, x)  # pyright: ignore[reportArgumentType]
    for mine, plain, wanted in zip(got, want, exact, strict=True):
        assert (mine - wanted).norm() <= 1.2 * (plain - wanted).norm() + 1e-6 * wanted.norm()
