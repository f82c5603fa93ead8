"""Flux.1: rectified flow on packed latents, as diffusers' train_dreambooth_lora_flux.py and FluxPipeline have it."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import Tensor, nn


def loss(module: nn.Module, folder: Path, batch: dict[str, Tensor], noise: Tensor, t: Tensor) -> Tensor:
    clean = batch["latents"]
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler", use_dynamic_shifting=False, shift=1.0)
    scheduler.timesteps, scheduler.sigmas = t * scheduler.config["num_train_timesteps"], t
    noisy = torch.cat(
        [scheduler.scale_noise(clean[i : i + 1], scheduler.timesteps[i : i + 1], noise[i : i + 1]) for i in range(len(clean))]
    )
    count, channels, height, width = clean.shape
    out = module(
        hidden_states=FluxPipeline._pack_latents(noisy, count, channels, height, width),
        timestep=scheduler.timesteps / 1000,
        guidance=torch.ones(count),
        pooled_projections=batch["pooled"],
        encoder_hidden_states=batch["text"],
        txt_ids=torch.zeros(batch["text"].shape[1], 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(count, height // 2, width // 2, torch.device("cpu"), torch.float32),
        return_dict=False,
    )[0]
    predicted = FluxPipeline._unpack_latents(out, height * 8, width * 8, vae_scale_factor=8)
    return torch.mean((predicted.float() - (noise - clean).float()) ** 2)


COMFYUI = [
    *(f"double_blocks.0.{s}_{n}" for s in ("img", "txt") for n in ("mod.lin", "attn.qkv", "attn.proj", "mlp.0", "mlp.2")),
    "single_blocks.0.linear1",
    "single_blocks.0.linear2",
    "single_blocks.0.modulation.lin",
]
