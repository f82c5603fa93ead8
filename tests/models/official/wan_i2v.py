"""Wan2.1 image to video: rectified flow beside a mask of known frames and their latents, as wan/image2video.py joins them."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn


def loss(module: nn.Module, folder: Path, batch: dict[str, Tensor], noise: Tensor, t: Tensor) -> Tensor:
    clean = batch["latents"]
    count, _, latent_frames, height, width = clean.shape
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.timesteps, scheduler.sigmas = 1000 * t, t
    noisy = torch.cat([scheduler.scale_noise(clean[i : i + 1], 1000 * t[i : i + 1], noise[i : i + 1]) for i in range(count)])
    # One value a frame, the first four times, so that four make a latent frame.
    known = torch.tensor([1.0] * 4 + [0.0] * 4 * (latent_frames - 1)).view(latent_frames, 4).T
    mask = known[None, :, :, None, None].expand(count, 4, latent_frames, height, width)
    out = module(
        hidden_states=torch.cat([noisy, mask, batch["condition"]], dim=1),
        timestep=1000 * t,
        encoder_hidden_states=batch["text"],
        encoder_hidden_states_image=batch["image"],
        return_dict=False,
    )[0]
    return torch.nn.functional.mse_loss(out.float(), (noise - clean).float())


COMFYUI = [
    *(f"blocks.0.{attention}.{name}" for attention in ("self_attn", "cross_attn") for name in "qkvo"),
    "blocks.0.cross_attn.k_img",
    "blocks.0.cross_attn.v_img",
    "blocks.0.ffn.0",
    "blocks.0.ffn.2",
]
