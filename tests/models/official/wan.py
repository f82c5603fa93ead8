"""Wan2.1 text to video: rectified flow on 5-D latents, timesteps in thousandths, as WanPipeline samples."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn


def loss(module: nn.Module, folder: Path, batch: dict[str, Tensor], noise: Tensor, t: Tensor) -> Tensor:
    clean = batch["latents"]
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.timesteps, scheduler.sigmas = 1000 * t, t
    noisy = torch.cat([scheduler.scale_noise(clean[i : i + 1], 1000 * t[i : i + 1], noise[i : i + 1]) for i in range(len(clean))])
    out = module(hidden_states=noisy, timestep=1000 * t, encoder_hidden_states=batch["text"], return_dict=False)[0]
    return torch.nn.functional.mse_loss(out.float(), (noise - clean).float())


COMFYUI = [
    *(f"blocks.0.{attention}.{name}" for attention in ("self_attn", "cross_attn") for name in "qkvo"),
    "blocks.0.ffn.0",
    "blocks.0.ffn.2",
]
