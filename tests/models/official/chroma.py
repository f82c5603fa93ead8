"""Chroma1: rectified flow on packed latents, masked as lodestone-rock/flow's train_chroma.py has it, one sample at a time."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import ChromaPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn


def loss(module: nn.Module, folder: Path, batch: dict[str, Tensor], noise: Tensor, t: Tensor) -> Tensor:
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.timesteps, scheduler.sigmas = t * scheduler.config["num_train_timesteps"], t
    errors = []
    for i in range(len(t)):
        clean, own = batch["latents"][i : i + 1], slice(i, i + 1)
        _, channels, height, width = clean.shape
        tokens = height // 2 * (width // 2)
        noisy = scheduler.scale_noise(clean, scheduler.timesteps[own], noise[own])
        # The caption and one token of padding, which the official code appends after its end; then all of the image.
        length = int(batch["attended"][i].sum())
        known = torch.arange(batch["text"].shape[1]) < length
        out = module(
            hidden_states=ChromaPipeline._pack_latents(noisy, 1, channels, height, width),
            timestep=scheduler.timesteps[own] / 1000,
            encoder_hidden_states=batch["text"][own],
            txt_ids=torch.zeros(batch["text"].shape[1], 3),
            img_ids=ChromaPipeline._prepare_latent_image_ids(1, height // 2, width // 2, torch.device("cpu"), torch.float32),
            attention_mask=torch.cat([known, torch.ones(tokens, dtype=torch.bool)])[None],
            return_dict=False,
        )[0]
        predicted = ChromaPipeline._unpack_latents(out, height * 8, width * 8, vae_scale_factor=8)
        errors.append(torch.mean((predicted.float() - (noise[own] - clean).float()) ** 2))
    return torch.stack(errors).mean()


COMFYUI = [
    *(f"double_blocks.0.{s}_{n}" for s in ("img", "txt") for n in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")),
    "single_blocks.0.linear1",
    "single_blocks.0.linear2",
]
