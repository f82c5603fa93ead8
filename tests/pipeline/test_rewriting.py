"""A compiled block does the same by fewer operations: adapters' products are added in place, GELU is a sigmoid, pairs are swapped."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from functorch.compile import aot_function, nop
from torch import Tensor, fx, nn
from torch._inductor.decomposition import select_decomp_table

from diffpipe.pipeline.memory.compiling import compiled
from diffpipe.pipeline.memory.merging import NARROW
from diffpipe.pipeline.memory.tags import cut

ROWS, WIDTH = 24, NARROW + 64


class Layer(nn.Module):
    """A frozen layer with an adapter; ``watched`` gives away what the layer alone makes too."""

    def __init__(self, bias: bool, watched: bool = False) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH, bias=bias).requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, WIDTH, bias=False)
        self.watched = watched

    def forward(self, x: Tensor) -> Tensor:
        own = self.base(x)
        out = own + 0.5 * self.up(self.down(x))
        return out * own if self.watched else out * out


class Gelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(x, approximate="tanh")


class Tanh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) * 2


class Rotary(nn.Module):
    """Turns pairs that lie side by side, or, ``apart``, of the two halves of each head."""

    def __init__(self, apart: bool = False) -> None:
        super().__init__()
        self.apart = apart
        angles = torch.randn(ROWS, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).repeat_interleave(2, 1)
        self.cos, self.sin = (nn.Parameter(by, requires_grad=False) for by in (angles.cos(), angles.sin()))

    def forward(self, x: Tensor) -> Tensor:
        by = self.cos, self.sin
        return apply_rotary_emb(x.tanh(), by, use_real_unbind_dim=-2 if self.apart else -1, sequence_dim=1)


def operations(block: nn.Module, x: Tensor) -> Counter[str]:
    """What the two passes of a block are cut into."""
    found: Counter[str] = Counter()

    def look(joint: fx.GraphModule, given: Any, **more: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        halves = cut(joint, "none", given, **more)
        found.update(str(n.target) for half in halves for n in half.graph.nodes if n.op == "call_function")
        return halves

    def run(weights: list[Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(dict(block.named_parameters()), weights, strict=True)), (x,))

    aot_function(run, nop, nop, partition_fn=look, decompositions=select_decomp_table())([*block.parameters()], x)
    return found


def outcome(forward: Any, block: nn.Module, x: Tensor) -> list[Tensor]:
    out = forward(x)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *(p for p in block.parameters() if p.requires_grad)])]


@pytest.mark.parametrize(("bias", "dims"), [(True, (ROWS,)), (False, (ROWS,)), (True, (2, ROWS))], ids=str)
def test_a_layer_and_its_adapter_are_one_operation_with_the_same_result(bias: bool, dims: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    block, x = Layer(bias).double(), torch.randn(*dims, WIDTH, dtype=torch.float64, requires_grad=True)
    found = operations(block, x)
    assert found["diffpipe.adapted_mm.default"] == 2 and not found["aten.addmm.default"], found  # the second for the gradient of x
    torch.testing.assert_close(outcome(compiled(block.forward, "none"), block, x), outcome(block.forward, block, x))


def test_a_layers_result_that_is_used_by_itself_stays_what_it_is() -> None:
    torch.manual_seed(0)
    block, x = Layer(bias=True, watched=True).double(), torch.randn(ROWS, WIDTH, dtype=torch.float64, requires_grad=True)
    assert operations(block, x)["diffpipe.adapted_mm.default"] == 1  # for the gradient of x alone
    torch.testing.assert_close(outcome(compiled(block.forward, "none"), block, x), outcome(block.forward, block, x))


def test_gelu_by_a_sigmoid_is_exact_to_float32() -> None:
    x = torch.linspace(-8, 8, 4001, requires_grad=True)
    found = operations(Gelu(), x)
    assert found["aten.sigmoid.default"] and not found["aten.tanh.default"]
    exact = x.detach().double().requires_grad_()
    for forward in (compiled(Gelu().forward, "none"), Gelu()):
        mine, wanted = forward(x), Gelu()(exact)
        for got, want in [(mine, wanted), *zip(torch.autograd.grad(mine.sum(), x), torch.autograd.grad(wanted.sum(), exact), strict=True)]:
            assert ((got - want).abs() / want.abs().clamp(min=1)).max() <= 4e-6


def test_a_tanh_that_is_used_by_itself_is_exact_near_0() -> None:
    x = torch.linspace(-1e-3, 1e-3, 101, requires_grad=True)
    assert operations(Tanh(), x)["aten.tanh.default"]
    torch.testing.assert_close(compiled(Tanh().forward, "none")(x), Tanh()(x), rtol=1e-6, atol=0)


def test_pairs_are_turned_by_swapping_them_with_the_same_result() -> None:
    x = torch.randn(2, ROWS, 3, 8, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    block = Rotary()
    found = operations(block, x)
    assert found["prims.rev.default"] == 2 and not found["aten.cat.default"], found  # once forward, once for the gradient
    aside = operations(Rotary(apart=True), x)
    assert not aside["prims.rev.default"] and aside["aten.cat.default"], aside
    for rotary in (block, Rotary(apart=True)):
        for got, wanted in zip(outcome(compiled(rotary.forward, "none"), rotary, x), outcome(rotary.forward, rotary, x), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-14, atol=1e-15)
