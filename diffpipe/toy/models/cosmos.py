"""A CosmosTextToWorldPipeline of a few hundred thousand weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffpipe.models.cosmos import NoChecker
from diffpipe.toy.tiny import make_t5, make_t5_tokenizer, open_heads, pictures_for_scale

CHANNELS, FRAMES = 4, 16  # of latents whose statistics the VAE knows


def make_vae() -> Any:
    """An AutoencoderKLCosmos whose statistics fit drawn clips, those of each latent frame its own."""
    from diffusers import AutoencoderKLCosmos

    vae: Any = AutoencoderKLCosmos(
        latent_channels=CHANNELS,
        encoder_block_out_channels=(8, 8, 16, 16),
        decode_block_out_channels=(8, 16, 16, 16),
        attention_resolutions=(),
        num_layers=1,
    ).eval()
    pictures = pictures_for_scale(frames=0)
    # Another picture every fourth frame: what stands still has the same latents in every frame.
    clips = torch.stack([pictures.roll(frame // 4, 0) for frame in range(17)], 2)
    with torch.no_grad():
        latents = vae.encode(clips).latent_dist.mode()

    def known(values: Tensor) -> list[float]:
        return torch.cat([values, values[:, -1:].expand(-1, FRAMES - values.shape[1])], 1).flatten().tolist()

    vae.register_to_config(latents_mean=known(latents.mean((0, 3, 4))), latents_std=known(latents.std((0, 3, 4))))
    return vae


def make(folder: Path) -> None:
    from diffusers import CosmosTextToWorldPipeline, CosmosTransformer3DModel, EDMEulerScheduler

    tokenizer = make_t5_tokenizer()
    transformer = CosmosTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=6,
        text_embed_dim=32,
        adaln_lora_dim=8,
        max_size=(FRAMES, 32, 32),
    )
    pipeline = CosmosTextToWorldPipeline(
        text_encoder=make_t5("T5", tokenizer, feed_forward="relu"),
        tokenizer=tokenizer,
        transformer=open_heads(transformer),
        vae=make_vae(),
        scheduler=EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5, final_sigmas_type="sigma_min"),
        safety_checker=NoChecker(),
    )
    pipeline.register_modules(safety_checker=None)  # it cannot be saved
    pipeline.save_pretrained(folder)
