"""Lumina Image 2.0: its transport, as Lumina2Pipeline has it: the model's time is 1 in the picture, and its output points there."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn


def loss(module: nn.Module, folder: Path, batch: dict[str, Tensor], noise: Tensor, t: Tensor) -> Tensor:
    clean = batch["latents"]
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler", shift=1.0)
    steps = scheduler.config["num_train_timesteps"]
    scheduler.timesteps, scheduler.sigmas = t * steps, t
    noisy = torch.cat(
        [scheduler.scale_noise(clean[i : i + 1], scheduler.timesteps[i : i + 1], noise[i : i + 1]) for i in range(len(clean))]
    )
    out = module(
        hidden_states=noisy,
        timestep=1 - scheduler.timesteps / steps,
        encoder_hidden_states=batch["text"],
        encoder_attention_mask=batch["text_mask"],
        return_dict=False,
    )[0]
    velocity = -out  # what the scheduler steps along
    return torch.nn.functional.mse_loss(velocity.float(), (noise - clean).float())


COMFYUI = [
    f"{block}.0.{name}"
    for block in ("layers", "noise_refiner", "context_refiner")
    for name in ("attention.qkv", "attention.out", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.1")
    if (block, name) != ("context_refiner", "adaLN_modulation.1")
]
