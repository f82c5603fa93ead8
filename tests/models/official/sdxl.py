"""Stable Diffusion XL: DDPM's loss on the noise, as diffusers' train_text_to_image_sdxl.py and StableDiffusionXLPipeline have it."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from torch import Tensor, nn


def loss(module: nn.Module, folder: Path, batch: dict[str, Tensor], noise: Tensor, t: Tensor) -> Tensor:
    clean = batch["latents"]
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    steps = (t * scheduler.config["num_train_timesteps"]).floor().long().clamp(max=scheduler.config["num_train_timesteps"] - 1)
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    time_ids = [
        pipeline._get_add_time_ids(size, crop, target, torch.float32, pipeline.text_encoder_2.config.projection_dim)
        for size, crop, target in ((tuple(f[:2]), tuple(f[2:4]), tuple(f[4:])) for f in batch["framing"].tolist())
    ]
    predicted = module.unet(
        scheduler.add_noise(clean, noise, steps),
        steps,
        encoder_hidden_states=batch["text"].flatten(1, 2),
        added_cond_kwargs={"time_ids": torch.cat(time_ids), "text_embeds": batch["pooled"]},
        return_dict=False,
    )[0]
    return torch.nn.functional.mse_loss(predicted.float(), noise.float(), reduction="mean")


COMFYUI = [
    "input_blocks.1.0.emb_layers.1",
    "input_blocks.4.0.emb_layers.1",
    *(f"input_blocks.4.1.{n}" for n in ("proj_in", "proj_out")),
    *(f"input_blocks.4.1.transformer_blocks.0.{a}.{n}" for a in ("attn1", "attn2") for n in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"input_blocks.4.1.transformer_blocks.0.ff.net.{n}" for n in ("0.proj", "2")),
    "middle_block.0.emb_layers.1",
    "middle_block.2.emb_layers.1",
]
FIRST = r"input_blocks\.[14]\.|middle_block\.[02]\."
