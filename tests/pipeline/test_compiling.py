"""What a compiled block keeps for its backward pass is what its policy says, and its gradients are those of the plain block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor

from diffpipe.pipeline.memory.chunks import chunk
from diffpipe.pipeline.memory.compiling import compiled

TOKENS, WIDTH, WIDER = 1088, 32, 96


@pytest.fixture(scope="module")
def block() -> WanTransformerBlock:
    torch.manual_seed(0)
    return WanTransformerBlock(WIDTH, WIDER, 2, cross_attn_norm=True)


def passes(forward: Any, block: WanTransformerBlock) -> tuple[Tensor, list[Tensor], list[tuple[int, ...]]]:
    """Output, gradients, and the shapes of the activations that are kept."""
    generator = torch.Generator().manual_seed(1)
    x, text = (torch.randn(1, n, WIDTH, generator=generator, requires_grad=True) for n in (TOKENS, 8))
    time = torch.randn(1, 6, WIDTH, generator=generator)
    turns = tuple(torch.randn(1, TOKENS, 1, WIDTH // 2, generator=generator) for _ in range(2))
    parameters = {p.data_ptr() for p in block.parameters()}
    kept: dict[int, tuple[int, ...]] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters and tensor.numel() >= TOKENS * WIDTH:
            kept[tensor.data_ptr()] = tuple(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = forward(x, text, time, turns)
    inputs = [x, text, *(p for p in block.parameters() if p.requires_grad)]
    gradients = torch.autograd.grad(out.square().sum(), inputs)
    return out.detach(), list(gradients), list(kept.values())


@pytest.mark.parametrize(("policy", "activations"), [("block", 1), ("selective", 2), ("parts", 3)])
def test_a_compiled_block_keeps_what_its_policy_says(block: WanTransformerBlock, policy: str, activations: int) -> None:
    want, wanted, everything = passes(block.forward, block)
    out, gradients, kept = passes(compiled(block.forward, policy), block)
    assert any(WIDER in shape for shape in everything) and not any(WIDER in shape for shape in kept)
    # What goes in; the result of attention among all tokens (not of that to the text); what passes on to the feed-forward part.
    assert len(kept) == activations, kept
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    for gradient, expected in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("policy", "kept"), [("block", False), ("selective", True)])
def test_the_result_of_a_wide_layer_is_kept_for_the_gradient_of_the_gate_behind_it(policy: str, kept: bool) -> None:
    torch.manual_seed(0)
    tokens, width = 72, 32
    block = FluxSingleTransformerBlock(width, 2, 16, mlp_ratio=256)
    x, text = (torch.randn(1, n, width, requires_grad=True) for n in (tokens - 8, 8))
    time, turns = torch.randn(1, width), tuple(torch.randn(tokens, 16) for _ in range(2))
    found: list[tuple[int, ...]] = []

    def gradients(forward: Any) -> tuple[Tensor, ...]:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(tuple(t.shape)) or t, lambda t: t):
            out = forward(x, text, time, turns)
        return torch.autograd.grad(sum(y.square().sum() for y in out), [x, text, *block.parameters()])

    want = gradients(block.forward)
    found.clear()
    got = gradients(compiled(block.forward, policy))
    assert ((tokens, width) in found) == kept, found  # texts and x go in apart, so nothing else has this shape
    for gradient, wanted in zip(got, want, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-3)


def test_a_compiled_block_whose_feed_forward_part_takes_the_tokens_in_parts_keeps_no_more() -> None:
    torch.manual_seed(0)
    block = WanTransformerBlock(WIDTH, WIDER, 2, cross_attn_norm=True)
    want, wanted, _ = passes(block.forward, block)
    chunk(block, 2, compiles=True)
    out, gradients, kept = passes(compiled(block.forward, "parts"), block)
    assert len(kept) == 3 and not any(WIDER in shape for shape in kept), kept
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    for gradient, expected in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3)
