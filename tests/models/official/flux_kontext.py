"""Flux.1 Kontext: Flux whose tokens are followed by those of the picture before the edit, as FluxKontextPipeline has it."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline
from torch import Tensor, nn

from tests.models.official.flux import COMFYUI as COMFYUI


def loss(module: nn.Module, folder: Path, batch: dict[str, Tensor], noise: Tensor, t: Tensor) -> Tensor:
    clean, shown = batch["latents"], batch["control_latents"]
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler", use_dynamic_shifting=False, shift=1.0)
    scheduler.timesteps, scheduler.sigmas = t * scheduler.config["num_train_timesteps"], t
    noisy = torch.cat(
        [scheduler.scale_noise(clean[i : i + 1], scheduler.timesteps[i : i + 1], noise[i : i + 1]) for i in range(len(clean))]
    )
    count, channels, height, width = clean.shape
    latents = FluxKontextPipeline._pack_latents(noisy, count, channels, height, width)
    ids = FluxKontextPipeline._prepare_latent_image_ids(count, height // 2, width // 2, torch.device("cpu"), torch.float32)
    shown_ids = ids.clone()
    shown_ids[..., 0] = 1
    out = module(
        hidden_states=torch.cat([latents, FluxKontextPipeline._pack_latents(shown, count, channels, height, width)], dim=1),
        timestep=scheduler.timesteps / 1000,
        guidance=torch.ones(count),
        pooled_projections=batch["pooled"],
        encoder_hidden_states=batch["text"],
        txt_ids=torch.zeros(batch["text"].shape[1], 3),
        img_ids=torch.cat([ids, shown_ids], dim=0),
        return_dict=False,
    )[0][:, : latents.size(1)]
    predicted = FluxKontextPipeline._unpack_latents(out, height * 8, width * 8, vae_scale_factor=8)
    return torch.mean((predicted.float() - (noise - clean).float()) ** 2)
