"""Attention that leaves padding out gives what attention gives that masks it, and what diffusers' own processors give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from diffpipe.models import MODELS, make_model
from diffpipe.models.padding import padded_attention, processors
from tests.families import frames_of, microbatch, with_weights
from tests.pipeline.test_memory import config_of

Toys = Callable[[str], Path]


def test_keys_and_values_of_padding_are_left_out_and_get_no_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, n, 3, 16, generator=generator).transpose(1, 2).requires_grad_() for n in (10, 12, 12))
    attended = torch.ones(2, 12, dtype=torch.bool)
    attended[0, 7:] = attended[1, 2:5] = False
    out = padded_attention(query, key, value, attended)[0]
    wanted = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attended[:, None, None])
    torch.testing.assert_close(out, wanted)
    gradients, expected = (torch.autograd.grad(x.square().sum(), (query, key, value)) for x in (out, wanted))
    torch.testing.assert_close(gradients, expected)
    assert not gradients[1].transpose(1, 2)[~attended].any()
    torch.library.opcheck(padded_attention, (query, key, value, attended))  # its gradients, shapes and strides, traced and not


@pytest.mark.parametrize("family", sorted(MODELS))
def test_a_denoiser_gives_what_diffusers_gives_of_captions_with_padding(toys: Toys, family: str) -> None:
    config = config_of(family, toys(family), None, {})
    model = make_model(config.model, config.objective)
    module = model.make_module().eval()
    if not processors(module):
        pytest.skip("it has no processors of ours")
    inputs, _ = microbatch(model, frames=frames_of(model))
    masks = [x for name, x in inputs.items() if name.endswith("attention_mask")]
    assert not all(m.all() for m in masks), "there is padding"
    theirs = model.denoiser_class().from_config(model.class_config(model.denoiser_config)).eval()
    with torch.no_grad():
        wanted = with_weights(theirs, model)(**inputs, return_dict=False)[0]
        for packs in (False, True):
            for processor in processors(module):
                processor.packs = packs
            torch.testing.assert_close(with_weights(module, model)(**inputs, return_dict=False)[0], wanted, rtol=1e-4, atol=1e-5)
