"""An LTXPipeline of a few hundred thousand weights, of version 0.9.0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffpipe.toy.tiny import make_t5, make_t5_tokenizer, open_heads, pictures_for_scale


def make_vae() -> Any:
    """An AutoencoderKLLTXVideo whose statistics fit drawn clips."""
    from diffusers import AutoencoderKLLTXVideo

    vae: Any = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 16, 16),
        decoder_block_out_channels=(8, 8, 16, 16),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    ).eval()
    with torch.no_grad():
        mode = vae.encode(pictures_for_scale(frames=9)).latent_dist.mode()
    vae.latents_mean.copy_(mode.mean((0, 2, 3, 4)))
    vae.latents_std.copy_(mode.std((0, 2, 3, 4)))
    return vae


def make(folder: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel

    tokenizer = make_t5_tokenizer()
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=16,
        cross_attention_dim=64,
        num_layers=6,
        caption_channels=32,
    )
    LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, max_image_seq_len=4096, shift_terminal=0.1
        ),
        vae=make_vae(),
        text_encoder=make_t5("T5", tokenizer),
        tokenizer=tokenizer,
        transformer=open_heads(transformer),
    ).save_pretrained(folder)
